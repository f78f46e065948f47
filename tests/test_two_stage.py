"""What a gate and tiles of several scales must keep to beyond the lesson: no look into the next block, training on shares, a gated map that was broken off."""
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import torch
from rasterio.transform import Affine

from geolab.core import DataError
from geolab.data.augment import Augment
from geolab.data.raster import fit_band_scale, open_scenes, read_window, write_geotiff
from geolab.data.tiles import TileDataset, tile_index
from geolab.evaluation.scores import ScoreHistogram
from geolab.inference.two_stage import GatedScores, choose_two_stage, gate_area, open_gates, predict_gated
from geolab.nn.losses import build_loss
from geolab.training.fit import FitConfig, fit

GRID = dict(crs="EPSG:32608", transform=Affine(3, 0, 500_000, 0, -3, 7_700_000))


@pytest.fixture
def scene(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.normal(100, 10, (2, 160, 200)).astype(np.float32)
    image[:, :20], image[:, 120:], image[:, :, :30], image[:, :, 150:] = (1e6,)*4  # all but the block
    write_geotiff(tmp_path/"image.tif", image, **GRID, bands=["red", "nir"])
    r, c = rng.uniform(25, 115, 15), rng.uniform(35, 145, 15)
    spots = gpd.GeoDataFrame(geometry=shapely.buffer(shapely.points(500_000 + 3*c, 7_700_000 - 3*r), 9), crs="EPSG:32608")
    scenes, _ = open_scenes(tmp_path/"image.tif", spots)
    block = pd.DataFrame([dict(block="b", scene="image", part="train", row0=20, row1=120, col0=30, col1=150)])
    tiles = tile_index(scenes, block, 32)
    return scenes, tiles, fit_band_scale(scenes, tiles[["scene", "row", "col", "height", "width"]].itertuples(index=False))


@pytest.mark.parametrize("scales", [(.5, 1, 2), (3.3,), (8,), (.25,)])
def test_no_scale_looks_out_of_the_block(scene, scales):
    scenes, tiles, scale = scene
    data = TileDataset(scenes, tiles, scale, scales=scales, jitter=10)
    for epoch in range(5):
        data.set_epoch(epoch)
        for i, sample in enumerate(data):
            assert sample["image"].abs().max() < 10  # deviations; the next block is 10,000 away
            assert sample["valid"].any() and sample["scale"] in scales
            assert not tiles.positive.iloc[i] or sample["mask"].any()


def test_shares_keep_the_area(scene):
    scenes, tiles, scale = scene
    for s in (2, 4):
        data = TileDataset(scenes, tiles, scale, scales=(s,))
        for i, sample in enumerate(data):
            t = tiles.iloc[i]
            least = scenes[0].read_mask(t.row, t.col, t.height, t.width)[0].sum()  # the window holds the tile
            kept = s*s*sample["mask"].sum().item()
            assert kept >= least - 1e-3 and abs(kept - round(kept)) < 1e-2 or not sample["valid"].all()


def test_a_network_trains_on_mixed_scales(scene, tmp_path):
    scenes, tiles, scale = scene
    train = TileDataset(scenes, tiles, scale, scales=(.5, 1, 2), jitter=True, augment=Augment(None), seed=1)
    val = TileDataset(scenes, tiles, scale, own=True)
    torch.manual_seed(0)
    network = torch.nn.Conv2d(2, 1, 3, padding=1)
    result = fit(network, build_loss("focal"), train, val, FitConfig(max_epochs=2, steps_per_epoch=3, batch_size=4, early_stopping_metric="val_loss"), out=tmp_path/"run", seed=0)
    assert np.isfinite(result.best_metric)


def test_a_gated_map_that_broke_off_is_continued(scene, tmp_path):
    scenes, tiles, scale = scene
    gate = write_geotiff(tmp_path/"gates"/"image.tif", np.add.outer(np.arange(160.), np.arange(200.)).astype(np.float32), **GRID)

    class Run: tile_size, calibrator = 32, None
    Run.scale, Run.model, left = scale, torch.nn.Conv2d(2, 1, 3, padding=1), [6]
    image, how = scenes[0].info.path, dict(output="logit", progress=False)
    whole = read_window(predict_gated(Run, image, tmp_path/"whole.tif", gate, 100, **how), 0, 0, 160, 200)

    def stop(*_):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
    hook = Run.model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt): predict_gated(Run, image, tmp_path/"map.tif", gate, 100, **how)
    hook.remove()
    assert not (tmp_path/"map.tif").exists()
    again = read_window(predict_gated(Run, image, tmp_path/"map.tif", gate, 100, **how), 0, 0, 160, 200)
    assert (again[1] == whole[1]).all() and (again[0] == whole[0]).all()


def test_open_ground_is_the_same_by_pixel_and_by_polygon(tmp_path):
    values = np.random.default_rng(1).random((120, 300)).astype(np.float32)
    values[values < .1] = np.nan
    gate, = open_gates([write_geotiff(tmp_path/"a.tif", np.zeros((120, 300), np.uint8), **GRID)], write_geotiff(tmp_path/"g.tif", values, **GRID, nodata=np.nan))
    assert abs(gate_area(gate, .6).area.sum() - 9*(values >= .6).sum()) < 1e-3


def test_nothing_is_certified_without_evidence():
    "Histograms without negatives, without empty tiles, with one block."
    def scores(blocks, target, prefix):
        b, n = len(blocks := [f"{prefix}{i}" for i in range(blocks)]), 50
        rng = np.random.default_rng(0)
        both = np.stack([rng.normal(size=(b, n)), rng.normal(size=(b, n))], 1).astype(np.float32)
        return GatedScores(blocks, [-1, 0], bins=100).update(torch.from_numpy(both), np.full((b, n), target), block=blocks)
    for cal, val in [((80, 1), (30, 1)), ((1, 1), (1, 1)), ((80, 0), (30, 1)), ((80, 1), (30, 0))]:
        for prevalence in (None, "1:100"):
            found = choose_two_stage(scores(*cal, "c"), .8, prevalence, val=scores(*val, "v"), max_loss=.5)
            assert not found.certified and found.reason
    assert isinstance(scores(3, 1, "c").at(None), ScoreHistogram)
    with pytest.raises(DataError, match="finite and increasing"): GatedScores(["a"], [])
