"""Runs in MLflow as a person makes them: from the command, killed and continued, afterwards, and refused before anything is trained."""
import os
import signal
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

SMALL = ["world.casts=800", "world.lengths=[80, 90]", "architecture.hidden_size=4", "training.num_epochs=2", "training.batch_size=64"]


def command(*arguments): return [sys.executable, "-m", "geolab.cli", *map(str, arguments)]


def run(*arguments): return command("run", "casting", "--out", "run", *(part for s in SMALL for part in ("--set", s)), *arguments)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    "A run with a bare --track in an empty folder, killed after its training and called again."
    home = tmp_path_factory.mktemp("tracked")
    process, start = subprocess.Popen(run("--track"), cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), time.time()
    while not (home/"run/mlflow.json").exists() or not (home/"run/history.json").exists():
        assert process.poll() is None and time.time() - start < 300
        time.sleep(.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = (home/"run/mlflow.json").read_text()
    done = subprocess.run(run("--track"), cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home, first, done


@pytest.fixture(scope="module")
def client(tracked): return MlflowClient(f"sqlite:///{tracked[0]}/mlflow.db")


@pytest.fixture(scope="module")
def found(client):
    (experiment,) = client.search_experiments(filter_string="name = 'casting'")
    return client.search_runs([experiment.experiment_id])


def test_a_killed_run_goes_on_in_the_same_mlflow_run(tracked, client, found):
    assert len(found) == 1 and found[0].info.run_id in tracked[1] and found[0].info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(found[0].info.run_id, "train_loss")] == [1, 2]
    assert "mlflow ui --backend-store-uri sqlite:///" in tracked[2].stdout


def test_what_is_logged(tracked, client, found):
    data = found[0].data
    assert (data.params["architecture.hidden_size"], data.params["random_seed"], data.tags["recipe"]) == ("4", "42", "casting")
    assert data.metrics["test/average_precision"] > 0 and data.tags["mlflow.note.content"].startswith("# Model card")
    names = {f.path for at in (None, "figures", "model") for f in client.list_artifacts(found[0].info.run_id, at)}
    assert names >= {"config.yaml", "metrics.json", "report.html", "MODEL_CARD.md", "model/model.safetensors", "threshold.json"} and any(n.startswith("figures/") for n in names)
    assert not any(n.startswith("data") for n in names)


def test_nothing_else_is_written(tracked):
    assert sorted(p.name for p in tracked[0].iterdir()) == ["mlflow.db", "mlflow_artifacts", "run"]
    assert "mlflow" not in (tracked[0]/"run/stages.json").read_text()  # outside of the hashed outputs


def test_a_run_is_logged_afterwards_and_once(tracked):
    home = tracked[0]
    for _ in range(2):
        done = subprocess.run(command("track", "run", "--uri", "sqlite:///later.db"), cwd=home, capture_output=True, text=True)
        assert done.returncode == 0 and "sqlite:///" in done.stdout, done.stderr
    later = MlflowClient(f"sqlite:///{home}/later.db")
    runs = later.search_runs([e.experiment_id for e in later.search_experiments()])
    assert len(runs) == 1 and runs[0].info.status == "FINISHED"
    assert [m.step for m in later.get_metric_history(runs[0].info.run_id, "train_loss")] == [1, 2]


def test_a_store_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path/"text.db").write_text("not a database "*90)
    done = subprocess.run(run("--track", "sqlite:///text.db"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be written (file is not a database)" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["text.db"]


def test_without_the_extra_the_line_that_installs_it(tmp_path):
    (tmp_path/"without").mkdir()
    (tmp_path/"without/mlflow.py").write_text("raise ImportError('No module named mlflow')\n")
    environment = os.environ | dict(PYTHONPATH=str(tmp_path/"without"))
    done = subprocess.run(run("--track"), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'geolab[track]'" in done.stderr and not (tmp_path/"run").exists()
