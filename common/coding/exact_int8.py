"""Exact integer matrix products with int8 digits, on CPUs several times faster than float64."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # it imports this module
    from common.coding.exact_layers import PreparedLayer

DIGITS_MAX = 127 * 257  # two digits of base 256 cover -128 * 257 to this
DIGITS_WORK = 2**24  # number of multiplications from which int8 digits pay off
TAPS_WORK = 2**15  # the same for `TapDigits`, per position
INPUT_BITS = 24  # of the integers that `LatentDigits` accepts, without the sign
_ONES = [0, 1, 0x101, 0x10101]  # integers of 1, 2 and 3 digits that are all 1


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
        layer.digits = ()
        if (signed := _signed(layer.weight.reshape(out, -1))) is not None:
            flat, signs = signed
            lines = flat.view(out, inputs, kh, kw).permute(2, 3, 1, 0).reshape(kh, -1, out)
            layer.digits = torch.cat(_digits(lines.int(), 2), 2), signs.view(-1, 1, 1)
    return layer.digits or None


def _signed(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The weight (out, inputs) with signs (out,) such that it fits two int8 digits; or None.

    2^15 does not fit two digits, but -2^15 does: channels that contain it are negated.
    """
    signs = torch.where(weight.amax(1) > DIGITS_MAX, -1.0, 1.0)
    weight = weight * signs[:, None]
    return None if weight.amax() > DIGITS_MAX or weight.amin() < -(2**15) else (weight, signs)


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


class TapDigits:
    """The weights of a convolution as int8 digits, for a few positions at a time."""

    @classmethod
    def of(cls, weight: Tensor) -> TapDigits | None:
        """weight: integers (out, inputs), float64; None where float64 is faster or needed."""
        out, inputs = weight.shape
        if (out * inputs < TAPS_WORK or weight.device.type != "cpu" or inputs == 1
                or inputs * 2**14 >= 2**31 or not _int8_is_exact()):
            return None
        signed = _signed(weight)
        return None if signed is None else cls(*signed)

    def __init__(self, weight: Tensor, signs: Tensor):
        self.digits = torch.cat(_digits(weight.t().int(), 2), 1)  # (inputs, 2 * out)
        self.signs = None if bool((signs == 1).all()) else signs

    def sums(self, digits: Tensor, units: Tensor) -> Tensor:
        """Sums (n, out) over rows that consist of `digits`, int8 (len(units) * n, inputs), the
        digits below each other; units (float64) are their weights.
        """
        parts = torch._int_mm(digits, self.digits).double()
        low, high = torch.mm(units[None], parts.view(len(units), -1)).view(
            len(digits) // len(units), 2, -1).unbind(1)
        sums = torch.add(low, high, alpha=256)
        return sums if self.signs is None else sums.mul_(self.signs)


class LatentDigits:
    """Decoded latents as int8 digits, so that a context need not split its inputs each time.

    Latents are multiples of 2^-12. For a gain of 1 they are multiples of 2^-8, so the lowest digit,
    which has LOW_BITS = 4 bits, is zero everywhere; the highest one is zero unless latents exceed
    128. Digits that are zero everywhere are left out of the products.
    """

    LOW_BITS = 4
    UNITS = (1, 2**4, 2**12, 2**20)

    def __init__(self, count: int, channels: int):
        self.digits = torch.zeros(len(self.UNITS) * count, channels, dtype=torch.int8)
        self.planes = self.digits.view(len(self.UNITS), count, channels)
        self._use(slice(1, 2))

    def _use(self, used: slice) -> None:
        """Multiply with these digits from now on."""
        self.used = used
        self.units = torch.tensor(self.UNITS[used], dtype=torch.float64)
        self.starts = torch.arange(len(self.UNITS))[used, None] * self.planes.shape[1]

    def put(self, rows: Tensor, q: Tensor) -> None:
        """Store latents q (n, channels) as these rows; integers in float64 up to 2^INPUT_BITS."""
        low = q.int()
        high = low >> self.LOW_BITS
        least, most = (int(v) for v in high.aminmax())
        count = next(k for k in (1, 2, 3) if -128 * _ONES[k] <= least and most <= 127 * _ONES[k])
        start, used = 1, self.used
        if used.start == 0 or np.bitwise_or.reduce(low.numpy(), None) & (2**self.LOW_BITS - 1):
            start = 0
            self.planes[0].index_copy_(0, rows, (low & (2**self.LOW_BITS - 1)).to(torch.int8))
        if start < used.start or 1 + count > used.stop:
            self._use(slice(start, max(1 + count, used.stop)))
        # With 128 added to each digit, the digits are the bytes of the sum, from the lowest to the
        # highest; as signed bytes, those less 128 have the other highest bit.
        high = high.add_(128 * _ONES[3]).bitwise_xor_(128 * _ONES[3])
        digits = high.view(torch.int8).view(*high.shape, 4)
        if sys.byteorder == "big":
            digits = digits.flip(-1)
        self.planes[1:].index_copy_(1, rows, digits[..., :3].permute(2, 0, 1))

    def sums(self, weight: TapDigits, taps: Tensor) -> Tensor:
        """taps (n, t): rows whose latents, one after the other, are multiplied with the weight."""
        places = (self.starts + taps.view(-1)).view(-1)
        digits = self.digits.index_select(0, places)
        return weight.sums(digits.view(len(self.units) * len(taps), -1), self.units)


@functools.cache
def _int8_is_exact() -> bool:
    """Whether int8 products are fast and exact; some CPUs saturate the sum of two at 2^15."""
    if not torch.cpu._is_vnni_supported():
        return False
    a, b = (torch.full(shape, value, dtype=torch.int8)
            for shape, value in (((64, 256), 127), ((256, 64), 127)))
    a[1::2] = b[:, 2::3] = -128
    return torch.equal(torch._int_mm(a, b).double(), a.double() @ b.double())
