"""QVRF: files of every rate decode to the encoder's image; what the bundled weights reach."""

import itertools
import math

from common import UserError, data, metrics
from common.coding import bitstream, image_file

import pytest
import torch
from qvrf_cases import ROOT, tiny

from qvrf import codec
from qvrf.model import Latents, load, wavefront


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
@pytest.fixture(scope="module")
def trained():
    return load(ROOT / "qvrf" / "weights" / "small-balle.pth")


@pytest.fixture(scope="module")
def crops():
    """The middle of each Kodak image, 256x256."""
    images = [data.to_float(data.read_image(p)) for p in data.list_images(data.KODAK)]
    return [x[None, :, x.shape[1] // 2 - 128 : x.shape[1] // 2 + 128,
              x.shape[2] // 2 - 128 : x.shape[2] // 2 + 128] for x in images]


def test_trained_rate_rises_with_the_level_on_each_image(trained, crops):
    for x in crops[::2]:
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
        for x in crops[::6]:
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


# ------------------------------------------------------------------------------- a wanted rate
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
