"""`geolab check`: in every recipe each line can pass, and what it guards is broken on purpose, whereupon it fails."""
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from geolab.check import GUIDE, check_run
from geolab.checklist import as_html
from geolab.cli import app
from geolab.core import RunError, read_json, write_json
from geolab.data.splits import Split, _measure
from geolab.evaluation.scores import load_scores, save_scores
from geolab.recipes import casting, flood, landslide, thaw_slump
from geolab.recipes.pipeline import best_f
from geolab.training.runs import StageLog
from geolab.training.tracking import RunTracker

quiet = dict(say=lambda text: None)
MAPS = ["world.scenes=4", "world.size=256", "input_size=[32, 32]", "backbone=tu-mobilenetv3_small_050", "max_epochs=2", "steps_per_epoch=8", "split.block_tiles=1.5", "overlap=0"]
SERIES = ["epochs=1", "batch_size=256", "sequence_length=10", "conv_filters=8", "lstm_units=4", "attention_heads=2", "explain=6", "rivals=[persistence]", "event.quantile=0.95", "split.block_days=60", "world.basins=2", "world.years=3"]
CASTS = ["world.casts=300", "world.lengths=[80, 90]", "data_processing.sequence_length=90", "architecture.hidden_size=4", "classifier.hidden_dims=[4]", "training.num_epochs=1", "split.train=0.4", "split.val=0.2", "split.cal=0.2", "split.test=0.2"]
CLASSES = ["training.epochs=1", "training.steps_per_epoch=1", "world.regions=4", "world.size=256", "inference.crf.enabled=false"]


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    out = tmp_path_factory.mktemp("maps") / "run"
    thaw_slump.run(out=out, settings=MAPS, **quiet)
    return out


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    out = tmp_path_factory.mktemp("series") / "run"
    flood.run(out=out, settings=SERIES, seed=3, until="evaluate", **quiet)
    return out


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    out = tmp_path_factory.mktemp("classes") / "run"
    landslide.run(out=out, settings=CLASSES, until="evaluate", **quiet)
    return out


@pytest.fixture
def run(maps, tmp_path):
    return Path(shutil.copytree(maps, tmp_path / "run"))


def states(path, **kwargs): return {line.title: line.state for line in check_run(path, **kwargs).lines}


def failed(path, **kwargs): return {line.title.split(" (")[0] for line in check_run(path, **kwargs).failed}


def line(path, words): return check_run(path)[words]


def change(path, name, edit):
    value = read_json(path / name)
    edit(value)
    write_json(path / name, value)


def seal(path):
    "Give the ledger the hashes of the files as they now are: an attacker who knows how."
    log = StageLog(path, read_json(path / "stages.json")["recipe"])
    for stage, entry in list(log.entries.items()): log.record(stage, entry["key"], [path / name for name in entry["outputs"]], entry["seconds"])


GIT = "Baseline config committed to version control"


def test_the_lines_are_those_of_the_guide():
    assert [title for stage, title, *_ in GUIDE if stage != "Run folder"] == [
        "Data pipeline validated (correct channels, labels, augmentations)", "Spatial blocking verified (no train/test geographic overlap)", "MLflow experiment configured",
        "Baseline config committed to version control", "GPU memory profiled for batch size selection",
        "Monitor Val-Balanced IoU for early stopping", "Log learning curves to MLflow", "Checkpoint best model",
        "Temperature scaling calibration", "PR curve analysis on Val-Realistic (all ratios)", "Threshold selection documented", "Final metrics on Test-Realistic", "Model artifacts saved to MLflow"]


def test_a_finished_run_passes_all_but_the_commit(maps):
    before = {p: p.stat().st_mtime_ns for p in maps.rglob("*")}
    assert failed(maps) == {GIT}
    assert before == {p: p.stat().st_mtime_ns for p in maps.rglob("*")}  # a check writes nothing
    assert all(line.evidence for line in check_run(maps).lines)


def test_series_say_what_does_not_apply(series):
    found = check_run(series)
    assert failed(series) == {GIT, "Files as they were written, all stages finished"}  # no report yet
    assert found["PR curve"].state == "not applicable" and "own rate" in found["PR curve"].evidence
    assert "no IoU" in found["Val-Balanced"].evidence and "windows" in found["blocking"].evidence


def test_ordered_classes_say_what_does_not_apply(classes):
    found = check_run(classes)
    assert failed(classes) - {"Temperature scaling calibration"} == {GIT, "Files as they were written, all stages finished"}
    assert found["PR curve"].state == "not applicable" and "order" in found["PR curve"].evidence
    assert "quadratic kappa" in found["Final metrics"].evidence and found["Threshold"].file == "cuts.json"


def test_a_casting_run_passes(tmp_path):
    casting.run(out=tmp_path / "run", settings=CASTS, until="evaluate", **quiet)
    assert failed(tmp_path / "run") - {"Temperature scaling calibration"} == {GIT, "Files as they were written, all stages finished"}


# ---- maps: one fault, the line that sees it

def leak(path):
    "A test tile among those of train."
    change(path, "split.json", lambda s: s["tiles"]["part"].__setitem__(s["tiles"]["part"].index("test"), "train"))


def cunning_leak(path):
    "A whole test block given to train, with a certificate that was measured anew and a ledger that fits."
    split = Split.load(path / "split.json")
    block = split.blocks.block[split.blocks.part == "test"].iloc[0]
    for table in (split.blocks, split.tiles): table.loc[table.block == block, "part"] = "train"
    split.certificate |= _measure(split.tiles, split.blocks, split.frames)
    split.save(path / "split.json")
    seal(path)


def tune_on_test(path):
    logit = best_f(load_scores(path / "scores.npz")["test"], .8).logit
    change(path, "threshold.json", lambda t: t[t["chosen"]].update(logit=logit))
    seal(path)


def swapped_val(path):
    scores = load_scores(path / "scores.npz")
    save_scores(path / "scores.npz", scores | dict(val=scores["test"]))


def other_weights(path):
    weights = load_file(path / "model.safetensors")
    save_file({k: v + .1 if v.is_floating_point() else v for k, v in weights.items()}, path / "model.safetensors")


def other_labels(path):
    "Polygons moved after the split was cut."
    import geopandas as gpd
    table = gpd.read_file(path / "data/labels.gpkg")
    table.geometry = table.translate(30, 0)
    table.to_file(path / "data/labels.gpkg")


def longer_patience(path):
    (path / "config.yaml").write_text((path / "config.yaml").read_text().replace("max_epochs: 2", "max_epochs: 3"))


def add_test(path):
    "Test metrics of a better run."
    change(path, "metrics.json", lambda m: m["test"].update(average_precision=.99))
    seal(path)


FAULTS = [
    (leak, "Spatial blocking verified"), (cunning_leak, "Spatial blocking verified"), (swapped_val, "Spatial blocking verified"),
    (other_labels, "Data pipeline validated"), (lambda p: (p / "data/images/scene_1.tif").unlink(), "Data pipeline validated"),
    (lambda p: (p / "split.json").unlink(), "Spatial blocking verified"), (lambda p: (p / "split.json").write_text("{"), "Data pipeline validated"),
    (lambda p: change(p, "history.json", lambda rows: [row.pop("val_average_precision") for row in rows]), "Monitor Val-Balanced IoU for early stopping"),
    (lambda p: change(p, "history.json", lambda rows: [row.pop("val_balanced_iou_rts") for row in rows]), "Monitor Val-Balanced IoU for early stopping"),
    (lambda p: change(p, "history.json", lambda rows: rows.pop()), "Monitor Val-Balanced IoU for early stopping"), (longer_patience, "Monitor Val-Balanced IoU for early stopping"),
    (lambda p: (p / "checkpoints/best.safetensors").unlink(), "Checkpoint best model"), (other_weights, "Checkpoint best model"),
    (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]), "Checkpoint best model"),
    (lambda p: (p / "calibration.json").unlink(), "Temperature scaling calibration"), (lambda p: change(p, "calibration.json", lambda c: c.pop("temperature")), "Temperature scaling calibration"),
    (lambda p: change(p, "calibration.json", lambda c: c.update(temperature=1.)), "Temperature scaling calibration"), (lambda p: change(p, "calibration.json", lambda c: c.update(part="test")), "Temperature scaling calibration"),
    (lambda p: change(p, "metrics.json", lambda m: m["val"]["at_ratio"].pop("1:200")), "PR curve analysis on Val-Realistic"), (lambda p: change(p, "metrics.json", lambda m: m["val"].pop("at_ratio")), "PR curve analysis on Val-Realistic"),
    (tune_on_test, "Threshold selection documented"), (lambda p: (p / "threshold.json").unlink(), "Threshold selection documented"), (lambda p: change(p, "threshold.json", lambda t: t.pop("1:1000")), "Threshold selection documented"),
    (add_test, "Final metrics on Test-Realistic"), (lambda p: change(p, "metrics.json", lambda m: m["test"]["at_ratio"].pop("1:500")), "Final metrics on Test-Realistic"), (lambda p: (p / "metrics.json").unlink(), "Final metrics on Test-Realistic"),
    (lambda p: (p / "report.html").write_text("better"), "Files as they were written, all stages finished"), (lambda p: (p / "stages.json").unlink(), "Files as they were written, all stages finished"),
    (lambda p: (p / "stages.json").write_text((p / "stages.json").read_text().replace("audit", "audlt")), "Configuration as it was run"),
    (lambda p: (p / "config.yaml").write_text((p / "config.yaml").read_text().replace("random_seed: 42", "random_seed: 41")), "Configuration as it was run"),
]


@pytest.mark.parametrize("fault, title", FAULTS, ids=[f"{i}-{title.split(' (')[0]}" for i, (_, title) in enumerate(FAULTS)])
def test_each_fault_is_seen_by_its_line(fault, title, run):
    fault(run)
    assert title in failed(run)


def test_weights_of_another_epoch_that_are_sealed_again(run):
    "Weights, model.json and best checkpoint exchanged alike: the scores of val still tell."
    change(run, "history.json", lambda rows: rows[-1].update(val_average_precision=rows[-1]["val_average_precision"] + .3))
    assert "are not those of that epoch" in line(run, "Checkpoint").evidence


# ---- series and classes

@pytest.mark.parametrize("name, edit, title", [
    ("split.json", lambda s: s["windows"]["part"].__setitem__(s["windows"]["part"].index("test"), "train"), "Spatial blocking verified"),
    ("model/model.json", lambda m: m["channels"].reverse(), "Data pipeline validated"), ("model/model.json", lambda m: m.update(best_epoch=7), "Checkpoint best model"),
    ("calibration.json", lambda c: c.update(bias=c["bias"] + 1), "Temperature scaling calibration"), ("threshold.json", lambda t: t["observed"].update(certified=True), "Threshold selection documented"),
    ("metrics.json", lambda m: m["test"].update(recall=1.), "Final metrics on Test-Realistic"), ("history.json", lambda rows: rows[0].update(val_loss=None), "Monitor Val-Balanced IoU for early stopping")])
def test_faults_of_series(name, edit, title, series, tmp_path):
    path = Path(shutil.copytree(series, tmp_path / "run"))
    change(path, name, edit)
    assert title in failed(path)


@pytest.mark.parametrize("name, edit, title", [
    ("cuts.json", lambda c: c.update(part="test"), "Threshold selection documented"), ("cuts.json", lambda c: c.update(network=[.3, .9]), "Threshold selection documented"),
    ("calibration.json", lambda c: c["softmax"].update(temperature=None), "Temperature scaling calibration"), ("metrics.json", lambda m: m["test"].update(kappa_quadratic=.9), "Final metrics on Test-Realistic")])
def test_faults_of_classes(name, edit, title, classes, tmp_path):
    path = Path(shutil.copytree(classes, tmp_path / "run"))
    change(path, name, edit)
    assert title in failed(path)


# ---- the commit

def git(folder, *arguments):
    subprocess.run(["git", "-c", "user.name=A", "-c", "user.email=a@b.c", *arguments], cwd=folder, check=True, capture_output=True)


def test_a_committed_baseline_is_compared_with_the_run(run, tmp_path):
    from geolab.core import override
    import yaml
    (tmp_path / "baseline.yaml").write_text(yaml.safe_dump(override({}, MAPS)))
    assert GIT in failed(run, baseline=tmp_path / "baseline.yaml")
    git(tmp_path, "init", "-q"); git(tmp_path, "add", "baseline.yaml"); git(tmp_path, "commit", "-qm", "Baseline")
    assert failed(run, baseline=tmp_path / "baseline.yaml") == set()
    assert GIT in failed(run)  # its own config.yaml is in no commit
    (tmp_path / "baseline.yaml").write_text((tmp_path / "baseline.yaml").read_text() + "random_seed: 7\n")
    assert "random_seed: 42 in the run, 7" in check_run(run, baseline=tmp_path / "baseline.yaml")["Baseline"].evidence


def test_without_git_the_line_does_not_apply(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert line(run, "Baseline").state == "not applicable"


# ---- MLflow

def test_a_tracked_run_and_its_faults(run, tmp_path):
    tracker = RunTracker(run, tmp_path / "mlflow.db")
    tracker.log("FINISHED")
    mlflow = {"MLflow experiment configured", "Log learning curves to MLflow", "Model artifacts saved to MLflow"}
    assert {title for title, state in states(run).items() if state == "passed"} >= mlflow
    change(run, "history.json", lambda rows: rows[0].update(train_loss=9.))
    assert mlflow & failed(run) == {"Log learning curves to MLflow"}
    tracker.client.log_metric(tracker.run_id, "train_loss", 9., step=1)
    assert not mlflow & failed(run)
    artifacts = next(tmp_path.glob("mlflow_artifacts/**/model.safetensors"))
    artifacts.write_bytes(b"others")
    assert mlflow & failed(run) == {"Model artifacts saved to MLflow"}
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("learning_rate: 0.001", "learning_rate: 0.1"))
    assert "MLflow experiment configured" in failed(run)
    (tmp_path / "mlflow.db").unlink()
    assert mlflow <= failed(run) and not (tmp_path / "mlflow.db").exists()  # asking makes no new store


# ---- the command

def test_the_command_prints_and_exits(maps, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")  # wide enough for the names of the lines
    done = CliRunner().invoke(app, ["check", str(maps)])
    assert done.exit_code == 1 and "Spatial blocking verified" in done.output and "failed" in done.output
    found = json.loads(CliRunner().invoke(app, ["check", str(maps), "--json"]).output)
    assert len(found["lines"]) == len(GUIDE) and {line["state"] for line in found["lines"]} == {"passed", "failed", "not applicable"}
    git(maps.parent, "init", "-q"); git(maps.parent, "add", "run/config.yaml"); git(maps.parent, "commit", "-qm", "Run")
    try: assert CliRunner().invoke(app, ["check", str(maps)]).exit_code == 0
    finally: shutil.rmtree(maps.parent / ".git")
    assert "<table>" in as_html(check_run(maps))


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(RunError, match="no config.yaml"): check_run(tmp_path)
    (tmp_path / "config.yaml").write_text("recipe: thaw_slump\n")
    with pytest.raises(RunError, match="names no recipe"): check_run(tmp_path)
    (tmp_path / "config.yaml").write_text("recipe: none_such\nconfig: {}\ndata: {}\n")
    assert not [line for line in check_run(tmp_path).lines if line.state == "passed"]
