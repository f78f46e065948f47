"Several modalities in one image: the map of a network that reads some of them does not depend on the others' bands."
import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from geolab.data.raster import BandScale
from geolab.inference.windows import predict_windows
from geolab.nn.fusion import GivenModalities, build_fusion_network

BANDS = ("B02", "B03", "B04", "B08", "VV", "VH")


def write(path, image):
    profile = dict(driver="GTiff", height=70, width=90, count=6, dtype="float32", crs="EPSG:32633", transform=from_origin(0, 0, 10, 10))
    with rasterio.open(path, "w", **profile) as dst:
        dst.write(image)
        dst.descriptions = BANDS
    return path


@pytest.mark.parametrize("mode", ["early", "late"])
def test_map_without_a_modality(tmp_path, mode):
    torch.manual_seed(0)
    network = build_fusion_network("unet", "tu-test_resnet", modalities=dict(S2=4, S1=2), mode=mode).eval()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if ".merge." in name or ".out." in name: p.normal_(std=.1)
    image = np.random.default_rng(0).random((6, 70, 90), dtype=np.float32)
    other = image.copy()
    other[4:] = 7
    scale = BandScale(BANDS, (.5,)*6, (.3,)*6, "float32", 10.)

    def drawn(score, raster, name):
        with torch.no_grad(): predict_windows(score, raster, tmp_path/name, scale=scale, tile=64)
        with rasterio.open(tmp_path/name) as src: return src.read(1)
    here, there = write(tmp_path/"here.tif", image), write(tmp_path/"there.tif", other)
    some = [drawn(GivenModalities(network, "S2"), raster, f"some_{raster.name}") for raster in (here, there)]
    full = [drawn(network, raster, f"full_{raster.name}") for raster in (here, there)]
    assert np.isfinite(some[0]).all() and np.array_equal(*some)
    assert not np.allclose(*full) and not np.allclose(some[0], full[0])
