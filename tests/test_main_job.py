"""`geolab run thaw_slump` as a person starts it: on made and on real data, killed and continued, looked at afterwards."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import geopandas as gpd
import numpy as np
import pytest
import rasterio

from geolab.core import RunError, SplitError, read_json, sha256_of
from geolab.data.splits import Split
from geolab.recipes.thaw_slump import ThawSlumpConfig, Work
from geolab.training.runs import Run

SMALL = ["world.scenes=4", "world.size=448", "input_size=[64, 64]", "max_epochs=3", "steps_per_epoch=4", "batch_size=4"]
FILES = ["config.yaml", "audit.json", "split.json", "model.safetensors", "model.json", "history.json", "scores.npz", "calibration.json", "threshold.json", "metrics.json", "samples.npz",
         "report.html", "MODEL_CARD.md", "stages.json", "gate.json", "objects.npz", "map/polygons.parquet", "map/polygons.geojson", "map/gate.geojson", "map/label_next.geojson",
         "map/scene_0_probability.tif"]


def command(*arguments, settings=SMALL):
    return [sys.executable, "-m", "geolab.cli", *map(str, arguments), *(part for s in settings for part in ("--set", s))]


def geolab(*arguments, settings=SMALL, **kwargs):
    done = subprocess.run(command(*arguments, settings=settings), capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kill_when(seen, *arguments, seconds=120):
    "Start geolab, and kill it (signal 9) as soon as `seen()` is true."
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start = time.time()
    while not seen():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.time() - start < seconds, "nothing to see"
        time.sleep(.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, geolab("run", "thaw_slump", "--out", out)


def test_the_folder_is_complete(whole):
    out, said = whole
    assert [name for name in FILES if not (out / name).exists()] == []
    assert [line.split("]")[0] for line in said.splitlines() if line.startswith("[")] == [f"[{i}/10" for i in range(1, 11)]
    run = Run.load(out)
    assert run.metrics["test"]["average_precision"] is not None and run.model is not None
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", (out / "report.html").read_text())  # opens without a network


def test_the_same_command_does_nothing_more(whole):
    out, _ = whole
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "config.yaml"}
    said = geolab("run", "thaw_slump", "--out", out)
    assert said.count("done before") == 10
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_other_settings_are_not_silent(whole):
    out, _ = whole
    done = subprocess.run(command("run", "thaw_slump", "--out", out, "--set", "learning_rate=0.5"), capture_output=True, text=True)
    assert done.returncode == 2 and "--force" in done.stderr


def test_single_stages(tmp_path, whole):
    out = tmp_path / "run"
    geolab("train", "thaw_slump", "--out", out)
    assert (out / "model.safetensors").exists() and not (out / "scores.npz").exists()
    geolab("calibrate", out, settings=[])
    geolab("evaluate", out, settings=[])
    geolab("report", out, settings=[])
    assert sha256_of(out / "model.safetensors") == sha256_of(whole[0] / "model.safetensors")
    assert read_json(out / "metrics.json") == read_json(whole[0] / "metrics.json")


def test_predict_maps_another_image(tmp_path, whole):
    out, _ = whole
    source = next((out / "data").rglob("images/scene_1.tif"))
    said = geolab("predict", out, source, tmp_path / "map.tif", "--polygons", settings=[])
    with rasterio.open(source) as a, rasterio.open(tmp_path / "map.tif") as b:
        assert (a.crs, a.transform, a.shape) == (b.crs, b.transform, b.shape)
    polygons, blocks = (gpd.read_parquet(tmp_path / f"{name}.parquet") for name in ("map", "map_gate"))
    assert len(polygons) == len(gpd.read_file(tmp_path / "map.geojson"))
    assert not polygons.certified.any()  # 16 blocks certify nothing
    assert f"{blocks.outside.sum()} of {len(blocks)} blocks of the map are louder" in said


@pytest.mark.parametrize("stage", ["train", "calibrate", "evaluate"])
def test_nothing_is_trained_or_measured_without_the_certificate_of_the_split(tmp_path, whole, stage):
    import shutil
    out = shutil.copytree(whole[0], tmp_path / "run")
    work = Work(ThawSlumpConfig.parse(Run.load(out).config), out, say=lambda text: None)
    split = Split.load(out / "split.json")
    moved = split.tiles.index[split.tiles.part == "test"][0]
    split.tiles.loc[moved, "part"] = "train"  # a test tile among those to train on
    with pytest.raises(SplitError, match="does not hold"): split.check()
    split.save(out / "split.json")
    with pytest.raises(RunError, match="split.json"): getattr(work, stage)()
    (out / "split.json").unlink()
    with pytest.raises(RunError, match="split.json"): getattr(work, stage)()


def test_an_altered_run_is_refused(tmp_path, whole):
    import shutil
    out = shutil.copytree(whole[0], tmp_path / "run")
    weights = bytearray((out / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (out / "model.safetensors").write_bytes(weights)
    with pytest.raises(RunError): Run.load(out).model


def test_killed_in_training(tmp_path, whole):
    out = tmp_path / "run"
    def second_epoch():
        try: return len(json.loads((out / "history.json").read_text())) >= 2
        except (OSError, ValueError): return False
    kill_when(second_epoch, "run", "thaw_slump", "--out", out)
    assert not (out / "model.safetensors").exists()
    geolab("train", "thaw_slump", "--out", out)
    assert sha256_of(out / "model.safetensors") == sha256_of(whole[0] / "model.safetensors")


def test_killed_while_the_map_is_written(tmp_path, whole):
    out = tmp_path / "run"
    geolab("calibrate", out := _copy_before_map(tmp_path, whole[0]), settings=[])
    kill_when(lambda: any((out / "map").glob(".*")) if (out / "map").exists() else False, "run", "thaw_slump", "--out", out)
    for path in (out / "map").glob("*.tif"):
        with rasterio.open(path) as f: assert np.isfinite(f.read(1)).any()  # what has its final name is whole
    geolab("run", "thaw_slump", "--out", out)
    for path in sorted((whole[0] / "map").glob("*.tif")):
        assert sha256_of(path) == sha256_of(out / "map" / path.name)


def _copy_before_map(tmp_path, whole):
    "A run as it was after its thresholds were chosen."
    import shutil
    out = shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("map", "metrics.json", "report.html", "figures", "samples.npz", "MODEL_CARD.md"))
    return out


def test_real_image_and_polygons(tmp_path, real_data):
    folder = real_data / "spacenet_solaris"
    out = tmp_path / "run"
    said = geolab("run", "thaw_slump", "--images", folder / "sample_geotiff.tif", "--labels", folder / "geotiff_labels.geojson", "--out", out, settings=["max_epochs=6"])
    audit = read_json(out / "audit.json")
    assert "43" in json.dumps(audit) and round(100 * audit["total"]["positive_fraction"], 2) == 4.18, said
    run = Run.load(out)
    assert run.metrics["test"]["average_precision"] > 3 * run.metrics["test"]["positive_fraction"]
    threshold = run.thresholds[read_json(out / "threshold.json")["chosen"]].probability
    with rasterio.open(folder / "sample_geotiff.tif") as a, rasterio.open(out / "map" / "sample_geotiff_probability.tif") as b:
        assert (a.crs, a.transform, a.shape) == (b.crs, b.transform, b.shape)
        pixels = int((b.read(1) >= threshold).sum())
    polygons = gpd.read_parquet(out / "map" / "polygons.parquet")
    assert polygons.crs.to_epsg() == 32616
    assert np.isclose(polygons.area.sum(), pixels * 0.25, rtol=1e-9) and np.isclose(polygons.area_m2.sum(), pixels * 0.25, rtol=1e-9)
    lonlat = gpd.read_file(out / "map" / "polygons.geojson")
    assert lonlat.crs.to_epsg() == 4326 and len(lonlat) == len(polygons) and (len(lonlat) == 0 or lonlat.total_bounds[0] > -180)
