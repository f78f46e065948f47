"""A training that is killed and called again ends with the same weights, bit for bit."""
import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from geolab.core import GeolabError, RunError
from geolab.data.sampling import RatioSampler
from geolab.evaluation.metrics import average_precision
from geolab.training.fit import FitConfig, fit, load_state

STEPS, EPOCHS = 4, 10


class Squares(Dataset):
    "Noise with a bright square in every second tile; the brightness moves with (epoch, index)."

    def __init__(self, n, jitter=0.): self.n, self.jitter, self.epoch = n, jitter, 0
    def set_epoch(self, epoch): self.epoch = epoch
    def __len__(self): return self.n

    def __getitem__(self, i):
        made, now = torch.Generator().manual_seed(i), torch.Generator().manual_seed(1000*(self.epoch + 1) + i)
        mask = torch.zeros(16, 16, dtype=torch.int64)
        if i % 2: mask[4:9, 5:10] = 1
        image = torch.randn(2, 16, 16, generator=made) + mask + self.jitter*torch.randn(1, generator=now)
        return dict(image=image, mask=mask, valid=torch.ones(16, 16, dtype=torch.bool), block=f"b{i % 3}", id=f"tile {i}")


def bce(logits, target, valid): return F.binary_cross_entropy_with_logits(logits[valid], target[valid].float())


def train(out, loss=bce, *, initial=0, workers=0, steps=STEPS, **changes):
    "Train, and leave a hash of the final weights in `out`."
    if workers: multiprocessing.set_start_method("fork", force=True)
    torch.manual_seed(initial)  # a new process may well begin with other weights; the checkpoint's count
    network = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.2), nn.Conv2d(8, 1, 3, padding=1))
    data = Squares(24, jitter=.3)
    config = FitConfig(**dict(batch_size=4, max_epochs=EPOCHS, steps_per_epoch=steps, early_stopping_metric="ap", early_stopping_patience=EPOCHS, workers=workers) | changes)
    result = fit(network, loss, data, Squares(6), config, sampler=RatioSampler(np.arange(24) % 3 == 1, "1:1", ramp_to="1:2", ramp_epochs=6, seed=5), out=out, seed=3,
                 val_metrics=lambda histogram: dict(ap=average_precision(histogram)), progress=False)
    final = {k: v for k, v in load_state(Path(out)/"checkpoints/last.ckpt").items() if k in ("network", "optimizer")}
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
    everything = repr([x.tolist() for x in [*network.state_dict().values(), *final["network"].values()]]) + repr(final["optimizer"]) + repr(rows) + repr(result.best_epoch)
    (Path(out)/"hash.txt").write_text(hashlib.sha256(everything.encode()).hexdigest())


def killed_at_step(out, step, **kwargs):
    "Train, and die in the middle of a step, counted over the whole training."
    done = load_state(Path(out)/"checkpoints/last.ckpt")["epoch"]*STEPS if (Path(out)/"checkpoints/last.ckpt").exists() else 0
    seen = [done]

    def loss(logits, target, valid):
        if torch.is_grad_enabled():
            seen[0] += 1
            if seen[0] >= step: os.kill(os.getpid(), signal.SIGKILL)
        return bce(logits, target, valid)
    train(out, loss, **kwargs)


def killed_at_rename(out, number, before):
    "Train, and die just before or after the n-th file takes its final name."
    rename, seen = os.replace, [0]

    def replace(a, b):
        seen[0] += 1
        if before and seen[0] == number: os.kill(os.getpid(), signal.SIGKILL)
        rename(a, b)
        if seen[0] == number: os.kill(os.getpid(), signal.SIGKILL)
    os.replace = replace
    train(out)


@pytest.fixture(scope="module")
def start():
    "Starts a function in a process of its own that has everything imported already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "geolab.training.fit", "geolab.data.sampling", "geolab.evaluation.metrics", "test_resume"])

    def start(function, *args, **kwargs):
        process = context.Process(target=function, args=args, kwargs=kwargs)
        process.start()
        return process
    return start


def ends(process, code):
    process.join(60)
    assert process.exitcode == code


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    "Hash of the training that nobody disturbed."
    out = tmp_path_factory.mktemp("straight")
    ends(start(train, out), 0)
    return (out/"hash.txt").read_text()


@pytest.mark.parametrize("step", sorted(random.Random(0).sample(range(1, STEPS*EPOCHS + 1), 8)))
def test_killed_at_a_step(step, start, straight, tmp_path):
    ends(start(killed_at_step, tmp_path, step), -signal.SIGKILL)
    assert load_state(tmp_path/"checkpoints/last.ckpt")["epoch"] == (step - 1)//STEPS
    ends(start(train, tmp_path, initial=7), 0)
    assert (tmp_path/"hash.txt").read_text() == straight


def test_killed_again_and_again(start, straight, tmp_path):
    for initial, step in enumerate([3, 6, 17, 18, 39]): ends(start(killed_at_step, tmp_path, step, initial=initial), -signal.SIGKILL)
    ends(start(train, tmp_path, initial=8), 0)
    assert (tmp_path/"hash.txt").read_text() == straight


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", [1, 4, 9])
def test_killed_while_writing(number, before, start, straight, tmp_path):
    ends(start(killed_at_rename, tmp_path, number, before), -signal.SIGKILL)
    last = tmp_path/"checkpoints/last.ckpt"
    assert last.exists() == (number > 1 or not before)
    if last.exists(): load_state(last)
    ends(start(train, tmp_path), 0)
    assert (tmp_path/"hash.txt").read_text() == straight


def test_killed_from_outside_at_any_moment(start, straight, tmp_path):
    for delay in random.Random(1).sample(range(50, 900, 50), 5):
        process = start(train, tmp_path)
        time.sleep(delay/1000)
        process.kill()
        process.join()
    ends(start(train, tmp_path), 0)
    assert (tmp_path/"hash.txt").read_text() == straight


def test_workers_and_a_kill_change_nothing(start, straight, tmp_path):
    ends(start(killed_at_step, tmp_path, 30, workers=2), -signal.SIGKILL)
    ends(start(train, tmp_path), 0)
    assert (tmp_path/"hash.txt").read_text() == straight


def full_disk(out):
    "Train under a limit on the size of a file, which only the checkpoint with optimiser state exceeds."
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
    try: train(out)
    except RunError as error: (Path(out)/"error.txt").write_text(str(error))


def test_full_disk_is_said_and_survived(start, straight, tmp_path):
    ends(start(killed_at_step, tmp_path, 10), -signal.SIGKILL)
    ends(start(full_disk, tmp_path), 0)
    assert "could not write" in (tmp_path/"error.txt").read_text() and "intact" in (tmp_path/"error.txt").read_text()
    assert load_state(tmp_path/"checkpoints/last.ckpt")["epoch"] == 2
    assert not [p for p in (tmp_path/"checkpoints").iterdir() if ".part" in p.name]
    ends(start(train, tmp_path), 0)
    assert (tmp_path/"hash.txt").read_text() == straight


def ctrl_c(out):
    "Train, and press Ctrl-C in the tenth step."
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started with Ctrl-C ignored
    seen, before = [], signal.getsignal(signal.SIGINT)

    def loss(logits, target, valid):
        seen.append(1)
        if len(seen) == 10: signal.raise_signal(signal.SIGINT)
        return bce(logits, target, valid)
    try: train(out, loss)
    except KeyboardInterrupt: (Path(out)/"pressed.txt").write_text(str(signal.getsignal(signal.SIGINT) is before))


def test_ctrl_c_stays_ctrl_c(start, straight, tmp_path):
    ends(start(ctrl_c, tmp_path), 0)
    assert (tmp_path/"pressed.txt").read_text() == "True"
    ends(start(train, tmp_path), 0)
    assert (tmp_path/"hash.txt").read_text() == straight


def test_flipped_bytes_of_a_checkpoint_never_pass(start, tmp_path):
    ends(start(train, tmp_path, max_epochs=1), 0)
    last, rng = tmp_path/"checkpoints/last.ckpt", random.Random(2)
    whole, state = last.read_bytes(), repr(load_state(tmp_path/"checkpoints/last.ckpt"))
    for _ in range(60):
        at = rng.randrange(len(whole))
        last.write_bytes(whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1:])
        try: assert repr(load_state(last)) == state  # a byte that means nothing, such as padding
        except RunError as error: assert "delete it" in str(error)
    for _ in range(10):
        last.write_bytes(whole[:rng.randrange(len(whole))])
        with pytest.raises(GeolabError, match="delete it"): load_state(last)
