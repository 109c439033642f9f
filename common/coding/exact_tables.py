"""Smooth functions in fixed-point arithmetic, read from tables that are equal on all machines."""

from __future__ import annotations

import math

from common import UserError

import torch
from torch import Tensor, nn

EXACT_BITS = 53  # float64 holds every integer up to 2^53
TABLE_RANGE, TABLE_BITS = 16, 12  # tables cover [-16, 16] in steps of 2^-12
_tables: dict[tuple[str, torch.device], Tensor] = {}  # by activation and device


def quantise(x: Tensor, grid_bits: int, clamp_bits: int) -> Tensor:
    limit = 2.0 ** (grid_bits + clamp_bits)
    return (x * 2.0**grid_bits).round_().clamp_(-limit, limit)


def smooth(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """Apply a smooth activation by table; beyond the table it is constant or the identity."""
    limit = TABLE_RANGE << TABLE_BITS
    table = _tables.get(key := (repr(layer), x.device))
    if table is None:
        table = _tables[key] = _tabulate(layer, name).to(x.device)
    index = quantise(x, TABLE_BITS, 40)
    inside = index.clamp(-limit, limit)
    y = table[(inside + limit).long()]
    if table[-1] == TABLE_RANGE:  # GELU, SiLU, ... are the identity from here on
        y += (index - inside).clamp_min_(0) * 2.0**-TABLE_BITS
    return y


def exp(x: Tensor) -> Tensor:
    """exp(x) for x <= 0, in multiples of 2^-24; x is rounded to 2^-12, and below -16 it is 0."""
    limit = TABLE_RANGE << TABLE_BITS
    table = _tables.get(key := ("exp", x.device))
    if table is None:
        units = torch.arange(-limit, 1, dtype=torch.float64) * 2.0**-TABLE_BITS
        values = torch.exp(units) * 2.0**24
        if not (values - values.floor() - 0.5).abs().min() > 2.0**-26:
            raise UserError("exp has no exact table")
        table = torch.round(values) * 2.0**-24
        table[0] = 0.0
        _tables[key] = table = table.to(x.device)
    index = quantise(x, TABLE_BITS, 40).clamp_(-limit, 0)
    return table[(index + limit).long()]


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension of x (float64): `exp` by table, and a sum of integers."""
    peak = x.amax(-1, keepdim=True)
    if not math.isfinite(peak.sum().item()):
        raise UserError("NaN or infinity in attention: the model's weights are broken")
    weight = exp(x - peak)
    return weight / weight.sum(-1, keepdim=True)


def matmul(a: Tensor, b: Tensor, a_range: tuple[int, int] = (12, 11),
           b_range: tuple[int, int] = (12, 11)) -> Tensor:
    """a @ b for float64 activations, rounded to multiples of 2^-p within [-2^c, 2^c].

    a_range, b_range: (p, c) of a and of b.
    """
    if a.shape[-1] * 2.0 ** sum(a_range + b_range) >= 2.0**EXACT_BITS:
        raise UserError(f"a product over {a.shape[-1]} terms cannot be computed exactly")
    unit = 2.0 ** -(a_range[0] + b_range[0])
    return torch.matmul(quantise(a, *a_range), quantise(b, *b_range)) * unit


def _tabulate(layer: nn.Module, name: str) -> Tensor:
    """Values of the activation on the grid, rounded to it; UserError if another machine could round
    one of them differently.
    """
    limit = TABLE_RANGE << TABLE_BITS
    units = torch.arange(-limit, limit + 1, dtype=torch.float64)
    exact = layer(units * 2.0**-TABLE_BITS) * 2.0**TABLE_BITS
    tie_distance = (exact - exact.floor() - 0.5).abs().min()
    ends = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64) * TABLE_RANGE
    left, _, right = (layer(ends) * 2.0**TABLE_BITS).diff().tolist()
    flat = min(abs(right), abs(right - limit))
    if not (tie_distance > 2.0**-30 and abs(left) < 0.5 and flat < 0.5):
        raise UserError(f"layer {name} ({layer}) has no exact table")
    return torch.round(exact) * 2.0**-TABLE_BITS
