"""ConvNeXTIC: six revisions, their ablations, two context models, two file formats."""

import importlib
import json
import re
import shlex
import struct
from pathlib import Path

from common import UserError, data
from common.coding import bitstream, exact, image_file
from common.complexity import complexity
from common.loss import RateDistortionLoss
from common.training.checkpoints import Checkpoints

import pytest
import torch
from PIL import Image

from convnextic import ablate, codec, train
from convnextic.blocks import Depthwise
from convnextic.context import AROUND, CHECKERBOARD, CORNERS, EDGES, SCCTX, anchors, lattices
from convnextic.model import build, load
from convnextic.variants import BASELINE, VARIANTS

ROOT = Path(__file__).parents[1]
ABLATIONS = [  # option, value: each beside v1_patch
    ("resample_norm", "layernorm"), ("block_norm", "gdn"), ("block_norm", "batchnorm"),
    ("block_norm", "none"), ("depths", (3, 3, 9, 3, 3, 3)), ("decoder_dw", "convtranspose"),
    ("kernel_size", 5), ("dw_groups", 4), ("drop_path_rate", 0.1), ("mlp_ratio", 2),
    ("resample", "k3s2"), ("stem", "k2s2"), ("stem", "k5s2"), ("context", "scctx"),
    ("external_attention", True), ("variable_rate", True), ("layer_scale_init", 0.1)]
CASES = [(variant, {}) for variant in VARIANTS] + [("v1_patch", dict([a])) for a in ABLATIONS]


def lively(variant, seed=0, **options):
    """A small network whose blocks do something and whose latents are not all zero."""
    torch.manual_seed(seed)
    merged = VARIANTS[variant] | options
    options.setdefault("layer_scale_init", 0.5)
    model = build(variant, 8, 24 if merged["context"] == "scctx" else 12, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(("g_a.3.down", "h_a.1.down")) and p.dim() == 4:
                p.mul_(6)
    model.update(force=True)
    return model.eval()


def rate_of(model):
    return {"lmbda": 0.02} if model.variable_rate else {}


@pytest.fixture(scope="module")
def x():
    image = data.to_float(data.read_image(data.KODAK / "kodim23.png"))
    return image[None, :, 100:228, 200:328]


# --------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("variant, options, counts", [
    ("v0_ln", {}, (11_508_937, 29_023_049)), ("v1_patch", {}, (11_505_859, 29_018_307)),
    ("v1_patch", {"depths": (3, 3, 9, 3, 3, 3)}, (13_502_915, 33_754_307)),
    ("v2_stride2", {}, (12_618_691, 31_670_595)), ("v3_scctx", {}, (24_723_299, 45_207_907)),
    ("v4_ea", {}, (25_119_203, 46_096_867)), ("v5_vr", {}, (24_811_619, 45_424_483))])
def test_parameter_count(variant, options, counts):
    for widths, count in zip(((128, 192), (192, 320)), counts, strict=True):
        model = build(variant, *widths, **options)
        assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("variant, giga", [("v0_ln", (26.63, 60.17)),
                                           ("v2_stride2", (112.77, 254.34)),
                                           ("v5_vr", (132.03, 277.51))])
def test_multiply_accumulates(variant, giga):
    for widths, expected in zip(((128, 192), (192, 320)), giga, strict=True):
        model = build(variant, *widths)
        counts = complexity(model, **rate_of(model))
        assert (counts["macs_true"] + counts["macs_masked"]) / 1e9 == pytest.approx(expected,
                                                                                  abs=0.006)


@pytest.mark.parametrize("dim, k", [(48, 7), (6, 5), (5, 7)])  # blocks of 16, 2 and 1 channels
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_the_depthwise_convolution(dim, k, precision):
    torch.manual_seed(0)
    conv = Depthwise(dim, dim, k, padding=k // 2, groups=dim)
    x = torch.randn(2, dim, 9, 12).contiguous(memory_format=torch.channels_last)
    weight = torch.randn_like(x)
    found = []
    for mode in (True, False):  # the second is PyTorch's
        conv.train(mode).zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16" and mode):
            (conv(leaf) * weight).sum().backward()
        found.append((leaf.grad, conv.weight.grad, conv.bias.grad))
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    for ours, theirs in zip(*found, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance


@pytest.mark.parametrize("widths, g_a, h_a, h_s, g_s, bottleneck, mcm, scctx", [
    ((128, 192), (286_720, 701_568, 978_560, 833_472), (498_304, 424_576), (424_576, 719_744),
     (833_408, 978_560, 701_568, 286_595), 7_808, (663_936, 2_951_424),
     (16_124_512, 486_784, 436_544)),
    ((192, 320), (626_688, 1_556_160, 2_168_256, 2_228_800), (1_165_248, 944_064),
     (944_064, 1_718_656), (2_228_672, 2_168_256, 1_556_160, 626_499), 11_712,
     (1_843_840, 8_195_840), (23_587_680, 2_125_440, 1_551_552))])
def test_parts(widths, g_a, h_a, h_s, g_s, bottleneck, mcm, scctx):
    def sizes(modules):
        return tuple(sum(p.numel() for p in m.parameters()) for m in modules)

    for variant in ("v2_stride2", "v3_scctx", "v5_vr"):
        model = build(variant, *widths)
        assert (sizes(model.g_a), sizes(model.h_a)) == (g_a, h_a)
        assert (sizes(model.h_s), sizes(model.g_s)) == (h_s, g_s)
        assert sizes([model.entropy_bottleneck]) == (bottleneck,)
        context = model.context_model
        if variant == "v2_stride2":
            assert sizes(context.contexts) == (mcm[0],) * 3
            assert sizes([context.parameters_network]) == mcm[1:]
        else:
            assert sizes([context.channel_contexts, context.space_contexts,
                          context.parameters_networks]) == scctx


@pytest.mark.parametrize("variant, y, z", [("v0_ln", 8, 2), ("v1_patch", 8, 2),
                                           ("v2_stride2", 16, 4), ("v3_scctx", 16, 4)])
def test_shapes(variant, y, z):
    model = build(variant, 8, 136).eval()
    model.update(force=True)
    image = torch.rand(1, 3, 256, 256)
    latent = model.analyse(image)
    assert latent.shape == (1, 136, y, y) and model.h_a(latent).shape == (1, 8, z, z)
    output = model(image)
    assert output["x_hat"].shape == image.shape and set(output["likelihoods"]) == {"y", "z"}


def test_drop_rates_are_one_ramp_over_each_coder():
    model = build("v2_stride2", 8, 12)
    for parts in ((model.g_a, model.h_a), (model.h_s, model.g_s)):
        rates = [b.drop_path.drop_prob for part in parts for stage in part for b in stage.blocks]
        assert rates == pytest.approx([0.1 * i / 17 for i in range(18)])


def test_masks():
    for taps, count in ((CORNERS, 4), (EDGES, 4), (AROUND, 8), (CHECKERBOARD, 12)):
        assert sum(map(sum, taps)) == count
    masks = torch.stack(lattices(5, 7))
    assert (masks.sum(0) == 1).all() and masks[2, 0, 1] and masks[3, 1, 0]
    assert not anchors(4, 4)[0, 0] and anchors(4, 4)[0, 1]


def test_cosine_climbs_again_past_T_max():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=1e-4)
    args = train.flags().parse_args("--lr_schedule cosine --T_max 250 --eta_min 1e-6".split())
    scheduler, rates = train.schedule(optimizer, args), {}
    for epoch in range(1, 401):
        optimizer.step()
        scheduler.step()
        rates[epoch] = optimizer.param_groups[0]["lr"]
    assert rates[125] == pytest.approx(5.05e-5, rel=1e-3)
    assert rates[250] == pytest.approx(1e-6, rel=1e-3)
    assert rates[400] == pytest.approx(6.58e-5, rel=1e-2)


def test_multipliers_of_the_qualities():
    for quality, (lmbda, low, high) in {"1": (0.0018, 0.0003, 0.0018),
                                        "8": (0.18, 0.03, 0.23)}.items():
        args = train.flags().parse_args(["--quality_level", quality])
        train.choose_lmbda(args)
        assert (args.lmbda, args.lambda_min, args.lambda_max) == (lmbda, low, high)


# ------------------------------------------------------------------------------------- mechanisms
@pytest.mark.parametrize("variant, options", CASES)
def test_trains_codes_and_decodes(variant, options, x):
    """Every revision and every ablation; a file decodes to the encoder's reconstruction."""
    model = lively(variant, **options)
    rate = rate_of(model)
    batch = torch.cat([x, x.flip(-1)])
    lmbda = torch.tensor([0.01, 0.03]) if rate else None
    output = model.train()(batch, lmbda)
    bits = sum(-p.log2().sum() for p in output["likelihoods"].values())
    (bits / 128**2 + 100 * (output["x_hat"] - batch).square().mean()).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None]
    assert all(n.endswith("quantiles") for n in still)
    model.eval()
    with torch.no_grad():
        expected = model(x, **rate)["x_hat"].clamp(0, 1)[0]
    file = image_file.encode_image(model, x[0], **rate)
    assert torch.equal(image_file.decode_image(model, file), expected)


@pytest.mark.parametrize("variant, options", CASES)
def test_exact_h_s_is_h_s(variant, options):
    model = lively(variant, **options)
    z_hat = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(1)).mul(3).round()
    with torch.no_grad():
        expected = model.h_s(z_hat)
    found = exact.run(model.h_s, z_hat)
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max() + 1e-3


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(24), "2d"])
def test_exact_layer_norm(norm):
    """Close to the float one, and the same whatever the order of channels."""
    from timm.layers import LayerNorm2d

    torch.manual_seed(0)
    norm = LayerNorm2d(24) if norm == "2d" else norm
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    shape = (2, 24, 5, 6) if isinstance(norm, LayerNorm2d) else (2, 5, 6, 24)
    x = 30 * torch.randn(shape)
    found = exact.run(norm, x)
    assert torch.allclose(found.float(), norm(x).detach(), atol=2e-4)
    order = torch.randperm(24)
    dim = 1 if isinstance(norm, LayerNorm2d) else 3
    with torch.no_grad():
        norm.weight.copy_(norm.weight[order].clone())
        norm.bias.copy_(norm.bias[order].clone())
    assert torch.equal(exact.run(norm, x.index_select(dim, order)), found.index_select(dim, order))


def parameters_of(model, y_hat, params):
    with torch.no_grad():
        _, scales, means = model.context_model(y_hat, params, y_hat)
    return torch.cat([scales, means])


def test_mcm_sees_what_comes_before():
    """A change of y_k leaves the parameters of y_1 to y_k alone, and changes y_(k+1)'s."""
    model = lively("v2_stride2")
    y_hat, params = torch.randn(1, 12, 8, 8).round(), torch.randn(1, 24, 8, 8)
    before = parameters_of(model, y_hat, params)
    masks = lattices(8, 8)
    for k, mask in enumerate(masks):
        changed = (parameters_of(model, y_hat + 3 * mask, params) != before).any(1).any(0)
        assert not any(changed[masks[j]].any() for j in range(k + 1))
        assert k == 3 or changed[masks[k + 1]].all()


def test_scctx_sees_what_comes_before():
    model = lively("v3_scctx")
    y_hat, params = torch.randn(1, 24, 8, 8).round(), torch.randn(1, 48, 8, 8)
    before = parameters_of(model, y_hat, params)
    sizes, anchor = model.context_model.sizes, anchors(8, 8)
    assert sizes == (2, 2, 4, 8, 8) and SCCTX(320).sizes == (16, 16, 32, 64, 192)
    for k, size in enumerate(sizes):
        start = sum(sizes[:k])
        for part in (anchor, ~anchor):
            disturbed = y_hat.clone()
            disturbed[:, start : start + size] += 3 * part
            changed = (parameters_of(model, disturbed, params) != before).any(0)
            assert not changed[:start].any()
            mine = changed[start : start + size].any(0)
            assert not mine[anchor].any()
            assert mine[~anchor].all() if part is anchor else not mine.any()
            assert k == 4 or changed[start + size :].any()


@pytest.mark.parametrize("lambda_input", ["log", "raw"])
def test_scaling_nets_begin_at_one(lambda_input, x):
    """v5 at the start is v3 with the same weights, at every lmbda."""
    fixed, variable = lively("v3_scctx"), lively("v5_vr", lambda_input=lambda_input)
    variable.load_state_dict({**variable.state_dict(), **fixed.state_dict()})
    with torch.no_grad():
        expected = fixed(x)["x_hat"]
        for lmbda in (0.0001, 0.2):
            assert torch.equal(variable(x, lmbda)["x_hat"], expected)
    with pytest.raises(UserError, match="give it a lmbda"):
        variable(x)


def test_variable_rate_loss_weighs_each_sample():

    x, x_hat = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    output = {"x_hat": x_hat, "likelihoods": {"y": torch.full((2, 1, 8, 8), 0.5)}}
    lmbda = torch.tensor([0.001, 0.5])
    losses = RateDistortionLoss(0.1)(output, x, lmbda)
    each = [255**2 * (a - b).square().mean() for a, b in zip(x, x_hat, strict=True)]
    expected = 1 + (0.001 * each[0] + 0.5 * each[1]) / 2
    assert losses["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_drawn_multipliers():
    args = train.flags().parse_args(["--variant", "v5_vr", "--quality_level", "7"])
    train.choose_lmbda(args)
    drawn = torch.cat([train.draw_lmbda(args, step, 8) for step in range(500)])
    values = drawn.unique()
    assert len(values) == 21 and values[0] == pytest.approx(0.013)
    assert values.diff().tolist() == pytest.approx([(0.0932 - 0.013) / 20] * 20, rel=1e-3)


def test_tables_follow_the_weights(x):
    """A forced update after a training step: the source kept its first tables for ever."""
    model = lively("v2_stride2")
    before = model.entropy_bottleneck._quantized_cdf.clone()
    optimizer = torch.optim.SGD(model.entropy_bottleneck.parameters(), lr=1.0)
    (-model.train()(x)["likelihoods"]["z"].log2().mean()).backward()
    optimizer.step()
    model.update(force=True)
    after = model.entropy_bottleneck._quantized_cdf
    assert before.shape != after.shape or not torch.equal(before, after)


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_have_the_estimated_size(variant, x):
    """Within 1 %, of a network whose densities cover its latents."""
    model = lively(variant)
    image = data.to_float(data.read_image(data.KODAK / "kodim23.png"))[None]
    context = model.context_model
    networks = [context.parameters_network] if model.context == "mcm" else (
        context.parameters_networks)
    with torch.no_grad():
        spread = model.analyse(image, **rate_of(model)).std()
        for network, channels in zip(networks, context.sizes, strict=True):
            network[-1].bias[:channels] = 1.5 * spread
        model.h_a[1].down[-1].weight /= 20  # untrained, p(z) covers +-10
    rate = rate_of(model)
    with torch.no_grad():
        likelihoods = model(image, **rate)["likelihoods"].values()
    bits = sum(float(-p.double().log2().sum()) for p in likelihoods)
    strings = [s for s, in model.compress(image, **rate)["strings"]]
    assert abs(8 * sum(map(len, strings)) - bits) < 0.01 * bits + 64 * len(strings)  # their ends


@pytest.mark.parametrize("variant, options", CASES)
def test_bare_weights_tell_their_options(variant, options, x, tmp_path):
    if "decoder_dw" in options:
        pytest.skip("a transposed depthwise convolution has the shape of an ordinary one")
    model = lively(variant, **options)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    found = load(tmp_path / "bare.pt")
    for key in BASELINE:
        if key not in ("drop_path_rate", "layer_scale_init"):  # act in training, at the start
            assert getattr(found, key) == getattr(model, key), key
    with torch.no_grad():
        assert torch.allclose(found(x, **rate_of(model))["x_hat"],
                              model(x, **rate_of(model))["x_hat"], atol=1e-4)


@pytest.mark.parametrize("options, message", [
    ({"variant": "v9"}, "choose from v0_ln"), ({"depths": (1, 2)}, "six positive"),
    ({"kernel_size": 4}, "odd"), ({"dw_groups": 3}, "divisor of 8 and 12"),
    ({"drop_path_rate": 1.0}, "below 1"), ({"stem": "k9"}, "patch4"),
    ({"dpeths": 1}, "no option dpeths")])
def test_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        build(**{"variant": "v2_stride2", "embed_dim": 8, "latent_dim": 12} | options)


# ------------------------------------------------------------------------------------ file formats
@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for variant in ("v2_stride2", "v3_scctx", "v5_vr"):
        model = lively(variant)
        options = {key: getattr(model, key) for key in BASELINE}
        options |= {"variant": variant, "lambda_min": 0.0007, "lambda_max": 0.013}
        torch.save({"model": model.state_dict(), "config": options},
                   folder / f"{variant}.pt")
    Image.open(data.KODAK / "kodim23.png").crop((100, 100, 401, 350)).save(folder / "in.png")
    return folder


@pytest.mark.parametrize("variant, strings", [("v2_stride2", 5), ("v3_scctx", 2)])
def test_source_format(variant, strings, weights, tmp_path):
    """Its header, byte for byte, and back: a 301x250 image returns with its size."""
    path, out = tmp_path / "a.bin", tmp_path / "a.png"
    checkpoint = ["--checkpoint", str(weights / f"{variant}.pt")]
    codec.main(["encode", str(weights / "in.png"), "-o", str(path), "--format", "source", "-q", "8",
                *checkpoint])
    file = path.read_bytes()
    assert file[:2] == bytes([0, 7])
    assert struct.unpack(">5I", file[2:22]) == (250, 301, 4, 8, strings)
    parts = codec.unpack_source(file, variable=False)
    assert len(file) == 22 + 4 * strings + sum(map(len, parts.strings))
    assert (parts.metric, parts.quality, parts.size) == ("mse", 8, (250, 301))
    codec.main(["--command=decode", "--input", str(path), "-o", str(out), *checkpoint])
    model = load(weights / f"{variant}.pt")
    x = data.to_float(data.read_image(weights / "in.png"))
    padded = torch.nn.functional.pad(x, (105, 106, 3, 3))[None]  # zeros, centred, to 256x512
    with torch.no_grad():
        expected = model(padded)["x_hat"].clamp(0, 1)[0, :, 3:253, 105:406]
    assert torch.equal(data.read_image(out), data.to_uint8(expected))


def test_metric_and_quality_in_the_header(weights):
    model, x = load(weights / "v2_stride2.pt"), torch.rand(3, 64, 64)
    for metric, quality, code in (("mse", 1, 0x00), ("mse", 8, 0x07), ("ms-ssim", 3, 0x12)):
        assert codec.pack_source(model, x, {}, None, None, quality, metric)[1] == code


@pytest.mark.parametrize("form", ["ours", "source"])
def test_patches_of_a_variable_rate(form, weights, tmp_path):
    """Odd remainders; the rate is in the file."""
    path, out = tmp_path / "a.bin", tmp_path / "a.png"
    checkpoint = ["--checkpoint", str(weights / "v5_vr.pt")]
    codec.main(["encode", str(weights / "in.png"), "-o", str(path), "--format", form, "-lb", "130",
                "-ph", "128", "-pw", "192", *checkpoint])
    codec.main(["decode", str(path), "-o", str(out), *checkpoint])
    model = load(weights / "v5_vr.pt")
    x = data.to_float(data.read_image(weights / "in.png"))
    patches, (top, left) = codec.cut(x, (128, 192), "zeros" if form == "source" else "replicate")
    assert len(patches) == 4
    with torch.no_grad():
        a, b, c, d = (model(p[None], 0.013)["x_hat"].clamp(0, 1)[0] for p in patches)
    whole = torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1)
    expected = whole[:, top : top + 250, left : left + 301]
    assert torch.equal(data.read_image(out), data.to_uint8(expected))
    if form == "source":
        header = struct.unpack(">BB6I4I", path.read_bytes()[:42])
        assert header == (0, 2, 250, 301, 128, 192, 1, 130, 2, 3, 4, 2)


def test_quality_is_a_rate_of_a_variable_rate_model(weights, tmp_path, capsys):
    path = tmp_path / "a.bin"
    encode = ["encode", str(weights / "in.png"), "-o", str(path), "--checkpoint",
              str(weights / "v5_vr.pt")]
    for flags, lmbda in (([], 0.0067), (["-q", "1"], 0.0018), (["-q", "4", "-lb", "7"], 0.0007)):
        codec.main([*encode, *flags])
        assert f"lmbda {lmbda:g}" in capsys.readouterr().out
    with pytest.raises(UserError, match="trained for 7 to 130"):
        codec.main([*encode, "-q", "5"])
    with pytest.raises(UserError, match="has one rate"):
        codec.main([*encode[:-1], str(weights / "v2_stride2.pt"), "-lb", "35"])


def test_readme_form_of_the_source(weights, tmp_path):
    path = tmp_path / "compressed.bin"
    codec.main(["encode", "--model", "nic", "-m", "mse", "-q", "1", "-o", str(path),
                str(weights / "in.png"), "--checkpoint", str(weights / "v2_stride2.pt")])
    assert path.read_bytes().startswith(bitstream.MAGIC)
    codec.main(["decode", "-o", str(tmp_path / "out.png"), str(path), "--checkpoint",
                str(weights / "v2_stride2.pt")])
    assert Image.open(tmp_path / "out.png").size == (301, 250)


@pytest.mark.parametrize("change, message", [
    (lambda f: b"\x07" + f[1:], "model 7"), (lambda f: f[:1] + b"\x48" + f[2:], "code 72"),
    (lambda f: f[:-5], "cut short"), (lambda f: f[:10], "cut short"), (lambda f: b"", "empty"),
    (lambda f: f + b"a", "longer than its header"),
    (lambda f: f[:2] + struct.pack(">I", 2**31) + f[6:], "states an image of"),
    (lambda f: f[:10] + struct.pack(">I", 2**30) + f[14:], "does not fit"),
    (lambda f: f[:18] + struct.pack(">I", 2**30) + f[22:], "cut short"),
    (lambda f: f[:18] + struct.pack(">I", 4) + f[22:], "longer than")])
def test_damaged_source_files(change, message, weights, tmp_path):
    path = tmp_path / "a.bin"
    checkpoint = ["--checkpoint", str(weights / "v2_stride2.pt")]
    codec.main(["encode", str(weights / "in.png"), "-o", str(path), "--format", "source",
                *checkpoint])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        codec.main(["decode", str(path), "-o", str(tmp_path / "a.png"), *checkpoint])
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("size, patch, message", [
    ((64, 64), (32768, 32768), "1 patches of 32768x32768"),
    ((65535, 4096), (64, 96), "states patches of 64x96"),
    ((64, 64), (0, 64), "states patches of 0x64"), ((128, 64), (64, 64), "2 strings, 4 are"),
    ((2048, 2048), (2048, 2048), "does not decode")])
def test_source_files_with_absurd_patches(size, patch, message, weights, tmp_path):
    """Consistent headers of a variable rate, and two strings of eight bytes."""
    z = tuple(p // 64 for p in patch)
    head = struct.pack(">BB2I4I2I2I", 0, 2, *size, *patch, 1, 130, *z, 1, 2)
    path = tmp_path / "a.bin"
    path.write_bytes(head + 2 * (struct.pack(">I", 8) + bytes(range(8))))
    with pytest.raises(UserError, match=message):
        codec.main(["decode", str(path), "--checkpoint", str(weights / "v5_vr.pt")])


def test_what_is_encoded_can_be_decoded(weights):
    x, model = torch.rand(3, 200, 100), load(weights / "v5_vr.pt")
    with pytest.raises(UserError, match="give smaller -ph and -pw"):
        codec.check_area(x, (65472, 65472))
    parser_error = pytest.raises(SystemExit)
    with parser_error as e:
        codec.main(["encode", str(weights / "in.png"), "-ph", "65536"])
    assert e.value.code == 2 and model.variable_rate


# ---------------------------------------------------------------------------------------- training
TINY = ("--embed_dim 4 --latent_dim 6 --patchsize 128 --batchsize 2 --steps-per-epoch 3 --epochs 2 "
        "--worker_num 0 --batchsize_test 8 --precision fp32 --quality_level 3 --seed 1").split()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    kodak = Image.open(data.KODAK / "kodim23.png")
    for sub in ("train", "test"):
        (folder / sub).mkdir()
        for i in range(2):
            kodak.crop((200 + 90 * i, 100, 360 + 90 * i, 240)).save(folder / sub / f"{i}.png")
    return folder


@pytest.fixture
def run(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        train.main([*TINY, "--trainset", str(images), *map(str, flags)])
        return tmp_path / "results"
    return call


def read(path):
    return torch.load(path, weights_only=True)


def test_folders_of_a_run(run):
    folder = run("--name", "a", "--snapshot_save_epoch", 1) / "a" / "3"
    names = sorted(p.name for p in (folder / "snapshots").iterdir())
    assert "best.pt" in names and "latest.pt" in names
    kept = [n for n in names if n[0].isdigit()]
    assert len(kept) == 2
    number, bpp, mse = kept[1].removesuffix(".pt").split("_")
    assert number == "001" and len(bpp.split(".")[1]) == 4 and len(mse.split(".")[1]) == 8
    assert 0 < float(mse) < 1 and (folder / "config.yaml").exists()
    assert read(folder / "snapshots" / "latest.pt")["config"]["lmbda"] == 0.0067
    with pytest.raises(UserError, match="holds a run"):
        run("--name", "a")


def test_resumed_run_is_the_run(run, monkeypatch):

    straight = run("--name", "straight")
    save, count = Checkpoints.save, []

    def dies(self, *arguments, **more):
        save(self, *arguments, **more)
        count.append(1)
        if len(count) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run("--name", "killed")
    monkeypatch.setattr(Checkpoints, "save", save)
    run("--name", "killed", "--resume")
    a, b = (read(straight / name / "3" / "snapshots" / "latest.pt")
            for name in ("straight", "killed"))
    assert a["step"] == b["step"] == 6
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


def test_resume_from_a_file_takes_weights(run):
    """As in the source: fixed rate to variable rate, first epoch as told."""
    folder = run("--name", "fixed", "--variant", "v3_scctx", "--latent_dim", 24)
    start = folder / "fixed" / "3" / "snapshots" / "best.pt"
    run("--name", "vr", "--variant", "v5_vr", "--latent_dim", 24, "--resume", start,
        "--startepoch", 1, "--lr", 1e-9, "--lr_aux", 1e-9)
    state = read(folder / "vr" / "3" / "snapshots" / "latest.pt")
    assert state["step"] == 6 and (folder / "vr" / "3" / "snapshots" / "001.pt").exists()
    assert torch.allclose(state["model"]["g_a.0.down.0.weight"],
                          read(start)["model"]["g_a.0.down.0.weight"], atol=1e-6)


@pytest.mark.parametrize("flags, kind", [
    (["--optimizer", "adamw", "--wd_exclude_1d"], torch.optim.AdamW),
    (["--eb_group", "aux"], torch.optim.Adam)])
def test_optimizers(flags, kind):
    model = build("v2_stride2", 8, 12)
    main, aux = train.optimizers(model, train.flags().parse_args(flags))
    assert type(main) is kind
    groups = [[id(p) for p in g["params"]] for o in (main, aux) for g in o.param_groups]
    assert sorted(sum(groups, [])) == sorted(map(id, model.parameters()))
    if kind is torch.optim.AdamW:
        assert [g["weight_decay"] for g in main.param_groups] == [0.05, 0.0]
        assert all(p.dim() < 2 for p in main.param_groups[1]["params"])
    else:
        mine = {id(p) for p in model.entropy_bottleneck.parameters()}
        assert mine == set(groups[-1])


def test_defaults_are_the_source_s():
    args = vars(train.flags().parse_args([]))
    source = {"snapshot_save_epoch": 10, "log_itr": 1000, "epochs": 400, "lr": 1e-4,
              "lr_aux": 1e-3, "clip_max_norm": 1, "metric": "mse", "quality_level": "7",
              "in_chans": 3, "embed_dim": 128, "latent_dim": 192, "batchsize": 8,
              "batchsize_test": 1, "patchsize": 256, "worker_num": 8, "name": "VCIP",
              "milestones": [250, 350], "gamma": 0.1, "optimizer": "adam"}
    assert {key: args[key] for key in source} == source


@pytest.mark.parametrize("flags, message", [
    (["--quality_level", "9"], "give 1 to 8"), (["--patchsize", "100"], "multiple of"),
    (["--resume", "no.pt"], "no such checkpoint"), (["--depths", "0"] + ["1"] * 5, "depths"),
    (["--lambda_min", "0.5"], "is above"), (["--drop_path_rate", "1.5"], "below 1"),
    (["--drop_path_rate", "nan"], "drop_path_rate"), (["--dw_groups", "3"], "divisor of"),
    (["--optimizer", "adamw", "--weight_decay", "-1"], "weight_decay"),
    (["--quality_level", "\u00b3"], "give 1 to 8"), (["--name", "../a"], "name of a folder"),
    (["--eta_min", "1"], "is above"), (["--startepoch", "1"], "goes with --resume"),
    (["--optimizer", "muon", "--eb_group", "aux"], "not with"),
    (["--quality_level", "../a", "--lmbda", "1", "--lambda_min", "1", "--lambda_max", "1"],
     "folder")])
def test_training_mistakes(flags, message, run, capsys):
    try:
        run(*flags)
    except UserError as e:
        assert message in str(e)
    except SystemExit as e:
        assert e.code == 2 and message in capsys.readouterr().err
    else:
        pytest.fail("was accepted")


def test_published_results():
    published = json.loads((ROOT / "convnextic" / "results" / "published.json").read_text())
    points = [point for c in published["curves"]
              for point in zip(c["results"]["bpp"], c["results"]["psnr-rgb"], strict=True)]
    for point in ((0.248, 30.26), (1.171, 39.16), (0.319, 32.34), (0.128, 29.16), (1.694, 40.68)):
        assert point in points


@pytest.mark.parametrize("quality, costs", [
    ("3", {"baseline": 0.927, "AdamW": 0.940, "d3393": 0.919, "dwtrans": 0.932, "GDN": 0.965,
           "drop path": 0.941}),
    ("7", {"baseline": 5.043, "AdamW": 4.957, "d3393": 5.034, "dwtrans": 5.066, "GDN": 5.269,
           "drop path": 5.070})])
def test_published_ablation(quality, costs):
    """J of each row, as the specification has computed it."""
    lmbda = train.LMBDAS[int(quality) - 1]
    for row, expected in costs.items():
        found = ablate.cost(*ablate.PUBLISHED[quality][row], lmbda)
        assert found == pytest.approx(expected, abs=0.001 if quality == "3" else 0.002)


# --------------------------------------------------------------------------------------- pages
def test_bundled_rates():
    """One model spans a factor of four in rate, and every image's rate follows lmbda."""
    found = json.loads((ROOT / "convnextic" / "results" / "small.json").read_text())
    assert found["meta"]["lmbda"] == sorted(found["meta"]["lmbda"])
    assert found["results"]["bpp"][-1] > 4 * found["results"]["bpp"][0]
    for image in zip(*found["per_image"], strict=True):
        rates = [row["bpp"] for row in image]
        assert all(a < b for a, b in zip(rates, rates[1:], strict=False)), image[0]["image"]
    surpluses = [surplus(row) for images in found["per_image"] for row in images]
    assert -0.025 < min(surpluses) and max(surpluses) < 0.01
    assert sum(abs(s) >= 0.01 for s in surpluses) <= 1  # of 144
    for images in found["per_image"]:
        assert abs(sum(map(surplus, images)) / len(images)) < 0.01


def surplus(row):
    """Of a file without its header over the estimate, which has 30 bits for each latent beyond a
    likelihood of 1e-9: in files they cost less.
    """
    payload = 8 * (row["bytes"] - 29) / (row["height"] * row["width"])
    return payload / row["bpp_estimated"] - 1


def test_pages_give_the_bundled_results():
    results = json.loads((ROOT / "convnextic" / "results" / "small.json").read_text())["results"]
    page, front = ((ROOT / name).read_text() for name in ("convnextic/README.md", "README.md"))
    for bpp, psnr in zip(results["bpp"], results["psnr-rgb"], strict=True):
        assert f"| {bpp:.4f} | {psnr:.2f} |" in page
    assert f"| {results['bpp'][2]:.4f} | {results['psnr-rgb'][2]:.2f} |" in front


def test_page_gives_the_ablation():
    rows = json.loads((ROOT / "convnextic" / "results" / "ablation.json").read_text())["rows"]
    assert list(rows) == list(ablate.ROWS)
    page = (ROOT / "convnextic" / "README.md").read_text()
    for row in ablate.table(rows).splitlines():
        assert row in page


def test_readme_commands(tmp_path, monkeypatch):
    """In their order, in one folder, as a reader would type them; only sizes are made tiny."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "convnextic" / "README.md").read_text(), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python ")]
    assert {c[0] for c in commands} == {"train.py", "ablate.py", "eval.py", "codec.py"}
    kodak = Image.open(data.KODAK / "kodim23.png")
    for folder in ("flicker/train", "flicker/test", "Kodak"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            kodak.crop((90 * i, 100, 128 + 90 * i, 230)).save(tmp_path / folder / f"{i}.png")
    kodak.crop((100, 100, 280, 165)).save(tmp_path / "test.png")
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "--epochs", "1", "--latent_dim", "12", "--no-compile"]
    at = tiny.index("--quality_level")
    del tiny[at : at + 2]
    for script, *words in commands:
        words = [str(ROOT / "convnextic" / w) if w.endswith(".yaml") else w for w in words]
        if script == "train.py":
            words += tiny
        elif script == "ablate.py":
            words += ["--rows", "baseline", "stride 2 (v2)", "--", *tiny, "--trainset", "flicker"]
        elif script == "eval.py" and "--testset" not in words:
            words += ["--testset", "Kodak"]
        importlib.import_module(f"convnextic.{script.removesuffix('.py')}").main(words)
    assert Image.open("out.png").size == (180, 65)
    sizes = [Path(f"{name}.bin").stat().st_size for name in ("compressed", "rate", "patches")]
    assert sizes == sorted(sizes)
