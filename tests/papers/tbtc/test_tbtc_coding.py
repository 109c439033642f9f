"""TBTC: order of the slices, files of all models and sizes, exact parts."""

from common.coding import entropy, exact, image_file

import pytest
import torch
from tbtc_cases import photograph, tiny

from tbtc.model import MODELS
from tbtc.slices import in_floats


@pytest.mark.parametrize("name", ["zyc2022-conv-charm", "zyc2022-swint-charm", "tcm"])
@pytest.mark.parametrize("run", [in_floats, exact.run])
def test_slices_see_those_before(name, run):
    model = tiny(name)
    torch.manual_seed(1)
    D = sum(model.slices)
    params = model.hyper(torch.randn(1, model.h_a(torch.zeros(1, D, 8, 8)).shape[1], 2, 2), run)
    symbols = torch.randn(1, D, 8, 8).round().to(torch.float64 if run is exact.run else None)

    def parameters_with(q):
        with torch.no_grad():
            _, scales, means = model.walk(params, run, lambda i, *_: q.split(model.slices, 1)[i])
        return scales.split(model.slices, 1), means.split(model.slices, 1)

    before = parameters_with(symbols)
    for k in range(len(model.slices)):
        changed = symbols.clone()
        changed.split(model.slices, 1)[k].zero_()
        after = parameters_with(changed)
        for i in range(len(model.slices)):
            same = [torch.equal(a[i], b[i]) for a, b in zip(before, after, strict=True)]
            assert same == [i <= k] * 2


@pytest.mark.parametrize("name", MODELS)
def test_codes_what_forward_promises(name):
    model, x = tiny(name), photograph()
    with torch.no_grad():
        output = model(x)
    coded = model.compress(x)
    decoded = model.decompress(coded["strings"], coded["shape"])["x_hat"]
    assert torch.equal(decoded, output["x_hat"].clamp(0, 1))
    y_bits = float(-output["likelihoods"]["y"].double().log2().sum())
    if name != "zyc2022-swint-hyperprior" and name != "zyc2022-conv-hyperprior":
        assert abs(8 * len(coded["strings"][0][0]) - y_bits) < 0.01 * y_bits + 64


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(1, 1), (128, 128), (320, 256), (300, 450), (37, 129)])
def test_any_size(name, size):
    model = tiny(name)
    x = photograph(*size)[0]
    file = image_file.encode_image(model, x)
    found = image_file.decode_image(model, file)
    with torch.no_grad():
        output = model(image_file.pad(x[None], 64))["x_hat"]
    assert torch.equal(found, image_file.crop(output, x.shape[1:])[0].clamp(0, 1))


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_its_images(name):
    """One string an image, each of which decodes alone, to the same bits."""
    model = tiny(name)
    x = torch.cat([photograph(), photograph().flip(3)])
    with torch.no_grad():
        y = model.g_a(x)
        z_hat = model.h_a(y).round()
    both, (first, second) = model.encode(y, z_hat), (
        model.encode(y[i : i + 1], z_hat[i : i + 1]) for i in range(2))
    for k in range(3):  # y_hat, scales, means
        assert torch.equal(both[k], torch.cat([first[k], second[k]]))
    (y_strings, z_strings), shape = model.compress(x).values()
    z_hat = entropy.decode_bottleneck(model.entropy_bottleneck, z_strings, shape)
    alone = [model.decode(y_strings[i : i + 1], z_hat[i : i + 1]) for i in range(2)]
    assert torch.equal(model.decode(y_strings, z_hat), torch.cat(alone))


@pytest.mark.parametrize("name", MODELS)
def test_all_parameters_learn(name):
    model = tiny(name).train()
    output = model(photograph())
    bits = sum(-p.log2().sum() for p in output["likelihoods"].values())
    (bits + 1e5 * (output["x_hat"] - photograph()).square().mean()).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == ["entropy_bottleneck.quantiles"]


@pytest.mark.parametrize("name", ["zyc2022-swint-hyperprior", "tcm"])
def test_exact_parts_are_close_to_floats(name):
    model = tiny(name)
    torch.manual_seed(2)
    z_hat = 3 * torch.randn(2, len(model.entropy_bottleneck.quantiles), 3, 5)
    with torch.no_grad():
        expected = model.hyper(z_hat, in_floats)
    found = model.hyper(z_hat, exact.run)
    flat = [torch.cat([t.flatten().double() for part in p
                       for t in (part if isinstance(part, tuple) else [part])])
            for p in (expected, found)]
    assert found[0][0].dtype == torch.float64
    assert (flat[0] - flat[1]).abs().max() < 2e-3 * flat[0].abs().max() + 1e-3
