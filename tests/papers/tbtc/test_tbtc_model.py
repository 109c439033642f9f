"""TBTC: parameter counts, shapes, multiply-accumulates, keys; windows, shifts and tiles."""

from common.coding import exact
from common.coding.tiles import tiled
from common.complexity import complexity_of_parts

import pytest
import torch
from tbtc_cases import parameters, photograph, tiny
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tbtc import complexity
from tbtc.model import MODELS, build
from tbtc.slices import in_floats
from tbtc.swin import Block, WindowAttention, shift_mask


# --------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("name, counts", {
    "zyc2022-conv-hyperprior": (8_092_867, 21_385_155, 41_050_819),
    "zyc2022-conv-charm": (10_145_675, 29_078_031, 60_238_997),
    "zyc2022-swint-hyperprior": (9_116_406, 24_664_184, 41_802_588),
    "zyc2022-swint-charm": (11_169_214, 32_357_060, 60_990_766),
    "tcm": (45_180_752, 59_133_650, 76_568_148)}.items())
def test_parameter_count(name, counts):
    for quality, count in zip("SML", counts, strict=True):
        assert parameters(build(name, quality)) == count


@pytest.mark.parametrize("name, options, count", [
    ("zyc2022-conv-charm", {"charm_widths": "paper"}, 29_277_391),
    ("zyc2022-swint-hyperprior", {"split": "post"}, 24_670_340),
    ("zyc2022-swint-charm", {"charm_widths": "paper", "split": "post"}, 32_562_576),
    ("zyc2022-swint-hyperprior", {"num_heads": 4}, 24_645_008),
    ("zyc2022-swint-charm", {"num_heads": 4}, 32_337_884)])
def test_parameter_count_of_other_readings(name, options, count):
    assert parameters(build(name, "M", **options)) == count


def test_parameters_of_the_parts():
    conv, swint = build("zyc2022-conv-charm"), build("zyc2022-swint-charm")
    parts = ("g_a", "g_s", "h_a", "h_s", "entropy_bottleneck", "charm_mean_transforms",
             "charm_scale_transforms")
    rest = [11_712, 3_846_438, 3_846_438]
    for model, expected in ((conv, [8_013_440, 8_013_123, 2_396_736, 2_950_144]),
                            (swint, [9_139_416, 9_136_472, 3_065_892, 3_310_692])):
        assert [parameters(model.get_submodule(part)) for part in parts] == expected + rest
    widths = [[net.layers[k].out_channels for k in (0, 2)] for net in conv.charm_mean_transforms]
    assert widths[:3] == [[32, 32], [53, 42], [74, 53]] and widths[9] == [224, 128]
    nets = build("zyc2022-conv-charm", charm_widths="paper").charm_mean_transforms
    widths = [[net.layers[k].out_channels for k in (0, 2)] for net in nets]
    assert widths[:3] == [[64, 32], [64, 32], [85, 42]] and widths[9] == [234, 117]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quality, D, Hd", [("S", 192, 128), ("M", 320, 192), ("L", 448, 256)])
def test_shapes(name, quality, D, Hd, monkeypatch):
    if name == "tcm":
        D, Hd = 320, 192
    monkeypatch.setattr("tbtc.swin._masks", {})  # those of other tests have values
    with torch.no_grad(), FakeTensorMode():
        model = build(name, quality)
        sizes = [((256, 256), (16, 16)), ((512, 768), (32, 48))]
        for (height, width), (h, w) in sizes if quality == "M" else sizes[:1]:
            y = model.g_a(torch.empty(1, 3, height, width))
            assert y.shape == (1, D, h, w)
            z = model.h_a(y)
            assert z.shape == (1, Hd, h // 4, w // 4)
            assert model.g_s(y).shape == (1, 3, height, width)
            y_hat, scales, means = model.walk(model.hyper(z, in_floats), in_floats,
                                              lambda i, s, m: torch.zeros_like(m))
            assert y_hat.shape == scales.shape == means.shape == y.shape


def test_multiply_accumulates():
    """Size M at 512x768, both counting rules."""
    conv, swint = complexity.parts("zyc2022-conv-charm"), complexity.parts("zyc2022-swint-charm")
    for part in ("g_a", "g_s"):
        assert conv[part]["true"] + conv[part]["gdn"] == pytest.approx(98.15, abs=0.005)
        assert conv[part]["gdn"] == pytest.approx(13.21, abs=0.005)
        assert swint[part]["true"] == pytest.approx(97.44, abs=0.005)
        assert swint[part]["true"] + swint[part]["products"] == pytest.approx(103.21, abs=0.005)
    assert conv["g_s"]["output"] + conv["g_s"]["gdn"] == pytest.approx(352.95, abs=0.005)
    assert (conv["h_a"]["true"], conv["h_s"]["true"], conv["h_s"]["output"]) == pytest.approx(
        (1.29, 2.14, 3.47), abs=0.005)
    assert (swint["h_a"]["true"], swint["h_s"]["true"]) == pytest.approx((1.00, 1.10), abs=0.006)
    assert conv["context"]["true"] == swint["context"]["true"] == pytest.approx(11.81, abs=0.005)
    assert swint["h_a"]["true"] + swint["h_a"]["products"] == pytest.approx(1.01, abs=0.005)
    assert swint["h_s"]["true"] + swint["h_s"]["products"] == pytest.approx(1.11, abs=0.005)
    for name, numbers in (("conv-hyperprior", "encoder 99.4, decoder 100.3 GMACs, by output pixels "
                           "356.4"), ("conv-charm", "encoder 111.2, "),
                          ("swint-hyperprior", "encoder 98.4, decoder 98.5 "),
                          ("swint-charm", "encoder 110.3, decoder 110.3 ")):
        assert numbers in complexity.report([f"zyc2022-{name}"])
    assert "by output pixels 368.2" in complexity.report(["zyc2022-conv-charm"])
    paper = complexity_of_parts(build("zyc2022-conv-charm", charm_widths="paper"))
    assert sum(paper[f"charm_{kind}_transforms"]["macs_true"] for kind in ("mean", "scale")) / (
        1e9) == pytest.approx(12.12, abs=0.005)


def test_keys_are_the_source_s():
    keys = build("zyc2022-swint-charm", "XS").state_dict()
    for key in ("g_a.patch_embed.proj.weight", "h_a.patch_merger.proj.bias",
                "g_a.layers.2.blocks.5.attn.relative_position_bias_table",
                "g_s.layers.3.downsample.reduction.weight", "g_a.layers.0.downsample.norm.weight",
                "h_s.layers.1.blocks.4.mlp.fc1.weight", "g_a.layers.0.blocks.0.attn.qkv.bias",
                "h_s.layers.0.blocks.0.attn.proj.weight", "charm_mean_transforms.2.layers.4.bias",
                "charm_scale_transforms.0.layers.0.weight", "g_a.layers.1.blocks.0.norm2.weight"):
        assert key in keys
    assert "g_a.layers.3.downsample.reduction.weight" not in keys  # the last stage has none
    assert "g_a.0.weight" in build("zyc2022-conv-hyperprior", "XS").state_dict()


# ------------------------------------------------------------------------------------- mechanisms
@pytest.mark.parametrize("shift", [0, 2])
def test_block_is_timm_s(shift):
    torch.manual_seed(0)
    ours = Block(64, 4, shift)
    theirs = SwinTransformerBlock(64, (8, 12), num_heads=2, window_size=4, shift_size=shift)
    nn.init.normal_(ours.attn.relative_position_bias_table)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 8, 12, 64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_filling_is_not_seen():
    """A 5x6 map in a window of 8 is attention among 30 tokens."""
    torch.manual_seed(0)
    attention = WindowAttention(32, 8)
    nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(1, 5, 6, 32)
    q, k, v = attention.qkv(x.view(1, 30, 32)).chunk(3, 2)
    places = torch.tensor([8 * i + j for i in range(5) for j in range(6)])
    bias = attention.bias()[0][places][:, places]
    expected = attention.proj((q @ k.transpose(1, 2) * 32**-0.5 + bias).softmax(2) @ v)
    block = Block(32, 8, 0)
    block.attn = attention
    assert torch.allclose(block.attend(x, attention).flatten(1, 2), expected, atol=1e-5)


def test_shift_mask():
    assert shift_mask(8, 8, 4, 0, torch.device("cpu")) is None
    mask = shift_mask(8, 8, 4, 2, torch.device("cpu"))
    assert mask.shape == (4, 16, 16) and not mask[0].any()
    assert (mask[1].view(4, 4, 4, 4)[:, :2, :, 2:] == -100).all()  # what came round the border
    assert shift_mask(8, 8, 4, 2, torch.device("cpu")) is mask  # kept
    assert (shift_mask(4, 4, 4, 2, torch.device("cpu"))[0] != 0).any()  # a single window too


@pytest.mark.parametrize("layout", ["channels last", "channels first"])
def test_a_part_at_a_time_is_the_whole(layout, monkeypatch):
    torch.manual_seed(0)
    block, x = Block(32, 4, 2), torch.randn(2, 12, 8, 32)
    if layout == "channels first":  # g_s is given y_hat.permute(0, 2, 3, 1)
        x = torch.randn(2, 32, 12, 8).permute(0, 2, 3, 1)
    with torch.no_grad():
        expected, exactly = block(x), exact.run(block, x)
        monkeypatch.setattr("tbtc.swin.PART", 48)
        assert torch.allclose(block(x), expected, atol=1e-5)
        assert torch.equal(exact.run(block, x), exactly)


@pytest.mark.parametrize("name", MODELS)
def test_tiles_are_the_whole(name):
    """Windows do not move, and the halo covers what a latent sees."""
    model = tiny(name).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, WindowAttention):
            nn.init.normal_(module.relative_position_bias_table)
    x = photograph(320, 512).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = model.g_a(x)
        assert torch.allclose(tiled(model.g_a, x, down=16, halo=model.halo, tile=128, limit=0), y,
                              atol=1e-4 * float(y.abs().max()))
        z = torch.randn_like(y)
        x_hat = model.g_s(z)
        found = tiled(model.g_s, z, up=16, halo=model.halo, tile=128, limit=0)
        assert torch.allclose(found, x_hat, atol=1e-4 * float(x_hat.abs().max()))


def test_merge_and_split_order():
    from tbtc.swin import PatchMerge, PatchSplit

    merge = PatchMerge(1, 4)
    merge.norm = nn.Identity()
    merge.reduction.weight.data = torch.eye(4)
    x = torch.arange(4.0).view(1, 2, 2, 1)  # 0 1 / 2 3
    assert merge(x).flatten().tolist() == [0, 2, 1, 3]
    split = PatchSplit(8, 2)
    split.norm = nn.Identity()
    split.reduction.weight.data = torch.eye(8)
    y = torch.arange(8.0).view(1, 1, 1, 8)
    assert torch.equal(split(y).permute(0, 3, 1, 2), torch.pixel_shuffle(y.permute(0, 3, 1, 2), 2))
