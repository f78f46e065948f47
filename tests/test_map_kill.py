"""`kill -9` while a map is drawn: no file under the final name, only missing bands computed again, the same bytes in the end."""
import json
import os
import random
import subprocess
import sys

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from affine import Affine

# One process imports once and then forks a child per job; `os` and `rasterio.shutil` of the child die where the job says.
SERVER = """
import json, os, signal, sys, time
import rasterio.shutil, torch
from geolab.core import GeolabError
from pathlib import Path
from geolab.data.raster import read_info
from geolab.inference.accounts import PolygonWatch
from geolab.inference.windows import predict_windows

def die(): os.kill(os.getpid(), signal.SIGKILL)

def dying(function, n, after=False):
    "The function, which kills the process before (or after) its n-th call."
    left = [n]
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and not after: die()
        result = function(*args, **kwargs)
        if left[0] == 0: die()
        return result
    return call

def halting(function, n):
    "The function, which stops the process after its n-th call, until somebody continues or kills it."
    left = [n]
    def call(*args):
        result = function(*args)
        left[0] -= 1
        if left[0] == 0: os.kill(os.getpid(), signal.SIGSTOP)
        return result
    return call

def half_a_copy(source, target, **kwargs):
    rasterio_copy(source, target, **kwargs)
    os.truncate(target, os.path.getsize(target)//2)
    die()
rasterio_copy = rasterio.shutil.copy

def draw(job, events):
    channels = job.get("channels", 1)
    def score(x): os.write(events, b"."); return torch.cat([i*x + 1 for i in range(2, channels + 2)], 1)
    bands = dict(name=[f"logit {i}" for i in range(channels)]) if channels > 1 else {}
    if "legend" in job: bands = dict(transform_logits=lambda z: z.argmax(0).astype("uint8"), legend={i: ("grade", "#00ff00") for i in range(channels)})
    if job.get("polygons"): bands = dict(watch=[PolygonWatch(read_info(job["src"]), 1.5, Path(job["dst"]).parent, "found", unit="logit")])
    kind, n = job.get("die", [None, 0])
    if kind == "call": score = dying(score, n)
    if "halt" in job: score = halting(score, job["halt"])
    if kind == "fsync": os.fsync = dying(os.fsync, n)
    if kind == "copy": rasterio.shutil.copy = half_a_copy
    if kind == "replace": os.replace = dying(os.replace, n)
    if kind == "replaced": os.replace = dying(os.replace, n, after=True)
    try: predict_windows(score, job["src"], job["dst"], tile=32, overlap=.5, channels=channels, key="v1", overwrite=job.get("overwrite", False), progress=False, **bands)
    except GeolabError as error: os.write(events, f"{type(error).__name__}: {error}".encode()); os._exit(1)
    os._exit(0)

def start(job):
    read, write = os.pipe()
    child = os.fork()
    if child == 0: draw(job, write)
    os.close(write)
    return child, read

def finish(child, read, seen=b""):
    while part := os.read(read, 65536): seen += part
    os.close(read)
    calls = len(seen) - len(seen.lstrip(b"."))
    return dict(status=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), calls=calls, error=seen[calls:].decode())

def await_calls(read, n):
    seen = b""
    while len(seen) < n and (part := os.read(read, n - len(seen))): seen += part
    return seen

for line in sys.stdin:
    job = json.loads(line)
    child, read = start(job)
    if "kill_after" in job: # from outside, wherever the child is by then
        seen = await_calls(read, job["kill_after"])
        time.sleep(job["delay"]); os.kill(child, signal.SIGKILL)
        answer = finish(child, read, seen)
    elif "halt" in job: # a second writer comes while the first one stands still, and a third when it is dead
        os.waitpid(child, os.WUNTRACED)
        job.pop("halt"); rival = finish(*start(job)); os.kill(child, signal.SIGKILL)
        answer = dict(first=finish(child, read), rival=rival, heir=finish(*start(job)))
    else: answer = finish(child, read)
    print(json.dumps(answer), flush=True)
"""
ROWS, COLS = 9, 7 # of windows in the raster below


@pytest.fixture(scope="module")
def ask():
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    def ask(**job):
        print(json.dumps(job, default=str), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())
    yield ask
    server.stdin.close()
    assert server.wait(30) == 0


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")/"scene.tif"
    array = np.random.default_rng(0).normal(size=(1, 150, 120)).astype(np.float32)
    array[:, 20:40, 30:50] = -1
    with rasterio.open(path, "w", driver="GTiff", width=120, height=150, count=1, dtype="float32", crs="EPSG:32608", transform=Affine(3, 0, 500_000, 0, -3, 7_700_000), nodata=-1) as f:
        f.write(array)
    return path


@pytest.fixture(scope="module")
def straight(ask, source, tmp_path_factory):
    path = tmp_path_factory.mktemp("straight")/"map.tif"
    assert ask(src=source, dst=path) == dict(status=0, calls=ROWS*COLS, error="")
    return path.read_bytes()


def names(folder): return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("kind, n, done", [
    ("call", 1, 0), ("call", COLS, 0), ("call", COLS + 1, 1), ("call", 5*COLS + 3, 5), ("call", ROWS*COLS, ROWS - 1), # in the network
    *[("fsync", 2 + 3*4 + i, 4) for i in range(1, 4)], ("fsync", 2 + 3*5 + 1, 5), # fifth band: before its numbers are on disk, before the carry, before the journal; then the sixth
    ("copy", 0, ROWS), ("replace", 2, ROWS), # while the GeoTIFF is compressed; before it takes its name
])
def test_killed_then_continued(ask, source, straight, tmp_path, kind, n, done):
    dst = tmp_path/"map.tif"
    killed = ask(src=source, dst=dst, die=[kind, n])
    assert killed["status"] == -9
    assert names(tmp_path) == [".map.tif.draft"]
    assert not list(tmp_path.glob("*.tif"))
    kept = len((tmp_path/".map.tif.draft"/"journal").read_text().split("\n")) - 2 # a first line with the key, an end
    assert kept in ((done, done + (n % 3 == 2)) if kind == "fsync" # a line that was written but not yet flushed outlives the process, though not a power cut
                    else (done - 1, done) if kind == "call" and done else (done,)) # a band is written while the next one is computed
    again = ask(src=source, dst=dst)
    assert (again["status"], again["error"], again["calls"]) == (0, "", (ROWS - kept)*COLS)
    assert dst.read_bytes() == straight
    assert names(tmp_path) == ["map.tif"]


def test_killed_after_the_map_has_its_name(ask, source, straight, tmp_path):
    dst = tmp_path/"map.tif"
    assert ask(src=source, dst=dst, die=["replaced", 2])["status"] == -9
    assert dst.read_bytes() == straight
    refused = ask(src=source, dst=dst)
    assert refused["status"] == 1 and "overwrite=True" in refused["error"]
    assert ask(src=source, dst=dst, overwrite=True) == dict(status=0, calls=0, error="")
    assert dst.read_bytes() == straight and names(tmp_path) == ["map.tif"]


@pytest.mark.parametrize("more", [{}, dict(legend=True)])
def test_three_channels_killed_then_continued(ask, source, tmp_path, more):
    whole, dst = tmp_path/"whole"/"map.tif", tmp_path/"map.tif"
    whole.parent.mkdir()
    assert ask(src=source, dst=whole, channels=3, **more) == dict(status=0, calls=ROWS*COLS, error="")
    made = names(whole.parent)
    assert made == (["map.qml", "map.tif", "map.tif.aux.xml"] if more else ["map.tif"])
    last = 4 if more else 2 # the journal's own, then names and style of the legend, and the map
    for kind, n in [("call", 3*COLS + 2), ("fsync", 2 + 3*4 + 2), ("copy", 0), *[("replace", i) for i in range(2, last + 1)]]:
        assert ask(src=source, dst=dst, channels=3, die=[kind, n], **more)["status"] == -9
        assert not dst.exists()
        assert ask(src=source, dst=dst, channels=3, **more)["status"] == 0
        for name in made: assert (tmp_path/name).read_bytes() == (whole.parent/name).read_bytes()
        for name in made: (tmp_path/name).unlink()
        assert names(tmp_path) == ["whole"]


def test_polygons_of_a_killed_pass(ask, source, tmp_path):
    "Killed in the network, while a band is written, while polygons take their names, while the map does: the same files in the end."
    whole, dst = tmp_path/"whole"/"map.tif", tmp_path/"map.tif"
    whole.parent.mkdir()
    assert ask(src=source, dst=whole, polygons=True)["status"] == 0
    made = names(whole.parent)
    assert made == ["found.geojson", "found.parquet", "map.tif"] and len(gpd.read_parquet(whole.parent/"found.parquet")) > 20
    for kind, n in [("call", 3*COLS + 2), ("fsync", 2 + 3*4 + 2), ("replace", 2), ("replace", 3), ("copy", 0), ("replace", 4)]:
        assert ask(src=source, dst=dst, polygons=True, die=[kind, n])["status"] == -9
        assert not dst.exists()
        again = ask(src=source, dst=dst, polygons=True)
        assert again["status"] == 0 and again["calls"] <= (ROWS*COLS if kind in ("call", "fsync") else 0)
        for name in made: assert (tmp_path/name).read_bytes() == (whole.parent/name).read_bytes(), name
        for name in made: (tmp_path/name).unlink()
        assert names(tmp_path) == ["whole"]


@pytest.mark.parametrize("seed", range(3))
def test_killed_anywhere_many_times(ask, source, straight, tmp_path, seed):
    dst, chance, total, attempts = tmp_path/"map.tif", random.Random(seed), 0, 0
    while not dst.exists():
        answer = ask(src=source, dst=dst, kill_after=chance.randint(1, 3*COLS), delay=chance.random()*.01)
        attempts, total = attempts + 1, total + answer["calls"]
        assert attempts < 100
    assert dst.read_bytes() == straight
    assert total <= ROWS*COLS + attempts*2*COLS # what a killed attempt may have computed in vain: one row of windows, and one on its way to the disk


def test_a_second_writer_is_refused_and_a_dead_one_is_no_writer(ask, source, straight, tmp_path):
    answer = ask(src=source, dst=tmp_path/"map.tif", halt=COLS + 1)
    assert answer["first"]["status"] == -9
    assert answer["rival"]["status"] == 1 and "is being written by process" in answer["rival"]["error"] and answer["rival"]["calls"] == 0
    assert answer["heir"]["status"] == 0 and answer["heir"]["calls"] in ((ROWS - 1)*COLS, ROWS*COLS) # the first band may have been on its way to the disk
    assert (tmp_path/"map.tif").read_bytes() == straight
