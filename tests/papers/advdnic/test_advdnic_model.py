"""advDNIC: the transforms of ten experiments, their parameter counts, shapes and layers."""

from common import UserError

import compressai.models
import pytest
import torch
from advdnic_cases import parameters
from compressai.layers import GDN
from torch import nn
from torch.nn import functional as F

from advdnic import transforms as t
from advdnic.model import EXPERIMENTS, build


@pytest.mark.parametrize("experiment, n128, n192", [
    ("base", 4_516_611, 10_141_827), ("mod1", 4_671_939, 10_485_411),
    ("mod2", 9_475_699, 9_475_699), ("mod3", 9_327_931, 9_327_931),
    ("mod4", 5_062_668, 11_366_412), ("variant1", 4_516_611, 10_141_827),
    ("variant2", 5_483_651, 12_317_379), ("variant3", 7_790_147, 17_503_587),
    ("variant3_old", 6_295_491, 14_143_395), ("variant4", 6_476_395, None)])
def test_parameter_count(experiment, n128, n192):
    assert parameters(build(experiment)) == n128
    if n192:
        assert parameters(build(experiment, 192)) == n192
    else:
        with pytest.raises(UserError, match="needs num_filters 128, not 192"):
            build(experiment, 192)


@pytest.mark.parametrize("experiment, options, count", [
    ("variant1", {"variant1": "mod3"}, 9_327_931), ("variant3", {"resnets": 2}, 9_889_219),
    ("variant3", {"stages": 2}, 14_809_411),
    ("variant3", {"ep_compat": True}, 7_790_147 - 512 * 513)])
def test_parameter_count_of_other_readings(experiment, options, count):
    assert parameters(build(experiment, **options)) == count


def test_parameters_of_the_parts():
    counts = {
        "base": {"g_a": 1_288_448, "g_s": 1_288_323, "h_a": 966_912, "h_s": 967_040,
                 "entropy_bottleneck": 5_888},
        "mod1": {"g_a": 1_366_112, "g_s": 1_365_987},
        "mod2": {"g_a": 1_075_552, "g_s": 1_167_187, "h_a": 2_789_760, "h_s": 4_428_480,
                 "entropy_bottleneck": 14_720},
        "mod3": {"g_a": 1_014_128, "g_s": 1_080_843}, "mod4": {"g_s": 1_834_380},
        "variant3": {"h_s": 1_466_944, "entropy_parameters": 459_520, "context_model": 2_314_112},
        "variant4": {"g_a": 1_011_744, "g_s": 1_123_875, "h_a": 507_544, "h_s": 1_053_712}}
    for experiment, parts in counts.items():
        model = build(experiment)
        assert {name: parameters(model.get_submodule(name)) for name in parts} == parts
    assert parameters(t.MBConv(128, 128)) == 25_888
    assert [parameters(t.NLAM(c)) for c in (64, 96, 128)] == [98_816, 218_880, 386_048]
    assert [parameters(t.NonLocal(c)) for c in (128, 288)] == [32_768, 165_888]
    assert parameters(t.DPN(128)) == 140_832 and parameters(t.Subpixel(128)) == 66_048
    assert parameters(t.MBConv(32, 16, 3, norm=True)) == 1_448  # timm's DepthwiseSeparableConv
    assert parameters(t.MBConv(24, 24, 5, norm=True)) == 1_590


@pytest.mark.parametrize("N", [128, 192])
def test_base_beside_compressai_s(N):
    """A bias in h_a's last layer and a longer p(z) apart, it is CompressAI's ScaleHyperprior."""
    theirs = parameters(compressai.models.ScaleHyperprior(N, N))
    assert theirs - parameters(build("base", N)) == N + 15 * N


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_shapes(experiment):
    model = build(experiment, 128 if experiment == "variant4" else 32).eval()
    C, Z = (192, 320) if experiment in ("mod2", "mod3") else (model.N, model.N)
    x = torch.rand(1, 3, 128, 256)
    with torch.no_grad():
        y = model.g_a(x)
        z = model.h_a(y.abs())
        assert y.shape == (1, C, 8, 16) and z.shape == (1, Z, 2, 4)
        assert model.g_s(y).shape == x.shape
        if model.prior == "context":
            assert model.h_s(z).shape == model.context_model(y).shape == (1, 2 * model.N, 8, 16)


def test_first_output_lies_on_the_first_input():
    """SignalConv's alignment: an impulse at 0 is seen by the kernel's centre."""
    for k, s in ((3, 1), (5, 2), (3, 4), (3, 8)):
        layer = t.conv(1, 1, k, s, bias=False)
        for side in (16, 17):
            x = torch.zeros(1, 1, side, side)
            x[..., 0, 0] = 1
            y = layer(x)
            assert y.shape[-1] == -(-side // s)
            assert y[0, 0, 0, 0] == layer.weight[0, 0, k // 2, k // 2]
    up = t.deconv(1, 1, 5, bias=False)
    x = torch.zeros(1, 1, 4, 4)
    x[..., 1, 1] = 1
    y = up(x)
    assert y.shape[-1] == 8 and y[0, 0, 2, 2] == up.weight[0, 0, 2, 2]


def test_2x2_steps_of_mod2():
    """The kernel of a step down reaches one up and one left; a step up is its transpose."""
    down, up = t.Down2(1), t.Up2(1)
    up.weight.data, up.bias.data = down.weight.data.clone(), torch.zeros(1)
    down.bias.data.zero_()
    x = torch.randn(1, 1, 6, 8)
    y = down(x)
    assert y.shape == (1, 1, 3, 4)
    assert torch.allclose(y[0, 0, 0, 0], x[0, 0, 0, 0] * down.weight[0, 0, 1, 1])
    assert torch.allclose(y[0, 0, 1, 1], (x[0, 0, 1:3, 1:3] * down.weight[0, 0]).sum())
    other = torch.randn_like(y)
    assert up(other).shape == x.shape
    assert torch.allclose((y * other).sum(), (x * up(other)).sum(), atol=1e-5)


def test_mod2_has_an_inverse_gdn_on_its_way_down():
    def inverses(model):
        return [m.gdn.inverse for m in model.g_a.modules() if isinstance(m, t.MBSignal)]

    assert sum(inverses(build("mod2"))) == 3
    assert sum(inverses(build("mod2", mod2_down_inverse=False))) == 0


def test_icnr_is_nearest_neighbour_at_first():
    """Subpixel convolution begins as a 1x1 convolution whose result is repeated."""
    torch.manual_seed(0)
    block, x = t.Subpixel(8), torch.randn(2, 8, 5, 6)
    expected = F.interpolate(F.leaky_relu(block.conv(x)[:, ::4], 0.2), scale_factor=2)
    assert torch.allclose(block(x), expected, atol=1e-6)
    block.conv.weight.data = block.conv.weight[torch.randperm(32)]  # not in torch's order
    assert not torch.allclose(block(x), expected, atol=1e-2)


def test_blur():
    block = t.Subpixel(4, blur=True)
    constant = torch.full((1, 4, 6, 8), 3.0)
    assert torch.allclose(block.smooth(constant), constant)
    x = torch.randn(1, 4, 6, 8)
    y = block.smooth(x)
    assert y.shape == x.shape
    assert torch.allclose(y[..., 3, 4], x[..., 2:4, 3:5].mean((2, 3)))
    assert torch.allclose(y[..., 0, 0], x[..., 0, 0])


def test_inverse_gdn_multiplies():
    """It is not GDN's inverse: x -> x sqrt(beta + gamma x^2)."""
    torch.manual_seed(0)
    gdn, inverse = GDN(4), GDN(4, inverse=True)
    x = torch.randn(1, 4, 3, 3)
    norm = torch.sqrt(1 + 0.1 * x**2)
    assert torch.allclose(gdn(x), x / norm, atol=1e-5)
    assert torch.allclose(inverse(x), x * norm, atol=1e-5)
    assert not torch.allclose(inverse(gdn(x)), x, atol=1e-3)


def test_attention_in_parts_is_the_whole(monkeypatch):
    torch.manual_seed(0)
    layer, x = t.NonLocal(8).eval(), torch.randn(2, 8, 12, 10)
    theta = layer.theta(x).flatten(2).transpose(1, 2)
    phi, g = (F.max_pool1d(part(x).flatten(2), 2) for part in (layer.phi, layer.g))
    y = (theta @ phi).softmax(2) @ g.transpose(1, 2)
    expected = x + layer.out(y.transpose(1, 2).unflatten(2, (12, 10)))
    assert torch.allclose(layer(x), expected, atol=1e-5)
    seen = []
    attend = layer.attend
    layer.attend = lambda part, *rest: seen.append(part.shape[1]) or attend(part, *rest)
    monkeypatch.setattr(t, "CHUNK", 7 * 2 * 60)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert max(seen) == 7 and sum(seen) == 120


def test_masked_out_attention_is_the_identity():
    torch.manual_seed(0)
    block, x = t.NLAM(8).eval(), torch.randn(1, 8, 8, 8)
    assert not torch.allclose(block(x), x)
    block.last[-1] = nn.Threshold(float("inf"), 0.0)  # the mask is 0 everywhere
    assert torch.equal(block(x), x)


def test_dual_path_multiplies():
    block, x = t.DPN(128), torch.randn(1, 128, 4, 4)
    a, b = block.project(x), block.main(x)
    expected = (a[:, :128] + b[:, :128]) * torch.cat([a[:, 128:], b[:, 128:]], 1)
    assert torch.equal(block(x), expected)
