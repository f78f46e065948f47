"""The thaw slump recipe with the guide's own YAML, with radar beside the image, and with keys that contradict each other."""
import json

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from geolab.cli import main
from geolab.core import GeolabError, read_json
from geolab.data.raster import read_info, read_window, write_geotiff
from geolab.recipes import thaw_slump
from geolab.recipes.guide import GUIDE, GuideConfig
from geolab.recipes.new_images import predict_image

TINY = ["backbone=tu-test_resnet", "input_size=[64, 64]", "batch_size=4", "max_epochs=2", "steps_per_epoch=3"]  # sizes and time; all else is as written
WORLD = ["world.scenes=4", "world.size=448"]
CHIP = ["split={block_size: 80, dead_zone: 16, train: 0.28, val: 0.24, cal: 0.24, test: 0.24}"]  # one chip of 512 px has no room for more


def quiet(text): pass


def geolab(*arguments):
    "The command, in this process; its exit code."
    with pytest.raises(SystemExit) as end: main([str(a) for a in arguments])
    return end.value.code


def band(path, name=1):
    with rasterio.open(path) as src: return src.read(name)


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    path = tmp_path_factory.mktemp("guide")/"guide.yaml"
    path.write_text(GUIDE)
    return path


@pytest.fixture(scope="module")
def world(guide, tmp_path_factory):
    return thaw_slump.run(guide, profile="full", settings=TINY + WORLD, out=tmp_path_factory.mktemp("world")/"run", say=quiet)


@pytest.fixture(scope="module")
def flood(guide, real_data, tmp_path_factory):
    chip, folder = real_data/"sen1floods11_spain"/"sample", tmp_path_factory.mktemp("flood")
    s2 = read_info(next((chip/"S2").glob("*.tif")))
    (green, nir), _ = read_window(s2, 0, 0, s2.height, s2.width, bands=["B3", "B8"])
    gate = write_geotiff(folder/"wet.tif", (green - nir)/(green + nir), crs=s2.crs, transform=s2.transform)  # stands in for a susceptibility model
    keys = TINY + CHIP + ["fusion=late", f"gate={gate}", "target_precision=0.3", "max_recall_loss=0.2"]
    return chip, thaw_slump.run(guide, profile="full", images=chip/"S2", labels=chip/"Labels", auxiliary=dict(radar=chip/"S1"), settings=keys, out=folder/"run", say=quiet)


def test_the_guide_as_written_runs_two_epochs(world):
    said = {k: v for k, v in world.config.items() if k in GuideConfig.model_fields}
    plain = GuideConfig().plain()
    assert {k for k in said if said[k] != plain[k]} == {text.split("=")[0] for text in TINY}  # nothing else was changed on the way
    assert [row["epoch"] for row in world.history] == [1, 2] and all("val_balanced_iou_rts" in row and "val_ap_1_500" in row for row in world.history)
    assert world.metrics["test"]["average_precision"] is not None and (world.path/"report.html").exists()


def test_a_radar_beside_the_image_goes_all_the_way(flood):
    chip, run = flood
    assert run.spec["builder"] == "fusion" and run.spec["arguments"]["modalities"] == dict(image=3, radar=2)
    stack = read_info(next((run.path/"stack").glob("*.tif")))
    assert stack.bands == run.scale.bands == ("B1", "B2", "B3", "radar_VV", "radar_VH")
    s2, s1 = (next((chip/name).glob("*.tif")) for name in ("S2", "S1"))
    assert np.array_equal(band(stack.path, 2), band(s2, 2)) and np.array_equal(band(stack.path, 4), band(s1, 1))  # bit for bit what was given
    assert "radar_VV" in (run.path/"MODEL_CARD.md").read_text() and run.metrics["test"]["average_precision"] > run.metrics["test"]["positive_fraction"]
    assert -30 < run.scale.mean[3] < 0 and run.audit["total"]["positive"] == 70_035
    notes = []
    thaw_slump.resume(run.path, say=notes.append)
    assert sum("done before" in line for line in notes) == 11


def test_two_stages_are_chosen_together_and_measured(flood):
    _, run = flood
    kept = read_json(run.path/"two_stage.json")
    two, cost = kept["two_stage"], kept["test"]
    assert two["threshold"]["certified"] is False and "60 are needed" in two["threshold"]["reason"]  # ten blocks certify nothing
    assert two["max_loss"] == .2 and two["recall_lost"] <= .2 and cost["cut"] == two["cut"] and 0 < cost["area_removed"]["value"] < 1 and cost["recall_lost"]["interval"]
    whole, gated, wet = band(next((run.path/"map").glob("*.tif"))), band(next((run.path/"map"/"gated").glob("*.tif"))), band(run.path.parent/"wet.tif")
    searched = np.isfinite(gated)
    assert (wet[searched] >= two["cut"]).all() and (wet[~searched & np.isfinite(whole)] < two["cut"]).all() and np.array_equal(gated[searched], whole[searched])
    assert (run.path/"map"/"gated"/"polygons.parquet").exists()
    card = (run.path/"MODEL_CARD.md").read_text()
    assert "With a gate before the network" in (run.path/"report.html").read_text()
    assert "## Two stages" in card and f"removes {cost['area_removed']['value']:.3f}" in card and "Fusion: late, of image (B1, B2, B3); radar (radar_VV, radar_VH)." in card


def test_early_fusion_learns_from_the_same_files(guide, flood, tmp_path):
    chip, late = flood
    run = thaw_slump.run(guide, profile="full", images=chip/"S2", labels=chip/"Labels", auxiliary=[f"radar={chip/'S1'}"], settings=TINY + CHIP + ["fusion=early"], out=tmp_path/"run", until="train", say=quiet)
    assert run.spec["arguments"]["mode"] == "early" and run.scale == late.scale and run.spec["parameters"] < late.spec["parameters"]


def test_new_images_with_and_without_radar(flood, tmp_path, capsys):
    chip, run = flood
    s2, s1 = (str(next((chip/name).glob("*.tif"))) for name in ("S2", "S1"))
    assert geolab("predict", run.path, s2, tmp_path/"full.tif", "--auxiliary", f"radar={s1}") == 0
    assert np.array_equal(band(tmp_path/"full.tif"), band(next((run.path/"map").glob("*_probability.tif"))), equal_nan=True)  # the map of the run itself
    assert geolab("predict", run.path, s2, tmp_path/"none.tif") == 2
    assert "radar is missing" in capsys.readouterr().err and not (tmp_path/"none.tif").exists()
    with pytest.warns(UserWarning, match="mapped without radar"): assert geolab("predict", run.path, s2, tmp_path/"some.tif", "--without", "radar", "--polygons") == 0
    assert np.isfinite(band(tmp_path/"some.tif")).all() and not np.allclose(band(tmp_path/"some.tif"), band(tmp_path/"full.tif"), atol=1e-4, equal_nan=True)
    features = json.loads((tmp_path/"some.geojson").read_text())["features"]
    assert not any(f["properties"]["certified"] for f in features)
    stack = next((run.path/"stack").glob("*.tif"))
    with pytest.warns(UserWarning, match="mapped without radar"): assert geolab("predict", run.path, stack, tmp_path/"again.tif", "--without", "radar") == 0
    assert np.array_equal(band(tmp_path/"again.tif"), band(tmp_path/"some.tif"))  # whatever the radar bands of the source hold


def test_bands_of_one_raster_as_modalities(tmp_path):
    keys = ["fusion=late", "input_channels=null", "modalities={rgb: [red, green, blue], ground: [relief, ndvi]}", "drop_modality=0.3", "train_pos_neg_ratio=1:2"]
    run = thaw_slump.run(settings=TINY + WORLD + keys, out=tmp_path/"run", until="threshold", say=quiet)
    assert run.scale.bands == ("red", "green", "blue", "relief", "ndvi") and not (tmp_path/"run"/"stack").exists()
    source = next((tmp_path/"run"/"data"/"images").glob("*.tif"))
    info = read_info(source)
    with rasterio.open(source) as src: light = src.read(info.indexes(["red", "green", "blue"]))
    write_geotiff(tmp_path/"rgb.tif", light, crs=info.crs, transform=info.transform, nodata=info.nodata, bands=["red", "green", "blue"])
    with pytest.raises(GeolabError, match="lacks relief, ndvi.*say that ground is missing"): predict_image(run, tmp_path/"rgb.tif", tmp_path/"x.tif")
    with pytest.warns(UserWarning, match="without ground"): predict_image(run, tmp_path/"rgb.tif", tmp_path/"map.tif", without=["ground"])
    assert np.isfinite(band(tmp_path/"map.tif")).any()


@pytest.mark.parametrize("keys", [["loss=tversky", "train_ratio_ramp_to=1:4", "train_ratio_ramp_epochs=1", "accumulate=2"], ["loss=combined", "dice_weight=0.5"], ["soft_labels=gaussian", "scales=[1, 2]"]], ids=" ".join)
def test_losses_labels_and_ramps_train(world, tmp_path, keys):
    import shutil
    shutil.copytree(world.path/"data", tmp_path/"data")
    images, labels = tmp_path/"data"/"images", tmp_path/"data"/"labels.gpkg"
    run = thaw_slump.run(profile="full", images=images, labels=labels, settings=TINY + keys, out=tmp_path/"run", until="calibrate", say=quiet)
    assert len(run.history) == 2 and np.isfinite([row["train_loss"] for row in run.history]).all()
    calibration = read_json(run.path/"calibration.json")
    assert (calibration["focal"] is None) == any("loss=" in key for key in keys)  # the inverse of the focal bias belongs to the focal loss
    hist = run.scores["test"]
    assert hist.edges[-1] == (100 if any("loss=" in key for key in keys) else 20) and not hist.counts[:, 0, [0, -1]].any()  # no positive beyond the bins


CONTRADICTIONS = {
    "optimizer=adam": "set optimizer=adamw, or weight_decay=0",
    "input_size=[512, 512]": "the largest is 448 x 448 pixels; set input_size to 448 or less",
    "bands=[red, red, blue]": "bands names red twice",
    "fusion=early": "there is nothing beside the image",
    "fusion=late & architecture=dpt": "tokens beside its maps",
    "fusion=late & modalities={rgb: [red, green], ground: [green]}": "modalities name green twice",
    "fusion=late & modalities={rgb: [red], ground: [radar]}": "there is no band `radar`",
    "fusion=early & fusion_attention_at=[5]": "set fusion=late, or leave fusion_attention_at out",
    "fusion=late & fusion_attention_at=[9] & modalities={rgb: [red], ground: [relief]}": "reads the levels",
    "modalities={rgb: [red], ground: [relief]}": "set fusion=early or late, or leave modalities out",
    "drop_modality=0.5": "leave drop_modality out",
    "early_stopping_metric=val_iou": "is not computed; choose one of",
    "loss=tversky & focal_gamma=5": "focal_gamma is 5.0, but loss is tversky",
    "fp_weight=0.9": "fp_weight is 0.9, but loss is focal",
    "max_recall_loss=0.2": "there is no gate",
    "soft_width=2": "set soft_labels=gaussian or distance",
    "train_ratio_ramp_to=1:50": "needs both train_ratio_ramp_to and train_ratio_ramp_epochs",
    "freeze_encoder=2": "frozen stages would keep",
    "derive=[slope]": "set fusion=early or late and give --auxiliary dem",
    "derive=[ndvi]": "so nir is missing",
    "min_lr=1": "is above learning_rate",
}


@pytest.mark.parametrize("keys", CONTRADICTIONS)
def test_contradictory_configurations_are_refused_before_anything_is_done(tmp_path, keys):
    with pytest.raises(GeolabError) as error: thaw_slump.run(profile="full", settings=[*TINY, *WORLD, *keys.split(" & ")], out=tmp_path/"run", say=quiet)
    assert CONTRADICTIONS[keys] in str(error.value)
    assert not (tmp_path/"run").exists()


def test_auxiliary_rasters_that_do_not_fit_are_refused(tmp_path):
    rng, place = np.random.default_rng(0), dict(crs="EPSG:32608", transform=Affine(3, 0, 500000, 0, -3, 7700000))
    image = write_geotiff(tmp_path/"a.tif", rng.random((3, 96, 96), dtype=np.float32), bands=["red", "green", "blue"], **place)
    mask = write_geotiff(tmp_path/"mask"/"a.tif", (rng.random((96, 96)) < .1).astype(np.uint8), **place)
    away = write_geotiff(tmp_path/"away.tif", rng.random((96, 96), dtype=np.float32), crs="EPSG:32608", transform=Affine(3, 0, 600000, 0, -3, 7700000))
    two = write_geotiff(tmp_path/"two.tif", rng.random((2, 96, 96), dtype=np.float32), **place)
    def refused(says, keys=("fusion=early",), **kwargs):
        with pytest.raises(GeolabError) as error: thaw_slump.run(settings=[*TINY, *keys], out=tmp_path/"run", say=quiet, **kwargs)
        assert says in str(error.value) and not (tmp_path/"run").exists()
    given = dict(images=image, labels=mask.parent)
    refused("does not meet", auxiliary=dict(dem=away), **given)
    refused("a height model has one", auxiliary=dict(dem=two), **given)
    refused("lies on another grid", (f"gate={away}",), **given)
    refused("no raster at", auxiliary=dict(dem=tmp_path/"missing.tif"), **given)
    refused("expected NAME=path", auxiliary=[str(two)], **given)
    refused("give --images and --labels too", auxiliary=dict(dem=two))
    refused("slope, which come from the heights", ("derive=[slope]",), auxiliary=dict(dem=two), **given)
