"""An experiment matrix as a person runs it: killed and continued, with cells that fail, searched, and refused where it cannot work."""
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import mlflow
import optuna
import pandas as pd
import pytest
import yaml

from geolab.core import ConfigError, RunError, read_json, sha256_of, write_json
from geolab.recipes import thaw_slump
from geolab.recipes.pipeline import alone_in
from geolab.search import open_study
from geolab.sweep import EXAMPLES, Matrix, _give_back, read_matrix, run_search, run_sweep
from geolab.training.tracking import store_uri

BASE = {"world": {"casts": 800, "lengths": [80, 90]}, "architecture": {"hidden_size": 4}, "training": {"num_epochs": 2, "batch_size": 64}, "shown_defects": None}
MATRIX = dict(recipe="casting", base=BASE, seeds=[1], rows={"baseline": {}, "broken": {"world.lengths": [60, 70]}, "small": {"architecture.hidden_size": 3}})
SEARCH = dict(recipe="casting", base=BASE, seeds=[1], search=dict(trials=3, startup=2, metric="val_average_precision",
              space={"training.learning_rate": dict(low=1e-4, high=1e-1, log=True), "architecture.hidden_size": [3, 4]}))


def quiet(text): pass


def dies_when(seen):
    "Kill this process with signal 9 as soon as `seen()` is true."
    def watch():
        while not seen(): time.sleep(.002)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=watch, daemon=True).start()


def sweep(out, dies_at=None, **options):
    if dies_at: dies_when((Path(out)/dies_at).exists)
    run_sweep(MATRIX, out=out, say=quiet, **options)


def search(out, dies_at=None):
    if dies_at: dies_when((Path(out)/dies_at).exists)
    run_search(read_matrix(SEARCH), Path(out), say=quiet)


@pytest.fixture(scope="module")
def process():
    "Runs a function in a process of its own that has everything imported already; gives its exit code."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["geolab.sweep", "geolab.recipes.casting", "lightning.pytorch", "optuna", "test_sweep"])

    def process(function, *args, **kwargs):
        child = context.Process(target=function, args=args, kwargs=kwargs)
        child.start()
        child.join(300)
        return child.exitcode
    return process


@pytest.fixture(scope="module")
def whole(process, tmp_path_factory):
    "A sweep that was killed inside its last cell, and called again."
    out = tmp_path_factory.mktemp("matrix")/"sweep"
    assert process(sweep, out, dies_at="runs/small/seed_1/model/model.safetensors") == -signal.SIGKILL
    first = out/"runs/baseline/seed_1"
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file() and p.name != ".lock"}
    assert not (out/"table.csv").exists()
    assert process(sweep, out) == 0
    return out, before


def test_finished_cells_are_not_touched(whole):
    _, before = whole
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_killed_cell_ends_as_an_undisturbed_one(whole, process, tmp_path):
    assert process(sweep, tmp_path/"sweep", only=["small"]) == 0
    cells = [out/"runs/small/seed_1" for out in (whole[0], tmp_path/"sweep")]
    weights = [sha256_of(cell/"model/model.safetensors") for cell in cells]
    metrics = [read_json(cell/"metrics.json")["test"] for cell in cells]
    assert weights[0] == weights[1] and metrics[0] == metrics[1]
    assert pd.read_csv(tmp_path/"sweep/table.csv").row.tolist() == ["small"]  # a part of the rows has a table too


def test_the_table_says_what_failed(whole):
    out, _ = whole
    found, failed = pd.read_csv(out/"table.csv"), read_json(out/"failures.json")
    assert found.row.tolist() == ["baseline", "small"] and list(failed) == ["broken, seed 1"]
    assert "`lengths` must be two whole numbers" in failed["broken, seed 1"]
    for name in ("table.md", "table.html"): assert "broken, seed 1" in (out/name).read_text(), name
    assert (found.seconds > 0).all() and (found.parameters > 100).all() and "blocks only" in found.remark[0]
    assert (out/"pareto.png").stat().st_size > 5000 and "[1/9] data" in (out/"logs/baseline_seed_1.txt").read_text()


def test_the_folder_of_another_sweep_is_refused(whole):
    out, _ = whole
    with pytest.raises(RunError, match="was made with architecture"): run_sweep(MATRIX | dict(rows={"baseline": {"architecture.hidden_size": 5}}), out=out, say=quiet)
    with pytest.raises(RunError, match="holds a sweep with recipe casting"): run_sweep("tiny", out=out, say=quiet)
    with pytest.raises(RunError, match="another geolab is at work"):
        with alone_in(out): run_sweep(MATRIX, out=out, say=quiet)


def test_a_killed_search_finds_what_an_undisturbed_one_does(process, tmp_path):
    assert process(search, tmp_path/"a") == 0
    for dies_at in ("search/trial_000/model/model.safetensors", "search/trial_002/config.yaml"):
        assert process(search, tmp_path/"b", dies_at=dies_at) == -signal.SIGKILL
        assert not (tmp_path/"b/trials.csv").exists()
    assert process(search, tmp_path/"b") == 0
    a, b = (pd.read_csv(tmp_path/name/"trials.csv") for name in "ab")
    pd.testing.assert_frame_equal(a, b)
    assert len(a) == 3 and (a.state == "complete").all() and a.value.notna().all()
    assert not list(tmp_path.rglob("scores.npz"))  # nothing but the training and validation parts was read
    other = read_matrix(SEARCH).config.search
    with pytest.raises(RunError, match="holds a search of the recipe casting, not of flood"): open_study(tmp_path/"b/study.db", other, recipe="flood")
    changed = SEARCH | dict(search=SEARCH["search"] | dict(space={"training.learning_rate": dict(low=1e-4, high=1e-2)}))
    with pytest.raises(RunError, match="another space"): run_search(read_matrix(changed), tmp_path/"b", say=quiet)


def test_the_epochs_reach_a_trial_of_thaw_slumps_and_end_it(tmp_path):
    rows = []

    def end(row):
        rows.append(row)
        raise optuna.TrialPruned("behind")
    settings = ["world.scenes=4", "world.size=448", "input_size=[64, 64]", "max_epochs=3", "steps_per_epoch=2", "batch_size=2"]
    with pytest.raises(optuna.TrialPruned): thaw_slump.run(out=tmp_path/"run", settings=settings, until="train", say=quiet, on_epoch=end)
    assert [row["epoch"] for row in rows] == [1] and "val_average_precision" in rows[0]
    assert len(read_json(tmp_path/"run/history.json")) == 1 and not (tmp_path/"run/model.safetensors").exists()


def test_some_rows_alone_search_nothing(whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path/"sweep")
    asked = MATRIX | dict(search=SEARCH["search"])
    with pytest.raises(ConfigError, match="no row `smal`"): run_sweep(asked, out=out, only=["smal"], say=quiet)
    found, failed = run_sweep(asked, out=out, only=["small"], say=quiet)
    assert found.row.tolist() == ["baseline", "small"] and not failed and not (out/"search").exists() and not (out/"study.db").exists()


def test_a_pruned_trial_is_killed_in_mlflow_and_says_so(tmp_path):
    def run(config, *, out, profile, seed, say, until=None, on_epoch=None):
        "Each trial is worse than the one before."
        out.mkdir(parents=True)
        (out/"config.yaml").write_text(yaml.safe_dump(dict(recipe="casting", profile=profile, geolab="0", data={}, config=config)))
        rows = [dict(epoch=epoch, val_average_precision=.9 - .1*int(out.name[-1])) for epoch in (1, 2)]
        for n in (1, 2):
            write_json(out/"history.json", rows[:n])
            if on_epoch: on_epoch(rows[n - 1])
    matrix = read_matrix(SEARCH | dict(search=SEARCH["search"] | dict(trials=4, startup=2, warmup=0)))
    matrix = Matrix("made", matrix.config, SimpleNamespace(run=run), matrix.rows)
    run_search(matrix, tmp_path/"sweep", track=(uri := store_uri(tmp_path/"store.db")), say=quiet)
    client = mlflow.MlflowClient(uri)
    kept = {r.info.run_name: r for e in client.search_experiments() for r in client.search_runs([e.experiment_id])}
    state = pd.read_csv(tmp_path/"sweep/trials.csv").state.tolist()
    assert "pruned" in state and "complete" in state
    assert [kept[f"trial {i}"].info.status for i in range(4)] == [dict(pruned="KILLED", complete="FINISHED")[s] for s in state]
    assert ["behind the median" in kept[f"trial {i}"].data.tags.get("pruned", "") for i in range(4)] == [s == "pruned" for s in state]
    assert not any("error" in r.data.tags for r in kept.values())


def test_what_a_cell_has_freed_goes_back_to_the_system():
    def resident(): return int(Path("/proc/self/statm").read_text().split()[1])*os.sysconf("SC_PAGESIZE")
    held = [bytearray(b"1"*100_000) for _ in range(2000)]
    last, full = held[-1], resident()  # one that stays keeps the rest from falling back by itself
    del held
    kept = resident()
    _give_back()
    assert kept > full - 50e6 and resident() < kept - 120e6 and len(last) == 100_000


@pytest.mark.parametrize("text, word", [
    ("recipe: thaw_slump\naxes: {lerning_rate: [1e-3]}", "did you mean `learning_rate`"),
    ("recipe: thaw_slump\naxes: {focal_gamma: [high]}", "`focal_gamma`"),
    ("recipe: thaw_slump\nrows: {a: {loss: dice, focal_gamma: 5}}", "does not read it"),
    ("recipe: slumps\nrows: {a: {}}", "thaw_slump"),
    ("rows: {a: {}}", "`recipe` is missing"),
    ("recipe: thaw_slump\nrow: {a: {}}", "did you mean `rows`"),
    ("recipe: thaw_slump\nrows: {a: {}}\nrows: {b: {}}", "stands twice"),
    ("- a\n- b", "must hold `key: value` lines"),
    ("recipe: thaw_slump\nsearch: {space: {loss: focal}}", "must be a list of choices"),
    ("recipe: casting\nsearch: {metric: val_loss, space: {shown_defects: [.1, .3]}}", "a search of `shown_defects` cannot go by `val_loss`"),
    ("recipe: thaw_slump\nprofile: fast\nrows: {a: {}}", "choose `quick` or `full`")])
def test_bad_matrices_are_refused_before_anything_runs(tmp_path, text, word):
    path = tmp_path/"matrix.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused: run_sweep(path, out=tmp_path/"sweep", say=quiet)
    assert word in str(refused.value) and not (tmp_path/"sweep").exists()


def test_the_command_prints_examples_and_refuses(tmp_path):
    def geolab(*arguments): return subprocess.run([sys.executable, "-m", "geolab.cli", "sweep", *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path)
    shown = geolab("guide", "--example")
    assert shown.returncode == 0 and shown.stdout.strip() == EXAMPLES["guide"].strip() and len(yaml.safe_load(shown.stdout)["rows"]) == 12
    (tmp_path/"matrix.yaml").write_text("recipe: thaw_slump\nrows: {a: {lr: 1}}\n")
    refused = geolab("matrix.yaml")
    assert refused.returncode == 2 and "row `a`: `lr` is not a known key" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path/"sweeps").exists()
