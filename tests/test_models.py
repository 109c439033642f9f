"""Facts of the architectures, and their codecs against the likelihood estimate."""

import importlib
from pathlib import Path

from common import UserError, data
from common.coding import entropy, exact, image_file
from common.loss import bits

import pytest
import torch
from compressai.layers import GDN
from compressai.models import JointAutoregressiveHierarchicalPriors

ROOT = Path(__file__).parents[1]
PAPERS = ("factorized", "hyperprior", "joint_ar", "checkerboard")
MODELS = {paper: importlib.import_module(f"{paper}.model") for paper in PAPERS}
KEYS = {"factorized": 72, "hyperprior": 91, "joint_ar": 100, "checkerboard": 100}
COMPRESSAI = {p: getattr(m, "BASELINE", JointAutoregressiveHierarchicalPriors)
              for p, m in MODELS.items()}  # the checkerboard has the keys of joint_ar


def tiny(paper, seed=0, N=8, M=12):
    """A small network whose latents and scales are not all zero, tables ready."""
    torch.manual_seed(seed)
    model = MODELS[paper].build(N=N, M=M)
    with torch.no_grad():
        model.g_a[6].weight.mul_(60)
        if paper != "factorized":
            model.h_a[4].weight.mul_(40)
        if paper == "hyperprior":
            model.h_s[4].bias.uniform_(0, 3)
        if hasattr(model, "entropy_parameters"):
            model.entropy_parameters[4].bias[:M].uniform_(0, 3)  # scales
            model.entropy_parameters[4].weight.mul_(4)
    model.update(force=True)
    return model.eval()


def bundled(paper):
    """The bundled weights of the highest rate."""
    return sorted((ROOT / paper / "weights").glob("small-*.pth"))[-1]


@pytest.fixture(scope="module", params=PAPERS)
def paper(request):
    return request.param


@pytest.fixture(scope="module")
def trained(paper):
    return MODELS[paper].load(bundled(paper))


@pytest.mark.parametrize("paper, N, M, count", [
    ("factorized", 128, 192, 2_998_147), ("factorized", 192, 320, 7_030_531),
    ("hyperprior", 128, 192, 5_075_843), ("hyperprior", 192, 320, 11_816_323),
    ("joint_ar", 192, 192, 14_130_467), ("joint_ar", 192, 320, 25_504_596),
    ("checkerboard", 192, 192, 14_130_467), ("checkerboard", 192, 320, 25_504_596)])
def test_parameter_count(paper, N, M, count):
    assert sum(p.numel() for p in MODELS[paper].build(N=N, M=M).parameters()) == count


@pytest.mark.parametrize("paper, N, part, count", [
    ("factorized", 128, "entropy_bottleneck", 11_712), ("factorized", 128, "g_a", 1_493_312),
    ("factorized", 128, "g_s", 1_493_123), ("hyperprior", 128, "entropy_bottleneck", 7_808),
    ("hyperprior", 128, "h_a", 1_040_768), ("hyperprior", 128, "h_s", 1_040_832),
    *((paper, 192, *part) for paper in ("joint_ar", "checkerboard") for part in (
        ("g_a", 2_891_136), ("g_s", 2_890_947), ("h_a", 2_175_552), ("h_s", 3_300_192),
        ("context_prediction", 1_843_584), ("entropy_parameters", 1_017_344)))])
def test_parameters_of_parts(paper, N, part, count):
    module = MODELS[paper].build(N=N, M=192).get_submodule(part)
    assert sum(p.numel() for p in module.parameters()) == count


def test_shapes(paper):
    model = tiny(paper)
    x = torch.rand(2, 3, 128, 192)
    output = model(x)
    assert output["x_hat"].shape == x.shape
    assert output["likelihoods"]["y"].shape == (2, 12, 8, 12)
    if paper != "factorized":
        assert output["likelihoods"]["z"].shape == (2, 8, 2, 3)


def test_state_dict_is_compressai_s(paper):
    state = MODELS[paper].build(N=8, M=12).state_dict()
    theirs = COMPRESSAI[paper](8, 12).state_dict()
    assert len(state) == KEYS[paper]
    assert sorted(state) == sorted(theirs)
    assert all(state[k].shape == theirs[k].shape for k in state)


@pytest.mark.parametrize("paper", ["factorized", "hyperprior"])  # others: test_context.py
def test_same_output_as_compressai(paper):
    torch.manual_seed(1)
    baseline = MODELS[paper].BASELINE(16, 24).eval()
    baseline.update()
    model = MODELS[paper].build(N=16, M=24).eval()
    model.load_state_dict(baseline.state_dict())
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        ours, theirs = model(x), baseline(x)
    assert torch.allclose(ours["x_hat"], theirs["x_hat"], atol=1e-5)
    for name, likelihoods in theirs["likelihoods"].items():
        assert torch.allclose(ours["likelihoods"][name], likelihoods, atol=1e-5)


def test_old_key_spelling_loads(paper):
    """CompressAI's zoo files call the density's parameters _matrix0, _bias0, _factor0."""
    state = tiny(paper).state_dict()
    old = {}
    for key, value in state.items():
        for new, before in ((".matrices.", "._matrix"), (".biases.", "._bias"),
                            (".factors.", "._factor")):
            key = key.replace(new, before)
        old[key] = value
    assert old.keys() != state.keys()
    loaded = COMPRESSAI[paper].from_state_dict(old).state_dict()
    ours = type(tiny(paper)).from_state_dict(old).state_dict()
    assert all(torch.equal(ours[k], v) for k, v in loaded.items() if "context" not in k)


def test_strings_of_the_last_latent_are_compressai_s(paper):
    """Same tables, same coder: equal strings of the last latent (y, or z of the others)."""
    model = tiny(paper)
    baseline = COMPRESSAI[paper].from_state_dict(model.state_dict()).eval()
    x = torch.rand(1, 3, 64, 64)
    ours, theirs = model.compress(x), baseline.compress(x)
    assert ours["strings"][-1] == theirs["strings"][-1]
    assert ours["shape"] == tuple(theirs["shape"])


@pytest.mark.parametrize("inverse, value", [(False, 1.690308), (True, 2.366432)])
def test_gdn_at_initialisation(inverse, value):
    x = torch.full((1, 4, 1, 1), 2.0)
    assert GDN(4, inverse=inverse)(x).flatten().tolist() == pytest.approx([value] * 4, abs=1e-5)


def test_scale_table_and_gaussian():
    model = tiny("hyperprior")
    table = model.gaussian_conditional.scale_table
    assert table.shape == (64,)
    assert table[[0, 1, 63]].tolist() == pytest.approx([0.11, 0.124404, 256], rel=1e-5)
    zero = torch.zeros(1, 1, 1, 2)
    p = model.gaussian_conditional(zero, torch.tensor([1.0, 0.01]).view(1, 1, 1, 2))[1]
    assert p.flatten().tolist() == pytest.approx([0.3829249, 0.9999945], abs=1e-6)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 70), (17, 33), (64, 64), (65, 97)])
def test_any_size_decodes_to_the_encoder_s_reconstruction(paper, height, width):
    model = tiny(paper)
    x = torch.rand(3, height, width)
    x_hat = image_file.decode_image(model, image_file.encode_image(model, x))
    padded = image_file.pad(x[None], model.downsampling_factor)
    with torch.no_grad():
        expected = model(padded)["x_hat"].clamp(0, 1)[0, :, :height, :width]
    assert x_hat.shape == x.shape
    assert torch.allclose(x_hat, expected, atol=1e-5)


def test_batch_codes_as_single_images(paper):
    model = tiny(paper)
    x = torch.rand(3, 3, 64, 128)
    together = model.compress(x)
    for i in range(3):
        alone = model.compress(x[i : i + 1])
        assert [s[i] for s in together["strings"]] == [s[0] for s in alone["strings"]]


def test_compress_needs_tables(paper):
    model = MODELS[paper].build(N=8, M=12).eval()
    with pytest.raises(UserError, match="update"):
        model.compress(torch.rand(1, 3, 64, 64))


def test_large_image_in_tiles_equals_one_piece(paper, monkeypatch):
    """A 2304x2048 image is above the tiling limit; the symbols are those of the whole plane."""
    model = tiny(paper, N=4, M=6)
    x = torch.rand(1, 3, 2304, 2048)
    tiles = model.compress(x)
    monkeypatch.setattr(MODELS[paper], "tiled", lambda transform, x, **_: transform(x))
    whole = model.compress(x)
    sizes = [[len(s[0]) for s in result["strings"]] for result in (tiles, whole)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
    a = entropy_symbols(model, tiles)
    b = entropy_symbols(model, whole)
    assert (a != b).float().mean() < 1e-4  # a float rounding at a tie may move single symbols


def entropy_symbols(model, result):
    seen = []
    hook = model.g_s.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    model.decompress(result["strings"], result["shape"])
    hook.remove()
    return seen[0].round()


def test_file_bits_against_estimate(paper, trained):
    """Real files of Kodak images are within 1 % of the likelihoods' information content."""
    estimated, real = 0.0, 0
    for path in data.list_images(data.KODAK)[::6]:
        x = data.to_float(data.read_image(path))[None]
        real += 8 * len(image_file.encode_image(trained, x))
        with torch.no_grad():
            estimated += sum(float(bits(p)) for p in trained(x)["likelihoods"].values())
    assert real == pytest.approx(estimated, rel=0.01)


def test_exact_h_s_costs_no_rate():
    """Bits with the scales of the exact h_s against those of the float h_s: at most +0.1 %."""
    model = MODELS["hyperprior"].load(bundled("hyperprior"))
    gaussian = model.gaussian_conditional
    sizes = [0, 0]
    for path in data.list_images(data.KODAK)[::6]:
        x = data.to_float(data.read_image(path))[None]
        with torch.no_grad():
            y = model.g_a(x)
            z_hat = entropy.dequantize(model.entropy_bottleneck, model.h_a(y.abs()))
            exact_scales = exact.run(model.h_s, z_hat)
            float_scales = model.h_s(z_hat)
        indexes = (exact.scale_indexes(exact_scales, gaussian.scale_table),
                   exact.scale_indexes(float_scales, gaussian.scale_table))
        for i, index in enumerate(indexes):
            sizes[i] += len(entropy.encode(y.round(), index, entropy.Tables.of(gaussian))[0])
    assert sizes[0] <= 1.001 * sizes[1]


@pytest.mark.gpu
def test_weights_load_into_a_model_on_a_gpu(paper):
    """As a training does, which moves its network first. checkerboard also takes joint_ar's."""
    for source in (paper, "joint_ar") if paper == "checkerboard" else (paper,):
        trained, model = tiny(source), MODELS[paper].build(N=8, M=12).to("cuda")
        model.load_state_dict(trained.state_dict())
        assert torch.equal(model.g_s[0].weight.cpu(), trained.g_s[0].weight)


@pytest.mark.gpu
def test_files_cross_devices(paper):
    """A file made on the CPU decodes on a GPU, and the reverse: the same latents on both."""
    module = MODELS[paper]
    path = bundled(paper)
    models = {device: module.load(path, device) for device in ("cpu", "cuda")}
    x = data.to_float(data.read_image(data.KODAK / "kodim08.png"))
    for source in models:
        file = image_file.encode_image(models[source], x.to(source))
        latents = []
        for model in models.values():
            hook = model.g_s.register_forward_pre_hook(
                lambda _, inputs, seen=latents: seen.append(inputs[0].cpu()))
            image_file.decode_image(model, file)
            hook.remove()
        assert torch.equal(*latents)
