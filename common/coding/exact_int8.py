"""Exact integer matrix products with int8 digits, on CPUs several times faster than float64."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # it imports this module
    from common.coding.exact_layers import PreparedLayer

DIGITS_MAX = 127 * 257  # two digits of base 256 cover -128 * 257 to this
DIGITS_WORK = 2**24  # number of multiplications from which int8 digits pay off


def digits_of(layer: PreparedLayer, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The weights as int8 (kh, kw * in, digits * out), and signs of the output channels; or None.

    Integers of 16 bits have two digits of base 256, those of 24 bits three. On CPUs with int8
    products and int32 sums, this is several times faster than float64 and gives the same integers.
    None where that is not supported, or not worthwhile because the layer is small.
    """
    out, inputs, kh, kw = layer.weight.shape
    work = out * inputs * kh * kw * x.shape[0] * x.shape[2] * x.shape[3]
    if (layer.groups > 1 or work < DIGITS_WORK or x.device.type != "cpu"
            or inputs * kw == 1  # _int_mm fails on rows of one element
            or inputs * kh * kw * 2**14 >= 2**31 or not _int8_is_exact()):
        return None
    if layer.digits is None:
        flat = layer.weight.reshape(out, -1)
        # 2^15 does not fit two int8 digits, but -2^15 does: negate the channels that contain it
        signs = torch.where(flat.amax(1) > DIGITS_MAX, -1.0, 1.0)
        flat = flat * signs[:, None]
        if flat.amax() > DIGITS_MAX or flat.amin() < -(2**15):
            layer.digits = ()
        else:
            lines = flat.view(out, inputs, kh, kw).permute(2, 3, 1, 0).reshape(kh, -1, out)
            layer.digits = torch.cat(_digits(lines.int(), 2), 2), signs.view(-1, 1, 1)
    return layer.digits or None


def _digits(q: Tensor, count: int) -> list[Tensor]:
    """Digits of q (int32) in base 256, as int8 from -128 to 127, the lowest first."""
    found = []
    for _ in range(count):
        found.append(q.to(torch.int8))  # the lowest byte; the cast wraps around
        q = (q - found[-1]) >> 8
    return found


def sums_by_digits(digits: tuple[Tensor, Tensor], x: Tensor, top: int, n: int, columns: int,
                   layer: PreparedLayer) -> Tensor:
    """Sums of `n` output rows, from row `top` of the quantised x on: (B, out, n, columns)."""
    weight, signs = digits
    (kh, kw), (sh, sw), (dh, dw) = layer.weight.shape[-2:], layer.stride, layer.dilation
    part = x[:, :, top : top + (n - 1) * sh + dh * (kh - 1) + 1].permute(0, 2, 3, 1)
    peak = part.abs().amax()
    count = 2 if peak <= DIGITS_MAX else 3 if peak <= 127 * 65_793 else 4
    batch, height, _, inputs = part.shape
    sums = x.new_zeros(batch * n * columns, len(layer.weight))
    for i, digit in enumerate(_digits(part.int().contiguous(), count)):
        b, h, w, c = digit.stride()
        lines = digit.as_strided((batch, height, columns, kw, inputs),
                                 (b, h, w * sw, w * dw, c)).flatten(3).contiguous()
        product = torch.tensor(0, dtype=torch.int32)
        for k in range(kh):
            rows = lines[:, k * dh : k * dh + (n - 1) * sh + 1 : sh]
            product = product + torch._int_mm(rows.reshape(-1, kw * inputs), weight[k])
        for j, part_of_sum in enumerate(product.chunk(2, 1)):
            sums.add_(part_of_sum, alpha=256 ** (i + j))
    return sums.view(batch, n, columns, -1).permute(0, 3, 1, 2) * signs


@functools.cache
def _int8_is_exact() -> bool:
    """Whether int8 products are fast and exact; some CPUs saturate the sum of two at 2^15."""
    if not torch.cpu._is_vnni_supported():
        return False
    a, b = (torch.full(shape, value, dtype=torch.int8)
            for shape, value in (((64, 256), 127), ((256, 64), 127)))
    a[1::2] = b[:, 2::3] = -128
    return torch.equal(torch._int_mm(a, b).double(), a.double() @ b.double())
