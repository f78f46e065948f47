"""Maps on a cluster of processes: the bytes of one machine, also when a worker, the driver or the scheduler is killed in the middle."""
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import dask
import geopandas as gpd
import numpy as np
import pytest
import torch
from affine import Affine
from dask.distributed import Client, LocalCluster

from geolab.cli import main
from geolab.core import ConfigError, write_json
from geolab.data.raster import BandScale, write_geotiff
from geolab.evaluation.calibration import Calibrator
from geolab.evaluation.thresholds import Threshold
from geolab.inference.cluster import ClusterLost, connect, predict_cluster
from geolab.inference.windows import predict_raster
from geolab.nn.segmentation import build_segmenter
from geolab.training.runs import Run, StageLog, save_model

ROWS = 14 # of windows in the raster below
HOW = dict(device="cpu", overlap=.5, progress=False)


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    "A run folder, an image, and its map by one machine."
    folder = tmp_path_factory.mktemp("cluster")
    array = np.random.default_rng(0).normal(size=(3, 480, 300)).astype(np.float32)
    array[:, 20:90, 30:250] = -1
    image = write_geotiff(folder/"scene.tif", array, crs="EPSG:32608", transform=Affine(3, 0, 500_000, 0, -3, 7_700_000), nodata=-1, bands=["red", "green", "nir"])
    torch.manual_seed(0)
    scale, arguments = BandScale(("red", "green", "nir"), (0.,)*3, (1.,)*3, "float32", 3.), dict(architecture="unet", encoder="resnet18", in_channels=3)
    log = StageLog(folder/"run", "thaw_slump", ["train", "calibrate"])
    log.record("train", "k", save_model(folder/"run", build_segmenter(**arguments), builder="segmenter", arguments=arguments, scale=scale, tile_size=64), 1)
    log.record("calibrate", "k", [write_json(folder/"run"/"calibration.json", Calibrator(temperature=2., bias=-1.).to_dict()),
        write_json(folder/"run"/"threshold.json", {"chosen": "1:500", "1:500": Threshold(0., .3, .8, .01, "tile", reason="too few positives").to_dict()})], 1)
    predict_raster(Run.load(folder/"run"), image, folder/"straight.tif", **HOW)
    return folder/"run", image, (folder/"straight.tif").read_bytes()


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL) as cluster: yield cluster


@pytest.fixture
def client(cluster):
    with Client(cluster, set_as_default=False) as client: yield client


def bands(map_path):
    "How many bands of a map that is being drawn are finished."
    journal = map_path.with_name(f".{map_path.name}.draft")/"journal"
    return journal.read_text().count("\n") - 1 if journal.exists() else 0


def when(seen, act, seconds=300):
    "Do something as soon as something is to be seen, beside what else goes on."
    def watch():
        until = time.monotonic() + seconds
        while not seen() and time.monotonic() < until: time.sleep(.002)
        if seen(): act()
    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def names(folder): return sorted(p.name for p in folder.iterdir())


def test_a_killed_worker_changes_nothing(place, client, tmp_path):
    run, image, straight = place
    dst, before = tmp_path/"map.tif", client.run(os.getpid)
    killed = []
    def kill(): killed.append(bands(dst)); os.kill(next(iter(before.values())), signal.SIGKILL)
    watcher = when(lambda: bands(dst) >= 3, kill)
    assert predict_cluster(run, image, dst, client, ahead=4, **HOW) == dst
    watcher.join()
    assert killed and 3 <= killed[0] < ROWS
    assert dst.read_bytes() == straight and names(tmp_path) == ["map.tif"]
    client.wait_for_workers(2, timeout=300)
    assert set(client.run(os.getpid).values()) != set(before.values()) # another one has come in its place


DRIVER = "import sys; from geolab.inference.cluster import predict_cluster; predict_cluster(*sys.argv[1:5], device='cpu', overlap=.5, progress=False, ahead=4)"


def test_a_killed_driver_is_continued(place, client, tmp_path, monkeypatch):
    run, image, straight = place
    dst, asked, submit = tmp_path/"map.tif", [], client.submit
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, run, image, dst, client.scheduler.address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS="1"))
    when(lambda: bands(dst) >= 5, driver.kill).join()
    assert driver.wait(300) == -9
    done = bands(dst)
    assert 5 <= done < ROWS and names(tmp_path) == [".map.tif.draft", ".map.tif.rows"]
    monkeypatch.setattr(client, "submit", lambda *args, **kwargs: asked.append(args[3]) or submit(*args, **kwargs))
    predict_cluster(run, image, dst, client, **HOW)
    assert set(asked) <= set(range(done, ROWS)) and len(asked) == len(set(asked))
    assert dst.read_bytes() == straight and names(tmp_path) == ["map.tif"]


def test_a_lost_worker_and_a_lost_scheduler_are_said_and_another_cluster_finishes(place, client, tmp_path):
    run, image, straight = place
    dst, file, processes = tmp_path/"maps"/"map.tif", tmp_path/"scheduler.json", []
    def start(name, *arguments):
        processes.append(subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{name}", *arguments, "--scheduler-file", file, "--no-dashboard"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path))
        return processes[-1]
    def draw(other, victim, band, says):
        other.wait_for_workers(1, timeout=300)
        watcher = when(lambda: bands(dst) >= band, victim.kill)
        with pytest.raises(ClusterLost, match=says): predict_cluster(run, image, dst, other, patience=3, ahead=2, **HOW)
        watcher.join()
        assert victim.poll() == -9 and band <= bands(dst) < ROWS and not dst.exists()
    try:
        scheduler = start("scheduler", "--port", "0", "--host", "127.0.0.1")
        worker = start("worker", "--no-nanny", "--nthreads", "1")
        when(file.exists, lambda: None).join()
        with connect(file, patience=300) as other:
            draw(other, worker, 2, "no worker for 3 s")
            start("worker", "--no-nanny", "--nthreads", "1")
            draw(other, scheduler, 6, "scheduler of the cluster went away")
    finally:
        for process in processes: process.kill(); process.wait()
    predict_cluster(run, image, dst, client, **HOW)
    assert dst.read_bytes() == straight and names(dst.parent) == ["map.tif"]


def geolab(capsys, *arguments):
    "Exit code, standard output, standard error."
    code = 0
    try: main(["predict", *map(str, arguments)])
    except SystemExit as stop: code = stop.code or 0
    return code, *capsys.readouterr()


def test_the_command(place, client, tmp_path, capsys):
    run, image, _ = place
    address = client.scheduler.address
    predict_raster(run, image, tmp_path/"alone.tif", device="cpu", progress=False)
    code, said, _ = geolab(capsys, run, image, tmp_path/"map.tif", "--cluster", address)
    assert (code, said.split()[0]) == (0, str(tmp_path/"map.tif")) and (tmp_path/"map.tif").read_bytes() == (tmp_path/"alone.tif").read_bytes()
    found = []
    for folder, options in [("shared", ["--cluster", address]), ("lone", [])]:
        assert geolab(capsys, run, image, tmp_path/folder/"map.tif", "--polygons", *options)[0] == 0
        assert names(tmp_path/folder) == ["map.geojson", "map.parquet", "map.tif"]
        found.append(gpd.read_parquet(tmp_path/folder/"map.parquet"))
    assert len(found[0]) > 10 and found[0].equals(found[1])
    (tmp_path/"cut.tif").write_bytes(image.read_bytes()[:5000])
    (tmp_path/"images.csv").write_text(f"id,href\ngood,{image}\nbad,cut.tif\n")
    for found in ("1 mapped, 1 failed", "1 kept, 1 failed"):
        code, said, error = geolab(capsys, run, tmp_path/"images.csv", tmp_path/"maps", "--cluster", address)
        assert code == 1 and "2 images: " in said and all(part in said for part in found.split(", ")) and "geolab: bad: cannot read" in error
    assert (tmp_path/"maps"/"good.tif").read_bytes() == (tmp_path/"alone.tif").read_bytes() and names(tmp_path/"maps") == ["good.tif", "maps.jsonl"]


def test_a_scheduler_that_cannot_be_reached_is_refused_in_time(place, tmp_path, capsys):
    run, image, _ = place
    start = time.monotonic()
    with pytest.raises(ConfigError, match="no Dask scheduler answers at tcp://127.0.0.1:1 within 2 s"): predict_cluster(run, image, tmp_path/"map.tif", "tcp://127.0.0.1:1", patience=2, **HOW)
    with socket.socket() as mute: # takes the connection and never says a word
        mute.bind(("127.0.0.1", 0)); mute.listen()
        with pytest.raises(ConfigError, match="no Dask scheduler answers"): predict_cluster(run, image, tmp_path/"map.tif", f"tcp://127.0.0.1:{mute.getsockname()[1]}", patience=2, **HOW)
    assert time.monotonic() - start < 15
    code, _, error = geolab(capsys, run, image, tmp_path/"map.tif", "--cluster", "locale")
    assert code == 2 and "expected local, local:4, an address" in error
    assert names(tmp_path) == []


def test_a_cluster_of_this_machine_spends_little_on_waiting():
    "Its workers get the settings, and this process keeps its own."
    names = ("distributed.worker.profile.enabled", "distributed.admin.tick.interval")
    before = [dask.config.get(name) for name in names]
    with connect("local:1", 120) as own: assert list(own.run(lambda: [dask.config.get(name) for name in names]).values()) == [[False, "1s"]] != [before]
    assert [dask.config.get(name) for name in names] == before
