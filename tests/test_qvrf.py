"""QVRF: one mechanism on three bases, its rates, its stages, its tools."""

import contextlib
import copy
import csv
import importlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from common import UserError, data, metrics
from common.coding import bitstream, entropy, image_file
from common.training.checkpoints import Checkpoints
from common.training.optimizers import make_optimizers

import pytest
import torch
from compressai.models import (
    Cheng2020Attention,
    JointAutoregressiveHierarchicalPriors,
    ScaleHyperprior,
)
from PIL import Image

from hyperprior.model import Hyperprior
from joint_ar.model import JointAutoregressive
from qvrf import codec, plot, preprocess, train, update
from qvrf import eval as evaluation
from qvrf.model import LMBDAS, QVRF, Latents, build, initial_gain, load, wavefront

ROOT = Path(__file__).parents[1]
BASES = ("balle", "minnen", "cheng")
FIXED = {"balle": ScaleHyperprior, "minnen": JointAutoregressiveHierarchicalPriors,
         "cheng": Cheng2020Attention}
TINY = ("--model minnen --N 4 --M 6 --patch-size 64 64 --batch-size 2 --steps-per-epoch 4 -e 1 "
        "-n 0 --precision fp32 --seed 3 -lr 0.001").split()


def tiny(base, levels=8, seed=0):
    """A small network whose latents and scales are not all zero, tables ready."""
    torch.manual_seed(seed)
    model = build(base, levels, 8, 12)
    with torch.no_grad():
        last = model.g_a[-1].conv_b[-1] if base == "cheng" else model.g_a[-1]
        last.weight.mul_(60 if base != "cheng" else 1)
        if base == "cheng":
            model.g_a[-2].weight.mul_(60)
        model.h_a[-1].weight.mul_(40)
        if base == "balle":
            model.h_s[4].bias.uniform_(0, 3)
        else:
            model.entropy_parameters[4].bias[: model.M].uniform_(0.3, 3)
            model.entropy_parameters[4].weight.mul_(4)
    model.update(force=True)
    return model.eval()


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


@pytest.fixture(scope="module")
def model(base):
    return tiny(base)


@pytest.fixture(scope="module")
def x():
    image = data.to_float(data.read_image(data.KODAK / "kodim23.png"))
    return image[None, :, 100:228, 200:392]


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


# ------------------------------------------------------------------------------------- coding
def test_decoded_is_the_encoder_s_reconstruction(model, x):
    generator = torch.Generator().manual_seed(0)
    factors = (0.5 * 24 ** torch.rand(20, generator=generator)).tolist()
    for rate in [{"s": s} for s in range(8)] + [{"factor": f} for f in factors]:
        with torch.no_grad():
            expected = model(x, **rate)["x_hat"].clamp(0, 1)
        file = image_file.encode_image(model, x, **rate)
        assert torch.equal(image_file.decode_image(model, file), expected[0])


def test_rate_rises_with_the_level_and_z_stays(model, x):
    strings = [model.compress(x, s)["strings"] for s in range(8)]
    sizes = [len(y[0]) for y, _ in strings[::2]]  # with random weights neighbours differ by bytes
    assert sizes == sorted(set(sizes))
    assert all(z == strings[0][1] for _, z in strings)


def test_batch_gives_the_files_of_single_images(model, x):
    batch = torch.cat([x, x.flip(-1), x.flip(-2)])
    latents = model.analyse(batch)
    strings = model.encode(latents, factor=2.5)["strings"]
    for i in range(3):
        one = Latents(*(t[i : i + 1] for t in (latents.y, latents.z, latents.z_hat,
                                               latents.params)))
        assert model.encode(one, factor=2.5)["strings"] == [[s[i]] for s in strings]
    files = image_file.encode_images(model, batch, factor=2.5)
    seen = []
    hook = model.g_s.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image_file.decode_images(model, files)
    image_file.decode_image(model, files[1])
    hook.remove()
    assert torch.equal(seen[0][1:2], seen[1])
    other = image_file.encode_image(model, x, factor=2.6)
    with pytest.raises(UserError, match="several sizes or rates"):
        image_file.decode_images(model, [files[0], other])


@pytest.mark.gpu
def test_files_cross_devices(base, x):
    """A file made on the CPU decodes on a GPU, and the reverse: the same latents on both."""
    models = {"cpu": tiny(base), "cuda": tiny(base).cuda()}
    for source, rate in itertools.product(models, ({"s": 6}, {"factor": 3.7})):
        file = image_file.encode_image(models[source], x.to(source), **rate)
        latents = []
        for model in models.values():
            hook = model.g_s.register_forward_pre_hook(
                lambda _, inputs, seen=latents: seen.append(inputs[0].cpu()))
            image_file.decode_image(model, file)
            hook.remove()
        assert torch.equal(*latents)
    models["cuda"].coding_device = torch.device("cpu")  # eval.py's default
    with torch.no_grad():
        assert models["cuda"](x.cuda(), 3)["x_hat"].is_cuda


@pytest.mark.parametrize("size", [(1, 1), (65, 130)])
def test_odd_sizes(model, size):
    x = torch.rand(3, *size)
    file = image_file.encode_image(model, x, s=7)
    assert image_file.decode_image(model, file).shape == x.shape


def test_header_holds_the_rate(model, x):
    for rate, length in (({"s": 5}, 1), ({"factor": 1 / 3}, 4)):
        file = bitstream.unpack(image_file.encode_image(model, x, **rate), model.tag)
        assert len(file.parameters) == length
        assert model.read_parameters(file.parameters) == pytest.approx(rate)
    with pytest.raises(UserError, match="holds no rate"):
        model.read_parameters(b"ab")


@pytest.mark.parametrize("rate", [{"s": 8}, {"s": -1}, {"factor": 0.0}, {"factor": -1.0},
                                  {"factor": math.nan}, {"factor": math.inf}])
def test_impossible_rates(model, rate, x):
    with pytest.raises(UserError, match="level|factor"):
        model.compress(x, **rate)


def test_waves_cover_each_position_once():
    waves = wavefront(7, 5)
    assert torch.cat(waves).sort().values.tolist() == list(range(35))
    assert len(waves) == 5 + 3 * 6


# ------------------------------------------------------------------------------ bundled weights
@pytest.fixture(scope="module", params=["balle", "minnen"])
def trained(request):
    return load(ROOT / "qvrf" / "weights" / f"small-{request.param}.pth")


@pytest.fixture(scope="module")
def crops():
    """The middle of each Kodak image, 256x256."""
    images = [data.to_float(data.read_image(p)) for p in data.list_images(data.KODAK)]
    return [x[None, :, x.shape[1] // 2 - 128 : x.shape[1] // 2 + 128,
              x.shape[2] // 2 - 128 : x.shape[2] // 2 + 128] for x in images]


def test_trained_rate_rises_with_the_level_on_each_image(trained, crops):
    for x in crops:
        latents = trained.analyse(x)
        strings = [trained.encode(latents, s)["strings"] for s in range(8)]
        sizes = [len(y[0]) for y, _ in strings]
        assert sizes == sorted(set(sizes))
        assert all(z == strings[0][1] for _, z in strings)


def test_trained_bits_are_those_of_the_likelihoods(trained, crops):
    for s in (0, 4, 7):
        for x in crops[::6]:
            with torch.no_grad():
                likelihoods = trained(x, s)["likelihoods"].values()
            bits = sum(-p.double().log2().sum().item() for p in likelihoods)
            real = sum(8 * len(string[0]) for string in trained.compress(x, s)["strings"])
            assert abs(real - bits) < 0.01 * bits + 64


def test_trained_points_between_the_levels_lie_on_their_curve(trained, crops):
    """At the geometric mean of two gains, within 0.1 dB of the straight line in log rate."""
    def point(**rate):
        rows = []
        for x in crops[::3]:
            latents = trained.analyse(x)
            bits = 8 * sum(len(s[0]) for s in trained.encode(latents, **rate)["strings"])
            x_hat = trained.estimate(latents, **rate)["x_hat"]
            psnr = metrics.psnr(data.to_uint8(x), data.to_uint8(x_hat))
            rows.append((bits / 256**2, psnr))
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    levels = [point(s=s) for s in range(8)]
    for s in range(7):
        bpp, psnr = point(factor=float((trained.Gain[s] * trained.Gain[s + 1]).detach().sqrt()))
        (a, low), (b, high) = levels[s : s + 2]
        share = math.log(bpp / a) / math.log(b / a)
        assert abs(psnr - (1 - share) * low - share * high) < 0.1


# ------------------------------------------------------------------------------------- weights
def spellings(state):
    """Keys as CompressAI 1.1, 1.1-1.2.6 and its zoo files, and the newest spell them."""
    parts = (("matrices.", "_matrices.", "_matrix"), ("biases.", "_biases.", "_bias"),
             ("factors.", "_factors.", "_factor"))
    for which in (1, 2, 0):
        renamed = {}
        for key, value in state.items():
            for names in parts:
                key = key.replace("entropy_bottleneck." + names[0],
                                  "entropy_bottleneck." + names[which])
            renamed[key.replace(".skip.", ".downsample.") if which == 1 else key] = value
        yield renamed


def test_three_spellings_of_fixed_rate_weights(base, tmp_path):
    fixed = {k: v for k, v in tiny(base, seed=4).state_dict().items() if k != "Gain"}
    for i, state in enumerate(spellings(fixed)):
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}},
                   tmp_path / f"{i}.pth.tar")
        model = build(base, N=8, M=12)
        train.load_weights(model, tmp_path / f"{i}.pth.tar", single=True)
        assert torch.equal(model.Gain, initial_gain(8))
        assert all(torch.equal(model.state_dict()[k], v) for k, v in fixed.items())
        with pytest.raises(UserError, match="Gain"):
            train.load_weights(build(base, N=8, M=12), tmp_path / f"{i}.pth.tar", single=False)


@pytest.mark.parametrize("levels", [8, 11])
def test_base_widths_and_levels_are_inferred(base, levels, tmp_path):
    state = tiny(base, levels).state_dict()
    for i, spelled in enumerate(spellings(state)):
        torch.save(spelled, tmp_path / f"{i}.pth")
        loaded = load(tmp_path / f"{i}.pth")
        assert (loaded.model, loaded.levels, loaded.N) == (base, levels, 8)
        assert all(torch.equal(loaded.state_dict()[k], v) for k, v in state.items())


def test_wrong_weights_are_named(model, tmp_path):
    state = model.state_dict()
    for changed, message in (
            ({**state, "Gain": torch.ones(5)}, "Gain has 5 levels, not 8 or 11"),
            ({k: v for k, v in state.items() if k != "Gain"}, "'Gain' is missing"),
            ({k: v for k, v in state.items() if k != "h_s.0.bias"}, "h_s.0.bias"),
            ({**state, "extra": torch.ones(1)}, "extra")):
        torch.save(changed, tmp_path / "a.pth")
        with pytest.raises(UserError, match=message):
            load(tmp_path / "a.pth")
    torch.save(state, tmp_path / "a.pth")
    other = "balle" if model.model != "balle" else "minnen"
    with pytest.raises(UserError, match=f"not weights of --model {other}"):
        train.load_weights(build(other, N=8, M=12), tmp_path / "a.pth", single=False)
    with pytest.raises(UserError, match="has a Gain already"):
        train.load_weights(build(model.model, N=8, M=12), tmp_path / "a.pth", single=True)


# ------------------------------------------------------------------------------------ training
@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    kodak = Image.open(data.KODAK / "kodim23.png")
    for sub, count in (("train", 3), ("test", 2)):
        (folder / sub).mkdir()
        for i in range(count):
            kodak.crop((200 + 90 * i, 100, 296 + 90 * i, 190)).save(folder / sub / f"{i}.png")
    return folder


@pytest.fixture
def run(images, tmp_path, monkeypatch):
    """Runs train.py in this process, in an empty folder; returns that folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        train.main([*TINY, "-d", str(images), *map(str, flags)])
        return tmp_path
    return call


def read(path):
    return torch.load(path, weights_only=True)


def test_stages_follow_each_other(run):
    """Each starts from the best weights of the one before, which are kept."""
    folder = run("--stage", 1)
    first = read(folder / "checkpoint_best_loss.pth.tar")
    assert first["step"] == 4 and torch.equal(first["model"]["Gain"], initial_gain(8))
    run("--stage", 2, "-e", 2)
    kept = read(folder / "checkpoint_best_loss_stage1.pth.tar")
    assert all(torch.equal(v, kept["model"][k]) for k, v in first["model"].items())
    second = read(folder / "checkpoint.pth.tar")
    assert second["step"] == 8 and second["config"]["steps_before"] == 4
    assert second["model"]["Gain"][0] == 1
    assert not torch.equal(second["model"]["Gain"], initial_gain(8))
    run("--stage", 3)
    third = read(folder / "checkpoint.pth.tar")
    assert third["config"]["stage"] == 3 and third["model"]["Gain"][0] == 1
    assert (folder / "checkpoint_stage2.pth.tar").exists()
    assert third["scheduler"]["patience"] == 20 and third["scheduler"]["factor"] == 0.5
    assert [s["step"] for s in third["aux_optimizer"]["state"].values()] == [4]
    with pytest.raises(UserError, match="of a run of stage 3"):
        run("--stage", 2)


@pytest.mark.parametrize("stage, flags", [(1, []), (2, []), (2, ["--ste", 1]), (3, [])])
def test_what_a_stage_trains(stage, flags, run, monkeypatch):
    """Level, regulator and rounding of each step, and the multiplier of its loss."""
    steps, losses = [], []
    forward, loss = QVRF.forward, train.RateDistortionLoss.forward

    def recorded(self, x, s=2, factor=None, ste=False):
        if self.training:
            steps.append((s, factor, ste))
        return forward(self, x, s, factor, ste)

    def measured(self, output, x):
        if torch.is_grad_enabled():
            losses.append(self.lmbda)
        return loss(self, output, x)

    monkeypatch.setattr(QVRF, "forward", recorded)
    monkeypatch.setattr(train.RateDistortionLoss, "forward", measured)
    run("--stage", stage, *flags)
    levels = [7] * 4 if stage == 1 else [train.draw_level(3, step, 8) for step in range(4)]
    assert steps == [(s, 1.0 if stage == 1 else None, stage == 3 or bool(flags)) for s in levels]
    assert losses == [LMBDAS[s] for s in levels]


@pytest.mark.parametrize("stage", [1, 2])
def test_validation_sums_the_levels(stage, model, x):
    """Stage 1: the same codec, with step 1, at each multiplier."""
    images = torch.stack([data.to_uint8(x[0, :, :64, i : i + 64]) for i in (0, 50, 100)])
    args = SimpleNamespace(stage=stage, test_batch_size=2)
    log = SimpleNamespace(images=lambda *_: None, scalars=lambda *_: None)
    criteria = [train.RateDistortionLoss(lmbda) for lmbda in LMBDAS[:8]]
    found = train.validate(copy.deepcopy(model), images, args, criteria, torch.device("cpu"), log,
                           0)
    total, bpp = 0.0, 0.0
    for s, lmbda in enumerate(LMBDAS[:8]):
        with torch.no_grad():
            output = model(data.to_float(images), s, 1.0 if stage == 1 else None)
        bits = sum(-p.log2().sum() for p in output["likelihoods"].values()) / (3 * 64**2)
        total += bits + lmbda * 255**2 * (output["x_hat"] - data.to_float(images)).square().mean()
        bpp += bits / 8
    assert found["loss"] == pytest.approx(float(total), rel=1e-3)
    assert found["bpp"] == pytest.approx(float(bpp), rel=1e-3)


@pytest.mark.parametrize("absolute", [False, True])
def test_checkpoint_without_refresh_goes_on(run, absolute):
    """As in the source: the same run, with its optimisers, whatever the path is called."""
    folder = run("--stage", 1, "-e", 2, "--out", "straight")
    run("--stage", 1, "-e", 1, "--out", "out")
    path = folder / "out" / "checkpoint_best_loss.pth.tar"
    run("--stage", 1, "-e", 2, "--out", "out", "--checkpoint",
        path if absolute else path.relative_to(folder))
    a, b = (read(folder / name / "checkpoint.pth.tar") for name in ("straight", "out"))
    assert b["step"] == 8 and b["config"]["steps_before"] == 0
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


def test_nothing_is_overwritten(run):
    """What a new run finds in its folder is copied first, each file by its own stage."""
    folder = run("--stage", 1, "--out", "a")
    run("--stage", 2, "--out", "b", "--checkpoint", "a/checkpoint.pth.tar", "--refresh", 1)
    before = read(folder / "b" / "checkpoint.pth.tar")["model"]
    run("--stage", 1, "-e", 2, "--out", "b", "--checkpoint", "a/checkpoint.pth.tar")
    kept = read(folder / "b" / "checkpoint_stage2.pth.tar")["model"]
    assert all(torch.equal(v, kept[k]) for k, v in before.items())
    (folder / "a" / "checkpoint.pth.tar").unlink()
    run("--stage", 2, "--out", "a", "--checkpoint", "a/checkpoint_best_loss.pth.tar",
        "--refresh", 1)
    assert read(folder / "a" / "checkpoint_best_loss_stage1.pth.tar")["config"]["stage"] == 1


def test_plateau_with_rare_validation(run):
    assert read(run("--stage", 1, "-e", 3, "--test-every", 2) / "checkpoint.pth.tar")["step"] == 12


def test_a_stage_that_was_never_validated(run, monkeypatch):
    """Its newest weights are the start of the next, not the best ones of the stage before it."""
    folder = run("--stage", 1)
    save = Checkpoints.save

    def dies(self, *arguments, **more):
        save(self, *arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run("--stage", 2, "-e", 3, "--test-every", 3)
    monkeypatch.setattr(Checkpoints, "save", save)
    run("--stage", 3)
    assert read(folder / "checkpoint.pth.tar")["config"]["steps_before"] == 8


def test_cheng_trains_in_fp32(run):
    folder = run("--stage", 1, "--model", "cheng", "--N", 16, "--M", 16)
    assert read(folder / "checkpoint.pth.tar")["step"] == 4


def test_from_a_fixed_rate_model(run, tmp_path):
    """CompressAI's weights as stage 1, as the source's short cut."""
    torch.manual_seed(1)
    fixed = JointAutoregressiveHierarchicalPriors(4, 6)
    fixed.update(force=True)
    torch.save(fixed.state_dict(), tmp_path / "mbt2018.pth.tar")
    folder = run("--stage", 2, "--checkpoint", "mbt2018.pth.tar", "--refresh", 1,
                 "--loadFromPretrainedSinglemodel", 1, "-lr", 1e-9)
    state = read(folder / "checkpoint.pth.tar")
    assert state["step"] == 4 and state["config"]["steps_before"] == 0
    assert torch.allclose(state["model"]["g_a.0.weight"], fixed.g_a[0].weight, atol=1e-6)
    assert torch.allclose(state["model"]["Gain"], initial_gain(8), atol=1e-6)


def test_start_gain_needs_a_known_stage(run, capsys):
    run("--stage", 1)
    update.main(["checkpoint_best_loss.pth.tar", "-n", "S1"])
    path = capsys.readouterr().out.split()[-1]
    with pytest.raises(UserError, match="does not tell its stage"):
        run("--stage", 2, "--start_gain", 10, "--checkpoint", path, "--refresh", 1)


@pytest.mark.parametrize("name", ["balle", "minnen"])
@pytest.mark.parametrize("last, level", [(16.0, None), (128.0, 2), (128.0, 0)])
def test_start_gain_makes_a_level_the_codec_of_stage_one(name, last, level, x):
    """The same symbols and tables as with step 1 before."""
    model, before = tiny(name), tiny(name)
    train.spread_gains(model, last, level)  # steps that are powers of two: nothing is rounded
    s = 7 if level is None else level
    assert model.compress(x, s)["strings"] == before.compress(x, 0)["strings"]
    assert torch.allclose(model(x, s)["x_hat"], before(x, 0)["x_hat"], atol=1e-5)
    assert torch.allclose(model.Gain, torch.tensor([last ** (i / 7) for i in range(8)]))


def test_start_gain_in_training(run):
    folder = run("--stage", 1)
    first = read(folder / "checkpoint_best_loss.pth.tar")["model"]
    run("--stage", 2, "--start_gain", 10, "-lr", 1e-9)
    second = read(folder / "checkpoint.pth.tar")["model"]
    assert torch.allclose(second["g_a.6.weight"], first["g_a.6.weight"] / 10, rtol=1e-4)
    run("--stage", 3, "--start_gain", 10, "-lr", 1e-9)  # once, not again
    third = read(folder / "checkpoint.pth.tar")["model"]
    assert torch.allclose(third["g_a.6.weight"], first["g_a.6.weight"] / 10, rtol=1e-4)


def test_best_loss_begins_anew_with_refresh(run):
    folder = run("--stage", 1)
    path = folder / "checkpoint_best_loss.pth.tar"
    state = read(path)
    state["best_loss"] = 0.0
    torch.save(state, path)
    run("--stage", 2, "--checkpoint", path, "--refresh", 1)
    assert 0 < read(path)["best_loss"] < math.inf


@pytest.mark.parametrize("when", range(8))
def test_several_stages_at_once_and_resumed(when, run, monkeypatch):
    """Killed after any file that it writes, and continued: as the straight run, bit for bit."""
    flags = ("--stage", 1, 2, 3, "-e", 1, 2, 1, "-lr", 0.001, 0.002, 0.001, "--optimizer", "muon",
             "--lr-schedule", "cosine")
    folder = run(*flags, "--out", "straight")
    save, saves = Checkpoints.save, []

    def dies(self, name, *arguments, **more):
        save(self, name, *arguments, **more)
        saves.append(name)
        if len(saves) == when + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", dies)
    with contextlib.suppress(KeyboardInterrupt):
        run(*flags, "--out", "killed")
    assert len(saves) >= min(when + 1, 6)
    monkeypatch.setattr(Checkpoints, "save", save)
    run(*flags, "--out", "killed", "--resume")
    straight, killed = (read(folder / name / "checkpoint.pth.tar") for name in
                        ("straight", "killed"))
    assert all(torch.equal(v, killed["model"][k]) for k, v in straight["model"].items())
    assert straight["config"]["steps_before"] == killed["config"]["steps_before"] == 12
    best = [read(folder / name / "checkpoint_best_loss.pth.tar")["step"]
            for name in ("straight", "killed")]
    assert best[0] == best[1]


def test_stopped_between_two_stages(run, monkeypatch):
    """Before stage 2 has saved anything: stage 1 is not lost, and not trained again."""
    flags = ("--stage", 1, 2, "--out", "out")
    save = Checkpoints.save

    def dies(self, *arguments, **more):
        if self.config["stage"] == 2:
            raise KeyboardInterrupt
        save(self, *arguments, **more)

    monkeypatch.setattr(Checkpoints, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    monkeypatch.setattr(Checkpoints, "save", save)
    folder = run(*flags, "--resume") / "out"
    assert read(folder / "checkpoint.pth.tar")["config"]["stage"] == 2
    assert sorted(p.name for p in folder.glob("*_stage*")) == [
        "checkpoint_best_loss_stage1.pth.tar", "checkpoint_stage1.pth.tar"]


def test_killed_stage_two_resumes_bit_for_bit(images, run, tmp_path):
    """kill -9 in mid-epoch; weights, optimisers, schedule and generators end equal."""
    run("--stage", 1, "--out", "first")
    flags = [*TINY, "-d", images, "--stage", 2, "--checkpoint",
             tmp_path / "first" / "checkpoint_best_loss.pth.tar", "--refresh", 1,
             "--steps-per-epoch", 60, "-e", 2, "--check_time", 0]

    def process(out, *more):
        command = [sys.executable, ROOT / "qvrf" / "train.py", *flags, "--out", out, *more]
        return subprocess.Popen(list(map(str, command)), cwd=tmp_path, text=True,
                                env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    whole, part = process("whole"), process("part")
    newest = tmp_path / "part" / "checkpoint.pth.tar"
    deadline = time.monotonic() + 180
    while not (newest.exists() and read(newest)["step"] > 60):
        assert time.monotonic() < deadline and part.poll() is None, part.communicate()[1]
        time.sleep(0.01)
    part.send_signal(signal.SIGKILL)
    part.communicate()
    assert read(newest)["step"] % 60 != 0
    resumed = process("part", "--resume")
    for one in (whole, resumed):
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors
    a, b = read(tmp_path / "whole" / "checkpoint.pth.tar"), read(newest)
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    assert str(a["optimizer"]) == str(b["optimizer"]) and a["best_loss"] == b["best_loss"]
    assert str(a["scheduler"]) == str(b["scheduler"])
    assert torch.equal(a["rng"][0]["cpu"], b["rng"][0]["cpu"])


def test_two_hundred_steps_of_stage_two_lower_the_loss(base, x):
    torch.manual_seed(0)
    model = build(base, N=8, M=12).train()
    optimizer, _ = make_optimizers(model, "adam", 1e-3)
    losses = []
    for step in range(200):
        s = train.draw_level(0, step, 8)
        output = model(x[..., :64, :64], s)
        bits = sum(-p.log2().sum() for p in output["likelihoods"].values()) / 64**2
        error = (output["x_hat"] - x[..., :64, :64]).square().mean()
        loss = bits + LMBDAS[s] * 255**2 * error
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / LMBDAS[s])
    assert sum(losses[-50:]) < 0.7 * sum(losses[:50])
    assert model.Gain[0] == 1 and not torch.equal(model.Gain.detach(), initial_gain(8))


def test_levels_are_drawn_alike_on_all_processes():
    drawn = [train.draw_level(7, step, 8) for step in range(4000)]
    assert drawn == [train.draw_level(7, step, 8) for step in range(4000)]
    counts = torch.bincount(torch.tensor(drawn))
    assert len(counts) == 8 and 420 < counts.min() and counts.max() < 580


def test_flags_of_the_source():
    args = train.flags().parse_args(
        "-d ./dataset -e 500 -lr 1e-4 -n 8 --batch-size 8 --test-batch-size 64 "
        "--aux-learning-rate 1e-3 --patch-size 256 256 --cuda --save --seed 1926 --clip_max_norm "
        "1.0 --stage 3 --ste 1 --refresh 1 --loadFromPretrainedSinglemodel 0 --checkpoint "
        "checkpoint_best_loss.pth.tar".split())
    assert (args.seed, args.stage, args.epochs, args.learning_rate) == (1926, [3], [500], [1e-4])
    defaults = vars(train.flags().parse_args([]))
    assert {k: defaults[k] for k in ("epochs", "learning_rate", "num_workers", "batch_size",
                                     "test_batch_size", "aux_learning_rate", "patch_size", "stage",
                                     "ste", "loadFromPretrainedSinglemodel", "refresh",
                                     "clip_max_norm", "checkpoint")} == {
        "epochs": [100], "learning_rate": [1e-4], "num_workers": 4, "batch_size": 16,
        "test_batch_size": 64, "aux_learning_rate": 1e-3, "patch_size": [256, 256], "stage": [0],
        "ste": 0, "loadFromPretrainedSinglemodel": 0, "refresh": 0, "clip_max_norm": 1.0,
        "checkpoint": None}


@pytest.mark.parametrize("flags, message", [
    (["--patch-size", "60", "64"], "give multiples of 64"),
    (["--stage", "1", "2", "-e", "1", "2", "3"], "--epochs: give one number, or 2"),
    (["--stage", "2", "1"], "rising order"),
    (["--stage", "2", "--lmbda", "0.01"], "--lmbda trains one rate"),
    (["--start_gain", "9", "--model", "cheng", "--M", "4"], "attention block"),
    (["--start_level", "2"], "needs --start_gain"),
    (["--start_gain", "9", "--start_level", "8"], "a level from 0 to 7"),
    (["--model", "cheng"], "in cheng M is N"),
    (["--stage", "2", "--start_gain", "9"], "there is no stage 1"),
    (["--loadFromPretrainedSinglemodel", "1"], "needs --checkpoint"),
    (["--stage", "2", "--checkpoint", "no.pth.tar"], "no such checkpoint"),
    (["--patch-size", "128", "64"], "96x90 is smaller than the 64x128 crop")])
def test_training_mistakes(flags, message, run):
    with pytest.raises(UserError, match=message):
        run(*flags)


# --------------------------------------------------------------------------------------- tools
@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "checkpoint_best_loss.pth.tar"
    torch.save({"state_dict": tiny("minnen").state_dict()}, path)
    return path


def test_update_names_after_the_hash(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags, stem, folder in (([], "checkpoint_best_loss", "."),
                                (["-n", "Cheng2020VR", "-d", "out", "--no-update"], "Cheng2020VR",
                                 "out")):
        update.main([str(weights), *flags])
        path = Path(capsys.readouterr().out.strip())
        assert path.parent == Path(folder)
        name, digest = path.name.removesuffix(".pth.tar").rsplit("-", 1)
        assert name == stem and len(digest) == 8 and int(digest, 16) >= 0
        assert set(read(path)) == set(tiny("minnen").state_dict())
    assert evaluation.exported(Path("out/Cheng2020VR.pth.tar")) == path
    with pytest.raises(UserError, match="'Gain' is missing"):
        torch.save({"a": torch.ones(1)}, "a.pth")
        update.main(["a.pth"])


@pytest.mark.parametrize("text, value", [("1.5", 1.5), ("1/2.5", 0.4), ("3", 3), ("2/3", 2 / 3)])
def test_factors(text, value):
    assert evaluation.factor(text) == pytest.approx(value)


@pytest.mark.parametrize("text, message", [
    ("0", "positive"), ("-2", "positive"), ("nan", "not a number"), ("1/0", "not a number"),
    ("inf", "not a number"), ("x", "not a number"), ("1e400/1", "not a number"),
    ("1/2/3", "not a number"), ("1e999999999/1", "not a number")])
def test_wrong_factors(text, message, weights, images, capsys):
    for main, flags in ((evaluation.main, ["--factormode", "1", "-p", str(weights), "--dataset",
                                           str(images / "test"), f"--factor={text}"]),
                        (codec.main, ["encode", str(images / "test/0.png"), "--checkpoint",
                                      str(weights), f"--factor={text}"])):
        try:
            main(flags)
        except UserError as e:
            assert message in str(e)
        except SystemExit as e:
            assert e.code == 2 and message in capsys.readouterr().err
        else:
            pytest.fail("was accepted")


def test_eval_as_the_source_calls_it(weights, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "set"
    folder.mkdir()
    for path in (images / "test").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    call = ["--dataset", str(folder), "--output_path", "VR", "-p", str(weights), "--patch", "64"]
    evaluation.main([*call, "--s", "8", "--factormode", "0", "--factor", "0"])
    out = capsys.readouterr().out
    printed = json.loads(out[out.index("{"):])
    assert printed["description"] == "Inference (ans)"
    assert len(printed["results"]["bpp"]) == 8
    assert printed["results"]["bpp"] == sorted(printed["results"]["bpp"])
    rows = list(csv.reader((tmp_path / "VR_s_3" / "VR_s_3_result.csv").open()))
    assert rows[0] == list(evaluation.COLUMNS) and [r[0] for r in rows[1:]] == ["0.png", "1.png"]
    assert (tmp_path / "VR_s_3" / "0.png").exists()
    bits = 8 * (tmp_path / "VR_s_3" / "0.bin").stat().st_size
    assert float(rows[1][1]) == bits
    evaluation.main([*call, "--factormode", "1", "--factor", "1/2"])
    assert (tmp_path / "VR_factor_0.5" / "VR_factor_0.5_result.csv").exists()
    evaluation.main([*call, "--s", "2", "--entropy-estimation"])
    estimated = list(csv.reader((tmp_path / "VR_s_2" / "VR_s_2_result.csv").open()))
    assert float(estimated[1][3]) > 0 and estimated[1][9] == ""


def test_the_source_s_sweep(weights, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluation.main(["--dataset", str(images / "test"), "-p", str(weights), "--factormode", "1",
                     "--factor", "0.1"])
    results = json.loads((tmp_path / "results" / "QVRF-checkpoint_best_loss.json").read_text())
    assert sorted(results["meta"]["factor"]) == pytest.approx(list(evaluation.SWEEP))
    assert "sweep of 27 factors" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bpp", "psnr"])
def test_codec_finds_the_rate(kind, trained, images, tmp_path, capsys):
    image, file, model = images / "test/0.png", tmp_path / "a.bin", trained
    x = data.to_float(data.read_image(image))
    reach = []
    for s in (1, 6):
        coded = image_file.encode_image(model, x, s=s)
        decoded = data.to_uint8(image_file.decode_image(model, coded))
        reach.append(8 * len(coded) / x[0].numel() if kind == "bpp"
                     else metrics.psnr(data.to_uint8(x), decoded))
    target = sum(reach) / 2
    encode = ["encode", str(image), "-o", str(file), "--weights", model.model]
    codec.main([*encode, f"--{kind}={target}"])
    assert "factor" in capsys.readouterr().out
    decoded = data.to_uint8(image_file.decode_image(model, file.read_bytes()))
    if kind == "bpp":
        assert 0.97 * target < 8 * file.stat().st_size / x[0].numel() <= target
    else:
        assert target <= metrics.psnr(data.to_uint8(x), decoded) < target + 0.1
    with pytest.raises(UserError, match=f"--{kind} 1000: this model reaches"):
        codec.main([*encode, f"--{kind}=1000"])


# ------------------------------------------------------------------------------- preprocessing
def test_preprocessing(tmp_path):
    """The largest n by header, all of CLIC, halved where large, equal stems kept apart."""
    sizes = {"a.png": (40, 30), "b.png": (600, 520), "c.png": (520, 600), "d.png": (10, 10),
             "e/a.jpg": (60, 60)}
    for name, size in sizes.items():
        path = tmp_path / "imagenet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    (tmp_path / "clic").mkdir()
    Image.new("RGB", (20, 20), (255, 0, 254)).save(tmp_path / "clic" / "z.png")
    preprocess.main(["--imagenet", str(tmp_path / "imagenet"), "--clic", str(tmp_path / "clic"),
                     "--out", str(tmp_path / "out"), "-n", "4", "--num-workers", "1"])
    made = {p.name: Image.open(p).size for p in (tmp_path / "out").iterdir()}
    assert made == {"b.png": (300, 260), "c.png": (260, 300), "a.png": (60, 60),
                    "a_2.png": (40, 30), "z.png": (20, 20)}
    original = data.read_image(tmp_path / "imagenet" / "a.png")
    assert torch.equal(data.read_image(tmp_path / "out" / "a_2.png"), original)  # a no-op noise
    with pytest.raises(UserError, match="9 images were asked for, 5 are there"):
        preprocess.main(["--imagenet", str(tmp_path / "imagenet"), "-n", "9"])
    for out in ("imagenet", "imagenet/e", "."):
        with pytest.raises(UserError, match="mix with the originals"):
            preprocess.main(["--imagenet", str(tmp_path / "imagenet"), "-n", "4",
                             "--out", str(tmp_path / out)])


def test_plot_wants_results_of_eval(tmp_path):
    curve = {"name": "a", "description": "", "results": {"bpp": [1, 2], "psnr-rgb": [30, 31]}}
    for meta in (None, {}, {"level": [0]}, {"level": [0, None]}):
        (tmp_path / "a.json").write_text(json.dumps(curve | {"meta": meta}))
        with pytest.raises(UserError, match="holds no level of its points"):
            plot.main([str(tmp_path / "a.json"), str(tmp_path / "a.json")])


# --------------------------------------------------------------------------------------- pages
def test_readme_commands(tmp_path, monkeypatch):
    """In their order, in one folder, as a reader would type them; only sizes are made tiny."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "qvrf" / "README.md").read_text(), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python ")]
    assert {c[0] for c in commands} == {"train.py", "update.py", "eval.py", "plot.py", "codec.py",
                                        "preprocess.py"}
    kodak = Image.open(data.KODAK / "kodim23.png")
    for folder in ("dataset/train", "dataset/test", "dataset/Kodak", "imagenet", "clic"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            kodak.crop((200 + 90 * i, 100, 296 + 90 * i, 190)).save(tmp_path / folder / f"{i}.png")
    kodak.crop((100, 100, 197, 165)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    for script, *words in commands:
        if script == "train.py":
            words = [str(ROOT / "qvrf" / w) if w.endswith(".yaml") else w for w in words]
            words += [*TINY, "--no-compile"]
        elif script == "eval.py" and "--dataset" not in words:
            words += ["--dataset", "dataset/Kodak"]
        elif script == "preprocess.py":
            words += ["-n", "2", "--num-workers", "1"]
        importlib.import_module(f"qvrf.{script.removesuffix('.py')}").main(words)
    assert Image.open("decoded.png").size == (97, 65)
    assert read("runs/a/checkpoint.pth.tar")["config"]["stage"] == 3
    assert read("ckpts/quick/checkpoint.pth.tar")["config"]["steps_before"] == 8
    assert Path("dataset/AttentionVRSTE_s_7/0.png").exists()
    assert Path("dataset/AttentionVRSTE_factor_0.4/0.png").exists()


def test_pages_give_the_bundled_results():
    results = json.loads((ROOT / "qvrf" / "results" / "small.json").read_text())["results"]
    rows = {f"| {bpp:.4f} | {psnr:.2f} |"
            for bpp, psnr in zip(results["bpp"], results["psnr-rgb"], strict=True)}
    assert len(rows) == 8 and all(row in (ROOT / "qvrf" / "README.md").read_text() for row in rows)
    front = [line for line in (ROOT / "README.md").read_text().splitlines()
             if line.startswith("| qvrf (balle), level")]
    assert len(front) >= 2 and all(any(row in line for row in rows) for line in front)


def test_readme_python(tmp_path, monkeypatch):
    (tmp_path / "qvrf").symlink_to(ROOT / "qvrf")
    Image.open(data.KODAK / "kodim23.png").crop((100, 100, 197, 165)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "qvrf" / "README.md").read_text(), re.S)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["x_hat"].shape == names["x"].shape
    assert 8 * len(names["file"]) / names["x"][0].numel() <= 0.5
