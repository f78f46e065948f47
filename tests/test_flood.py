"""`geolab run flood` from outside: a table on the command line, a kill between stages and in one, calibrated alerts, bad input."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from geolab.evaluation.calibration import Calibrator
from geolab.recipes.flood import FloodConfig, Work, forecast, resume, run, stages
from geolab.training.runs import Run
from geolab.worlds.catchments import make_world

SMALL = ["epochs=1", "batch_size=256", "sequence_length=10", "conv_filters=8", "lstm_units=4", "attention_heads=2", "explain=6", "rivals=[persistence, climatology]", "event.quantile=0.95", "split.block_days=60"]
FILES = ["config.yaml", "audit.json", "split.json", "model/model.safetensors", "model/model.json", "history.json", "scores.npz", "logits.npz", "calibration.json", "threshold.json", "rivals.npz", "metrics.json",
         "attention.npz", "alerts.csv", "report.html", "MODEL_CARD.md", "stages.json", "figures/pr.png"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    made = make_world(tmp_path_factory.mktemp("world"), seed=3, basins=2, years=3)
    path = tmp_path_factory.mktemp("table")/"days.csv"
    pd.concat(pd.read_csv(p) for p in made.tables).to_csv(path, index=False)
    return path


def command(*arguments):
    return [sys.executable, "-m", "geolab.cli", *map(str, arguments), *(part for s in SMALL for part in ("--set", s))]


def test_a_table_on_the_command_line_survives_a_kill(tmp_path, table):
    call = command("run", "flood", "--table", table, "--group-column", "basin", "--out", tmp_path/"run", "--seed", 3)
    process, start = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), time.time()
    while not (tmp_path/"run"/"model"/"model.json").exists():                              # the training is over, or nearly
        assert process.poll() is None and time.time() - start < 240
        time.sleep(.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path/"run"/"report.html").exists()
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0 and "split: done before" in done.stdout, done.stdout + done.stderr
    assert [name for name in FILES if not (tmp_path/"run"/name).exists()] == []
    assert (tmp_path/"run"/"report.html").read_text().count(Run.load(tmp_path/"run").metrics["contest"]["line"][:30]) >= 1
    again = subprocess.run(call, capture_output=True, text=True).stdout
    assert again.count("done before") == len(Run.load(tmp_path/"run").log.stages)


@pytest.mark.parametrize("options, says", [(["--label-column", "flod"], "no column `flod`"), (["--time-column", "dat"], "did you mean `date`"), (["--images", "a.tif"], "takes no --images"),
                                           (["--set", "flow_column=streamflow"], "did you mean `streamflow_mm`")])
def test_wrong_names_are_refused_with_a_hint(tmp_path, table, options, says):
    done = subprocess.run(command("run", "flood", "--table", table, "--group-column", "basin", "--out", tmp_path/"run") + options, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr and not (tmp_path/"run").exists(), done.stderr


def test_alerts_are_calibrated_in_one_go_as_stage_by_stage(tmp_path):
    values, quiet = dict(settings=[*SMALL, "world.basins=2", "world.years=3"], seed=3), dict(say=lambda text: None)
    once = run(**values, out=tmp_path/"once", until="alerts", **quiet)
    run(**values, out=tmp_path/"stages", until="data", **quiet)
    for stage in stages(True)[1:-1]: resume(tmp_path/"stages", until=stage.name, **quiet)
    for name in ("model/model.safetensors", "calibration.json", "threshold.json", "alerts.csv", "metrics.json"): assert (tmp_path/"once"/name).read_bytes() == (tmp_path/"stages"/name).read_bytes(), name
    assert once.calibrator.bias != 0                                                       # it was fitted, so what follows can fail
    work = Work(FloodConfig.parse(once.config), once.path)
    work.world.read(terrain=True).rename(columns=dict(group="basin")).to_csv(tmp_path/"days.csv", index=False)
    told = pd.read_csv(once.path/"alerts.csv", parse_dates=["day"])
    both = told.merge(forecast(once.path, tmp_path/"days.csv"), on=["day", "basin"], suffixes=("", "_new"))
    assert len(both) == len(told) and abs(both.probability - both.probability_new).max() < 1e-4 and (both.alert == both.alert_new).all()
    with np.load(once.path/"logits.npz") as kept: mine = once.calibrator.logits(kept["test"].astype(float))
    np.testing.assert_array_equal(work.all_scores()[0].logits, mine)
    assert once.metrics["methods"]["the network"]["brier_skill"] == pytest.approx(1 - ((Calibrator().probability(mine) - work.part("test").label)**2).mean()/((work.part("train").label.mean() - work.part("test").label)**2).mean(), rel=1e-6)
