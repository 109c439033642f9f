"""Fixed-point activations, attention, scales and means; products of 8-bit integers."""

import copy
import math

from common import UserError
from common.coding import exact, exact_int8, exact_layers, exact_tables

import pytest
import torch
from compressai.entropy_models import GaussianConditional
from torch import nn


# ------------------------------------------------------------------- activations, scales, means
@pytest.mark.parametrize(
    "layer",
    [
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(),
        nn.ELU(),
        nn.Softplus(),
        nn.Mish(),
        nn.Sigmoid(),
        nn.Tanh(),
    ],
    ids=str,
)
def test_smooth_activations_are_read_from_a_table(layer):
    x = torch.linspace(-40, 40, 100_001, dtype=torch.float64)
    y = exact.run(layer, x)
    units = y * 2**12
    assert torch.equal(units, units.round())
    on_grid = torch.round(x * 2**12) / 2**12
    assert (
        y - layer(on_grid)
    ).abs().max() <= 2.0**-13 + 1e-6  # half a step; the tails are cut off below 2^-13
    # no input on the grid inside the table lies so near to a tie that another libm could round it
    # elsewhere
    exact_units = layer(torch.arange(-(2**16), 2**16 + 1, dtype=torch.float64) / 2**12) * 2**12
    assert ((exact_units % 1) - 0.5).abs().min() > 2.0**-30


@pytest.mark.parametrize("boundaries, by_table", [
    (exact.scale_boundaries(torch.logspace(-1, 2.4, 64)), True),
    (exact.scale_boundaries(torch.logspace(-1, 2.4, 64)) / 3.7, True),
    (torch.tensor([1.0, 1.001, 5.0], dtype=torch.float64), False),  # too close for the table
    (torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64), False)])
def test_intervals_equal_bucketize(boundaries, by_table):
    """At the boundaries, right below and above them, between, and outside."""
    intervals = exact.Intervals(boundaries)
    assert (intervals.below is not None) == by_table
    infinity = torch.full_like(boundaries, torch.inf)
    x = torch.cat([boundaries, torch.nextafter(boundaries, infinity),
                   torch.nextafter(boundaries, -infinity), torch.linspace(-3, 400, 5000).double(),
                   torch.tensor([0.0, -0.0, 1e-300, 1e300, -1e300, torch.inf]).double()])
    x = x[: len(x) // 2 * 2].view(2, -1)
    expected = torch.bucketize(x, boundaries, out_int32=True)
    assert torch.equal(intervals(x), expected) and intervals(x).dtype == torch.int32
    assert torch.equal(intervals(x[:, 7:]), expected[:, 7:])  # not contiguous, as a chunk


def test_scale_indexes_are_nearest_in_ratio():
    table = torch.exp(torch.linspace(math.log(0.11), math.log(256), 64))
    gaussian = GaussianConditional(None)
    gaussian.update_scale_table(table.tolist())
    table = gaussian.scale_table
    assert table[0] == torch.tensor(0.11) and abs(table[1] - 0.124404) < 1e-6 and table[-1] == 256
    random = (torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 8 - 5).exp()
    edge = torch.tensor([1e-30, 0.11, 256.0, 300.0, 1e30])
    scales = torch.cat([table, random, edge])
    indexes = exact.scale_indexes(scales, table)
    assert indexes.dtype == torch.int32
    distance = (scales.double().log()[:, None] - table.double().log()).abs()
    assert torch.equal(indexes.long(), distance.argmin(dim=1))
    assert exact.scale_indexes(torch.tensor([0.0, -1.0]), table).tolist() == [0, 0]
    # never above the row of CompressAI, which rounds up, and at most one below
    above = gaussian.build_indexes(scales) - indexes
    assert set(above.tolist()) == {0, 1}


def test_round_to_grid():
    x = torch.tensor([0.3, -0.3, 1 / 512, 3 / 512, 5.0])
    assert exact.round_to_grid(x, 8).tolist() == [77 / 256, -77 / 256, 0.0, 2 / 256, 5.0]


# ------------------------------------------------------------------------------- products of int8
@pytest.mark.skipif(not exact_int8._int8_is_exact(), reason="this CPU has no exact int8 products")
@pytest.mark.parametrize("layer, shape", [
    (nn.Conv2d(24, 16, 5, padding=2), (1, 24, 13, 10)), (nn.Conv2d(24, 16, 1), (2, 24, 7, 9)),
    (nn.Conv2d(9, 8, 3, stride=2, padding=1), (2, 9, 15, 12)),
    (nn.Conv2d(8, 8, 3, padding=2, dilation=2), (2, 8, 9, 12)),
    (nn.ConvTranspose2d(8, 6, 5, stride=2, padding=2, output_padding=1), (1, 8, 9, 7)),
    (nn.Linear(12, 8), (3, 5, 12)), (nn.Conv2d(1, 8, 3, padding=1), (2, 1, 9, 8)),
    (nn.Conv2d(1, 8, 1), (2, 1, 20, 20)), (nn.ConvTranspose2d(1, 8, 2, stride=2), (2, 1, 9, 9))])
@pytest.mark.parametrize("strip", [1, 1000, 2**23])
def test_digits_give_the_bits_of_float64(layer, shape, strip, monkeypatch):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    with torch.no_grad():  # weights at both ends of the 16 bits, in different channels
        layer.weight.view(-1)[0] = 1.0 - 2**-17
        layer.weight.view(-1)[-1] = -1.0 + 2**-17
    monkeypatch.setattr(exact_layers, "STRIP_ELEMENTS", strip)
    for scale in (0.01, 1, 100, 10_000):
        x = scale * torch.randn(shape)
        found = []
        for work in (0, 2**60):
            monkeypatch.setattr(exact_int8, "DIGITS_WORK", work)
            found.append(exact.run(layer, x))
        assert torch.equal(*found)
    prepared = exact_layers.prepare(layer, "", x.device)
    terms = prepared.weight.shape[1] * prepared.weight.shape[3]
    assert bool(prepared.digits) == (terms > 1)  # they were used


@pytest.mark.parametrize("value", [-(2**23), -32_896, -129, -128, -1, 0, 127, 128, 32_639,
                                   8_355_711])
def test_digits_of_an_integer(value):
    digits = exact_int8._digits(torch.tensor([value], dtype=torch.int32), 3)
    assert sum(256**i * int(d) for i, d in enumerate(digits)) == value


# ------------------------------------------------------------------------------- attention
def test_softmax_and_products_are_close_to_floats():
    torch.manual_seed(0)
    logits = 5 * torch.randn(3, 7, 7, dtype=torch.float64)
    logits[:, 0, 3:] = -100
    weights = exact_tables.softmax(logits)
    assert torch.allclose(weights, logits.softmax(-1), atol=1e-3)
    assert (weights[:, 0, 3:] == 0).all() and torch.allclose(weights.sum(-1), torch.tensor(1.0,
                                                             dtype=torch.float64))
    v = torch.randn(3, 7, 5, dtype=torch.float64)
    assert torch.allclose(exact_tables.matmul(weights, v, (20, 0)), weights @ v, atol=1e-3)
    order = torch.randperm(7)
    assert torch.equal(exact_tables.matmul(weights[..., order], v[:, order], (20, 0)),
                       exact_tables.matmul(weights, v, (20, 0)))
    with pytest.raises(UserError, match="cannot be computed exactly"):
        exact_tables.matmul(torch.zeros(2, 2**14), torch.zeros(2**14, 2))
