"""The landslide recipe on a small made world and on files: deliverables, continued and killed runs, comparisons, and what it refuses."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from functools import partial
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import torch

from geolab.cli import main
from geolab.core import ConfigError, DataError, GeolabError, RunError, SplitError, load_yaml, read_json, sha256_of, write_json
from geolab.data.augment import rgb_of
from geolab.data.raster import read_info, read_window, write_geotiff
from geolab.evaluation.ordinal import MEASURES, PER_CLASS, decide
from geolab.evaluation.calibration import SoftmaxCalibrator
from geolab.inference.crf import crf_score, dense_crf
from geolab.inference.tta import DOUBT
from geolab.inference.windows import predict_raster
from geolab.recipes import landslide
from geolab.recipes.ordinal_training import CrfConfig
from geolab.recipes.pipeline import display, display_limits, merge_config, stage_keys
from geolab.training.runs import Run
from geolab.worlds.landslide import landslide_worlds, write_landslide_world

SMALL = ["training.epochs=2", "training.steps_per_epoch=2", "world.regions=4", "world.size=256"]
FILES = ["config.yaml", "audit.json", "split.json", "dataset_summary.json", "model.json", "model.safetensors", "history.json", "calibration.json", "cuts.json", "metrics.json", "scores.npz",
         "report.html", "MODEL_CARD.md", "stages.json",
         *(f"map/region_{i}_{end}" for i in range(4) for end in ("network.tif", "risk.tif", "class.tif", "class.tif.aux.xml", "class.qml"))]
NAMES = ["low", "medium", "high"]
DOCUMENT = """
# Architecture Upgrade
model:
  encoder: efficientnet-b4  # V2: resnet50 → V2.5: efficientnet-b4
  attention: true           # V2: false → V2.5: true (NEW)
  dropout_prob: 0.4         # Maintained

# Data Strategy
dataset:
  oversample_class: 1
  oversample_target_fraction: 0.075  # V2: 0.05 → V2.5: 0.075 (+50%)
  use_smote: true                    # V2: false → V2.5: true (NEW)
  smote_k_neighbors: 5               # V2: N/A → V2.5: 5 (NEW)

# Training (Maintained from V2)
training:
  use_ordinal_loss: true
  coral_weight: 0.3
  class_weights: [0.4, 2.5, 2.0]
  epochs: 60
  use_focal_loss: true
  focal_gamma: 2.5

# Enhanced CRF
inference:
  crf:
    enabled: true
    iterations: 8           # V2: 5 → V2.5: 8
    spatial_weight: 5.0     # V2: 3.0 → V2.5: 5.0
    compat_spatial: 5.0     # V2: 3.0 → V2.5: 5.0
    compat_bilateral: 15.0  # V2: 10.0 → V2.5: 15.0
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "The same sums in the same order, here and in the processes that are killed."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quiet(text): "Says nothing."


def resumed(out, *settings, until=None, **options):
    "What a continued run says."
    said = []
    landslide.resume(out, settings=settings, until=until, say=said.append, **options)
    return said


def done_anew(said): return [line.split("] ")[1].split(":")[0] for line in said if line.startswith("[") and "done before" not in line]


def pixels(path, bands=None):
    with rasterio.open(path) as f: return f.read(bands)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out, said = tmp_path_factory.mktemp("landslide") / "run", []
    landslide.run(out=out, settings=SMALL, say=said.append)
    return out, said


@pytest.fixture(scope="module")
def smoothed(whole, tmp_path_factory):
    "The same run, continued so that the CRF stays."
    out = shutil.copytree(whole[0], tmp_path_factory.mktemp("smoothed") / "run")
    return out, resumed(out, "inference.crf.keep=always", until="evaluate")


# --- the folder ---

def test_the_folder_is_complete(whole):
    out, said = whole
    assert [name for name in FILES if not (out / name).exists()] == []
    assert [line.split("]")[0] for line in said if line.startswith("[")] == [f"[{i}/11" for i in range(1, 12)]
    test = Run.load(out).metrics["test"]
    assert test["classes"] == NAMES and all(isinstance(test[name], float) for name in ("kappa", "kappa_quadratic", "spearman"))
    assert all(len(test[name]) == 3 for name in (*PER_CLASS, "support", "share"))
    summary = read_json(out / "dataset_summary.json")
    for part in summary["parts"].values():
        assert min(part["pixels"].values()) > 0 and sum(part["share"].values()) == pytest.approx(1, abs=1e-5)
    assert summary["added"]["of"] == "medium" and summary["added"]["reached"] >= summary["added"]["share"]


def test_the_report_and_the_card_begin_with_who_won(whole):
    out, said = whole
    m = read_json(out / "metrics.json")
    line, rivals = m["contest"]["line"], {name: b["kappa_quadratic"] for name, b in m["baselines"].items()}
    best = max(rivals, key=rivals.get)
    winner = "network" if m["test"]["kappa_quadratic"] > rivals[best] else best
    assert set(rivals) == {"pixel regression", "slope threshold", "most frequent class"}
    verb = "is ahead" if "cannot tell from none" in line or "cannot be said" in line else "wins"
    assert line.startswith(f"The {winner} {verb}: quadratic kappa {m['test']['kappa_quadratic']:.3f} of the map against {rivals[best]:.3f} of the best simpler rule, the {best}")
    page = (out / "report.html").read_text()
    assert page.index("quadratic kappa") == page.index(line[:60]) + line.index("quadratic kappa")  # said before any table
    assert (out / "MODEL_CARD.md").read_text().split("\n\n")[1] == line
    assert f"  {line}" in said


def test_the_numbers_are_those_of_the_maps(whole):
    "Counted once more, from the class maps and the labels of the test blocks."
    out, _ = whole
    blocks = Run.load(out).split.blocks
    counts = np.zeros((3, 3), int)
    for b in blocks[blocks.part == "test"].itertuples():
        window = np.s_[b.row0:b.row1, b.col0:b.col1]
        truth, found = (pixels(path, 1)[window] for path in (out / f"data/labels/{b.scene}.tif", out / f"map/{b.scene}_class.tif"))
        both = (truth != 255) & (found != 255)
        np.add.at(counts, (truth[both], found[both]), 1)
    kept = np.array(read_json(out / "metrics.json")["test"]["confusion"]["counts"]).sum(0)
    assert abs(counts - kept).sum() <= 2e-4 * kept.sum()  # a pixel on a cut may fall to either side


def test_again_does_nothing(whole):
    out, _ = whole
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    said = resumed(out)
    assert done_anew(said) == [] and sum("done before" in line for line in said) == 11
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_other_targets_remake_what_names_them_and_nothing_else(whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "run")
    before = {name: (out / name).stat().st_mtime_ns for name in ("model.safetensors", "model.json", "cuts.json", "map/region_0_class.tif")}
    assert done_anew(resumed(out, "targets.kappa=-1")) == ["evaluate", "report"]
    assert before == {name: (out / name).stat().st_mtime_ns for name in before}
    row = read_json(out / "metrics.json")["targets"][0]
    assert row["measure"] == "kappa" and row["target"] == -1 and row["met"] is True
    assert read_json(out / "metrics.json")["test"] == read_json(whole[0] / "metrics.json")["test"]


def test_a_trained_network_is_not_thrown_away(whole, tmp_path):
    with pytest.raises(RunError, match="--force"): resumed(whole[0], "training.epochs=3")
    with pytest.raises(RunError, match="--force"): resumed(whole[0], "random_seed=7")


# --- the deliverables ---

@pytest.mark.parametrize("kept", ["whole", "smoothed"])
def test_class_maps_open_in_a_gis(request, kept):
    out, _ = request.getfixturevalue(kept)
    cuts = read_json(out / "cuts.json")
    assert kept == "whole" or cuts["map"] == "risk"
    for i in range(4):
        source, path = out / f"data/images/region_{i}.tif", out / f"map/region_{i}_class.tif"
        with rasterio.open(source) as a, rasterio.open(path) as b:
            assert (a.crs, a.transform, a.shape) == (b.crs, b.transform, b.shape)
            assert (b.dtypes, b.nodata, b.count, b.descriptions) == (("uint8",), 255, 1, ("class",))
            found, known = b.read(1), b.read_masks(1) > 0
            colours = [f"#{r:02X}{g:02X}{b_:02X}" for r, g, b_, _ in map(b.colormap(1).get, range(3))]
        assert colours == landslide.class_colours(3) and len(set(colours)) == 3
        assert [c.text for c in ElementTree.parse(f"{path}.aux.xml").iter("Category")][:3] == NAMES
        style = [(e.get("value"), e.get("label"), e.get("color").upper()) for e in ElementTree.parse(path.with_suffix(".qml")).iter("paletteEntry")]
        assert style == [(str(k), name, colours[k]) for k, name in enumerate(NAMES)]
        p = pixels(out / f"map/region_{i}_{cuts['map']}.tif", [1, 2, 3])
        assert (known == np.isfinite(p[0])).all() and (found[~known] == 255).all() and known.any() and not known.all()
        assert (found[known] == decide(p[:, known], cuts[cuts["map"]])).all()


@pytest.mark.parametrize("kept, kind", [("whole", "network"), ("smoothed", "risk")])
def test_probabilities_and_doubt(request, kept, kind):
    out, _ = request.getfixturevalue(kept)
    for i in range(4):
        source, path = out / f"data/images/region_{i}.tif", out / f"map/region_{i}_{kind}.tif"
        with rasterio.open(source) as a, rasterio.open(path) as b:
            assert (a.crs, a.transform, a.shape) == (b.crs, b.transform, b.shape)
            assert b.descriptions == (*(f"probability_{name}" for name in NAMES), *(DOUBT if kind == "network" else ()))
            assert set(b.dtypes) == {"float32"} and np.isnan(b.nodata)
            values, here = b.read(), np.isfinite(a.read()).all(0)
        assert here.any() and not here.all() and (np.isfinite(values) == here).all()  # NaN elsewhere, in all bands
        p = values[:3, here]
        assert p.min() >= 0 and np.abs(p.sum(0) - 1).max() < 1e-5
        if kind == "risk": continue
        entropy, mutual, spread = values[3:, here]
        of_map = -(p * np.log(p.clip(1e-30))).sum(0)
        assert entropy.min() >= 0 and entropy.max() <= np.log(3) + 1e-6
        assert np.corrcoef(entropy, of_map)[0, 1] > .95  # not equal: where windows overlap, the entropies of both are blended
        assert np.abs(mutual).max() < 1e-6  # one network, one view: nobody to disagree with
        assert spread.min() >= 0 and spread.max() > 0


def test_the_crf_smooths(smoothed):
    "Fewer neighbours of different class than without it."
    out, said = smoothed
    assert done_anew(said) == ["crf", "threshold", "evaluate"]
    def edges(kind):
        found = [pixels(out / f"map/region_{i}_{kind}.tif", [1, 2, 3]).argmax(0) for i in range(4)]
        return sum((np.diff(f, axis=k) != 0).sum() for f in found for k in (0, 1))
    assert edges("risk") < edges("network")
    m = read_json(out / "metrics.json")
    assert m["crf"]["used"] and m["crf"]["after"]["recall"] == m["test"]["recall"] != m["crf"]["before"]["recall"]


def test_two_networks_disagree(whole, tmp_path):
    out = tmp_path / "run"
    landslide.run(out=out, settings=[*SMALL, "training.epochs=1", "training.steps_per_epoch=1", "model.seeds=2"], until="map", say=quiet)
    assert landslide.network_folders(out) == [out, out / "members" / "seed_43"]
    assert sha256_of(out / "model.safetensors") != sha256_of(out / "members/seed_43/model.safetensors")
    mutual = pixels(out / "map/region_0_network.tif", 5)
    assert np.nanmax(mutual) > 1e-4 and np.nanmin(mutual) > -1e-6
    assert landslide.network_folders(whole[0]) == [whole[0]]


def test_eight_views_disagree(whole):
    out, config = whole[0], landslide.LandslideConfig.parse(Run.load(whole[0]).config)
    eight = landslide.LandslideConfig.parse(config.plain() | dict(inference=config.inference.plain() | dict(tta=True)))
    image = torch.randn(1, 13, 64, 64, generator=torch.Generator().manual_seed(0))
    one, many = (landslide.risk_score(out, c)(image)[:, 4] for c in (config, eight))
    assert one.abs().max() < 1e-6 < 1e-5 < many.max()


@pytest.mark.parametrize("change", [dict(tta=True), dict(overlap=.5)])
def test_other_views_remake_the_maps(change):
    config = landslide.LandslideConfig.parse(merge_config(landslide.PROFILES, "quick")).plain()
    keys = [stage_keys(landslide.stages(), c) for c in (config, config | dict(inference=config["inference"] | change))]
    assert keys[0]["train"] == keys[1]["train"]
    assert keys[0]["map"] != keys[1]["map"]


def test_networks_of_an_earlier_run_are_left_out(whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "run", ignore=shutil.ignore_patterns("map", "data"))
    (out / "members/seed_43").mkdir(parents=True)
    for name in ("model.json", "model.safetensors"): shutil.copy(out / name, out / "members/seed_43" / name)
    assert landslide.network_folders(out) == [out]  # config.yaml says one seed


@pytest.mark.parametrize("k", [2, 3, 4, 5, 7])
def test_each_class_has_a_colour(k):
    assert len(set(landslide.class_colours(k))) == k


def test_two_classes_with_made_tiles(tmp_path):
    two = ["classes={low: 0, high: [1, 2]}", "training.class_weights=[1, 2]", "targets={recall high: 0.5}", "dataset.smote_k_neighbors=2", "dataset.rich=0.2",
           "dataset.duplicate_target_fraction=0.6", "dataset.oversample_target_fraction=0.8", "training.epochs=1", "training.steps_per_epoch=1"]
    landslide.run(out=tmp_path / "run", settings=[*SMALL, *two], until="tiles", say=quiet)
    assert read_json(tmp_path / "run/dataset_summary.json")["added"]["made"] > 0
    resumed(tmp_path / "run", until="train")


# --- another image ---

@pytest.mark.parametrize("kept", ["whole", "smoothed"])
def test_predict_gives_the_maps_of_the_run(request, kept, tmp_path):
    out, _ = request.getfixturevalue(kept)
    kinds = ["network", "risk", "class"] if kept == "smoothed" else ["network", "class"] if read_json(out / "cuts.json")["map"] == "network" else ["network", "risk", "class"]
    if kept == "smoothed": resumed(out)  # predict wants a finished run
    image = out / "data/images/region_1.tif"
    maps = landslide.predict(out, image, tmp_path / "maps")
    assert [p.name for p in maps] == [f"region_1_{kind}.tif" for kind in kinds]
    for p in maps: assert p.read_bytes() == (out / "map" / p.name).read_bytes(), p.name
    assert (tmp_path / "maps/region_1_class.qml").read_text() == (out / "map/region_1_class.qml").read_text()
    with pytest.raises(GeolabError, match="exists"): landslide.predict(out, image, tmp_path / "maps")


def test_predict_refuses_other_bands(whole, tmp_path):
    image = shutil.copy(whole[0] / "data/images/region_1.tif", tmp_path / "image.tif")
    edit(image, lambda a: a[:-1])
    with pytest.raises(DataError, match="bands|rainfall"): landslide.predict(whole[0], image, tmp_path / "maps")
    assert not list((tmp_path / "maps").glob("*.tif"))


def test_predict_refuses_an_existing_class_map_before_it_maps(whole, tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps/region_1_class.tif").write_bytes(b"mine")
    with pytest.raises(GeolabError, match="exists"): landslide.predict(whole[0], whole[0] / "data/images/region_1.tif", tmp_path / "maps")
    assert [p.name for p in (tmp_path / "maps").iterdir()] == ["region_1_class.tif"]


def test_clouds_are_not_mapped(whole, tmp_path):
    image = whole[0] / "data/images/region_0.tif"
    clouds = shutil.copy(whole[0] / "data/labels/region_0.tif", tmp_path / "clouds.tif")
    edit(clouds, lambda a: np.uint8(np.arange(a.shape[2]) < 64) * np.ones_like(a) * 3, nodata=None)
    maps = landslide.predict(whole[0], image, tmp_path / "maps", clouds=clouds)
    here = np.isfinite(pixels(image)).all(0) & (np.arange(256) >= 64)
    assert here.any() and (np.isfinite(pixels(maps[0])) == here).all() and ((pixels(maps[-1], 1) != 255) == here).all()


@pytest.mark.parametrize("name", ["none.tif", "small.tif"])
def test_clouds_that_do_not_fit(whole, tmp_path, name):
    edit(shutil.copy(whole[0] / "data/labels/region_0.tif", tmp_path / "small.tif"), lambda a: a[:, :100] * 0)
    with pytest.raises(GeolabError, match=name): landslide.predict(whole[0], whole[0] / "data/images/region_0.tif", tmp_path / "maps", clouds=tmp_path / name)


# --- comparing ---

def test_compare_with_a_run_of_the_same_split(whole, smoothed):
    found = landslide.compare(smoothed[0], whole[0] / "metrics.json")
    mine, theirs = (read_json(folder / "metrics.json")["test"] for folder in (smoothed[0], whole[0]))
    assert found["paired"] is True and found == {k: v for k, v in read_json(smoothed[0] / "comparison.json").items() if k != "of"}
    for name in MEASURES:
        assert found["baseline"][name] == pytest.approx(theirs[name])
        assert found["value"][name] == pytest.approx(mine[name] - theirs[name])
    itself = landslide.compare(whole[0], whole[0] / "metrics.json")
    assert all(v in (0, None) for name in MEASURES for v in [itself["value"][name]])


def test_compare_with_bare_numbers(whole, tmp_path):
    "The numbers of the document, of which there are only four."
    base = write_json(tmp_path / "v2.json", dict(kappa=.4534, precision=[None, .1785, None], recall=[None, None, .9386], spearman=.5666))
    found, mine = landslide.compare(whole[0], base), read_json(whole[0] / "metrics.json")["test"]
    assert found["paired"] is False and found["reason"]
    assert found["value"]["kappa"] == pytest.approx(mine["kappa"] - .4534) and found["value"]["precision"][1] == pytest.approx(mine["precision"][1] - .1785)
    assert found["value"]["kappa_quadratic"] is None and found["value"]["precision"][0] is None
    assert read_json(whole[0] / "comparison.json")["of"] == "v2.json"


@pytest.mark.parametrize("text, match", [
    (json.dumps(dict(classes=["a", "b", "c"], kappa=.3)), "baseline has the classes a, b, c, this run low, medium, high"),
    (json.dumps(dict(test=dict(classes=["low", "high"], kappa=.3))), "baseline has the classes low, high"),
    (json.dumps(dict(kappa=.3, precision=[.1, .2])), "lists of other lengths than the 3 classes"),
    (json.dumps(dict(f2=.3)), "has none of accuracy, kappa"),
    ("{", "cannot be read"),
    (json.dumps(dict(kappa=.3, confusion=[[1, 2, 3]] * 3)), "confusion"),
    (json.dumps([1, 2]), "metrics.json"),
    (json.dumps(dict(test=None)), "metrics.json"),
    (json.dumps(dict(kappa="high")), "kappa"),
    (json.dumps(dict(precision=.2)), "precision"),
    (json.dumps(dict(precision=dict(medium=.1785))), "precision"),
])
def test_baselines_that_cannot_be_compared(whole, tmp_path, text, match):
    (tmp_path / "base.json").write_text(text)
    try: landslide.compare(whole[0], tmp_path / "base.json")
    except GeolabError as error: assert match in str(error)
    else: pytest.fail("it was compared")


def test_on_the_command_line(whole, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `main` sets its own
    out = str(whole[0])
    with pytest.raises(SystemExit) as end: main(["evaluate", out, "--compare-baseline", str(whole[0] / "metrics.json")])
    assert not end.value.code and "precision medium" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end: main(["evaluate", out, "--compare-baseline", str(tmp_path / "none.json")])
    assert end.value.code == 2 and "none.json is missing" in capsys.readouterr().err
    write_json(tmp_path / "other.json", dict(classes=["a", "b"], kappa=.3))
    with pytest.raises(SystemExit) as end: main(["evaluate", out, "--compare-baseline", str(tmp_path / "other.json")])
    assert end.value.code == 2 and "they cannot be compared" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end: main(["predict", out, f"{out}/data/images/region_1.tif", str(tmp_path / "map.tif")])
    assert end.value.code == 2 and "give a folder as the target" in capsys.readouterr().err


def test_a_missing_baseline(whole, tmp_path):
    with pytest.raises(RunError, match="none.json is missing"): landslide.compare(whole[0], tmp_path / "none.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="cannot be read"): landslide.compare(whole[0], tmp_path / "folder")


def test_the_winner_is_named_with_the_confidence_that_was_asked_for():
    mine, theirs = dict(kappa_quadratic=.5), dict(kappa_quadratic=.4)
    line = landslide.says_who_won(mine, dict(rule=theirs), dict(rule=dict(low=dict(kappa_quadratic=.05), high=dict(kappa_quadratic=.15), confidence=.8, reason=None)))
    assert "+0.050 to +0.150" in line and "80%" in line


def test_a_tie_is_no_win():
    same = dict(kappa_quadratic=0.)
    line = landslide.says_who_won(same, dict(rule=same), dict(rule=dict(low=None, high=None, confidence=.95, reason="too few blocks")))
    assert "wins" not in line


# --- killed ---

def killed_when(seen, out, *settings, seconds=240):
    "Run in a process of its own, and kill it (signal 9) as soon as `seen()` is true."
    code = f"from geolab.recipes import landslide\nlandslide.run(out={str(out)!r}, settings={[*SMALL, *settings]!r}, say=lambda text: None)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1")) as going:
        start = time.monotonic()
        while not seen() and going.poll() is None and time.monotonic() - start < seconds: time.sleep(.005)
        going.kill()
    assert going.returncode == -signal.SIGKILL, "it ended before it could be killed"


def test_killed_and_continued(whole, tmp_path):
    "Killed after the first epoch, and again when the first map stands: what was finished is kept, and the end is the same to the byte."
    out = tmp_path / "run"
    def epochs():
        try: return len(json.loads((out / "history.json").read_text()))
        except (OSError, ValueError): return 0
    killed_when(lambda: epochs() == 1, out)
    assert epochs() == 1 and not (out / "model.safetensors").exists()
    killed_when(lambda: (out / "map/region_0_network.tif").exists(), out)
    assert sha256_of(out / "model.safetensors") == sha256_of(whole[0] / "model.safetensors")
    assert "map" not in read_json(out / "stages.json")["stages"] and not (out / "cuts.json").exists()
    assert done_anew(resumed(out, until="map")) == ["map"]
    for name in ("calibration.json", "dataset_summary.json"): assert read_json(out / name) == read_json(whole[0] / name), name
    for path in sorted((whole[0] / "map").glob("*_network.tif")): assert sha256_of(path) == sha256_of(out / "map" / path.name), path.name
    assert [p.name for p in out.rglob(".*") if p.name != ".lock"] == []  # no draft, nothing half-written


def test_killed_while_the_crf_is_drawn(whole, tmp_path):
    "What is finished of a smoothed map is kept, and the end is the same to the byte."
    out, again = (shutil.copytree(whole[0], tmp_path / name) for name in ("run", "again"))
    settings = ["inference.crf.tile_size=24", "inference.crf.bilateral_sxy=4"]
    assert done_anew(resumed(out, *settings, until="crf")) == ["crf"]
    def bands():
        try: return len((again / "map/.region_1_risk.tif.draft/journal").read_text().split()) - 1
        except OSError: return 0
    killed_when(lambda: bands() > 1, again, *settings)
    assert sha256_of(again / "map/region_0_risk.tif") == sha256_of(out / "map/region_0_risk.tif")
    before, asked = bands(), []
    def counted(*args, **kwargs):
        score = crf_score(*args, **kwargs)
        return lambda x: asked.append(1) or score(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landslide, "crf_score", counted)
        landslide.refine(again / "map/region_1_network.tif", again / "data/images/region_1.tif", again / "map/region_1_risk.tif", crf_of(again, *settings), overwrite=True, progress=False)
        continued, asked[:] = len(asked), []
        landslide.refine(again / "map/region_1_network.tif", again / "data/images/region_1.tif", tmp_path / "anew.tif", crf_of(again, *settings), progress=False)
    assert 0 < continued < len(asked) and before > 1
    assert done_anew(resumed(again, *settings, until="crf")) == ["crf"]
    for path in sorted((out / "map").glob("*_risk.tif")): assert sha256_of(path) == sha256_of(again / "map" / path.name), path.name
    assert [p.name for p in again.rglob(".*") if p.name != ".lock"] == []


# --- a scene of any size ---

def crf_of(out, *settings):
    "The CRF of a run under other settings."
    changed = {key.removeprefix("inference.crf."): float(value) if "." in value else int(value) for key, value in (text.split("=") for text in settings)}
    return CrfConfig(**load_yaml(out / "config.yaml")["config"]["inference"]["crf"] | changed)


def test_the_crf_of_windows_is_that_of_the_scene(tmp_path):
    "The scene at once is `dense_crf`; windows with a rim of one reach have the same classes."
    write_landslide_world(tmp_path, landslide_worlds(1, 256, seed=42))
    image, rgb = tmp_path / "images/region_0.tif", ("red", "green", "blue")
    truth, (shown, valid) = pixels(tmp_path / "labels/region_0.tif", 1), read_window(image, 0, 0, 256, 256, bands=rgb)
    z = 2 * np.eye(3)[np.where(truth == 255, 0, truth)].transpose(2, 0, 1) + np.random.default_rng(0).gumbel(size=(3, 256, 256))  # as of a network that is unsure
    here, p = truth != 255, (np.exp(z) / np.exp(z).sum(0)).astype(np.float32)
    network = write_geotiff(tmp_path / "network.tif", np.where(here, p, np.nan), bands=[f"probability_{name}" for name in NAMES], nodata=np.nan, crs=read_info(image).crs, transform=read_info(image).transform)
    crf = CrfConfig(iterations=8, spatial_weight=2, compat_spatial=1, compat_bilateral=2, bilateral_sxy=6, bilateral_srgb=13, compatibility="ordinal")
    at_once = dense_crf(p, display(shown, valid, rgb), valid=here, iterations=8, gaussian_sxy=2, gaussian_compat=1, bilateral_sxy=6, bilateral_srgb=13, bilateral_compat=2, compatibility="ordinal", progress=False)
    one, many = (pixels(landslide.refine(network, image, tmp_path / f"{tile}.tif", crf.model_copy(update=dict(tile_size=tile)), progress=False)) for tile in (2048, 64))
    assert (np.isfinite(one) == here).all() and (np.isfinite(many) == here).all() and not here.all()
    assert np.abs(one - at_once)[:, here].max() < 1e-4
    assert (one.argmax(0) != p.argmax(0))[here].mean() > .01  # there is something to agree about
    assert (one.argmax(0) == many.argmax(0))[here].all() and 0 < np.abs(one - many)[:, here].max() < .02


def test_the_crf_needs_no_more_memory_for_a_longer_scene(tmp_path, monkeypatch):
    "Rows of windows and an even sample for the stretch: three times the scene, the same peak of numpy."
    monkeypatch.setattr(landslide, "display_limits", partial(display_limits, most=2**16))
    crf, peaks = CrfConfig(iterations=1, compat_bilateral=0, spatial_weight=1, tile_size=128), []
    for height in (4096, 12288):
        rng, place = np.random.default_rng(0), dict(crs="EPSG:32633", transform=rasterio.Affine(10, 0, 480_000, 0, -10, 5_260_000))
        p = rng.random((3, height, 256), np.float32)
        network = write_geotiff(tmp_path / f"p{height}.tif", p / p.sum(0), bands=[f"probability_{name}" for name in NAMES], nodata=np.nan, **place)
        image = write_geotiff(tmp_path / f"x{height}.tif", rng.random((1, height, 256), np.float32), bands=["red"], nodata=np.nan, **place)
        tracemalloc.start()
        landslide.refine(network, image, tmp_path / f"r{height}.tif", crf, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < p.nbytes


# --- bad input ---

def edit(path, change, **profile):
    "Write a raster anew with other pixels."
    with rasterio.open(path) as f: values, kept, names = change(f.read()), f.profile, f.descriptions
    kept.update(count=len(values), height=values.shape[1], width=values.shape[2], **profile)
    os.unlink(path)
    with rasterio.open(path, "w", **kept) as f:
        f.write(values)
        for i, name in enumerate(names[:len(values)], 1):
            if name: f.set_band_description(i, name)


@pytest.fixture
def files(whole, tmp_path):
    "The made world as files of one's own."
    for kind in ("images", "labels"): shutil.copytree(whole[0] / "data" / kind, tmp_path / kind)
    return tmp_path


def go(files, *settings, until="tiles", say=quiet, out="run", **data):
    data = dict(images=files / "images", labels=files / "labels") | data
    return landslide.run(**data, out=files / out, settings=[*SMALL, *settings], until=until, say=say)


def refused(files, match, *settings, kind=DataError, **data):
    with pytest.raises(kind, match=match): go(files, *settings, **data)
    assert not (files / "run/model.safetensors").exists() and not list(files.rglob("*.part*"))
    return files / "run"


def test_files_of_ones_own_give_the_same_tiles(files, whole):
    go(files)
    assert read_json(files / "run/dataset_summary.json") == read_json(whole[0] / "dataset_summary.json")


def test_data_that_are_not_whole(files):
    for given, match in [(dict(images=None), "belong together"), (dict(labels=None), "belong together"), (dict(images=None, labels=None, masks=files / "labels"), "`masks` belongs to given images")]:
        assert not refused(files, match, kind=ConfigError, **given).exists()
    assert not refused(files, "no raster at .*nothing", images=files / "nothing").exists()
    assert not refused(files, "no raster at .*nothing", labels=files / "nothing").exists()


def test_an_area_of_interest_without_images(files):
    assert not refused(files, "aoi", kind=ConfigError, images=None, labels=None, aoi=files / "aoi.gpkg").exists()


@pytest.mark.parametrize("settings, match", [
    (["training.class_weights=[1, 2]"], "class_weights: 3 numbers are needed, one for each of low, medium, high, got 2"),
    (["dataset.oversample_class=3"], "oversample_class: there are the classes 0 to 2, got 3"),
    (["classes={low: 0}"], "classes: two or more are needed"),
    (["dataset.duplicate_target_fraction=0.5"], "is above oversample_target_fraction"),
    (["targets={precision extreme: 0.2}"], "no measure `precision extreme`"),
    (["training.early_stopping_metric=val_dice"], "`val_dice` is not computed; choose one of train_loss, val_loss"),
    (["model.head=coral", "training.use_ordinal_loss=false"], "coral"),
    (["training.class_weights=[0, 0, 0]"], "class_weights"),
    (["training.class_weights=[-1, 1, 1]"], "class_weights"),
    (["model.encoder=efficientnet-b40"], "no encoder is called 'efficientnet-b40'"),
])
def test_settings_that_cannot_work(files, settings, match):
    assert not refused(files, match, *settings, kind=GeolabError).exists()


def test_bands_of_the_made_world(files):
    assert not refused(files, "made world has no swir; it has red", "model.bands=[swir]", kind=ConfigError, images=None, labels=None).exists()


def test_every_fault_of_the_configuration_is_said_at_once(files):
    with pytest.raises(ConfigError) as refusal: go(files, "trainning.epochs=1", "training.epoch=3", "inference.crf.iteration=3", "model.seeds=0")
    for text in ("4 faults", "`trainning` is not a known key; did you mean `training`", "`training.epoch` is not a known key; did you mean `epochs`", "`inference.crf.iteration`", "`model.seeds`"): assert text in str(refusal.value)
    with pytest.raises(ConfigError) as refusal: go(files, "training.class_weights=[1]", "dataset.oversample_class=9", "targets={f3 low: 1}")
    for text in ("class_weights", "oversample_class", "f3 low"): assert text in str(refusal.value)


def test_a_mask_on_another_grid(files):
    edit(files / "labels/region_1.tif", lambda a: a[:, :-8])
    refused(files, "region_1.tif lies on another grid than .*region_1.tif")


def test_a_shifted_mask(files):
    path = files / "labels/region_1.tif"
    edit(path, lambda a: a, transform=read_info(path).transform @ rasterio.Affine.translation(.1, 0))
    refused(files, "lies on another grid")


def test_a_mask_without_partner(files):
    (files / "labels/region_1.tif").rename(files / "labels/other.tif")
    refused(files, "no mask of classes for region_1.tif; expected a mask of classes named region_1 or region_1_mask, found other")


def test_clouds_without_partner(files):
    refused(files, "no cloud mask for region_1.tif", masks=files / "labels/region_0.tif")


def test_images_in_place_of_masks(files):
    refused(files, "has 13 bands; one band of class numbers is expected", labels=files / "images")


def test_a_class_that_no_mask_holds(files):
    refused(files, "no pixel is of class high; the masks hold the values 0, 1, 2", "classes={low: 0, medium: 1, high: 7}")


def test_masks_of_one_class(files):
    for path in (files / "labels").iterdir(): edit(path, lambda a: np.where(a == 255, a, 0).astype(np.uint8))
    refused(files, "no pixel is of class medium, high; the masks hold the values 0,")


def test_a_part_without_a_class(files):
    for i in range(1, 4): edit(files / f"labels/region_{i}.tif", lambda a: np.where(a == 1, 0, a).astype(np.uint8))
    out = refused(files, "the part .* holds no pixel of medium, so it cannot teach or test that class", kind=SplitError)
    assert (out / "split.json").exists() and not (out / "dataset_summary.json").exists()


def test_images_of_another_kind(files):
    edit(files / "images/region_2.tif", lambda a: a[:-1])
    refused(files, "images differ in their bands: .*region_0.tif has 13, .*region_2.tif has 12")


def test_an_image_of_nothing(files):
    edit(files / "images/region_2.tif", lambda a: a * np.nan)
    refused(files, "no valid pixel in region_2")


def test_a_constant_band(files):
    for path in (files / "images").iterdir(): edit(path, lambda a: np.r_[a[:1], np.where(np.isfinite(a[1:2]), 5, np.nan), a[2:]].astype(np.float32))
    with pytest.warns(UserWarning, match="constant in all training windows: green"): go(files)


def test_a_truncated_mask(files):
    path = files / "labels/region_1.tif"
    path.write_bytes(path.read_bytes()[:-500])
    assert not refused(files, str(path)).exists()


def test_a_truncated_image(files):
    path = files / "images/region_1.tif"
    path.write_bytes(path.read_bytes()[:20_000])
    refused(files, str(path))


def test_a_folder_that_is_something_else(files):
    (files / "run").mkdir()
    (files / "run/thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="is not a run folder"): go(files)
    assert [p.name for p in (files / "run").iterdir()] == ["thesis.txt"]


# --- clouds, and images that lost their place ---

def test_clouds_hide_the_ground(files):
    shutil.copytree(files / "labels", files / "clouds")
    for path in (files / "clouds").iterdir(): edit(path, lambda a: np.uint8(np.arange(a.shape[2]) < 64) * np.ones_like(a) * 3, nodata=None)
    go(files, masks=files / "clouds", until="audit")
    table = {row["id"]: row["valid"] for row in read_json(files / "run/audit.json")["scenes"]}
    for id, valid in table.items():
        known = (pixels(files / f"labels/{id}.tif", 1) != 255) & np.isfinite(pixels(files / f"images/{id}.tif")).all(0)
        assert valid == known[:, 64:].sum() < known.sum()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_an_image_without_crs_needs_a_mask_of_its_shape(files):
    with rasterio.open(files / "images/region_0.tif") as f: rgb = np.nan_to_num(f.read([1, 2, 3]))
    shutil.rmtree(files / "images")
    (files / "images").mkdir()
    rgb = (255 * rgb / rgb.max()).clip(0, 255).astype(np.uint8)
    with rasterio.open(files / "images/region_0.png", "w", driver="PNG", width=200, height=256, count=3, dtype="uint8") as f: f.write(rgb[:, :, :200])
    refused(files, "no CRS and 256 x 200 pixels, region_0.tif has 256 x 256", images=files / "images/region_0.png", labels=files / "labels/region_0.tif")
    refused(files, "no CRS and no mask of its name", images=files / "images/region_0.png", labels=str(files / "labels/region_[12].tif"))


def test_the_fire_tile_takes_the_grid_of_its_mask(real_data, tmp_path):
    folder, said = real_data / "cems_wildfire_EMSR382" / "EMSR382_AOI01_01", []
    image, mask, clouds = (folder / f"EMSR382_AOI01_01_{end}" for end in ("S2L2A.png", "GRA.tif", "CM.tif"))
    data, classes = dict(images=image, labels=mask, masks=clouds), "classes={low: 0, medium: 2, high: [3, 4]}"
    with pytest.raises(SplitError, match="block_size=320, dead_zone=64: 15% lost"): landslide.run(**data, out=tmp_path / "wide", settings=[classes], until="tiles", say=quiet)
    landslide.run(**data, out=tmp_path / "run", settings=[classes, "split.dead_zone=64"], until="tiles", say=said.append)
    note = "EMSR382_AOI01_01_S2L2A.png has no CRS; it takes the grid of EMSR382_AOI01_01_GRA.tif, which has the same 1380 x 1129 pixels"
    assert any(note in line for line in said) and note in read_json(tmp_path / "run/audit.json")["notes"]
    lent = read_info(tmp_path / "run/data/images/EMSR382_AOI01_01_S2L2A.tif")
    with rasterio.open(mask) as f: assert (lent.crs, lent.transform, (lent.height, lent.width)) == (f.crs, f.transform, f.shape)
    assert rgb_of(lent.bands) == (0, 1, 2)
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning): theirs = pixels(image)
    assert (pixels(lent.path) == theirs).all()
    with rasterio.open(clouds) as f: assert read_json(tmp_path / "run/audit.json")["total"]["valid"] == (f.read(1) == 0).sum()
    for part in read_json(tmp_path / "run/dataset_summary.json")["parts"].values(): assert list(part["pixels"]) == NAMES and min(part["pixels"].values()) > 0


# --- the document's file ---

def test_the_document_s_configuration_loads_as_written(tmp_path):
    (tmp_path / "config.yaml").write_text(DOCUMENT, encoding="utf-8")
    parse = landslide.LandslideConfig.parse
    assert parse(merge_config(landslide.PROFILES, "full", tmp_path / "config.yaml")) == parse(merge_config(landslide.PROFILES, "full"))
    landslide.run(tmp_path / "config.yaml", profile="full", out=tmp_path / "run", settings=["world.regions=1", "world.size=128"], until="data", say=quiet)
    kept = load_yaml(tmp_path / "run/config.yaml")
    def within(wanted, found): return all(within(v, found[k]) if isinstance(v, dict) else found[k] == v for k, v in wanted.items())
    assert kept["profile"] == "full" and within(load_yaml(DOCUMENT), kept["config"])


def test_the_run_keeps_what_every_run_promises(whole, tmp_path):
    out, _ = whole
    run = Run.load(out)
    kept = read_json(out / "calibration.json")["softmax"]
    assert run.calibrator == SoftmaxCalibrator(kept["temperature"], tuple(kept["bias"]))
    with pytest.raises(RunError, match="no threshold; the rule of its classes stands in cuts.json"): run.thresholds
    with pytest.raises(ConfigError, match="landslide.predict"): predict_raster(run, out / "data/images/region_0.tif", tmp_path / "map.tif")
    assert not (tmp_path / "map.tif").exists()
    assert "val_mean_ap decides" in (out / "report.html").read_text()
