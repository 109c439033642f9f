"""Linear layers in fixed-point arithmetic: quantised weights, and convolutions over integers."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import TypedDict

from common import UserError
from common.coding import exact_int8, exact_tables
from common.layers import mask_of

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_BITS = 16  # |q| <= 2^15
GRID_BITS = 12  # activations are multiples of 2^-12 ...
CLAMP_BITS = 12  # ... and lie in [-2^12, 2^12]
MAX_SHIFT = 30  # weights are multiples of 2^-30 or coarser, so that biases fit as well
STRIP_ELEMENTS = 2**23  # maximum size of unfolded input, 64 MiB of float64
SETTINGS = "exact_settings"  # attribute that holds the settings of `restore` in a layer
Linear = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
LINEAR = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
# What the layer was prepared from, the result, its weight and its bias.
prepared_layers: weakref.WeakKeyDictionary[
    nn.Module, tuple[tuple[object, ...], PreparedLayer, Tensor, Tensor | None]
] = weakref.WeakKeyDictionary()


class Settings(TypedDict):
    """Grid and clamp of a layer's input, and the exponents of its output channels."""

    grid_bits: int
    clamp_bits: int
    shifts: Tensor


@dataclass
class PreparedLayer:
    """A quantised linear layer; a transposed convolution is in the form of `_polyphase`."""

    weight: Tensor  # integers in float64, (out, in / groups, kh, kw)
    bias: Tensor  # integers in float64, (out, 1, 1)
    scale: Tensor  # powers of two, (out, 1, 1): value of one unit of the accumulator
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    grid_bits: int
    clamp_bits: int
    # for `Rows`, by the bits of its output: weight (inputs, out) times scale, scale, weight as int8
    # digits, and used taps
    rows: dict[int, tuple[Tensor, Tensor, exact_int8.TapDigits | None, list[int]]] = field(
        default_factory=dict)
    # weight as int8 and signs, for exact_int8.py; empty: does not fit
    digits: tuple[Tensor, Tensor] | tuple[()] | None = None


def out_channels(layer: Linear) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _weight(layer: Linear) -> Tensor:
    """The weight in float64, in the shape (out, in / groups, kh, kw) of an ordinary convolution."""
    weight = layer.weight.detach().double()
    if (mask := mask_of(layer)) is not None:
        weight = weight * mask
    if isinstance(layer, nn.Linear):
        return weight[:, :, None, None]
    return _polyphase(layer, weight) if isinstance(layer, nn.ConvTranspose2d) else weight


def _polyphase(layer: nn.ConvTranspose2d, weight: Tensor) -> Tensor:
    """Kernel of an ordinary convolution that, followed by a pixel shuffle, is the transposed one.

    Before the padding is cropped, output row t = q * stride + r is the sum over m of input row
    q - m times tap r + m * stride, i.e. a convolution with ceil(k / stride) taps for each phase r.
    (in, out / groups, kh, kw) -> (out * sh * sw, in / groups, ceil(kh / sh), ceil(kw / sw)), with
    the channels in the order of pixel_shuffle.
    """
    (sh, sw), groups = layer.stride, layer.groups
    channels, out, kh, kw = weight.shape
    nh, nw = -(-kh // sh), -(-kw // sw)
    weight = F.pad(weight, (0, nw * sw - kw, 0, nh * sh - kh))
    weight = weight.reshape(groups, channels // groups, out, nh, sh, nw, sw).flip(3, 5)
    return weight.permute(0, 2, 4, 6, 1, 3, 5).reshape(-1, channels // groups, nh, nw)


def settings_of(layer: Linear) -> Settings:
    """Grid, clamp and exponents of a layer: those of `restore`, or chosen from the weights."""
    restored: Settings | None = getattr(layer, SETTINGS, None)
    if restored is not None:
        return restored
    peak = _weight(layer).abs().reshape(out_channels(layer), -1).amax(dim=1).cpu()
    exponent = torch.frexp(peak).exponent  # peak < 2^exponent
    shifts = (WEIGHT_BITS - 1 - exponent).clamp_max(MAX_SHIFT).int()
    return {"grid_bits": GRID_BITS, "clamp_bits": CLAMP_BITS, "shifts": shifts}


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents in float64. torch.ldexp uses a vectorised pow, which may not be exact."""
    return torch.tensor([math.ldexp(1.0, e) for e in exponents.tolist()], dtype=torch.float64)


def prepare(layer: Linear, name: str, device: torch.device) -> PreparedLayer:
    """Quantise a layer; the result is cached until its weights change.

    In-place changes through `.data` cannot be detected; `restore(layers, None)` clears the cache.
    """
    weight, bias = layer.weight, layer.bias
    key: tuple[object, ...] = (device, weight.device, weight.data_ptr(), weight._version)
    if bias is not None:
        key += (bias.data_ptr(), bias._version)
    if (known := prepared_layers.get(layer)) is not None and known[0] == key:
        return known[1]
    stride: tuple[int, ...] = (1, 1)
    dilation, groups, phases = stride, 1, 1  # these are the values of a Linear
    if not isinstance(layer, nn.Linear):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise UserError(f"layer {name}: only zero padding given as numbers has an exact form")
        dilation, groups = layer.dilation, layer.groups
        if not isinstance(layer, nn.ConvTranspose2d):
            stride = layer.stride
        elif dilation == (1, 1):
            phases = math.prod(layer.stride)
        else:
            raise UserError(f"layer {name}: a dilated transposed convolution has no exact form")
    if not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
        raise UserError(f"layer {name} holds NaN or infinite weights: use an intact checkpoint")

    settings = settings_of(layer)
    grid_bits, clamp_bits = settings["grid_bits"], settings["clamp_bits"]
    shifts = settings["shifts"].repeat_interleave(phases)
    unit = _power_of_two(shifts).to(weight.device)
    q = torch.round(_weight(layer) * unit.view(-1, 1, 1, 1))
    b = torch.zeros_like(unit) if bias is None else bias.detach().double().repeat_interleave(phases)
    b = torch.round(b * unit * 2.0**grid_bits)
    bound = q.abs().sum(dim=(1, 2, 3)) * 2.0 ** (grid_bits + clamp_bits) + b.abs()
    if (worst := float(bound.max())) >= 2.0**exact_tables.EXACT_BITS:
        raise UserError(
            f"layer {name} cannot be computed exactly: sums reach {worst:.3g}, the limit is"
            f" 2^{exact_tables.EXACT_BITS}; its weights or biases are too large"
        )
    prepared = PreparedLayer(
        weight=q.to(device).contiguous(),
        bias=b.to(device).view(-1, 1, 1),
        scale=_power_of_two(-shifts - grid_bits).to(device).view(-1, 1, 1),
        stride=stride,
        dilation=dilation,
        groups=groups,
        grid_bits=grid_bits,
        clamp_bits=clamp_bits,
    )
    # The cache keeps the tensors alive, so that no other weights can get the same addresses.
    prepared_layers[layer] = (key, prepared, weight.detach(),
                              None if bias is None else bias.detach())
    return prepared


def apply_layer(layer: Linear, prepared: PreparedLayer, x: Tensor) -> Tensor:
    """Apply one linear layer to real-valued x; the result is real-valued and exact."""
    x = exact_tables.quantise(x, prepared.grid_bits, prepared.clamp_bits)
    if isinstance(layer, nn.Linear):  # acts on the last dimension
        flat = x.reshape(-1, x.shape[-1]).t()[None, :, :, None]
        return _convolve(prepared, flat)[0, :, :, 0].t().reshape(*x.shape[:-1], -1)
    assert not isinstance(layer.padding, str)  # `prepare` has refused it
    (ph, pw), (h, w) = layer.padding, x.shape[-2:]
    if not isinstance(layer, nn.ConvTranspose2d):
        return _convolve(prepared, F.pad(x, (pw, pw, ph, ph)))
    (sh, sw), (nh, nw) = layer.stride, prepared.weight.shape[-2:]
    out_h = (h - 1) * sh - 2 * ph + layer.kernel_size[0] + layer.output_padding[0]
    out_w = (w - 1) * sw - 2 * pw + layer.kernel_size[1] + layer.output_padding[1]
    bottom, right = -(-(ph + out_h) // sh) - h, -(-(pw + out_w) // sw) - w
    y = _convolve(prepared, F.pad(x, (nw - 1, right, nh - 1, bottom)))
    b, _, qh, qw = y.shape
    y = y.view(b, -1, sh, sw, qh, qw).permute(0, 1, 4, 2, 5, 3).reshape(b, -1, qh * sh, qw * sw)
    return y[..., ph : ph + out_h, pw : pw + out_w]


def _convolve(layer: PreparedLayer, x: Tensor) -> Tensor:
    """Integer convolution without padding, in strips that bound the memory for large planes.

    It unfolds and multiplies, because the convolution of a GPU library may use Winograd or FFT
    algorithms, which are not exact.
    """
    weight = layer.weight.view(layer.groups, len(layer.weight) // layer.groups, -1)
    (kh, kw), (sh, sw), (dh, dw) = layer.weight.shape[-2:], layer.stride, layer.dilation
    digits = exact_int8.digits_of(layer, x)
    rows = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    columns = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    out = x.new_empty(x.shape[0], len(layer.weight), rows, columns)
    strip = max(1, STRIP_ELEMENTS // (x.shape[0] * x.shape[1] * kh * kw * columns))
    for top in range(0, rows, strip):
        n = min(strip, rows - top)
        if digits is not None:
            sums = exact_int8.sums_by_digits(digits, x, top * sh, n, columns, layer)
            torch.mul(sums.add_(layer.bias), layer.scale, out=out[:, :, top : top + n])
            continue
        patches = x[:, :, top * sh : (top + n - 1) * sh + dh * (kh - 1) + 1]
        if (kh, kw, sh, sw) != (1, 1, 1, 1):
            patches = F.unfold(patches, (kh, kw), layer.dilation, 0, layer.stride)
        patches = patches.reshape(x.shape[0], layer.groups, weight.shape[-1], n * columns)
        sums = torch.matmul(weight, patches).view(x.shape[0], -1, n, columns)
        torch.mul(sums.add_(layer.bias), layer.scale, out=out[:, :, top : top + n])
    return out
