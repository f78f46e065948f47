"""One contract for every architecture that `build_segmenter` knows: any bands, any size, forward and backward, stored and loaded, a map drawn; and frozen stages through a real training."""
from types import SimpleNamespace
from unittest.mock import patch

import huggingface_hub
import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine
from timm.models import register_model, vision_transformer_sam
from torch import nn

from geolab.core import ConfigError, GeolabError, RunError
from geolab.data.raster import BandScale, write_geotiff
from geolab.inference.windows import predict_raster, predict_windows
from geolab.nn.foundation import SimpleFeaturePyramid, register_backbone
from geolab.nn.fusion import build_fusion_network
from geolab.nn.losses import BinaryFocalLoss, initialise_bias
from geolab.nn.segmentation import BACKBONES, architectures, build_segmenter, freeze_encoder
from geolab.training.fit import FitConfig, fit, image_logits
from geolab.training.runs import load_model, save_model

SMALL, TINY = "tu-tf_mobilenetv3_small_minimal_100", "tu-test_resnet"
LIST = [("UNet++", SMALL), ("DeepLabV3+", SMALL), ("SegFormer", "mit_b0"), ("UPerNet", "tu-swin_tiny_patch4_window7_224"), ("DPT", "tu-vit_small_patch14_dinov2"), ("DPT", "tu-vit_tiny_patch16_dinov3_qkvb"),
        ("DPT", "tu-samvit_test"), ("UNet", "tu-sam2_hiera_tiny"), ("Mask2Former", SMALL), ("UPerNet", "plain-vit")]


class PlainViT(nn.Module):
    "The last map of a ViT of torchvision's layers: a backbone that geolab does not know."
    def __init__(self, bands, side):
        super().__init__()
        self.patches, self.layer = nn.Conv2d(bands, 32, 16, 16), nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, image):
        x = self.patches(image)
        return self.layer(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


def plain_vit(bands, side): return SimpleFeaturePyramid(PlainViT(bands, side), 32, width=32)


default_cfgs = dict(samvit_test=vision_transformer_sam.default_cfgs["samvit_base_patch16"])  # where timm looks for what belongs to the function below


def samvit_test(pretrained=False, **kwargs):
    "SAM's image encoder with four small layers; the real ones have 86 million weights and more."
    options = dict(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2, global_attn_indexes=[1, 3], window_size=2, use_rel_pos=True, neck_chans=16)
    return vision_transformer_sam._create_vision_transformer("samvit_test", pretrained, **options | kwargs)


@pytest.fixture(scope="module", autouse=True)
def known():
    "The two encoders of this file have a name."
    register_model(samvit_test)
    register_backbone("plain-vit", plain_vit)
    yield
    del BACKBONES["plain-vit"]


def first_layer(network, bands):
    return next(p for p in network.network.encoder.parameters() if p.ndim == 4 and p.shape[1] == bands)


def test_the_list_is_all():
    assert set(architectures()) >= {"unetplusplus", "deeplabv3plus", "segformer", "upernet", "dpt", "mask2former"}


@pytest.mark.parametrize("architecture, encoder", LIST)
def test_three_bands_and_classes_train(architecture, encoder):
    "Channels-last, as `fit` has it: finite gradients reach the first layer; a frozen encoder gets none, and learns again when it is freed."
    torch.manual_seed(0)
    network = build_segmenter(architecture, encoder, in_channels=3, classes=3, input_size=64).to(memory_format=torch.channels_last)
    initialise_bias(network, [.8, .15, .05])
    image, target = torch.randn(2, 3, 37, 50).contiguous(memory_format=torch.channels_last), torch.randint(3, (2, 37, 50))
    for frozen in (True, False):
        freeze_encoder(network, "all" if frozen else 0).zero_grad()
        logits = network.train()(image)
        assert logits.shape == (2, 3, 37, 50)
        nn.functional.cross_entropy(logits, target).backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
        first = first_layer(network, 3).grad
        assert first is None if frozen else first.abs().sum() > 0


@pytest.mark.parametrize("architecture, encoder", LIST)
def test_five_bands_are_stored_loaded_and_mapped(architecture, encoder, tmp_path):
    "The loaded network gives the same logits, and a raster's map is what the network says of it."
    torch.manual_seed(0)
    network = build_segmenter(architecture, encoder, in_channels=5, input_size=64)
    initialise_bias(network, .01)
    batch = dict(image=torch.randn(2, 5, 41, 70), mask=torch.zeros(2, 41, 70, dtype=torch.int64), valid=torch.ones(2, 41, 70, dtype=torch.bool))
    logits, mask, valid = image_logits(network, batch)
    assert logits.shape == (2, 41, 70) and .001 < logits.sigmoid().mean() < .1
    BinaryFocalLoss()(logits, mask, valid=valid).backward()
    assert first_layer(network, 5).grad.isfinite().all() and first_layer(network, 5).grad.abs().sum() > 0

    bands = tuple("abcde")
    scale = BandScale(bands, (0.,)*5, (1.,)*5, "float32", 3.)
    save_model(tmp_path, network.eval(), builder="segmenter", arguments=network.arguments, scale=scale, tile_size=64)
    loaded, spec = load_model(tmp_path)
    with torch.no_grad(): assert torch.equal(loaded(batch["image"]), network(batch["image"]))

    image = np.random.default_rng(0).normal(size=(5, 45, 60)).astype(np.float32)
    write_geotiff(tmp_path/"image.tif", image, bands=bands, crs="EPSG:32633", transform=Affine(3, 0, 0, 0, -3, 0))
    with torch.no_grad(): want = network(torch.from_numpy(image)[None])[0, 0].numpy()
    run = SimpleNamespace(model=loaded, scale=scale, calibrator=None, tile_size=64, spec=spec)
    predict_raster(run, tmp_path/"image.tif", tmp_path/"map.tif", output="logit", device="cpu", progress=False)
    with torch.no_grad(): predict_windows(loaded, tmp_path/"image.tif", tmp_path/"windows.tif", scale=scale, tile=32, progress=False)
    with rasterio.open(tmp_path/"map.tif") as whole, rasterio.open(tmp_path/"windows.tif") as windows:
        assert np.isfinite(windows.read(1)).all() and windows.shape == (45, 60)
        np.testing.assert_allclose(whole.read(1), want, atol=1e-3)


def test_small_and_odd_sizes():
    for architecture, encoder in [("DPT", "tu-samvit_test"), ("Mask2Former", TINY), ("UPerNet", "plain-vit")]:
        network = build_segmenter(architecture, encoder, in_channels=4).eval()
        for size in [(1, 1), (33, 31)]:
            with torch.no_grad(): assert network(torch.randn(1, 4, *size)).shape == (1, 1, *size)


def test_weights_out_of_reach():
    "No network and an empty cache: the error says what to do."
    def cut_off(*args, **kwargs): raise OSError("name resolution is switched off")
    with patch("socket.getaddrinfo", cut_off), patch.object(huggingface_hub.constants, "HF_HUB_CACHE", "/nonexistent"):
        for architecture, encoder in [("DPT", "tu-vit_small_patch14_dinov2"), ("Mask2Former", "mit_b0")]:
            with pytest.raises(GeolabError, match="leave `encoder_weights=None`"): build_segmenter(architecture, encoder, in_channels=5, encoder_weights="imagenet")


def test_pairs_that_cannot_work():
    for architecture in ("UNet", "Mask2Former"):
        with pytest.raises(ConfigError, match="dpt goes on tu-samvit_test; .* goes on resnet18"): build_segmenter(architecture, "tu-samvit_test", in_channels=3)


def test_a_stored_backbone_that_nobody_registered(tmp_path):
    scale = BandScale(("red",), (0.,), (1.,), "float32", 3.)
    with patch.dict(BACKBONES):
        register_backbone("of-a-colleague", plain_vit)
        network = build_segmenter("UPerNet", "of-a-colleague", in_channels=1)
        save_model(tmp_path, network, builder="segmenter", arguments=network.arguments, scale=scale, tile_size=64)
    with pytest.raises(RunError, match="no encoder is called 'of-a-colleague'"): load_model(tmp_path)


class Tiles(torch.utils.data.Dataset):
    def __len__(self): return 4

    def __getitem__(self, i):
        mask = torch.zeros(32, 32, dtype=torch.int64)
        mask[4:12, 8:20] = i % 2
        return dict(image=torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(i)) + mask, mask=mask, valid=torch.ones(32, 32, dtype=torch.bool), block=f"b{i % 2}", id=f"tile {i}")


@pytest.mark.parametrize("build", [lambda: build_segmenter("unet", TINY, in_channels=4), lambda: build_fusion_network("unet", TINY, modalities=dict(optical=3, radar=1))], ids=["alone", "fusion"])
def test_frozen_stages_go_through_a_training_unchanged(build, tmp_path):
    torch.manual_seed(0)
    network = freeze_encoder(build(), 2)
    with torch.no_grad(): [p.add_(.01*torch.randn_like(p)) for p in network.parameters()]
    before = {name: x.clone() for name, x in network.state_dict().items()}
    held = {name for name in before if any(name.startswith(part + ".") for part in network.frozen)}
    config = FitConfig(max_epochs=2, batch_size=2, learning_rate=.01, weight_decay=.1)
    fit(network, BinaryFocalLoss(), Tiles(), Tiles(), config, out=tmp_path, progress=False)
    changed = {name for name, x in network.state_dict().items() if not torch.equal(x, before[name])}
    assert held and changed == set(before) - held
    assert any("running_mean" in name for name in held) and any("running_mean" in name for name in changed)
