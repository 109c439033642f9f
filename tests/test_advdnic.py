"""advDNIC: ten experiments, and the contexts that decode."""

import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from common import UserError, cli, data
from common.coding import entropy, exact, image_file
from common.loss import RateDistortionLoss

import compressai.models
import pytest
import torch
from compressai.layers import GDN
from PIL import Image
from torch import nn
from torch.nn import functional as F

from advdnic import codec, main, params, train
from advdnic import eval as advdnic_eval
from advdnic import transforms as t
from advdnic.model import EXPERIMENTS, build, load
from advdnic.pixelcnn import PixelCNN
from advdnic.pixelcnn_decoders import Steps, Waves

ROOT = Path(__file__).parents[1]
CONTEXTS = ("variant3", "variant3_old", "variant4")
SIZES = [(64, 64), (65, 97), (128, 192)]


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def tiny(experiment, seed=0, **options):
    """A small model with latents that are not all zero and scales that cover them."""
    torch.manual_seed(seed)
    model = build(experiment, 128 if experiment == "variant4" else 16, **options).eval()
    x = photograph()
    with torch.no_grad():
        for module in model.modules():  # batch norm as after some training
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.uniform_(-0.2, 0.2)
        last = [m for m in model.g_a.modules() if isinstance(m, nn.Conv2d)][-1]
        last.weight.mul_(4 / model.g_a(x).std())
        heads = {"scales": "h_s", "means": "h_scale_s", "context": "entropy_parameters"}
        head = [m for m in getattr(model, heads[model.prior]).modules()
                if isinstance(m, nn.Conv2d)][-1]
        if head.bias is not None:
            head.bias.add_(4)
        else:
            before = [m for m in model.entropy_parameters if isinstance(m, nn.Conv2d)][-2]
            before.bias.add_(1)
            head.weight[: model.M].abs_()
    model.update(force=True)
    return model


def photograph(height=128, width=192):
    image = data.to_float(data.read_image(data.KODAK / "kodim23.png"))
    return image[None, :, 100 : 100 + height, 200 : 200 + width]


# ------------------------------------------------------------------------------- architectures
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


# -------------------------------------------------------------------------------------- contexts
NETS = {"variant3_old": lambda: build("variant3_old", 4).context_model,
        "flat": lambda: PixelCNN(4), "flat, 2 resnets": lambda: PixelCNN(4, 2),
        "strided": lambda: PixelCNN(4, 1, 2)}
REACH = {"variant3_old": (2, 2, 2), "flat": (7, 6, 5), "flat, 2 resnets": (11, 10, 9)}


def dependence(net, height, width):
    """seen[a, b]: whether the output at position a depends on the input at b."""
    x = torch.randn(1, 4, height, width, dtype=torch.float64, requires_grad=True)
    out = net.double()(x).flatten(2)
    rows = [torch.autograd.grad(out[..., k].sum(), x, retain_graph=True)[0]
            for k in range(out.shape[2])]
    return torch.stack(rows).abs().sum((1, 2)).flatten(1) > 0


@pytest.mark.parametrize("name", NETS)
def test_context_is_causal(name):
    torch.manual_seed(0)
    seen = dependence(NETS[name](), 8, 8)
    assert not seen.triu().any()  # neither itself nor what follows


@pytest.mark.parametrize("name", REACH)
def test_reach_of_the_context(name):
    torch.manual_seed(0)
    up, left, right = REACH[name]
    height, width, i, j = up + 2, left + right + 3, up + 1, left + 1
    seen = dependence(NETS[name](), height, width)[i * width + j].view(height, width)
    rows, columns = seen.nonzero().unbind(1)
    assert (i - rows.min(), j - columns.min(), columns.max() - j) == (up, left, right)


def test_strided_context_sees_all_near_it():
    """Every earlier position near by in its own row and in the one above, whatever its parity."""
    torch.manual_seed(0)
    height, width = 8, 16
    seen = dependence(NETS["strided"](), height, width)
    for i in range(1, height):
        for j in range(width):
            row = seen[i * width + j].view(height, width)
            assert row[i - 1, max(0, j - 6) : j + 3].all() and row[i, max(0, j - 6) : j].all()


@pytest.mark.parametrize("name, kind, height, width", [
    ("flat", Steps, 8, 12), ("flat, 2 resnets", Steps, 4, 5), ("strided", Steps, 8, 12),
    ("flat", Waves, 8, 12), ("flat", Waves, 4, 1), ("flat", Waves, 1, 9), ("flat", Waves, 12, 4),
    ("flat, 2 resnets", Waves, 7, 23)])
def test_decoders_are_the_whole_pass(name, kind, height, width):
    """By pixels or by waves, what has been computed kept: the same bits; and close to floats."""
    torch.manual_seed(0)
    net = NETS[name]().eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    y_hat = torch.randint(-3, 4, (2, 4, height, width)).double()
    whole, rows = exact.run(net, y_hat), y_hat.flatten(2).transpose(1, 2)
    for _ in range(2):
        seen, decoded = [], kind(net, 2, height, width, y_hat.device)
        for positions, phi in decoded:
            seen += positions.tolist()
            assert torch.equal(phi, whole.flatten(2).transpose(1, 2)[:, positions])
            decoded.put(rows[:, positions])
        assert sorted(seen) == list(range(height * width))
    assert (net.float()(y_hat.float()) - whole).abs().max() < 0.02 * whole.abs().max()


def test_waves_know_no_strides():
    with pytest.raises(ValueError, match="Steps"):
        Waves(NETS["strided"](), 1, 4, 4, torch.device("cpu"))


def test_a_part_of_the_plane_is_enough():
    """Its reach gives the values of the whole plane; one less, up or to a side, does not."""
    torch.manual_seed(0)
    net = PixelCNN(4).double()
    x = torch.randn(1, 4, 12, 20, dtype=torch.float64)
    whole = net(x)
    i, j = 10, 10

    def error(up, left, right):
        part = net(x[:, :, i - up : i + 1, j - left : j + right + 1])
        return (part[:, :, up, left] - whole[:, :, i, j]).abs().max()

    assert error(7, 6, 5) < 1e-12
    assert error(6, 6, 5) > 1e-9 and error(7, 5, 5) > 1e-9 and error(7, 6, 4) > 1e-9


def test_old_variant_has_minnen_s_context():
    """One masked 5x5: as many parameters as CompressAI's joint model, but for the 5x5's size."""
    model = build("variant3_old")
    mask = model.context_model.mask
    assert mask.sum() == 12 * mask.shape[0] * mask.shape[1]


# ---------------------------------------------------------------------------------------- coding
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_codes_what_forward_promises(experiment):
    """File within 1 % of the likelihoods, decoded symbols those of the encoder."""
    model = tiny(experiment)
    x = photograph()
    with torch.no_grad():
        output = model(x)
    coded = model.compress(x)
    bits = -sum(p.log2().sum() for p in output["likelihoods"].values())
    size = 8 * sum(len(s) for strings in coded["strings"] for s in strings)
    assert abs(size - bits) < 0.01 * bits + 128
    assert torch.equal(model.decompress(coded["strings"], coded["shape"])["x_hat"],
                       output["x_hat"].clamp(0, 1))
    y = model.g_a(x)
    y_hat, *_ = model._encode(y, entropy.dequantize(model.entropy_bottleneck, model.h_a(y.abs())))
    assert y_hat.unique().numel() > 5


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("size", [(1, 1), *SIZES])
def test_any_size(experiment, size):
    model = tiny(experiment)
    x = photograph(*size)[0]
    x_hat = image_file.decode_image(model, image_file.encode_image(model, x))
    assert x_hat.shape == x.shape
    with torch.no_grad():
        padded = image_file.pad(x[None], 64)
        assert torch.equal(x_hat, image_file.crop(model(padded)["x_hat"], size)[0].clamp(0, 1))


@pytest.mark.parametrize("experiment", CONTEXTS)
def test_a_batch_is_its_images(experiment):
    model = tiny(experiment)
    x = torch.cat([photograph(64, 128), photograph(64, 128).flip(3)])
    both = model.compress(x)
    for i in range(2):
        one = model.compress(x[i : i + 1])
        assert [s[i] for s in both["strings"]] == [s[0] for s in one["strings"]]


@pytest.mark.parametrize("options", [{"stages": 2}, {"resnets": 2}, {"ep_compat": True}])
def test_other_readings_code(options, tmp_path):
    model = tiny("variant3", **options)
    x = photograph(64, 128)[0]
    file = image_file.encode_image(model, x)
    torch.save({"model": model.state_dict(), "config": {
        name: getattr(model, name) for name in model.options}}, tmp_path / "a.pth")
    again = load(tmp_path / "a.pth")
    torch.testing.assert_close(image_file.decode_image(again, file),  # g_s is in floats
                               image_file.decode_image(model, file), atol=1e-5, rtol=0)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_exact_parts_are_close_to_floats(experiment):
    model = tiny(experiment)
    with torch.no_grad():
        y = model.g_a(photograph())
        z_hat = entropy.dequantize(model.entropy_bottleneck, model.h_a(y.abs()))
        y_hat, scales, means, _ = model._encode(y, z_hat)
        expected = model._predict(z_hat, y_hat)
    for found, float_values in zip((scales, means), expected, strict=True):
        assert (found - float_values).abs().max() < 0.03 * (1 + float_values.abs().max())


def test_scales_have_a_floor():
    """Whatever entropy parameters say, no scale below 0.11 is coded with."""
    model = tiny("variant3")
    with torch.no_grad():
        model.entropy_parameters[-1].weight.zero_()
    coded = model.compress(photograph(64, 64))
    assert not coded["scales"].any() and not coded["means"].any()
    assert not exact.scale_indexes(coded["scales"], model.gaussian_conditional.scale_table).any()
    with torch.no_grad():
        found = model(photograph(64, 64))["likelihoods"]["y"]
    zeros = coded["y_hat"] == 0
    assert torch.allclose(found[zeros], torch.erf(torch.tensor(0.5 / 0.11 / 2**0.5)).expand(
        int(zeros.sum())))


def test_scale_table_is_that_of_params():
    model = build("base", 8, scales_min=0.2, scales_max=20.0, scales_levels=10)
    model.update()
    table = model.gaussian_conditional.scale_table
    assert len(table) == 10 and table[0] == pytest.approx(0.2) and table[-1] == pytest.approx(20)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_evaluation_is_without_chance(experiment):
    model, x = tiny(experiment), photograph(64, 64)
    with torch.no_grad():
        assert torch.equal(model(x)["x_hat"], model(x)["x_hat"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_all_parameters_learn(experiment):
    torch.manual_seed(0)
    model = build(experiment, 128 if experiment == "variant4" else 16).train()
    output = model(torch.rand(2, 3, 64, 64))
    rate = -sum(p.log().mean() for p in output["likelihoods"].values())
    (output["x_hat"].mean() + rate).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None and "quantiles" not in n]
    assert silent == []


def test_context_sees_the_noise_of_the_likelihood():
    """In training y_hat has one noise, for the context and for its own likelihood."""
    model = build("variant3", 8).train()
    seen = []
    model.context_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.gaussian_conditional._likelihood = (
        lambda y_hat, *_: seen.append(y_hat) or torch.ones_like(y_hat))
    model(torch.rand(1, 3, 64, 64))
    assert len(seen) == 2 and torch.equal(*seen)


def test_checkpoint_of_another_experiment(tmp_path):
    model = tiny("base")
    torch.save({"model": model.state_dict(), "config": {"experiment": "mod4"}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="not the weights"):
        load(tmp_path / "a.pth")
    torch.save(model.state_dict(), tmp_path / "b.pth")
    with pytest.raises(UserError, match="do not tell their experiment"):
        load(tmp_path / "b.pth")


# --------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    kodak = Image.open(data.KODAK / "kodim15.png")
    for i in range(3):
        kodak.crop((100 * i, 100, 100 * i + 160, 230)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def fit(images, tmp_path):
    def start(*flags, folder="m", experiment="base"):
        width = "128" if experiment == "variant4" else "8"
        train.main(["--model-dir", str(tmp_path / folder), "--experiment", experiment,
                    "--num_filters", width, "--train-data-dir", str(images),
                    "--eval-data-dir", str(images), "--eval-patchsize", "64", "--patchsize", "64",
                    "--batchsize", "2", "--epochs", "1", "--num-parallel-calls", "0",
                    "--random-seed", "3", "--threads", "1", *flags])
        return tmp_path / folder
    return start


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, "variant1 of mod3"])
def test_trains_and_codes(experiment, fit, images):
    more = ["--variant1", "mod3"] if experiment == "variant1 of mod3" else []
    folder = fit(*more, experiment=experiment.split()[0])
    model = main.newest(folder, torch.device("cpu"))
    x = data.to_float(data.read_image(images / "0.png"))
    file = image_file.encode_image(model, x)
    assert image_file.decode_image(model, file).shape == x.shape


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_overfits_one_crop(experiment):
    """The loss of one crop falls by a third."""
    torch.manual_seed(0)
    model = build(experiment, 128 if experiment == "variant4" else 32)
    model.train()
    x = photograph(64, 64).repeat(2, 1, 1, 1)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        output = model(x)
        bits = -sum(p.log2().sum() for p in output["likelihoods"].values()) / (2 * 64 * 64)
        loss = bits + 0.01 * 255**2 * F.mse_loss(output["x_hat"], x)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        adam.step()
        losses.append(float(loss))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_files_of_a_run(fit):
    folder = fit("--epochs", "7")
    names = {p.name for p in folder.iterdir()}
    assert {"params.json", "log.txt", "config.yaml"} <= names
    assert len([n for n in names if n.startswith("epoch_")]) == 5
    assert json.loads((folder / "params.json").read_text())["num_filters"] == 8


def test_resumed_run_is_the_run(fit, monkeypatch):
    def stop(model, *_):
        raise KeyboardInterrupt

    whole = fit("--epochs", "4", folder="whole")
    validate, calls = train.validate, []

    def twice(*args):
        calls.append(1)
        return stop(args[0]) if len(calls) == 3 else validate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", twice)
        with pytest.raises(KeyboardInterrupt):
            fit("--epochs", "4", "--test-every", "1", folder="part")
    part = fit("--epochs", "4", "--test-every", "1", "--resume", folder="part")
    a, b = (torch.load(f / "epoch_3.pth", weights_only=True)["model"] for f in (whole, part))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_aux_optimizer_has_the_quantiles_alone():
    model = build("variant2", 8)
    args = train.flags().parse_args([])
    for key, value in params.DEFAULTS.items():
        setattr(args, key, value)
    optimizer, aux = train.optimizers(model, args)
    mine = [id(p) for g in optimizer.param_groups for p in g["params"]]
    others = [id(p) for g in aux.param_groups for p in g["params"]]
    assert others == [id(model.entropy_bottleneck.quantiles)]
    assert sorted(mine + others) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("name", params.OPTIMIZERS)
def test_every_optimizer_takes_a_step(name, fit):
    fit("--main_optimizer", name)


@pytest.mark.parametrize("name", params.DECAYS)
def test_decays(name):
    weight = nn.Parameter(torch.zeros(1))
    scheduler = train.schedule(torch.optim.SGD([weight], lr=1.0), name, 100, 1000)
    rates = []
    for _ in range(1000):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    assert rates[0] == 1
    if name == "constant":
        assert set(rates) == {1}
    elif name == "exponential":  # 0.97 every 2.4 epochs, in steps
        assert rates[239] == 1 and rates[240] == pytest.approx(0.97)
        assert rates[999] == pytest.approx(0.97**4)
    else:
        assert rates[500] == pytest.approx(0.5) and rates[999] < 1e-4
        if name == "cosine_restarts":  # the second cycle from 3/4, five times as long
            assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(0.75)


@pytest.mark.parametrize("text, value", [("False", False), ("false", False), ("0", False),
                                         ("no", False), ("True", True), ("1", True), ("yes", True)])
def test_flags_mean_what_they_say(text, value):
    """The source takes --xla=False as true."""
    args = main.parser_of().parse_args(["--model-dir", "m", "train", f"--xla={text}",
                                        f"--allow-growth={text}"])
    assert args.xla is value and args.allow_growth is value
    bench = main.parser_of().parse_args(["--model-dir", "m", "benchmark", f"--allow-growth={text}"])
    assert bench.allow_growth is value


def test_defaults_are_the_source_s():
    args = main.parser_of().parse_args(["--model-dir", "m", "train"])
    assert (args.batchsize, args.num_parallel_calls, args.epochs, args.save_summary_steps,
            args.random_seed, args.allow_growth, args.xla, args.save_profiling_steps,
            args.log_verbosity) == (4, 4, 1000, 100, None, True, False, 0, "INFO")


@pytest.mark.parametrize("flags, message", [
    (["--use_adversarial_loss=True", "--model-dir", "m", "train"], "no discriminator"),
    (["train"], "--model-dir: name the folder"),
    (["--model-dir", "m", "train", "--xla=perhaps"], "invalid boolean value"),
    (["--model-dir", "m", "compress", "a.png"], "params.json: there is none"),
    (["--model-dir", "m", "train", "--experiment", "mod5"], "invalid choice"),
    (["--model-dir", "m", "train", "--patchsize", "100"], "multiple of 64"),
    (["--model-dir", "m", "train", "--experiment", "variant4", "--num_filters", "64"],
     "needs num_filters 128"),
    (["--model-dir", "m", "train", "--aux_optimizer", "muon"], "main parameters only")])
def test_mistakes(flags, message, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "train" in flags:
        flags = [*flags, "--train-data-dir", str(images)]
        flags += [] if "--patchsize" in flags else ["--patchsize", "64"]
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main.main(flags))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text, message", [
    ("{", "not JSON"), ("[]", "one object"), ('{"lmda": 1}', "there is no parameter lmda"),
    ('{"num_filters": "128"}', "is not int"), ('{"lmbda": -1}', "positive"),
    ('{"num_filters": true}', "is not int"), ('{"clip_norm": -1}', "0 or more"),
    ('{"scales_min": 5, "scales_max": 1}', "below scales_max"),
    ('{"experiment": "mod9"}', "choose from base")])
def test_broken_params(text, message, tmp_path):
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(UserError, match=message):
        params.read(tmp_path)


def test_params_win_over_defaults_and_flags_over_params(fit):
    folder = fit(experiment="mod1")
    with pytest.raises(UserError, match="another --model-dir"):
        fit("--lmbda", "0.02", "--resume", experiment="mod1")
    values = params.read(folder)
    params.write(folder, {**values, "experiment": "mod4"})
    with pytest.raises(UserError, match="is of experiment mod1, params.json says mod4"):
        main.newest(folder, torch.device("cpu"))


def test_the_source_s_commands(fit, images, tmp_path, monkeypatch, capsys):
    """compress and decompress of the seed, with its default names, report and figure."""
    folder = fit()
    monkeypatch.chdir(tmp_path)
    Image.open(images / "0.png").save("overfit.png")
    main.main(["--verbose", f"--model-dir={folder}", "compress", "overfit.png"])
    main.main(["--verbose", f"--model-dir={folder}", "decompress", "overfit.png.ncf"])
    assert Image.open("overfit.png.ncf.png").size == (160, 130)
    report = Path("overfit.png.ncf.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in report] == [
        "Mean squared error", "PSNR (dB)", "Multiscale SSIM", "Multiscale SSIM (dB)",
        "Information content in bpp", "Actual bits per pixel"]
    size = Path("overfit.png.ncf").stat().st_size
    assert float(report[-1].split(":")[1]) == pytest.approx(8 * size / (160 * 130), abs=1e-4)
    assert Image.open("overfit.png.ncf.panels.png").size == (1600, 640)
    with pytest.raises(UserError, match="another model|fingerprint|weights"):
        other = fit(folder="other", experiment="mod4")
        main.main([f"--model-dir={other}", "decompress", "overfit.png.ncf"])
    for content in (b"", b"NCF?", b"\n\x12\n\x10\n\x01\x01\x12\x0b\n\t"):  # the last: the source's
        Path("foreign.ncf").write_bytes(content)
        with pytest.raises(UserError, match="foreign.ncf|file is empty|not one of our"):
            main.main([f"--model-dir={folder}", "decompress", "foreign.ncf"])
    for path in folder.glob("epoch_*"):
        path.unlink()
    with pytest.raises(UserError, match="holds no checkpoint"):
        main.main([f"--model-dir={folder}", "compress", "overfit.png"])


def test_benchmark(fit, images, tmp_path):
    folder = fit()
    main.main([f"--model-dir={folder}", "benchmark", "--data-dir", str(images),
               "--allow-growth=False"])
    rows = list(csv.DictReader(io.StringIO(
        (folder / "benchmark" / "compression_metrics.csv").read_text())))
    assert [row["image"] for row in rows] == ["0", "1", "2", "mean"]
    for key in ("actual bpp", "psnr", "bytes", "decoding seconds"):
        values = [float(row[key]) for row in rows[:3]]
        assert float(rows[3][key]) == pytest.approx(sum(values) / 3, rel=1e-4)
    for row in rows[:3]:  # each row is of its own image
        x = data.read_image(images / f"{row['image']}.png")
        size = (folder / "benchmark" / f"{row['image']}.ncf").stat().st_size
        assert float(row["actual bpp"]) == pytest.approx(8 * size / x[0].numel(), rel=1e-4)
        decoded = data.read_image(folder / "benchmark" / f"{row['image']}.png")
        mse = (decoded.double() - x.double()).square().mean()
        assert float(row["mse"]) == pytest.approx(mse.item(), rel=1e-3)


def test_benchmark_without_decoding(fit, images):
    folder = fit()
    main.main([f"--model-dir={folder}", "benchmark", "--data-dir", str(images), "--no-decode"])
    rows = list(csv.DictReader(io.StringIO(
        (folder / "benchmark" / "compression_metrics.csv").read_text())))
    assert all(row["decoding seconds"] == "" and float(row["encoding seconds"]) > 0
               for row in rows)
    assert not list((folder / "benchmark").glob("*.png"))


def test_benchmark_says_when_a_file_decodes_to_something_else(fit, images, monkeypatch):
    folder, decode = fit(), main.evaluate.decode_image
    monkeypatch.setattr(main.evaluate, "decode_image", lambda *args: decode(*args) * 0.9)
    with pytest.raises(UserError, match="0.png: its file decodes to another image"):
        main.main([f"--model-dir={folder}", "benchmark", "--data-dir", str(images)])


@pytest.mark.parametrize("command", [
    ["compress", "a.png", "a.png"], ["compress", "a.png", "o.ncf", "--plot", "a.png"],
    ["compress", "a.png", "o.ncf", "--plot", "o.ncf"], ["-V", "compress", "o.panels.png", "o"],
    ["decompress", "o.ncf", "o.ncf"], ["benchmark", "--data-dir", ".", "--outdir", "."]])
def test_nothing_is_replaced(command, fit, images, tmp_path, monkeypatch):
    folder, photos = fit(), tmp_path / "photos"
    photos.mkdir()
    monkeypatch.chdir(photos)
    for name in ("a.png", "o.panels.png"):
        Path(name).write_bytes((images / "0.png").read_bytes())
    main.main([f"--model-dir={folder}", "compress", "a.png", "o.ncf"])
    before = {path: path.read_bytes() for path in photos.iterdir()}
    options = [command.pop(0)] if command[0] == "-V" else []
    with pytest.raises(UserError, match="would replace"):
        main.main([f"--model-dir={folder}", *options, *command])
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


@pytest.mark.parametrize("text", ['{"num_filters": Infinity}', '{"num_filters": NaN}',
                                  '{"lmbda": ' + 400 * "9" + "}", '{"lmbda": NaN}'])
def test_numbers_of_params_are_numbers(text, tmp_path):
    (tmp_path / params.NAME).write_text(text)
    with pytest.raises(UserError, match="(num_filters|lmbda) .* is not (int|float)"):
        params.read(tmp_path)


def test_start_from_weights(fit, images, tmp_path):
    """A run of no effect (lr 1e-30) keeps them; those of another experiment are refused."""
    folder = fit()
    path = main.last_checkpoint(folder)
    more = ["--num_filters", "8", "--train-data-dir", str(images), "--eval-data-dir", str(images),
            "--eval-patchsize", "64", "--patchsize", "64", "--batchsize", "3", "--epochs", "1",
            "--num-parallel-calls", "0", "--init-ckpt", str(path)]
    train.main(["--model-dir", str(tmp_path / "on"), "--base_learning_rate", "1e-30", *more])
    old, new = (torch.load(p, weights_only=True)["model"]
                for p in (path, tmp_path / "on" / "epoch_0.pth"))
    assert torch.equal(old["g_a.0.weight"], new["g_a.0.weight"])
    train.main(["--model-dir", str(tmp_path / "new"), "--base_learning_rate", "1e-30", "--resume",
                *more])  # nothing to resume: as make reproduce-advdnic does
    new = torch.load(tmp_path / "new" / "epoch_0.pth", weights_only=True)["model"]
    assert torch.equal(old["g_a.0.weight"], new["g_a.0.weight"])
    with pytest.raises(UserError, match="was trained with --experiment base, not variant2"):
        train.main(["--model-dir", str(tmp_path / "no"), "--experiment", "variant2", *more])


def test_experiment_is_in_the_folder_s_name(images, tmp_path):
    train.main(["--model-dir", str(tmp_path / "experiments/mod4_model/generator"), "--num_filters",
                "8", "--train-data-dir", str(images), "--eval-data-dir", str(images),
                "--eval-patchsize", "64", "--patchsize", "64", "--batchsize", "3", "--epochs", "1",
                "--num-parallel-calls", "0"])
    assert params.read(tmp_path / "experiments/mod4_model/generator")["experiment"] == "mod4"


def test_two_processes(images, tmp_path):
    def run(folder, count):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}",
                   "--master_port", "29617", "train.py", "--model-dir", str(tmp_path / folder),
                   "--num_filters", "8", "--train-data-dir", str(images), "--eval-data-dir",
                   str(images), "--eval-patchsize", "64", "--patchsize", "64", "--batchsize", "2",
                   "--epochs", "2", "--num-parallel-calls", "0", "--random-seed", "1",
                   "--precision", "fp32", "--threads", "1"]
        subprocess.run(command, cwd=ROOT / "advdnic", check=True, env={
            **os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
        return torch.load(tmp_path / folder / "epoch_1.pth", weights_only=True)

    found = run("two", 2)
    assert found["step"] == 4 and all(v.isfinite().all() for v in found["model"].values()
                                      if v.is_floating_point())


def test_compiled_loss_is_the_loss():

    x = photograph(64, 64)
    losses = []
    for compiled in (False, True):
        model = tiny("variant2").train()
        net = torch.compile(model) if compiled else model
        model.gaussian_conditional.quantize = lambda y, *_: y
        model.entropy_bottleneck.quantize = lambda z, *_: z
        losses.append(float(RateDistortionLoss(0.01, "mse")(net(x), x)["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ----------------------------------------------------------------------------- bundled, README
def test_bundled_weights_code(tmp_path):
    photo, file, out = (str(tmp_path / n) for n in ("a.png", "a.bin", "b.png"))
    Image.open(data.KODAK / "kodim07.png").crop((0, 0, 300, 200)).save(photo)
    codec.main(["encode", photo, "-o", file])
    codec.main(["decode", file, "-o", out])
    a, b = data.read_image(Path(photo)).double(), data.read_image(Path(out)).double()
    assert 10 * torch.log10(255**2 / (a - b).square().mean()) > 25


def test_pages_give_the_bundled_results():
    results = json.loads((ROOT / "advdnic" / "results" / "small.json").read_text())["results"]
    page, front = ((ROOT / name).read_text() for name in ("advdnic/README.md", "README.md"))
    for bpp, psnr in zip(results["bpp"], results["psnr-rgb"], strict=True):
        assert f"| {bpp:.4f} | {psnr:.2f} |" in page and f"| {bpp:.4f} | {psnr:.2f} |" in front


def test_complexity(capsys):
    advdnic_eval.main(["--complexity"])
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == list(EXPERIMENTS) and rows["base"][0] == "4,516,611"
    page = (ROOT / "advdnic" / "README.md").read_text()
    for name, (count, encoder, decoder, _) in rows.items():
        assert re.search(rf"\| `{name}` .*{count}.*{encoder}.*{decoder}", page)


def test_readme_commands(tmp_path, monkeypatch):
    """In their order, in one folder, as a reader would type them; only sizes are made tiny."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "advdnic" / "README.md").read_text(), re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python ")]
    assert {c[0] for c in commands} == {"train.py", "main.py", "eval.py", "codec.py"}
    kodak = Image.open(data.KODAK / "kodim23.png")
    for folder in ("data/train", "data/benchmark/kodak"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            kodak.crop((200, 100, 330, 230)).save(tmp_path / folder / f"{i}.png")
    for name in ("overfit.png", "photo.png"):
        kodak.crop((200, 100, 330, 230)).save(tmp_path / name)
    for config in ("quick.yaml", "ten.yaml", "config.yaml"):
        (tmp_path / config).write_text((ROOT / "advdnic" / config).read_text())
    monkeypatch.chdir(tmp_path)
    tiny_run = {"--epochs": "1", "--steps-per-epoch": "1", "--patchsize": "64",
                "--num_filters": "8", "--eval-patchsize": "64", "--num-parallel-calls": "0",
                "--threads": "1"}
    modules = {"train.py": train, "main.py": main, "eval.py": advdnic_eval, "codec.py": codec}
    for script, *arguments in commands:
        if script == "train.py" or "train" in arguments:
            kept = {a.split("=")[0] for a in arguments}
            for flag, value in tiny_run.items():
                if "variant4" in " ".join(arguments) and flag == "--num_filters":
                    continue
                arguments = [a for a in arguments if a.split("=")[0] != flag]
                arguments += [f"{flag}={value}"]
            if "--train-data-dir" not in kept:
                arguments += ["--train-data-dir=data/train"]
            arguments += ["--eval-data-dir=data/benchmark/kodak"]
        elif script == "eval.py" and "--complexity" not in arguments:
            arguments += ["--dataset", "data/benchmark/kodak", "--resultdir", "r"]
        elif "benchmark" in arguments and "--data-dir" not in " ".join(arguments):
            arguments += ["--data-dir", "data/benchmark/kodak"]
        modules[script].main(arguments)
