"""Maps window by window: every size, odd places on Earth, bad input, full disks, and what is built on top."""
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import rasterio.shutil
import shapely
import torch
from affine import Affine
from scipy import ndimage
from torch import nn

from geolab.cli import main
from geolab.core import ConfigError, DataError, GeolabError, RunError, write_json
from geolab.data.raster import BandScale, read_info, read_window, write_geotiff
from geolab.evaluation.calibration import Calibrator
from geolab.evaluation.thresholds import Threshold
from geolab.inference.accounts import PolygonWatch
from geolab.inference.crf import crf_score
from geolab.inference.drafts import Layer, cog_faults, read_values
from geolab.inference.ensemble import Ensemble, combine_maps
from geolab.inference.gate import block_background
from geolab.inference.rows import WindowSource, plan_windows, receptive_field, score_row
from geolab.inference.tta import D4, pyramid_score, tta_score
from geolab.inference.vectorize import polygonise, write_polygons
from geolab.inference.windows import predict_raster, predict_windows
from geolab.recipes.pipeline import outline_maps
from geolab.training.runs import BUILDERS, Run, StageLog, save_model

UTM = dict(crs="EPSG:32608", transform=Affine(3, 0, 500_000, 0, -3, 7_700_000))


def identity(x): return x[:, :1]


def draw(score, src, dst, **kwargs):
    with rasterio.open(predict_windows(score, src, dst, progress=False, **dict(overwrite=True) | kwargs)) as f: return f.read(1)


def noise(path, shape=(2, 71, 103), *, seed=0, bands=("red", "nir"), dtype="float32", nodata=-9999, **place):
    array = np.random.default_rng(seed).normal(size=shape)*100
    return write_geotiff(path, array.astype(dtype), nodata=nodata, bands=list(bands), **UTM | place)


@pytest.fixture
def scene(tmp_path): return noise(tmp_path/"scene.tif")


@pytest.fixture
def run(scene):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
    return SimpleNamespace(model=model, scale=BandScale(("red", "nir"), (0., 0.), (100., 100.), "float32", 3., 2), calibrator=Calibrator(1.5, -.2), threshold=.1, thresholds={}, tile_size=32)


def test_identity_returns_the_raster_for_every_size_and_overlap():
    "One pixel to three windows and odd remainders, at overlaps of 0 to 75 %, blended, cropped, and on a coarser grid."
    values, n = np.random.default_rng(0).normal(size=(1, 25, 51)).astype(np.float32), 0
    grid = SimpleNamespace(width=None, path="memory")
    for height in range(1, 25):
        width = 2*height + 1
        grid.width = width
        def read(row, col, h, w):
            image, valid = np.zeros((1, h, w), np.float32), np.zeros((h, w), bool)
            part = values[:, row:min(row + h, height), col:min(col + w, width)]
            image[:, :part.shape[1], :part.shape[2]], valid[:part.shape[1], :part.shape[2]] = part, True
            return image, valid
        for settings in [*(dict(overlap=o) for o in (0, .25, .5, .75)), dict(halo=3), dict(halo=1, multiple=2)]:
            source = WindowSource(grid, plan_windows(height, width, 8, **settings), read=read)
            total, carry = np.full((height, width), np.nan, np.float32), np.zeros((0, 1, width), np.float32)
            for k, row in enumerate(source.plan.rows):
                logits, wanted = score_row(identity, source, k)
                logits[:len(carry)] += carry
                m = source.plan.band(k)
                total[row:row + m] = np.where(wanted[:m], logits[:m, 0], np.nan)
                carry = logits[m:]
            np.testing.assert_allclose(total, values[0, :height, :width], rtol=1e-5, atol=1e-6)
            n += 1
    assert n == 144


def test_nodata_never_leaks_beyond_the_receptive_field(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 3, padding=1))
    field = receptive_field(network, 1, side=64)
    array = np.random.default_rng(0).normal(size=(1, 90, 110)).astype(np.float32)
    holed = array.copy(); holed[:, 40:50, 60:64] = np.nan; holed[:, 0, 0] = np.inf
    whole, made = (draw(network, write_geotiff(tmp_path/f"{i}.tif", x, nodata=-9999, **UTM), tmp_path/f"m{i}.tif", tile=32, halo=field.radius, multiple=field.step) for i, x in enumerate((array, holed)))
    hole = ~np.isfinite(holed[0])
    assert np.isnan(made[hole]).all() and not np.isnan(made[~hole]).any()
    near = ndimage.binary_dilation(hole, np.ones((2*field.radius + 1,)*2))
    assert (made == whole)[~near].all() and (made != whole)[near & ~hole].any()


def test_a_mosaic_gives_the_bytes_of_one_raster(tmp_path, scene):
    with rasterio.open(scene) as f: array = f.read()
    for i, (row, col) in enumerate([(0, 0), (0, 50), (33, 0), (33, 50)]):
        part = array[:, row:row + (33 if row == 0 else 38), col:col + (50 if col == 0 else 53)]
        write_geotiff(tmp_path/f"part{i}.tif", part, crs=UTM["crs"], transform=Affine(3, 0, 500_000 + 3*col, 0, -3, 7_700_000 - 3*row), nodata=-9999)
    sources = lambda band: "".join(f'<ComplexSource><SourceFilename relativeToVRT="1">part{i}.tif</SourceFilename><SourceBand>{band}</SourceBand><SrcRect xOff="0" yOff="0" xSize="{w}" ySize="{h}"/><DstRect xOff="{x}" yOff="{y}" xSize="{w}" ySize="{h}"/><NODATA>-9999</NODATA></ComplexSource>'
        for i, (y, x, h, w) in enumerate([(0, 0, 33, 50), (0, 50, 33, 53), (33, 0, 38, 50), (33, 50, 38, 53)]))
    with rasterio.open(scene) as f: crs, transform = f.crs.to_wkt(), ", ".join(map(repr, f.transform.to_gdal()))
    (tmp_path/"mosaic.vrt").write_text(f'<VRTDataset rasterXSize="103" rasterYSize="71"><SRS>{crs}</SRS><GeoTransform>{transform}</GeoTransform>'
        + "".join(f'<VRTRasterBand dataType="Float32" band="{b}"><Description>{name}</Description><NoDataValue>-9999</NoDataValue>{sources(b)}</VRTRasterBand>' for b, name in [(1, "red"), (2, "nir")]) + "</VRTDataset>")
    conv = nn.Conv2d(2, 1, 3, padding=1)
    draw(conv, scene, tmp_path/"one.tif", tile=32, overlap=.5); draw(conv, tmp_path/"mosaic.vrt", tmp_path/"many.tif", tile=32, overlap=.5)
    assert (tmp_path/"one.tif").read_bytes() == (tmp_path/"many.tif").read_bytes()
    stamp = WindowSource(read_info(tmp_path/"mosaic.vrt"), plan_windows(71, 103, 32)).stamp
    before = stamp()
    os.utime(tmp_path/"part2.tif", ns=(0, 0))
    assert len(before) == 15 and stamp() != before                       # a part of the mosaic was changed: its map is another one


def test_across_the_date_line_and_over_the_pole(tmp_path):
    "Windows lie on the grid of the raster, so nothing happens there: the map has its values, CRS and transform; areas of interest in longitude and latitude find their place."
    lonlat = dict(crs="EPSG:4326", transform=Affine(.05, 0, 178.03, 0, -.02, 66.01)) # 178.03 to 183.18 degrees east
    x, y = rasterio.warp.transform("EPSG:4326", "EPSG:32660", [180.], [66.])
    utm60 = dict(crs="EPSG:32660", transform=Affine(30.25, 0, x[0] - 1500.1, 0, -30.25, y[0] + 1000 + 1/3))
    polar = dict(crs="EPSG:3413", transform=Affine(1000.5, 0, -51_500.3, 0, -1000.5, 35_700.7)) # the pole is in the middle
    places = dict(lonlat=(lonlat, shapely.box(-179.9, 60, -178, 70)), utm60=(utm60, shapely.box(-180, 60, -179, 70)), polar=(polar, shapely.box(-180, 89.8, 180, 90)))
    for name, (place, area) in places.items():
        path = noise(tmp_path/f"{name}.tif", **place)
        truth = read_window(path, 0, 0, 71, 103)[0][0]
        got = draw(identity, path, tmp_path/"map.tif", tile=32, overlap=.5)
        np.testing.assert_allclose(got, truth, rtol=1e-5, atol=1e-4)
        with rasterio.open(path) as a, rasterio.open(tmp_path/"map.tif") as b: assert (a.crs, a.transform, a.shape) == (b.crs, b.transform, b.shape)
        some = ~np.isnan(draw(identity, path, tmp_path/"map.tif", tile=32, aoi=gpd.GeoDataFrame(geometry=[area], crs=4326)))
        rows, cols = np.mgrid[:71, :103]
        t = place["transform"]
        x, y = (t.c + t.a*(cols + .5)).ravel(), (t.f + t.e*(rows + .5)).ravel()
        lon, lat = (np.array(v).reshape(71, 103) for v in rasterio.warp.transform(place["crs"], "EPSG:4326", x, y))
        lon = np.where(lon > 180, lon - 360, lon)
        want = shapely.contains_xy(area, lon, lat)
        assert 0 < want.sum() < want.size and (some != want).mean() < .01, name
        polygons = polygonise(tmp_path/"map.tif", 150)
        back = gpd.read_file(write_polygons(polygons, tmp_path, name, [".geojson"])[0])
        assert len(back) == len(polygons) and (back.total_bounds[[0, 2]] >= -180).all() and (back.total_bounds[[0, 2]] <= 180).all()


def test_south_up_and_feet(tmp_path):
    for place in [dict(transform=Affine(3, 0, 500_000, 0, 3, 7_700_000)), dict(crs="EPSG:2263", transform=Affine(10, 0, 1e6, 0, -10, 2e5))]:
        path = noise(tmp_path/"odd.tif", **place)
        np.testing.assert_allclose(draw(identity, path, tmp_path/"map.tif", tile=20), read_window(path, 0, 0, 71, 103)[0][0], rtol=1e-5, atol=1e-4)
        with rasterio.open(path) as a, rasterio.open(tmp_path/"map.tif") as b: assert (a.crs, a.transform) == (b.crs, b.transform)


# ---- outputs of a run

def test_probability_and_class_in_one_pass(tmp_path, run, scene):
    predict_raster(run, scene, tmp_path/"z.tif", output="logit", progress=False)
    z = read_window(tmp_path/"z.tif", 0, 0, 71, 103)[0][0]
    for dtype, bound in [("float32", 1e-6), ("float16", 2**-12), ("uint8", 1/508 + 1e-6), ("uint16", 1/131068 + 1e-6)]:
        predict_raster(run, scene, tmp_path/f"{dtype}.tif", classes=tmp_path/f"{dtype}_class.tif", dtype=dtype, progress=False)
        (p,), valid = read_values(read_info(tmp_path/f"{dtype}.tif"), 0, 0, 71, 103)
        assert valid.all() and abs(p - run.calibrator.probability(z)).max() <= bound
        assert (read_window(tmp_path/f"{dtype}_class.tif", 0, 0, 71, 103)[0][0] == (z >= .1)).all()
        assert cog_faults(tmp_path/f"{dtype}.tif") == cog_faults(tmp_path/f"{dtype}_class.tif") == []
    for kwargs, match in [(dict(output="class"), "a second file"), (dict(threshold=1., classes=None), "belongs to")]:
        with pytest.raises(ConfigError, match=match): predict_raster(run, scene, tmp_path/"x.tif", **dict(classes=tmp_path/"y.tif") | kwargs)


def test_polygons_in_the_same_pass(tmp_path, run, scene):
    threshold = float(np.quantile(read_window(predict_raster(run, scene, tmp_path/"p.tif", progress=False), 0, 0, 71, 103)[0], .8))
    for dtype in ("float32", "uint8"):
        watch = PolygonWatch(read_info(scene), threshold, tmp_path, dtype, suffixes=[".parquet", ".gpkg", ".geojson"], block_size=40)
        predict_raster(run, scene, tmp_path/f"{dtype}.tif", dtype=dtype, progress=False, watch=[watch])
        want = polygonise(tmp_path/f"{dtype}.tif", threshold, block_size=40)
        for path in watch.paths:
            got = (gpd.read_parquet(path) if path.suffix == ".parquet" else gpd.read_file(path)).sort_values("id", ignore_index=True)
            assert len(got) == len(want) > 10
            for column in ("id", "pixels", "block"): assert got[column].tolist() == want[column].tolist()
            for column in ("area_m2", "mean_probability", "max_probability", "certainty"): np.testing.assert_allclose(got[column], want[column], rtol=1e-12)
            assert got.crs == (4326 if path.suffix == ".geojson" else want.crs)
            if path.suffix != ".geojson": assert got.geometry.geom_equals_exact(want.geometry, 0).all()


# ---- what composes with windows: all through the same door

def test_views_scales_crf_and_ensemble_go_through_the_same_windows(tmp_path, scene):
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))
    image = torch.from_numpy(read_window(scene, 0, 0, 71, 103)[0])[None]/100
    scale = dict(scale=BandScale(("red", "nir"), (0., 0.), (100., 100.), "float32", 3., 2))
    @torch.no_grad()
    def whole(score): return score(image)[0, 0].numpy()
    views = tta_score(conv, D4)
    assert abs(draw(views, scene, tmp_path/"tta.tif", tile=24, halo=2, **scale) - whole(views)).max() < 1e-5
    assert abs(draw(conv, scene, tmp_path/"one.tif", tile=24, halo=2, **scale) - whole(views)).max() > 1e-2 # the views do count
    pyramid = pyramid_score(conv, (.5, 1.), multiple=2)
    field = receptive_field(pyramid, 2, side=96, steps=8)
    image = torch.nn.functional.pad(image, (0, 1, 0, 1)) # an even raster, so that half of it is the same pixels
    assert abs(draw(pyramid, scene, tmp_path/"pyramid.tif", tile=64, halo=field.radius, multiple=2, **scale) - whole(pyramid)[:71, :103])[:60, :90].max() < 1e-4
    for name, network in dict(a=conv, b=nn.Conv2d(2, 1, 1)).items(): draw(network, scene, tmp_path/f"{name}.tif", tile=24, halo=2, **scale)
    members = {n: tmp_path/f"{n}.tif" for n in "ab"}
    ensemble = Ensemble(dict(a=.7, b=.3), dict(a=Calibrator(), b=Calibrator()))
    combine_maps(ensemble, members, tmp_path/"both.tif", output="logit", tile=32, progress=False)
    z = {n: read_window(p, 0, 0, 71, 103)[0][0] for n, p in members.items()}
    np.testing.assert_allclose(read_window(tmp_path/"both.tif", 0, 0, 71, 103)[0][0], ensemble.combine(z)["logits"], rtol=1e-5, atol=1e-5)


def test_a_crf_streams_with_a_rim(tmp_path):
    "One window is the whole scene, to the bit; smaller ones come close as their rim grows, since the kernels fade."
    rng = np.random.default_rng(0)
    truth = np.sign(ndimage.gaussian_filter(rng.normal(size=(96, 128)), 6))
    array = np.stack([truth + rng.normal(size=truth.shape)*.2, truth*.5 + rng.normal(size=truth.shape)]).astype(np.float32)
    path = write_geotiff(tmp_path/"scene.tif", array, **UTM)
    smooth = crf_score(lambda x: x[:, 1:], bands=[0], gaussian_sxy=2., bilateral_sxy=5., bilateral_srgb=.5, gaussian_compat=.3, bilateral_compat=.6, iterations=5)
    want = smooth(torch.from_numpy(array)[None])[0, 0].numpy()
    assert ((want > 0) != (array[1] > 0)).mean() > .05
    assert (draw(smooth, path, tmp_path/"map.tif", tile=128, halo=0) == want).all()
    gaps = {}
    for tile, halo in [(32, 0), (42, 5), (62, 15)]:
        z = draw(smooth, path, tmp_path/"map.tif", tile=tile, halo=halo)
        gaps[halo] = np.tanh(abs(z - want)/2).mean()
        assert halo == 0 or ((z > 0) == (want > 0)).mean() > .998
    assert gaps[0] > 2*gaps[5] > 2*gaps[15] > 0


def test_the_gate_reads_maps_in_whole_numbers(tmp_path, run, scene):
    "The background of every block is the same share of pixels, up to those within a rounding step of the level."
    tables = []
    for dtype in ("float32", "uint16"):
        predict_raster(run, scene, tmp_path/f"{dtype}.tif", dtype=dtype, progress=False)
        tables.append(block_background(tmp_path/f"{dtype}.tif", .3, 32, run.calibrator))
    assert len(tables[0]) == 6 and 0 < tables[0].background.mean() < 1
    np.testing.assert_allclose(tables[1].background, tables[0].background, atol=2e-3)


# ---- bad input

def never(x): raise AssertionError("the network was called")


def refuse(run, error, match, src, dst, **kwargs):
    beside = sorted(Path(dst).parent.iterdir()) if Path(dst).parent.is_dir() else None
    run.model = SimpleNamespace(parameters=lambda: iter(()), modules=lambda: [], state_dict=dict, eval=lambda: SimpleNamespace(to=lambda *a, **k: None), to=lambda *a: None)
    with pytest.raises(error, match=match): predict_raster(run, src, dst, progress=False, **kwargs)
    if beside is not None: assert sorted(Path(dst).parent.iterdir()) == beside, "something was left"


def test_rasters_of_another_kind(tmp_path, run, scene):
    def no(match, path): refuse(run, DataError, match, path, tmp_path/"map.tif")
    no("bands nir are missing", noise(tmp_path/"a.tif", (2, 40, 40), bands=("red", "green")))
    no("bands nir are missing", noise(tmp_path/"b.tif", (1, 40, 40), bands=("red",)))
    no("2 bands expected, got 3", noise(tmp_path/"c.tif", (3, 40, 40), bands=("band_1", "band_2", "band_3")))
    no("number type float32 expected, got int16", noise(tmp_path/"d.tif", dtype="int16"))
    no("pixels of 3 m expected, got 10", noise(tmp_path/"e.tif", transform=Affine(10, 0, 0, 0, -10, 0)))
    no("no CRS", noise(tmp_path/"f.tif", crs=None))
    no("rotated", noise(tmp_path/"g.tif", transform=Affine(3, .5, 500_000, .5, -3, 7_700_000)))
    (tmp_path/"empty.tif").touch()
    no("cannot read .*empty.tif", tmp_path/"empty.tif")
    whole = scene.read_bytes()
    for share in (.1, .5, .99):
        (tmp_path/"cut.tif").write_bytes(whole[:int(share*len(whole))])
        no("cut.tif", tmp_path/"cut.tif")
    no("is missing", tmp_path/"none.tif")
    no("bands nir are missing|number type", write_geotiff(tmp_path/"eight.tif", np.zeros((2, 9, 9), np.uint8), bands=["red", "nir"], **UTM))


def test_bands_in_another_order_are_found_by_name(tmp_path, run, scene):
    with rasterio.open(scene) as f: array = f.read()
    write_geotiff(tmp_path/"turned.tif", array[::-1], nodata=-9999, bands=["nir", "red"], **UTM)
    a, b = (read_window(predict_raster(run, src, tmp_path/f"m{i}.tif", progress=False), 0, 0, 71, 103)[0] for i, src in enumerate([scene, tmp_path/"turned.tif"]))
    assert (a == b).all()


def test_destinations(tmp_path, run, scene):
    (tmp_path/"there.tif").touch(); (tmp_path/"dir.tif").mkdir(); os.link(scene, tmp_path/"same.tif")
    refuse(run, ConfigError, "exists; choose another name or ask for", scene, tmp_path/"there.tif")
    refuse(run, ConfigError, "exists", scene, tmp_path/"dir.tif", overwrite=True)
    refuse(run, ConfigError, "both source and destination", scene, scene, overwrite=True)
    refuse(run, ConfigError, "both source and destination", scene, tmp_path/"same.tif", overwrite=True)
    refuse(run, ConfigError, "ends in .tif", scene, tmp_path/"map.jp2")
    refuse(run, ConfigError, "cannot write into", scene, scene/"map.tif")
    refuse(run, ConfigError, "exists", scene, tmp_path/"new.tif", classes=tmp_path/"there.tif")


def test_a_folder_that_is_not_writable(run):
    "Root may write anywhere, so this test goes on as nobody."
    folder = Path(tempfile.mkdtemp()); folder.chmod(0o755)
    path = noise(folder/"scene.tif"); path.chmod(0o644); (folder/"locked").mkdir(); (folder/"locked").chmod(0o555)
    root = os.geteuid() == 0
    if root: os.seteuid(65534)
    try: refuse(run, ConfigError, "cannot write into .*[Pp]ermission denied", path, folder/"locked"/"map.tif")
    finally:
        if root: os.seteuid(0)
        shutil.rmtree(folder)


def test_no_space_before_the_first_window(tmp_path, run, scene, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=50_000))
    refuse(run, GeolabError, "no space left .*: needs about 1 MB, 0 MB are free", scene, tmp_path/"map.tif")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3*4*71*103 + 1000))  # enough for the map, not for the logits that a watcher wants kept
    refuse(run, GeolabError, "no space left", scene, tmp_path/"map.tif", watch=[SimpleNamespace(logits=True)])


@pytest.mark.parametrize("file", ["rows0", "map0.tif"])
def test_the_disk_runs_full_and_the_same_call_continues(tmp_path, scene, file):
    "The real error of a full disk, from the device that always is: while a band is written, and while GDAL writes the GeoTIFF."
    plan, calls, draft = plan_windows(71, 103, 32, overlap=.5), [], tmp_path/".map.tif.draft"
    def score(x):
        calls.append(1)
        if len(calls) == 2*len(plan.cols) + 1: # in the third row of windows
            if file == "rows0": (draft/file).rename(tmp_path/"kept")
            (draft/file).symlink_to("/dev/full")
        return identity(x)
    def draw(dst, score): return predict_windows(score, scene, tmp_path/dst, tile=32, overlap=.5, key="k", progress=False)
    with pytest.raises(GeolabError, match="cannot write .*map.tif: .*the same call continues"): draw("map.tif", score)
    assert not (tmp_path/"map.tif").exists() and len(plan.rows) > 3
    kept = len((draft/"journal").read_text().split()) - 1
    assert kept in (1, 2) if file == "rows0" else kept == len(plan.rows)
    (draft/file).unlink()
    if file == "rows0": (tmp_path/"kept").rename(draft/file)
    before = len(calls)
    assert draw("map.tif", score).read_bytes() == draw("straight.tif", identity).read_bytes()
    assert len(calls) - before == (len(plan.rows) - kept)*len(plan.cols)


def test_a_raster_that_changes_while_it_is_mapped(tmp_path, scene):
    def score(x): os.utime(scene, ns=(1, 1)); return identity(x)
    with pytest.raises(DataError, match="was changed while it was mapped"): predict_windows(score, scene, tmp_path/"map.tif", tile=32, progress=False)
    assert not (tmp_path/"map.tif").exists()


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A run folder with one convolution."
    monkeypatch.setitem(BUILDERS, "pair", lambda in_channels: nn.Conv2d(in_channels, 1, 3, padding=1))
    torch.manual_seed(0)
    home = tmp_path/"run"
    log = StageLog(home, "thaw_slump", ["train", "calibrate"])
    scale = BandScale(("red", "nir"), (0., 0.), (100., 100.), "float32", 3., 2)
    log.record("train", "k", save_model(home, BUILDERS["pair"](2), builder="pair", arguments=dict(in_channels=2), scale=scale, tile_size=32), 1)
    log.record("calibrate", "k", [write_json(home/"calibration.json", Calibrator().to_dict()),
        write_json(home/"threshold.json", {"chosen": "1:9", "1:9": Threshold(.2, Calibrator().probability(.2), .8, .1, "tile", certified=True, blocks=60, gate=dict(logit=.2, max_background=.256, blocks=60, block_size_px=32)).to_dict()})], 1)
    return home


def test_a_tampered_run_folder(tmp_path, home, scene):
    assert predict_raster(home, scene, tmp_path/"good.tif", progress=False).exists()
    for name in ("model.safetensors", "model.json", "calibration.json", "threshold.json"):
        kept = (home/name).read_bytes()
        (home/name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]) if name.endswith("tensors") else kept.replace(b"1", b"2", 1))
        with pytest.raises(RunError): predict_raster(home, scene, tmp_path/"map.tif", progress=False)
        (home/name).write_bytes(kept)
    (home/"model.safetensors").unlink()
    with pytest.raises(RunError): predict_raster(home, scene, tmp_path/"map.tif", progress=False)
    assert not (tmp_path/"map.tif").exists() and not list(tmp_path.glob(".map*"))


def test_the_command_line(tmp_path, home, scene, capsys):
    def geolab(*options):
        with pytest.raises(SystemExit) as stop: main(["predict", str(home), str(scene), str(tmp_path/"map.tif"), *map(str, options)])
        return stop.value.code, capsys.readouterr().err
    assert geolab("--probability", "--dtype", "uint8", "--classes", tmp_path/"class.tif", "--polygons")[0] == 0
    with rasterio.open(tmp_path/"map.tif") as f: assert (f.dtypes, f.descriptions, round(f.scales[0], 6)) == (("uint8",), ("probability",), round(1/254, 6))
    shown = read_window(tmp_path/"class.tif", 0, 0, 71, 103)[0][0]
    assert set(np.unique(shown)) == {0, 1}
    found = gpd.read_parquet(tmp_path/"map.parquet")
    assert abs(found.pixels.sum()/shown.sum() - 1) < .02 and found.certainty.between(0, 1).all()
    for options, match in [(["--probability", "--output", "class"], "give one of them"), (["--dtype", "int3"], "float32, float16, uint8 or uint16"), ([], "exists; choose another name")]:
        code, said = geolab(*options)
        assert code == 2 and match in said


def test_the_polygons_of_the_command_are_those_of_the_map_also_when_it_was_broken_off(tmp_path, home, scene, capsys, monkeypatch):
    "Beside each map: the files that `outline_maps` makes of the finished one, row by row, and nothing else."
    def geolab(name):
        with pytest.raises(SystemExit) as stop: main(["predict", str(home), str(scene), str(tmp_path/"maps"/name), "--polygons"])
        return stop.value.code, capsys.readouterr()
    def tables(folder, stem): return {s: gpd.read_parquet(folder/f"{stem}{s}.parquet") for s in ("", "_gate")} | {s + ".geojson": gpd.read_file(folder/f"{stem}{s}.geojson") for s in ("", "_gate")}
    said = geolab("map.tif")[1].out
    assert "blocks of the map are louder" in said and said.count("map_gate") == 2
    stop = [2]
    def breaks(*args, **kwargs):
        stop[0] -= 1
        if stop[0] < 0: raise GeolabError("no more rows")
        return score_row(*args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr("geolab.inference.windows.score_row", breaks)
        code, said = geolab("broken.tif")
    assert code == 2 and "no more rows" in said.err and not list((tmp_path/"maps").glob("broken*")) and (tmp_path/"maps"/".broken.tif.draft").exists()
    assert geolab("broken.tif")[0] == 0
    run = Run.load(home)
    for stem in ("map", "broken"):
        outline_maps({stem: tmp_path/"maps"/f"{stem}.tif"}, run.threshold, run.calibrator, tmp_path/"want", names=(stem, f"{stem}_gate"))
        want, got = tables(tmp_path/"want", stem), tables(tmp_path/"maps", stem)
        assert 0 < want[""].certified.sum() < len(want[""])
        for name, table in want.items():
            mine = got[name].sort_values("id", ignore_index=True) if "id" in table else got[name]
            assert set(mine.columns) == set(table.columns) and mine.crs == table.crs and mine.geometry.geom_equals_exact(table.geometry, 0).all()
            plain = table.drop(columns="geometry")
            pd.testing.assert_frame_equal(mine[plain.columns], plain, check_exact=True, check_dtype=False)
    assert sorted(p.name for p in (tmp_path/"maps").iterdir()) == sorted(f"{stem}{s}" for stem in ("map", "broken") for s in (".tif", ".parquet", ".geojson", "_gate.parquet", "_gate.geojson"))


def test_several_files_or_none(tmp_path, scene):
    "A second file is refused like the first one, before anything is computed."
    taken = write_geotiff(tmp_path/"taken.tif", np.zeros((3, 3)), **UTM)
    with pytest.raises(ConfigError, match="taken.tif exists"): predict_windows(never, scene, tmp_path/"map.tif", also=[Layer(taken)], progress=False)
    assert not (tmp_path/"map.tif").exists()
