"""Bad input ends in one clear message before training, and leaves nothing half-written."""
import subprocess
import sys

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from affine import Affine
from shapely.geometry import box

from geolab.core import GeolabError
from geolab.recipes import thaw_slump

SIZE, TILE = 320, 64
SMALL = [f"input_size=[{TILE}, {TILE}]", "max_epochs=1", "steps_per_epoch=1", "batch_size=2", "augment=none"]


def image(path, *, bands=3, size=SIZE, crs="EPSG:32608", transform=Affine(3, 0, 500_000, 0, -3, 7_700_000), fill=None, dtype="float32", nodata=None):
    rng = np.random.default_rng(0)
    array = rng.normal(size=(bands, size, size)).astype(dtype) if fill is None else np.full((bands, size, size), fill, dtype)
    with rasterio.open(path, "w", driver="GTiff", width=size, height=size, count=bands, dtype=dtype, crs=crs, transform=transform, nodata=nodata) as f:
        f.write(array)
    return path


def polygons(path, *, crs="EPSG:32608", x=500_000, y=7_700_000, n=24, driver=None):
    rng = np.random.default_rng(1)
    corners = [(x + 3 * c, y - 3 * r) for r, c in rng.integers(5, SIZE - 20, (n, 2))]
    frame = gpd.GeoDataFrame({"kind": ["slump"] * n}, geometry=[box(a, b - 30, a + 30, b) for a, b in corners], crs=crs)
    frame.to_file(path, driver=driver)
    return path


def refuse(tmp_path, match, *, images, labels, settings=(), **kwargs):
    out = tmp_path / "run"
    with pytest.raises(GeolabError, match=match):
        thaw_slump.run(images=images, labels=labels, out=out, settings=[*SMALL, *settings], **kwargs)
    assert not (out / "model.safetensors").exists()
    assert not list(tmp_path.rglob("*.part*")), "something half-written was left"
    return out


@pytest.fixture
def good(tmp_path):
    return dict(images=[image(tmp_path / "a.tif")], labels=polygons(tmp_path / "labels.gpkg"))


def test_no_positives(tmp_path, good):
    refuse(tmp_path, "slide", images=good["images"], labels=good["labels"], settings=["labels.column=kind", "labels.positive=[slide]"])


def test_no_positives_in_a_part(tmp_path, good):
    refuse(tmp_path, "positive", images=good["images"], labels=polygons(tmp_path / "one.gpkg", n=1))


def test_labels_outside_the_image(tmp_path, good):
    refuse(tmp_path, "meets none", images=good["images"], labels=polygons(tmp_path / "far.gpkg", x=600_000))


def test_labels_without_crs(tmp_path, good):
    refuse(tmp_path, "CRS", images=good["images"], labels=polygons(tmp_path / "none.shp", crs=None))


def test_labels_in_another_crs_are_reprojected(tmp_path, good):
    frame = gpd.read_file(good["labels"]).to_crs(4326)
    frame.to_file(tmp_path / "lonlat.geojson", driver="GeoJSON")
    said = []
    thaw_slump.run(images=good["images"], labels=tmp_path / "lonlat.geojson", out=tmp_path / "run", settings=SMALL, until="audit", say=said.append)
    assert any("reprojected from EPSG:4326 to EPSG:32608" in line for line in said)
    assert "reprojected" in (tmp_path / "run" / "audit.json").read_text()


def test_image_without_crs(tmp_path, good):
    refuse(tmp_path, "CRS", images=[image(tmp_path / "b.tif", crs=None)], labels=good["labels"])


def test_rotated_grid(tmp_path, good):
    turned = Affine(3, 0, 500_000, 0, -3, 7_700_000) * Affine.rotation(10)
    refuse(tmp_path, "rotated", images=[image(tmp_path / "b.tif", transform=turned)], labels=good["labels"])


def test_different_band_counts(tmp_path, good):
    refuse(tmp_path, "band", images=[*good["images"], image(tmp_path / "b.tif", bands=4)], labels=good["labels"])


def test_truncated_tiff(tmp_path, good):
    whole = good["images"][0].read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path, "cut.tif", images=[tmp_path / "cut.tif"], labels=good["labels"])


def test_no_valid_pixel(tmp_path, good):
    refuse(tmp_path, "valid pixel", images=[image(tmp_path / "b.tif", fill=-9999, nodata=-9999)], labels=good["labels"])


@pytest.mark.parametrize("setting, match", [
    ("learning_rat=1", "did you mean `learning_rate`"),
    ("max_epochs=1.5", "max_epochs"),
    ("learning_rate=-1", "greater than 0"),
    ("focal_gamma=strong", "focal_gamma"),
    ("loss=hinge", "'focal'"),
    ("test_realistic_ratio=500", "1:500"),
    ("split.train=0.9", "must be 1"),
    ("labels.colum=kind", "did you mean `column`"),
    ("early_stopping_metric=val_magic", "val_average_precision"),
    ("backbone=resnet81", "resnet18"),
    ("architecture=unot", "unet"),
])
def test_config(tmp_path, good, setting, match):
    out = refuse(tmp_path, match, **good, settings=[setting])
    assert not out.exists()


def test_weights_that_cannot_be_downloaded(tmp_path, good, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    refuse(tmp_path, "encoder_weights", **good, settings=["encoder_weights=imagenet"])


def test_folder_of_another_recipe(tmp_path, good):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("recipe: flood\nconfig: {}\n")
    refuse(tmp_path, "flood", **good)
    assert [p.name for p in out.iterdir()] == ["config.yaml"]


def test_folder_that_is_no_run(tmp_path, good):
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    refuse(tmp_path, "not a run", **good)


def test_no_space_is_seen_before(tmp_path, good, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    out = refuse(tmp_path, "no space left", **good)
    assert not out.exists()


def test_disk_full_while_writing(tmp_path, good):
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
            "from geolab.cli import main; main(sys.argv[1:])")
    command = [sys.executable, "-c", code, "run", "thaw_slump", "--images", str(good["images"][0]), "--labels", str(good["labels"]), "--out", str(tmp_path / "run")]
    command += [part for setting in SMALL for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Make room" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()
