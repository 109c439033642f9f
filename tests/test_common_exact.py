"""Fixed-point networks: exact, close to the float network, stable over versions."""

import copy
import io
import math

from common import UserError
from common.coding import exact, exact_layers

import pytest
import torch
from torch import nn


def hyper_synthesis(n=8, m=12, seed=0):
    torch.manual_seed(seed)
    up = dict(kernel_size=5, stride=2, padding=2, output_padding=1)
    return nn.Sequential(
        nn.ConvTranspose2d(n, n, **up),
        nn.ReLU(),
        nn.ConvTranspose2d(n, m, **up),
        nn.LeakyReLU(),
        nn.Conv2d(m, m, 3, padding=1),
        nn.ReLU(),
    )


def test_square_roots_are_rounded_as_ieee_754_demands():
    """Not as MKL rounds them in torch.sqrt, which depends on the CPU's instructions."""
    x = torch.randint(1, 2**52, (5000,), generator=torch.Generator().manual_seed(0)).double() / 64
    assert exact.sqrt(x).tolist() == [math.sqrt(value) for value in x.tolist()]


def latent(*shape, seed=0, spread=5.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(spread).round()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_thread_count_layout_and_batch_do_not_change_a_bit(threads):
    h_s, z = hyper_synthesis(32, 48), latent(3, 32, 7, 9)
    threads(1)
    y = exact.run(h_s, z)
    assert y.dtype == torch.float64 and y.shape == (3, 48, 28, 36)
    threads(2)
    assert torch.equal(exact.run(h_s, z), y)
    assert torch.equal(exact.run(h_s, z.contiguous(memory_format=torch.channels_last)), y)
    for i in range(3):
        assert torch.equal(exact.run(h_s, z[i : i + 1]), y[i : i + 1])
    assert torch.equal(exact.run(list(h_s), z.double()), y)


def test_order_of_summation_does_not_matter():
    """Permuting the input channels permutes the sums; floats show it, exact arithmetic does not."""
    torch.manual_seed(0)
    a, order = nn.Conv2d(512, 8, 3, padding=1), torch.randperm(512)
    b = copy.deepcopy(a)
    b.weight.data = a.weight.data[:, order].contiguous()
    x = torch.randn(1, 512, 6, 6)
    assert torch.equal(exact.run(a, x), exact.run(b, x[:, order]))
    assert not torch.equal(a(x), b(x[:, order]))


LAYERS = [
    nn.Conv2d(6, 9, 3, padding=1),
    nn.Conv2d(6, 9, 5, stride=2, padding=2),
    nn.Conv2d(6, 9, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), bias=False),
    nn.Conv2d(6, 9, 1),
    nn.Conv2d(6, 9, 1, stride=2),
    nn.Conv2d(6, 6, 3, padding=1, groups=6),
    nn.Conv2d(6, 12, 3, padding=1, groups=3),
    nn.ConvTranspose2d(6, 9, 5, stride=2, padding=2, output_padding=1),
    nn.ConvTranspose2d(6, 9, 3, stride=1, padding=1),
    nn.ConvTranspose2d(6, 9, 4, stride=2, padding=1, bias=False),
    nn.ConvTranspose2d(6, 9, (3, 2), stride=(3, 2), padding=(1, 0), output_padding=(2, 1)),
    nn.ConvTranspose2d(6, 12, 5, stride=2, padding=2, output_padding=1, groups=3),
    nn.ConvTranspose2d(6, 9, 2, stride=4, padding=0),
    nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.PixelShuffle(2)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer)[:70])
def test_each_layer_is_close_to_its_float_form(layer):
    x = torch.randn(2, 6, 7, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = copy.deepcopy(layer).double()(x.double())
    y = exact.run(layer, x)
    assert y.shape == expected.shape
    # weights to 2^-16 of the largest, inputs to 2^-13: errors add up over at most 150 terms
    assert (y - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("layer", LAYERS[:-1], ids=lambda layer: str(layer)[:70])
def test_results_are_those_of_torch_in_integers(layer):
    """Same rounded weights and inputs, but through torch's own float64 convolution."""
    x = torch.randn(2, 6, 7, 10, generator=torch.Generator().manual_seed(2))
    shifts = exact.spec(layer)["shifts"][0]
    rounded = copy.deepcopy(layer).double()
    unit = torch.tensor([2.0**s for s in shifts.tolist()], dtype=torch.float64)
    with torch.no_grad():
        if isinstance(layer, nn.ConvTranspose2d):  # (in, out / groups, kh, kw)
            w = rounded.weight.view(layer.groups, -1, *rounded.weight.shape[1:])
            by_group = unit.view(layer.groups, 1, -1, 1, 1)
        else:
            w, by_group = rounded.weight, unit.view(-1, 1, 1, 1)
        w.copy_((w * by_group).round() / by_group)
        if layer.bias is not None:
            rounded.bias.copy_((rounded.bias * unit * 2**12).round() / unit / 2**12)
        expected = rounded((x.double() * 2**12).round() / 2**12)
    assert torch.equal(exact.run(layer, x), expected)


def test_a_tiny_network_against_python_integers():
    """Two layers by hand: integers without a width limit, and a power of two at the end."""
    torch.manual_seed(3)
    first, second = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1)
    x = torch.randn(1, 2, 1, 5)

    def shift_of(row):
        return 15 - math.frexp(max(abs(v) for v in row))[1]

    def layer(values, conv):
        out = []
        for row, bias in zip(conv.weight[:, :, 0, 0].tolist(), conv.bias.tolist(), strict=True):
            shift = shift_of(row)
            q, b = [round(v * 2**shift) for v in row], round(bias * 2 ** (shift + 12))
            n = [round(v * 2**12) for v in values]
            out.append((sum(i * j for i, j in zip(q, n, strict=True)) + b) / 2 ** (shift + 12))
        return out

    y = exact.run(nn.Sequential(first, nn.ReLU(), second), x)
    for column in range(5):
        hidden = [max(v, 0.0) for v in layer(x[0, :, 0, column].tolist(), first)]
        assert layer(hidden, second) == [y[0, 0, 0, column].item()]


def test_a_network_is_close_to_its_float_form():
    h_s, z = hyper_synthesis(32, 48), latent(1, 32, 5, 6)
    with torch.no_grad():
        expected = copy.deepcopy(h_s).double()(z.double())
    assert (exact.run(h_s, z) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_inputs_beyond_the_clamp_saturate():
    layer = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.tensor([1e30, -1e30, 4096.0, -4095.5]).view(1, 1, 1, 4)
    assert exact.run(layer, x).flatten().tolist() == [4096.0, -4096.0, 4096.0, -4095.5]


def test_linear_acts_on_the_last_dimension():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(2, 5, 6)
    y = exact.run(layer, x)
    assert y.shape == (2, 5, 4) and torch.allclose(y, layer(x).double(), atol=1e-3)
    assert torch.equal(exact.run(layer, x[1, 3]), y[1, 3])


def test_a_masked_convolution_uses_its_mask():
    from compressai.layers import MaskedConv2d

    torch.manual_seed(0)
    layer, x = MaskedConv2d(4, 4, 5, padding=2), torch.randn(1, 4, 6, 6)
    y = exact.run(layer, x)
    changed = x.clone()
    changed[:, :, 3:] += 1
    assert torch.equal(exact.run(layer, changed)[:, :, :3], y[:, :, :3])
    assert torch.allclose(y, layer(x).double(), atol=1e-3)


def test_strips_equal_the_whole(monkeypatch):
    h_s, z = hyper_synthesis(), latent(2, 8, 9, 6)
    strided = nn.Conv2d(8, 4, 5, stride=3, padding=2, dilation=2)
    whole, whole_strided = (
        exact.run(h_s, z),
        exact.run(strided, whole_input := latent(1, 8, 40, 31)),
    )
    for elements in (1, 30_000):
        monkeypatch.setattr(exact_layers, "STRIP_ELEMENTS", elements)
        assert torch.equal(exact.run(h_s, z), whole)
        assert torch.equal(exact.run(strided, whole_input), whole_strided)


def test_in_place_weight_changes_are_seen():
    layer, x = nn.Conv2d(2, 2, 1), latent(1, 2, 3, 3)
    before = exact.run(layer, x)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.mul_(2)
    assert torch.equal(exact.run(layer, x), 2 * before)
    layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()})
    assert torch.equal(exact.run(layer, x), 4 * before)
    layer.weight.data, layer.bias.data = layer.weight.data / 2, layer.bias.data / 2
    assert torch.equal(exact.run(layer, x), 2 * before)


def test_what_does_not_fit_in_53_bits_is_refused():
    layer = nn.Conv2d(4, 2, 1)
    with torch.no_grad():
        layer.bias[1] = 2.0**40
    with pytest.raises(UserError, match=r"layer 1 .*2\^53"):
        exact.run(nn.Sequential(nn.Identity(), layer), torch.zeros(1, 4, 1, 1))
    wide = nn.Conv2d(2**15, 1, 1)
    nn.init.constant_(wide.weight, 0.999)  # 2^15 channels * 2^15 * 2^24 > 2^53
    with pytest.raises(UserError, match=r"2\^53"):
        exact.run(wide, torch.zeros(1, 2**15, 1, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_refused(value):
    layer, x = nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)
    x[0, 0, 1, 1] = value
    with pytest.raises(UserError, match="NaN"):
        exact.run(layer, x)
    with torch.no_grad():
        layer.weight.fill_(value)
    with pytest.raises(UserError, match="NaN"):
        exact.run(layer, torch.zeros(1, 1, 2, 2))


def test_zero_and_tiny_weights():
    layer = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        layer.weight[0], layer.weight[1] = 0.0, 1e-30
        layer.bias.fill_(0.5)
    assert exact.run(layer, torch.ones(1, 1, 1, 1)).flatten().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(2), nn.Softmax(1), nn.Softplus(beta=0.1)])
def test_layers_without_an_exact_form_are_refused(layer):
    with pytest.raises(UserError, match=r"layer 0 .*exact"):
        exact.run(nn.Sequential(layer), torch.zeros(1, 2, 2, 2))
    with pytest.raises(UserError, match="padding"):
        exact.run(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), torch.zeros(1, 1, 4, 4))


def test_spec_survives_a_checkpoint_and_wins_over_new_defaults(monkeypatch):
    h_s, z = hyper_synthesis(), latent(1, 8, 4, 4)
    y, file = exact.run(h_s, z), io.BytesIO()
    torch.save(exact.spec(h_s), file)
    file.seek(0)
    spec = torch.load(file, weights_only=True)

    monkeypatch.setattr(exact_layers, "GRID_BITS", 9)
    monkeypatch.setattr(exact_layers, "CLAMP_BITS", 10)
    monkeypatch.setattr(exact_layers, "WEIGHT_BITS", 10)
    later = hyper_synthesis()  # the same weights, as a later version of the code would load them
    assert not torch.equal(exact.run(later, z), y)
    exact.restore(later, spec)
    assert torch.equal(exact.run(later, z), y)
    assert torch.equal(exact.run(copy.deepcopy(later), z), y)
    assert str(exact.spec(later)["shifts"]) == str(spec["shifts"])  # saving again changes nothing
    exact.restore(later, None)
    assert not torch.equal(exact.run(later, z), y)


def test_a_spec_of_something_else_is_refused():
    h_s = hyper_synthesis()
    spec = exact.spec(h_s)
    for other in (hyper_synthesis(8, 16), h_s[:3]):
        with pytest.raises(UserError, match="does not match"):
            exact.restore(other, spec)
    with pytest.raises(UserError, match="update the code"):
        exact.restore(h_s, {**spec, "version": 99})
    for damaged in ({}, {**spec, "shifts": spec["shifts"][:1]}, {**spec, "shifts": [1, 2, 3]}, 7):
        with pytest.raises(UserError, match="its entry exact"):
            exact.restore(h_s, damaged)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bits():
    h_s, z = hyper_synthesis(128, 192), latent(2, 128, 8, 12)
    h_s.append(nn.GELU())
    y = exact.run(h_s, z)
    assert torch.equal(exact.run(h_s.cuda(), z.cuda()).cpu(), y)
