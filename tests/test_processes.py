"""Two processes that share a training do what one would have done with all the tiles of a step."""
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from geolab.core import GeolabError
from geolab.data.sampling import RatioSampler
from geolab.evaluation.metrics import average_precision
from geolab.nn.losses import build_loss
from geolab.training.epochs import load_state, state_sha256
from geolab.training.fit import FitConfig, fit, score_dataset
from test_resume import Squares

STEPS, EPOCHS = 3, 4
FOCAL = build_loss("focal", alpha=.25, gamma=2.)


class Poisoned(Squares):
    "Tile 5 is NaN from the second epoch on."

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        if i == 5 and self.epoch: sample["image"][:] = torch.nan
        return sample


def network(norm, seed=0):
    torch.manual_seed(seed)
    between = nn.GroupNorm(2, 8) if norm == "group" else nn.BatchNorm2d(8)
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), between, nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))


def train(out, *, norm="group", data=Squares, ratio=False, loss=FOCAL, initial=0, score=average_precision, trainer=None, **changes):
    "Train on 29 tiles; leaves weights, history, warnings and the last histogram in `out`."
    rank = int(os.environ.get("RANK", 0))
    out = Path(out)
    config = FitConfig(**dict(batch_size=8, max_epochs=EPOCHS, learning_rate=.01, early_stopping_metric="ap", early_stopping_patience=EPOCHS) | changes)
    sampler = RatioSampler(np.arange(29) % 2 == 1, "14:11", ramp_to="14:15", ramp_epochs=EPOCHS, seed=5) if ratio else None
    net = network(norm, initial)

    def metrics(histogram):
        out.mkdir(parents=True, exist_ok=True)
        np.save(out/f"counts {rank}.npy", histogram.counts)
        return dict(ap=score(histogram))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(net, loss, data(29, .3), Squares(9), config, sampler=sampler, out=out, seed=3, val_metrics=metrics, progress=False, trainer_kwargs=trainer)
    torch.save(net.state_dict(), out/f"weights {rank}.pt")
    (out/f"said {rank}.json").write_text(json.dumps([str(x.message) for x in caught if "step is left out" in str(x.message)]))
    last = load_state(out/"checkpoints/last.ckpt")
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
    (out/f"hash {rank}.txt").write_text(state_sha256([net.state_dict(), last["network"], last["optimizer"], rows, result.best_epoch]))


def share(rank, port, out, *, nodes=1, **kwargs):
    "One of two processes, with the environment that torchrun gives it."
    local = 0 if nodes == 2 else rank
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local), NODE_RANK=str(rank if nodes == 2 else 0), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try: train(out, trainer=dict(accelerator="cpu", devices=2//nodes, num_nodes=nodes, strategy="ddp"), **kwargs)
    except GeolabError as error:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out)/f"error {rank}.txt").write_text(str(error))
        os._exit(3)


def killed(rank, port, out, *, who, step, **kwargs):
    "The same, and process `who` dies in the middle of a step."
    seen = []

    def loss(logits, target, valid):
        if torch.is_grad_enabled(): seen.append(1)
        if len(seen) == step and rank == who: os.kill(os.getpid(), signal.SIGKILL)
        return FOCAL(logits, target, valid=valid)
    share(rank, port, out, loss=loss, **kwargs)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def context():
    "Starts processes that have everything imported already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "torch.nn.parallel", "torch.distributed", "geolab.training.fit", "test_processes"])
    return context


@pytest.fixture(scope="module")
def both(context):
    "Runs a function in two processes that know of each other, and gives their exit codes."
    def both(function, out, **kwargs):
        port = free_port()
        processes = [context.Process(target=function, args=(rank, port, out), kwargs=kwargs) for rank in (0, 1)]
        for p in processes: p.start()
        for p in processes: p.join(120)
        for p in processes: p.kill()
        return [p.exitcode for p in processes]
    return both


@pytest.fixture(scope="module")
def alone(context):
    def alone(out, **kwargs):
        p = context.Process(target=train, args=(out,), kwargs=kwargs)
        p.start()
        p.join(120)
        assert p.exitcode == 0
    return alone


def weights(out, rank=0): return torch.load(out/f"weights {rank}.pt", weights_only=True)
def apart(a, b): return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)
def hashes(out): return [(out/f"hash {rank}.txt").read_text() for rank in (0, 1)]


@pytest.mark.parametrize("kwargs", [dict(), dict(ratio=True), dict(nodes=2), dict(batch_size=2, accumulate=2, ratio=True)], ids=["all tiles", "ratio", "two machines", "accumulated"])
def test_two_processes_are_one(kwargs, both, alone, tmp_path):
    alone(tmp_path/"one", ratio="ratio" in kwargs)
    assert both(share, tmp_path/"two", **dict(batch_size=4) | kwargs) == [0, 0]
    one, two = weights(tmp_path/"one"), weights(tmp_path/"two")
    assert apart(one, two) < 1e-5 < 1e-3 < apart(one, network("group").state_dict())
    assert apart(two, weights(tmp_path/"two", 1)) == 0 and len(set(hashes(tmp_path/"two"))) == 1
    counts = [np.load(tmp_path/"two"/f"counts {rank}.npy") for rank in (0, 1)]
    assert (counts[0] == counts[1]).all() and counts[0].sum() == 9*256


def test_batch_normalisation_shares_its_scores(both, tmp_path):
    "The weights may differ from those of one process; what is counted with them may not."
    assert both(share, tmp_path, norm="batch", batch_size=4, max_epochs=1) == [0, 0]
    net = network("batch", 1)
    net.load_state_dict(weights(tmp_path))
    assert (np.load(tmp_path/"counts 0.npy") == score_dataset(net, Squares(9), progress=False).counts).all()


@pytest.fixture(scope="module")
def straight(both, tmp_path_factory):
    "Hash of a training by two processes that nobody disturbed."
    out = tmp_path_factory.mktemp("straight")
    assert both(share, out, norm="batch", batch_size=4, ratio=True) == [0, 0]
    return hashes(out)


@pytest.mark.parametrize("who, step", [(0, 7), (1, 5)])
def test_one_is_killed_and_two_resume(who, step, both, straight, tmp_path):
    codes = both(killed, tmp_path, who=who, step=step, norm="batch", batch_size=4, ratio=True)
    assert codes[who] == -signal.SIGKILL and codes[1 - who] != 0  # the other one does not go on alone, and does not wait for ever
    assert load_state(tmp_path/"checkpoints/last.ckpt")["epoch"] == (step - 1)//STEPS
    assert both(share, tmp_path, norm="batch", batch_size=4, ratio=True, initial=7) == [0, 0]
    assert hashes(tmp_path) == straight


def dies_at(out, name, before):
    "Train, and die just before or after a file of the second epoch takes its final name."
    rename, seen = os.replace, []
    number = 3 if name in ("last.ckpt", "history.json") else 2  # these are written once before the first epoch

    def replace(a, b):
        if Path(b).name == name: seen.append(1)
        here = Path(b).name == name and len(seen) == number
        if here and before: os.kill(os.getpid(), signal.SIGKILL)
        rename(a, b)
        if here: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace
    train(out)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", ["best.next.safetensors", "last.ckpt", "best.safetensors", "history.json"])
def test_the_best_weights_are_those_of_the_checkpoint_after_any_kill(name, before, context, tmp_path):
    "The epochs after a kill need not be those before it; the best weights are the ones that the checkpoint names all the same."
    p = context.Process(target=dies_at, args=(tmp_path, name, before))
    p.start()
    p.join(120)
    assert p.exitcode == -signal.SIGKILL
    done = load_state(tmp_path/"checkpoints/last.ckpt")
    assert done["epoch"] == done["best_epoch"] == (1 if name == "best.next.safetensors" or name == "last.ckpt" and before else 2)
    train(tmp_path, loss=lambda logits, target, valid: FOCAL(-logits, target, valid=valid), score=lambda histogram: 0.)  # stands for kernels that sum differently each time
    last = load_state(tmp_path/"checkpoints/last.ckpt")
    assert (last["epoch"], last["best_epoch"], last["best_sha256"]) == (EPOCHS, done["best_epoch"], done["best_sha256"])
    assert state_sha256(weights(tmp_path)) == last["best_sha256"]
    assert sorted(x.name for x in (tmp_path/"checkpoints").iterdir() if not x.name.startswith(".")) == ["best.safetensors", "last.ckpt"]


def test_another_number_of_processes_is_refused(both, tmp_path):
    assert both(killed, tmp_path, who=1, step=4, batch_size=4)[1] == -signal.SIGKILL
    with pytest.raises(GeolabError, match="by 2 processes, now there are 1"): train(tmp_path, batch_size=4)


def test_nan_in_one_process_stops_both_with_its_tile(both, tmp_path):
    assert both(share, tmp_path, data=Poisoned, batch_size=4) == [3, 3]
    first, second = ((tmp_path/f"error {rank}.txt").read_text() for rank in (0, 1))
    assert first == second and re.search(r"the loss became nan in epoch 2, step \d, tiles .*tile 5.*best weights so far \(epoch 1\) are untouched", first)
    assert len(re.findall(r"tile \d+", first)) == 4  # those of the process that saw it


def test_nan_in_one_process_is_skipped_by_both(both, tmp_path):
    assert both(share, tmp_path, data=Poisoned, batch_size=4, on_nan="skip", norm="batch") == [0, 0]
    history = json.loads((tmp_path/"history.json").read_text())
    assert [row["skipped"] for row in history][0] == 0 and sum(row["skipped"] for row in history) >= 1
    assert apart(weights(tmp_path), weights(tmp_path, 1)) == 0 and all(x.isfinite().all() for x in weights(tmp_path).values())
    said = [json.loads((tmp_path/f"said {rank}.json").read_text()) for rank in (0, 1)]
    assert len(said[0]) == sum(row["skipped"] for row in history) and not said[1]  # said once


def test_torchrun_starts_it(alone, tmp_path):
    "As a user would start it, in a fresh interpreter."
    (tmp_path/"script.py").write_text(textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_processes import train
        train({str(tmp_path/"two")!r}, batch_size=4, max_epochs=1, trainer=dict(accelerator="cpu", devices=2, strategy="ddp"))
    """))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path/"script.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    alone(tmp_path/"one", max_epochs=1)
    assert apart(weights(tmp_path/"one"), weights(tmp_path/"two")) < 1e-5
