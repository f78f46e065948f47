"""`geolab run forest` as a person starts it: on a small made world and on files, killed and continued, and what it refuses."""
import shutil
import signal
import subprocess
import sys
import time

import geopandas as gpd
import numpy as np
import pytest
import rasterio

from geolab.core import SplitError, read_json, sha256_of, write_json
from geolab.inference.ensemble import load_ensemble_model
from geolab.recipes.forest import ForestConfig, Work, member_bands
from geolab.training.runs import Run

SMALL = ["world.scenes=3", "world.size=160", "world.dates=26", "world.prevalence=0.08", "history_days=120", "min_clear=0.5", "patch_size=16", "num_epochs=2", "max_samples_per_epoch=32",
         "max_val_samples=40", "hidden_channels=[4, 4]", "batch_size=8", "map_tile=160", "overlap=0", "split={block_tiles: 2, train: 0.4, val: 0.15, cal: 0.2, test: 0.25}", "force_members=true"]
FILES = ["config.yaml", "audit.json", "dates.json", "split.json", "samples.parquet", "scale.json", "runs.json", "ensemble.json", "skills.json", "scores.npz", "members.npz", "rivals.npz",
         "calibration.json", "threshold.json", "metrics.json", "samples.npz", "report.html", "MODEL_CARD.md", "stages.json", "gate.json", "objects.npz", "map/polygons.parquet",
         *(f"members/{name}/{file}" for name in ("forest_cover", "change_detection", "convlstm") for file in ("model.json", "model.safetensors", "history.json"))]


def command(*arguments, settings=SMALL):
    return [sys.executable, "-m", "geolab.cli", *map(str, arguments), *(part for s in settings for part in ("--set", s))]


def geolab(*arguments, settings=SMALL):
    done = subprocess.run(command(*arguments, settings=settings), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(*arguments, settings=SMALL):
    done = subprocess.run(command(*arguments, settings=settings), capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("forest") / "run"
    return out, geolab("run", "forest", "--out", out)


def test_the_folder_is_complete(whole):
    out, said = whole
    assert [name for name in FILES if not (out / name).exists()] == []
    run = Run.load(out)
    assert run.metrics["test"]["average_precision"] is not None
    assert {"season_trend", "index_difference", "pixel_logistic", "always_negative"} <= set(run.metrics["baselines"])
    assert [c["a"] for c in run.metrics["contest"]][1:] and all("average precision" in c["says"] for c in run.metrics["contest"])
    page = (out / "report.html").read_text()
    assert "Members and rivals" in page and run.metrics["contest"][0]["says"][4:40] in page
    assert "load_ensemble_model" in (out / "MODEL_CARD.md").read_text()
    assert said.count("[") >= 14


def test_the_same_command_does_nothing_more_and_other_settings_are_not_silent(whole):
    out, _ = whole
    assert geolab("run", "forest", "--out", out).count("done before") == 14
    assert "--force" in refused("run", "forest", "--out", out, settings=[*SMALL, "learning_rate=0.5"])


def test_the_map_is_what_the_ensemble_says(whole):
    "One window covers the whole scene, so the map must equal a call with arrays."
    out, _ = whole
    run, model = Run.load(out), load_ensemble_model(out)
    work = Work(ForestConfig.parse(run.config), out, say=lambda text: None)
    view = work.views("test")[0]
    images = view.read(0, 0, view.info.height, view.info.width)
    clear = np.where(images["valid"][:, None], images["image"], np.nan)[None]
    few, method = [work.bands.index(b) for b in member_bands("convlstm", work.bands, work.config)], read_json(out / "skills.json")["method"]
    said = model.ensemble_predict(clear[:, -1], clear[:, 0][:, few], clear[:, :, few], method, dates=images["dates"], context=images["valid"].mean(0)[None] if method == "dynamic" else None)
    with rasterio.open(work.map_path(view)) as src: drawn = src.read(1)
    both = np.isfinite(drawn) & np.isfinite(said["logits"][0])
    assert both.mean() > .3
    want = run.calibrator.probability(said["logits"][0][both])
    np.testing.assert_allclose(drawn[both], want, atol=2e-5)


def test_without_a_certificate_that_holds_nothing_is_trained(whole, tmp_path):
    "The ledger takes the altered file for its own, so only the certificate can tell that test tiles became train tiles."
    out, _ = whole
    shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("members", "map"))
    work = Work(ForestConfig.parse(Run.load(out).config), tmp_path / "run", say=lambda text: None)
    split = read_json(tmp_path / "run" / "split.json")
    split["tiles"]["part"] = ["train" if part == "test" else part for part in split["tiles"]["part"]]
    work.so_far.log.record("split", "", [write_json(tmp_path / "run" / "split.json", split)], 0)
    with pytest.raises(SplitError): work.train("convlstm")
    assert not (tmp_path / "run" / "members").exists()


@pytest.fixture(scope="module")
def files(whole, tmp_path_factory):
    "The made world as files of one's own: three places."
    data = tmp_path_factory.mktemp("files")
    for kind in ("images", "masks"):
        for k in range(3): shutil.copytree(whole[0] / "data" / kind / f"scene_{k}", data / kind / f"place_{k}")
    shutil.copy(whole[0] / "data" / "labels.gpkg", data / "labels.gpkg")
    return data


def own(files, *more, out, settings=SMALL): return ("run", "forest", "--images", files / "images", "--labels", files / "labels.gpkg", "--masks", files / "masks", "--out", out, *more)


def test_files_of_ones_own_give_the_same_samples(files, whole, tmp_path):
    done = subprocess.run([*command(*own(files, out=tmp_path / "run")), "--set", "num_epochs=1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    mine, theirs = (sum(r["changed"] for r in read_json(folder / "runs.json")) for folder in (tmp_path / "run", whole[0]))
    assert mine == theirs
    assert Run.load(tmp_path / "run").about["data"]["masks"].endswith("masks")


@pytest.mark.parametrize("settings, text", [
    (["labels.date_column=when"], "no column `when` that says when a change happened"),
    (["labels.column=kind", "labels.positive=[flood]"], "has `kind` = ['flood']"),
    (["min_clear=1"], "dates are at least 100% clear"),
    (["input_channels=40"], "input_channels is 40, the images have 12"),
    (["bands=[ndvi]"], "the images have no band `ndvi`"),
    (["scale=unit"], "set reflectance="),
    (["max_gap_days=1"], "clear dates follow each other within 1 days"),
    (["seq_length=40"], "and 40 are needed"),
])
def test_settings_that_do_not_fit_the_files(files, tmp_path, settings, text):
    assert text in refused(*own(files, out=tmp_path / "run"), settings=[*SMALL, *settings])


def test_files_that_do_not_fit(files, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(files / "images", bad)
    first = sorted((bad / "place_0").iterdir())[0]
    (first.with_name("place_0_undated.tif")).write_bytes(first.read_bytes())
    assert "holds no date" in refused("run", "forest", "--images", bad, "--labels", files / "labels.gpkg", "--out", tmp_path / "a")
    first.with_name("place_0_undated.tif").rename(first.with_name(f"again_{first.name}"))
    assert "are both of" in refused("run", "forest", "--images", bad, "--labels", files / "labels.gpkg", "--out", tmp_path / "b")
    first.with_name(f"again_{first.name}").unlink()
    assert "steps lie apart" in refused("run", "forest", "--images", bad, "--labels", files / "labels.gpkg", "--masks", files / "masks" / "place_1", "--out", tmp_path / "c")
    masks = shutil.copytree(files / "masks", tmp_path / "masks")
    sorted((masks / "place_0").iterdir())[0].unlink()
    assert "no cloud mask for 1 of" in refused("run", "forest", "--images", bad, "--labels", files / "labels.gpkg", "--masks", masks, "--out", tmp_path / "c")
    with rasterio.open(first, "r+") as src: src.crs = "EPSG:32634"
    assert "differ in their CRS" in refused("run", "forest", "--images", bad, "--labels", files / "labels.gpkg", "--out", tmp_path / "d")
    first.write_bytes(first.read_bytes()[:3000])
    assert first.name in refused("run", "forest", "--images", bad, "--labels", files / "labels.gpkg", "--out", tmp_path / "e")
    late = gpd.read_file(files / "labels.gpkg").assign(date="2031-01-01")
    late.to_file(tmp_path / "late.gpkg")
    assert "no positive pixel" in refused("run", "forest", "--images", files / "images", "--masks", files / "masks", "--labels", tmp_path / "late.gpkg", "--out", tmp_path / "f")
    assert "images and labels belong together" in refused("run", "forest", "--images", files / "images", "--out", tmp_path / "g")
    assert not (tmp_path / "g").exists()


def test_labels_without_dates(files, tmp_path):
    "One run over the whole period, where every labelled change counts."
    said = geolab(*own(files, "--set", "labels.date_column=null", "--set", "seq_length=4", out=tmp_path / "run"), settings=[s for s in SMALL if "history" not in s])
    assert "1 runs, 1 to measure on" in said
    assert "season_trend" not in Run.load(tmp_path / "run").metrics["baselines"]


def test_killed_and_continued(whole, tmp_path):
    "Killed while the third member trains, after its first epoch: what was finished is kept, and the end is the same to the byte."
    out = tmp_path / "run"
    member, end = out / "members" / "convlstm", time.monotonic() + 600
    def epochs(): return len(read_json(member / "history.json")) if (member / "history.json").exists() else 0
    with subprocess.Popen(command("run", "forest", "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as going:
        while not epochs() and going.poll() is None and time.monotonic() < end: time.sleep(.005)
        going.kill()
    assert going.returncode == -signal.SIGKILL
    assert epochs() and not (member / "model.safetensors").exists()
    assert (out / "members" / "change_detection" / "model.safetensors").exists() and not (out / "ensemble.json").exists()
    assert geolab("run", "forest", "--out", out).count("done before") == 6
    def losses(folder, name): return [[row["train_loss"], row["val_loss"]] for row in read_json(folder / "members" / name / "history.json")]
    for name in ("forest_cover", "change_detection", "convlstm"):
        assert sha256_of(out / "members" / name / "model.safetensors") == sha256_of(whole[0] / "members" / name / "model.safetensors")
        assert losses(out, name) == losses(whole[0], name)
    assert read_json(out / "metrics.json") == read_json(whole[0] / "metrics.json")
