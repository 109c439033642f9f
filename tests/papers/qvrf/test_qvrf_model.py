"""QVRF: parameter counts, shapes and keys; gains and rounding in both kinds of training."""

import copy

from common.coding import entropy

import pytest
import torch
from compressai.models import (
    Cheng2020Attention,
)
from qvrf_cases import BASES, FIXED, tiny

from hyperprior.model import Hyperprior
from joint_ar.model import JointAutoregressive
from qvrf.model import LMBDAS, build


# ---------------------------------------------------------------------------- facts of the paper
@pytest.mark.parametrize("name, widths, count", [
    ("cheng", (192, 192), 29_631_788), ("minnen", (192, 320), 25_504_596),
    ("balle", (192, 320), 11_816_323), ("balle", (128, 192), 5_075_843),
    ("minnen", (192, 192), 14_130_467), ("cheng", (128, 128), 13_183_293)])
def test_parameter_count(name, widths, count):
    for levels in (8, 11):
        model = build(name, levels, *widths)
        assert sum(p.numel() for p in model.parameters()) == count + levels


def test_default_widths_are_the_paper_s():
    assert [(m.N, m.M, m.levels) for m in map(build, BASES)] == [
        (192, 320, 8), (192, 320, 8), (192, 192, 8)]


@pytest.mark.parametrize("part, count", [
    ("g_a", 5_691_456), ("g_s", 13_267_212), ("h_a", 1_659_840), ("h_s", 6_140_640),
    ("context_prediction", 1_843_584), ("entropy_parameters", 1_017_344),
    ("entropy_bottleneck", 11_712)])
def test_parts_of_cheng(part, count):
    assert sum(p.numel() for p in build("cheng").get_submodule(part).parameters()) == count


def test_latent_shapes(base):
    model, x = build(base, N=8, M=12).eval(), torch.rand(4, 3, 256, 256)
    latents = model.analyse(x)
    assert latents.y.shape == (4, model.M, 16, 16) and latents.z.shape == (4, 8, 4, 4)
    assert model(x, 3)["x_hat"].shape == x.shape


@pytest.mark.parametrize("levels, last", [(8, 10.0), (11, 28.2843)])
def test_initial_gain_is_the_root_of_the_multipliers(levels, last):
    gain = build("balle", levels, 4, 6).Gain.detach()
    assert torch.allclose(gain**2 * LMBDAS[0], torch.tensor(LMBDAS[:levels]), rtol=1e-3)
    assert gain[0] == 1 and abs(float(gain[-1]) - last) < 1e-4
    assert [round(float(g), 4) for g in gain[:8]] == [
        1.0, 1.3944, 1.9293, 2.6874, 3.7268, 5.1801, 7.1957, 10.0]


def test_keys_are_compressai_s_and_gain(base):
    model = build(base, N=8, M=12)
    fixed = FIXED[base](8) if base == "cheng" else FIXED[base](8, 12)
    assert set(model.state_dict()) - set(fixed.state_dict()) == {"Gain"}
    assert all(model.state_dict()[k].shape == v.shape for k, v in fixed.state_dict().items())


# ------------------------------------------------------------------------------ the mechanism
@pytest.mark.parametrize("ste", [False, True])
def test_gain_zero_has_no_gradient(base, ste, x):
    model = build(base, N=8, M=12).train()
    for s in (0, 5):
        model.zero_grad()
        output = model(x[..., :64, :64], s, ste=ste)
        loss = 1e3 * (output["x_hat"] - x[..., :64, :64]).square().mean()
        (loss - sum(p.log().sum() for p in output["likelihoods"].values())).backward()
        moved = model.Gain.grad.nonzero().flatten().tolist()
        assert moved == ([] if s == 0 else [s])


def test_ste_forward_has_the_values_of_coding_and_the_gradient_of_identity(model, x):
    """Values: what estimate reconstructs. Gradient of x_hat: as if y_hat were y."""
    trained = copy.deepcopy(model).train()
    seen = []
    trained.g_s.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trained(x, 4, ste=True)
    latents, a = model.analyse(x), model.gain(4).detach()
    symbols, _, means = model._quantize(latents.y, latents.params, a)
    coded = model._dequantize(symbols, means, a)
    differs = (seen[0] - coded).abs() > 0.5 / float(a)  # a tie in floats may fall the other way
    assert differs.float().mean() < 0.005
    assert (seen[0] - coded)[~differs].abs().max() < 0.02


def test_ste_gradient_reaches_the_encoder(base, x):
    model = build(base, N=8, M=12).train()
    y_hat = []

    def keep(_, inputs):
        inputs[0].retain_grad()
        y_hat.append(inputs[0])

    model.g_s.register_forward_pre_hook(keep)
    y = []
    model.g_a.register_forward_hook(lambda *_: y.append(_[-1]) or _[-1].retain_grad())
    output = model(x[..., :64, :64], 3, ste=True)
    output["x_hat"].square().sum().backward()  # distortion alone
    assert torch.allclose(y[0].grad, y_hat[0].grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("ste", [False, True])
def test_gradient_of_the_gain(base, ste, x):
    """d y_hat / d a, the dequantiser's 1 / a being constant: y / a, centred in stage 3."""
    model = build(base, N=8, M=12).train()
    seen, y = [], []
    model.g_s.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.g_a.register_forward_hook(lambda *_: y.append(_[-1]))
    output = model(x[..., :64, :64], 3, ste=ste)
    seen[0].sum().backward(retain_graph=True)
    a, middle = model.Gain[3], 0.0
    if ste and base != "balle":
        params = model.h_s(entropy.dequantize(model.entropy_bottleneck, model.h_a(y[0])))
        middle = model._quantize(y[0].detach(), params.detach().double(), a.detach())[2].float()
    expected = ((y[0] - middle) / a).sum()
    assert torch.allclose(model.Gain.grad[3], expected, rtol=1e-3, atol=1e-4)
    model.zero_grad()
    output["likelihoods"]["y"].log().sum().backward()  # through z_hat, rounded or not
    assert model.h_a[0].weight.grad.abs().max() > 0


def test_shortcut_is_the_strided_convolution(x):
    model = build("cheng", N=8)
    plain = [m for m in model.modules() if type(m) is torch.nn.Conv2d and m.kernel_size == (1, 1)
             and m.stride == (2, 2)]
    assert not plain  # oneDNN's backward pass breaks memory
    shortcut = model.g_a[0].skip
    a, b = (x.clone().requires_grad_() for _ in range(2))
    expected = torch.nn.functional.conv2d(a, shortcut.weight, shortcut.bias, stride=2)
    assert torch.allclose(shortcut(b), expected, atol=1e-6)
    expected.square().sum().backward()
    shortcut(b).square().sum().backward()
    assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_noise_forward(base, x):
    """y_hat = (y * a + noise) / a: within half a step of y."""
    model = build(base, N=8, M=12).train()
    seen, y = [], []
    model.g_s.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.g_a.register_forward_hook(lambda *_: y.append(_[-1]))
    model(x, 6)
    error = (seen[0] - y[0]).abs().max() * model.Gain[6]
    assert 0.45 < error <= 0.5001


@pytest.mark.parametrize("name, kind", [("balle", Hyperprior), ("minnen", JointAutoregressive)])
def test_level_zero_codes_the_symbols_of_the_base(name, kind, x):
    model = tiny(name)
    fixed = kind(8, 12)
    fixed.load_state_dict({k: v for k, v in model.state_dict().items() if k != "Gain"})
    expected = fixed.eval().compress(x)["strings"]
    assert model.compress(x, 0)["strings"] == expected
    assert model.compress(x, factor=1.0)["strings"] == expected
    assert model.compress(x, 3)["strings"] != expected


def test_level_zero_of_cheng_rounds_as_the_base(x):
    """No folder has this base; CompressAI's float path gives the same symbols but for ties."""
    torch.manual_seed(0)
    model = build("cheng", 8, 8)
    with torch.no_grad():
        model.g_a[-2].weight.mul_(20)
        model.entropy_parameters[4].bias[: model.M].uniform_(0.3, 3)
    model.update(force=True)
    model.eval()
    fixed = Cheng2020Attention(8).eval()
    fixed.load_state_dict({k: v for k, v in model.state_dict().items() if k != "Gain"})
    seen = []
    fixed.g_s.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    theirs = fixed.compress(x)
    fixed.decompress(theirs["strings"], theirs["shape"])
    latents = model.analyse(x)
    symbols, _, means = model._quantize(latents.y, latents.params, model.gain(0))
    assert symbols.abs().mean() > 3
    error = (model._dequantize(symbols, means, 1.0) - seen[0]).abs()
    assert (error < 0.02).float().mean() > 0.99
