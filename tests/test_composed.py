"""Pyramid, views, ensemble, gate and CRF, each on top of the other: one map from windows, and from the whole scene at once."""
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from scipy import ndimage
from torch import nn

from geolab.data.raster import BandScale, read_window, write_geotiff
from geolab.evaluation.calibration import Calibrator
from geolab.inference.crf import crf_rim, crf_score, with_place
from geolab.inference.ensemble import Ensemble, combine_maps
from geolab.inference.rows import receptive_field
from geolab.inference.tta import D4, pyramid_score, tta_score
from geolab.inference.two_stage import gate_area
from geolab.inference.windows import predict_windows

H, W, CUT = 192, 232, .5
UTM = dict(crs="EPSG:32608", transform=Affine(3, 0, 500_000, 0, -3, 7_700_000))
SCALE = BandScale(("red", "nir"), (0., 0.), (100., 100.), "float32", 3., 2)
CRF = dict(gaussian_sxy=1., gaussian_compat=.5, bilateral_sxy=1.5, bilateral_srgb=1., bilateral_compat=2., iterations=2, threads=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def member(seed):
    "A network at two scales, asked for eight views."
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1)).requires_grad_(False)
    pyramid = pyramid_score(network, (.5, 1.), multiple=2)
    return SimpleNamespace(views=tta_score(pyramid, D4), field=receptive_field(pyramid, 2, side=96, steps=8), alone=network)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A scene with a cloud, a gate that leaves some of it to be searched, two members, and the answer of the whole scene."
    folder, rng = tmp_path_factory.mktemp("composed"), np.random.default_rng(0)
    array = ((ndimage.gaussian_filter(rng.normal(size=(2, H, W)), (0, 3, 3))*8 + rng.normal(size=(2, H, W))*.7)*100).astype(np.float32)
    array[:, 100:130, 100:150] = -9999
    scene = write_geotiff(folder/"scene.tif", array, nodata=-9999, bands=["red", "nir"], **UTM)
    gate = write_geotiff(folder/"gate.tif", ((np.arange(W) >= 120) & (np.arange(H)[:, None] < 150)).astype(np.float32)[None], nodata=np.nan, **UTM)
    members = {name: member(seed) for seed, name in enumerate("ab")}
    ensemble = Ensemble(dict(a=.7, b=.3), dict(a=Calibrator(2., .1), b=Calibrator()))
    def together(x): return torch.from_numpy(ensemble.combine({n: m.views(x)[:, 0].numpy() for n, m in members.items()})["logits"]).float()[:, None]
    def read(*window):
        image, valid = read_window(scene, *window)
        return SCALE.apply(image, valid), valid
    smooth = crf_score(together, place=True, **CRF)
    image, valid = with_place(read)(0, 0, H, W)
    z = smooth(torch.from_numpy(image)[None])[0, 0].numpy()
    wanted = valid & (read_window(gate, 0, 0, H, W)[0][0] >= CUT)
    return SimpleNamespace(folder=folder, scene=scene, area=gate_area(gate, CUT), members=members, ensemble=ensemble, together=together, read=read, smooth=smooth, image=torch.from_numpy(image), z=z, wanted=wanted,
                           sees=max(m.field.radius for m in members.values()), step=max(m.field.step for m in members.values()))


def draw(score, world, name, **kwargs):
    "Logits of a map, and where it has any."
    path = predict_windows(score, world.scene, world.folder/name, **dict(read=with_place(world.read), aoi=world.area, multiple=world.step, overwrite=True, progress=False) | kwargs)
    with rasterio.open(path) as f: z = f.read(1)
    return z, np.isfinite(z)


def test_every_part_changes_the_map(world):
    "Otherwise equality would say little."
    x = world.image[None, :2]
    one, views, both = (np.asarray(score(x))[0, 0] for score in (world.members["a"].alone, world.members["a"].views, world.together))
    for before, after in ((one, views), (views, both), (both, world.z)): assert abs(before - after)[world.wanted].mean() > .01
    assert ((both > 0) != (world.z > 0))[world.wanted].mean() > .01
    assert .2 < world.wanted.mean() < .6 and world.step == 2


@pytest.mark.parametrize("more", [20, 44])
def test_windows_say_what_the_whole_says(world, more):
    "With a halo of all that is seen the map is exact up to rounding, with any windows; closed windows are never asked."
    halo, asked = world.sees + crf_rim(exact=True, **CRF), []
    def counted(x): asked.append(x); return world.smooth(x)
    tile = 4*-(-halo//2) + more  # a multiple of 4, so that half a window is whole pixels
    z, drawn = draw(counted, world, "exact.tif", tile=tile, halo=halo)
    assert (drawn == world.wanted).all()
    assert abs(z - world.z)[drawn].max() < 1e-3 and ((z > 0) == (world.z > 0))[drawn].all()
    everywhere = []
    def counted_too(x): everywhere.append(x); return world.members["a"].alone(x[:, :2])
    draw(counted_too, world, "all.tif", tile=tile, halo=halo, aoi=None)
    assert 1 < len(asked) < len(everywhere)


def test_one_reach_is_enough_for_the_classes(world):
    halo = world.sees + crf_rim(**CRF)
    z, drawn = draw(world.smooth, world, "reach.tif", tile=64, halo=halo)
    assert (drawn == world.wanted).all()
    assert abs(np.tanh(z/2) - np.tanh(world.z/2))[drawn].max()/2 < .01 and ((z > 0) == (world.z > 0))[drawn].mean() > .9999


def test_map_upon_map_says_the_same(world):
    "The members drawn one by one, joined as maps, and smoothed from the joined map."
    maps = {n: world.folder/f"{n}.tif" for n in world.members}
    for n, m in world.members.items(): draw(lambda x: m.views(x[:, :2]), world, maps[n].name, tile=64, halo=world.sees, aoi=None)
    both = combine_maps(world.ensemble, maps, world.folder/"both.tif", output="logit", tile=56, progress=False)
    def read(*window):
        (image, valid), (z, known) = world.read(*window), read_window(both, *window)
        return np.concatenate([image, z]), valid & known
    z, drawn = draw(crf_score(lambda x: x[:, 2:], bands=[0, 1], place=True, **CRF), world, "twice.tif", read=with_place(read), tile=64, halo=crf_rim(exact=True, **CRF), multiple=1)
    assert (drawn == world.wanted).all()
    assert abs(z - world.z)[drawn].max() < 1e-3 and ((z > 0) == (world.z > 0))[drawn].all()
