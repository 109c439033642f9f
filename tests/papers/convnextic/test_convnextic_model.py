"""ConvNeXTIC: parameter counts, multiply-accumulates, shapes, masks, schedules."""

from common.complexity import complexity

import pytest
import torch
from convnextic_cases import rate_of

from convnextic import train
from convnextic.blocks import Depthwise
from convnextic.context import AROUND, CHECKERBOARD, CORNERS, EDGES, anchors, lattices
from convnextic.model import build


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
