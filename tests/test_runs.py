"""Altered, cut, foreign and dangerous run folders are refused, each with one clear message."""
import json
import os
import pickle
import random
import shutil

import pytest
import torch
from torch import nn

from geolab.core import RunError, content_hash, read_json, sha256_of, write_json
from geolab.data.raster import BandScale
from geolab.training.runs import BUILDERS, Run, StageLog, load_model, save_model, write_model_card

SCALE = BandScale(("red", "green"), (.1, .2), (.01, .02), "uint16", 3., 2)


def small(in_channels, hidden=6):
    return nn.Sequential(nn.Conv2d(in_channels, hidden, 3, padding=1), nn.BatchNorm2d(hidden), nn.Conv2d(hidden, 1, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A small run folder."
    BUILDERS["small"] = small
    folder, log = tmp_path_factory.mktemp("run"), None
    torch.manual_seed(0)
    model = save_model(folder, small(2), builder="small", arguments=dict(in_channels=2), scale=SCALE, tile_size=32)
    (folder/"config.yaml").write_text("recipe: demo\n")
    log = StageLog(folder, "demo", ["audit", "train"])
    log.record("audit", "a", [write_json(folder/"audit.json", dict(notes=["no remark"]))], 1)
    log.record("train", "b", [*model, write_json(folder/"history.json", [dict(epoch=1, train_loss=.5)])], 1)
    yield folder
    del BUILDERS["small"]


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path/"run")


def flipped(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ rng.randrange(1, 256)]) + content[at + 1:]


def reseal(path, **changes):
    "Change a JSON file, with a hash of itself that fits."
    kept = {k: v for k, v in (read_json(path) | changes).items() if k != "hash"}
    write_json(path, kept | dict(hash=content_hash(kept)))


def test_as_it_was_written_it_loads(run):
    network, spec = load_model(run)
    assert spec["tile_size"] == 32 and Run.load(run).scale == SCALE and not Run.load(run).missing
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), Run.load(run).model.state_dict().values()))


def test_a_real_segmenter_comes_back_bit_for_bit_and_asks_no_hub(tmp_path):
    from geolab.nn.segmentation import build_segmenter
    arguments = dict(architecture="unet", encoder="tu-mobilenetv3_small_050", in_channels=2)
    network = build_segmenter(**arguments).eval()
    save_model(tmp_path, network, builder="segmenter", arguments=arguments | dict(encoder_weights="imagenet"), scale=SCALE, tile_size=64)
    before = torch.get_rng_state()
    loaded, spec = load_model(tmp_path)
    assert spec["arguments"]["encoder_weights"] is None and torch.equal(before, torch.get_rng_state())
    x = torch.randn(1, 2, 50, 70)
    with torch.inference_mode(): assert torch.equal(loaded(x), network(x))


def test_hundred_flipped_bytes_of_the_weights(run):
    path, rng = run/"model.safetensors", random.Random(0)
    whole = path.read_bytes()
    for _ in range(100):
        path.write_bytes(flipped(whole, rng))
        with pytest.raises(RunError, match="altered"): load_model(run)
        with pytest.raises(RunError, match=r"model.safetensors \(stage train\)"): Run.load(run)


def test_twenty_cuts_of_the_weights(run):
    path, rng = run/"model.safetensors", random.Random(1)
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(14))]:
        path.write_bytes(whole[:size])
        with pytest.raises(RunError, match="cut short"): load_model(run)
        with pytest.raises(RunError, match="altered"): Run.load(run)


@pytest.mark.parametrize("name", ["model.json", "stages.json"])
def test_hundred_flipped_bytes_of_what_describes_the_rest(name, run):
    path, rng = run/name, random.Random(2)
    whole, content = path.read_bytes(), read_json(path)
    for _ in range(100):
        path.write_bytes(flipped(whole, rng))
        try: same = read_json(path) == content  # white space for white space
        except RunError: same = False
        if same: continue
        with pytest.raises(RunError): Run.load(run)
        if name == "model.json":
            with pytest.raises(RunError, match="model.json"): load_model(run)


class Evil:
    "Makes a folder when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


class Nested(Evil):
    def __reduce__(self): return list, ([Evil(self.path)],)


class Evaluates(Evil):
    def __reduce__(self): return eval, (f"__import__('os').mkdir({self.path!r})",)


@pytest.mark.parametrize("kind", [Evil, Nested, Evaluates])
@pytest.mark.parametrize("write", [lambda x, path: path.write_bytes(pickle.dumps(x)), torch.save])
def test_a_pickle_in_place_of_the_weights_never_runs(kind, write, run, tmp_path):
    canary = tmp_path/"canary"
    write(kind(str(canary)), run/"model.safetensors")
    with pytest.raises(RunError, match="altered"): load_model(run)
    reseal(run/"model.json", sha256=sha256_of(run/"model.safetensors"))
    with pytest.raises(RunError, match="cannot be read"): load_model(run)
    assert not canary.exists()
    pickle.loads(pickle.dumps(kind(str(canary))))
    assert canary.exists()  # it would have


@pytest.mark.parametrize("changes, message", [
    (dict(schema=0), "schema 0, this geolab reads schema 1"),
    (dict(builder="smal"), "`smal`, this geolab has .*did it mean `small`"),
    (dict(builder="os.system"), "names the builder `os.system`"),
    (dict(arguments=dict(in_channels=3)), "takes 3 bands, the scale has 2"),
    (dict(arguments=dict(in_channels=2, hidden=7)), r"\(6, 2, 3, 3\) in the file and \(7, 2, 3, 3\) in the network"),
    (dict(arguments=dict(in_channels=2, depth=1)), "cannot build"),
    (dict(bands=["red"]), "takes 2 bands, the scale has 1"),
])
def test_what_does_not_fit_names_both_sides(changes, message, run):
    reseal(run/"model.json", **changes)
    with pytest.raises(RunError, match=message): load_model(run)


def test_missing_pieces(run):
    for name in ("model.safetensors", "model.json"):
        kept = (run/name).read_bytes()
        (run/name).unlink()
        with pytest.raises(RunError, match="missing"): load_model(run)
        with pytest.raises(RunError, match=f"lacks {name}"): Run.load(run)
        (run/name).write_bytes(kept)
    (run/"stages.json").write_text(json.dumps({}))
    with pytest.raises(RunError, match="does not say which schema"): Run.load(run)
    (run/"stages.json").unlink()
    with pytest.raises(RunError, match="no stage of a run has finished"): Run.load(run)


def test_an_unfinished_run_names_its_stages(run):
    reseal(run/"stages.json", planned=["audit", "train", "map", "report"])
    with pytest.raises(RunError, match="map, report are missing; `geolab run demo --out .*` continues"): Run.load(run)
    partial = Run.load(run, partial=True)
    with pytest.raises(RunError, match="has no threshold.json; not finished: map, report"): partial.threshold
    assert "not finished" in repr(partial) and "map, report" in write_model_card(partial).read_text()


def test_names_from_a_folder_are_escaped_in_html(run):
    reseal(run/"model.json", builder="small", arguments=dict(in_channels=2, architecture="<script>"))
    assert "<script>" not in Run(run)._repr_html_()


def test_another_recipe_is_refused(run):
    with pytest.raises(RunError, match="recipe `demo`, not of `flood`"): StageLog(run, "flood")


def test_large_files_are_trusted_by_size_and_time(tmp_path):
    "A sparse file of 200 MB: unchanged it is not read again, touched it is."
    path = tmp_path/"map.tif"
    with open(path, "wb") as f: f.truncate(200_000_000)
    log = StageLog(tmp_path, "demo")
    log.record("map", "k", [path], 1)
    log.entries["map"]["outputs"]["map.tif"] = "not its hash"
    assert log.done("map", "k")
    os.utime(path, (1, 1))
    assert log.faults("map") == {"map.tif": "altered"}
