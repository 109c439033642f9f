"""Networks in fixed-point arithmetic, which give the same bits on every machine.

A decoder must compute the same CDF indexes and means as the encoder, to the last bit; otherwise the
rest of the stream is decoded wrongly. Floating-point convolutions do not ensure this, because the
order of summation depends on threads, layout, instruction set and device. Here, every number is an
integer stored in float64: weights `q` have 16 bits and one power of two per output channel,
activations are multiples of 2^-12. As long as `sum |q| * max |activation| + |bias| < 2^53`, every
product and every partial sum is an exact integer, so the order of summation does not matter. The
bound is checked, per output channel, when a layer is prepared. Between layers, only operations that
IEEE 754 defines exactly are used; smooth activations (GELU, sigmoid, ...) are read from a table
indexed by the quantised input.

    params = exact.run(h_s, z_hat)                              # float64, instead of h_s(z_hat)
    indexes = exact.scale_indexes(scales, gaussian_conditional.scale_table)

`Rows` applies a layer to single positions, for decoders that process a few at a time.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

from common import UserError
from common.coding import exact_int8, exact_tables
from common.coding.contract import ExactModule
from common.layers import mask_of

import torch
import torch.nn.functional as F
from compressai.layers import GDN
from timm.layers import LayerNorm2d
from torch import Tensor, nn

VERSION = 1  # of the arithmetic; a stream can only be decoded with the version that wrote it
WEIGHT_BITS = 16  # |q| <= 2^15
GRID_BITS = 12  # activations are multiples of 2^-12 ...
CLAMP_BITS = 12  # ... and lie in [-2^12, 2^12]
MAX_SHIFT = 30  # weights are multiples of 2^-30 or coarser, so that biases fit as well
STRIP_ELEMENTS = 2**23  # at most this many float64 (64 MiB) of unfolded input at a time
NORM_BITS, NORM_CLAMP_BITS = 12, 9  # LayerNorm squares its inputs: +-512 in steps of 2^-12
LINEAR = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
SMOOTH = (nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Mish, nn.Sigmoid, nn.Tanh)


@dataclass
class _Layer:
    """A quantised linear layer; a transposed convolution is in the form of `_polyphase`."""

    weight: Tensor  # integers in float64, (out, in / groups, kh, kw)
    bias: Tensor  # integers in float64, (out, 1, 1)
    scale: Tensor  # powers of two, (out, 1, 1): value of one unit of the accumulator
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    grid_bits: int
    clamp_bits: int
    rows: tuple[Tensor, list[int]] | None = None  # weight and used taps, for `Rows`
    digits: tuple | None = None  # weight as int8, for exact_int8.py; empty: does not fit


_prepared: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()


@torch.no_grad()
def run(layers: nn.Module, x: Tensor) -> Tensor:
    """Apply convolutional layers in exact arithmetic.

    layers: one layer, a list or a Sequential of Conv2d, ConvTranspose2d, Linear, LayerNorm, GDN,
        ReLU, LeakyReLU, PixelShuffle, Identity, smooth activations, and modules with a method
        `exact(x, run)`, which calls `run` for their layers and adds and multiplies in between.
    x: (B, C, H, W), any float or integer type. Returns float64, whose bits depend on x and the
        weights only. The input of each layer is rounded to multiples of 2^-12 and clamped to
        +-2^12, so the result is close, but not equal, to `layers(x)`.
    Raises UserError for an x that is not finite, for weights that cannot be computed exactly, and
    for unsupported layers.
    """
    x = x.double()
    if not math.isfinite(x.sum().item()):  # as if any element is not finite
        raise UserError(
            "NaN or infinity in the latent: the model's weights or its input are broken"
        )
    for name, layer in _flatten(layers):
        if isinstance(layer, LINEAR):
            x = _apply(layer, _prepare(layer, name, x.device), x)
        elif isinstance(layer, nn.LayerNorm):
            x = _normalise(layer, name, x)
        elif isinstance(layer, GDN):
            x = _divide(layer, x)
        elif isinstance(layer, ExactModule):
            x = layer.exact(x, run)
        else:
            x = activate(layer, name, x)
    return x


def activate(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """Apply a layer without weights to x (float64), with the same bits on every machine."""
    if isinstance(layer, nn.ReLU):
        return x.clamp_min(0)
    if isinstance(layer, nn.LeakyReLU):
        return F.leaky_relu(x, layer.negative_slope)
    if isinstance(layer, SMOOTH):
        return exact_tables.smooth(layer, name, x)
    if isinstance(layer, nn.PixelShuffle):
        return layer(x)  # a permutation, without arithmetic
    if isinstance(layer, (nn.Identity, nn.Dropout)):
        return x
    raise UserError(f"layer {name} ({type(layer).__name__}) has no exact form")


class Rows:
    """A layer for single positions: rows (n, inputs) -> (n, outputs), with the bits of `run`.

    layer: a Linear layer, a 1x1 convolution, or a convolution with a `mask`; the rows of the latter
    hold, tap by tap, the C inputs of its unmasked taps (`taps`, row-major positions in the kernel).
    A layer can be summed in parts: `sums` of some inputs may be computed beforehand.
    """

    @torch.no_grad()
    def __init__(self, layer: nn.Module, name: str, device: torch.device):
        prepared = _prepare(layer, name, device)
        if prepared.rows is None:
            out, inputs, kh, kw = prepared.weight.shape
            mask = mask_of(layer)
            if prepared.groups != 1 or (mask is None and kh * kw > 1):
                raise UserError(f"layer {name} is not one that acts on rows")
            live = torch.ones(kh * kw) if mask is None else mask.flatten(2).amax(dim=(0, 1))
            taps = live.nonzero().flatten().tolist()
            kernel = prepared.weight.reshape(out, inputs, kh * kw)[:, :, taps]
            prepared.rows = kernel.transpose(1, 2).reshape(out, -1).contiguous(), taps
        self.weight, self.taps = prepared.rows
        self.bias = prepared.bias.view(-1)
        self.scale = prepared.scale.view(-1)
        self.grid_bits, self.clamp_bits = prepared.grid_bits, prepared.clamp_bits

    def sums(self, x: Tensor, first: int = 0, begun: Tensor | None = None) -> Tensor:
        """Partial sums over the inputs from `first` on, added to `begun` (by default the bias).

        They are integers, so parts can be summed in any order.
        """
        x = exact_tables.quantise(x, self.grid_bits, self.clamp_bits)
        weight = self.weight[:, first : first + x.shape[1]]
        return torch.mm(x, weight.t()).add_(self.bias if begun is None else begun)

    def __call__(self, x: Tensor, first: int = 0, begun: Tensor | None = None) -> Tensor:
        """x: (n, inputs), float64; or the inputs from `first` on, with the `sums` of all others."""
        return self.sums(x, first, begun).mul_(self.scale)


def spec(layers: nn.Module) -> dict:
    """Constants and exponents that a checkpoint stores so that its streams stay decodable.

    Consists of plain numbers and int32 tensors, which `torch.load(weights_only=True)` reads.
    """
    settings = [_settings(layer) for layer in _linear(layers)]
    return {
        "version": VERSION,
        "weight_bits": WEIGHT_BITS,
        "grid_bits": [s["grid_bits"] for s in settings],
        "clamp_bits": [s["clamp_bits"] for s in settings],
        "shifts": [s["shifts"].clone() for s in settings],
    }


def restore(layers: nn.Module, spec: dict | None) -> None:
    """Compute with the `spec` of a checkpoint from now on; None chooses new exponents.

    Raises UserError if the spec belongs to other layers or to another version of the arithmetic.
    """
    linear = _linear(layers)
    settings = [None] * len(linear)
    if spec is not None:
        try:
            version, keys = spec["version"], ("grid_bits", "clamp_bits", "shifts")
            columns = zip(*(spec[key] for key in keys), strict=True)
            settings = [dict(zip(keys, column, strict=True)) for column in columns]
            sizes = [s["shifts"].numel() for s in settings]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError("the fixed-point entry is damaged: use an intact checkpoint") from error
        if version != VERSION:
            raise UserError(f"fixed-point arithmetic {version} is not known: update the code")
        if sizes != [_out_channels(layer) for layer in linear]:
            raise UserError("the fixed-point entry does not match: it is of other layers or widths")
    for layer, entry in zip(linear, settings, strict=True):
        layer.exact_settings = entry  # on the module, so that deep copies have it, too
        _prepared.pop(layer, None)


def values(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter for an `exact` method, in float64 on the device of x."""
    return parameter.detach().to(x.device, torch.float64)


def scale_indexes(scales: Tensor, scale_table: Tensor) -> Tensor:
    """Row of the CDF tables for each scale (int32): the entry of `scale_table` nearest in ratio.

    CompressAI's `build_indexes` picks the next larger entry. Entries are 13 % apart, so that one is
    6 % too wide on average, which costs 0.3-0.9 % of the rate; the nearest one costs a quarter of
    this. The boundaries are the geometric means of neighbours; IEEE 754 defines sqrt exactly.
    """
    scales = scales.double().contiguous()
    boundaries = scale_boundaries(scale_table.to(scales.device))
    return torch.bucketize(scales, boundaries, out_int32=True)


def scale_boundaries(scale_table: Tensor) -> Tensor:
    """Boundaries (float64) between neighbouring entries of `scale_table`, for `scale_indexes`."""
    table = scale_table.double()
    return torch.sqrt(table[:-1] * table[1:])


def round_to_grid(x: Tensor, bits: int = 8) -> Tensor:
    """Round to multiples of 2^-bits, ties to even; scaling by a power of two is exact."""
    return torch.round(x * 2.0**bits) * 2.0**-bits


def _flatten(layers: nn.Module, prefix: str = ""):
    """Yield (name, layer) in order, including the layers of nested Sequentials."""
    if isinstance(layers, nn.Module) and not isinstance(layers, (nn.Sequential, nn.ModuleList)):
        yield prefix or type(layers).__name__, layers
        return
    for index, layer in enumerate(layers):
        yield from _flatten(layer, f"{prefix}.{index}" if prefix else str(index))


def _linear(layers: nn.Module) -> list[nn.Module]:
    """All linear layers at any depth, in the order of their registration."""
    return [layer for _, part in _flatten(layers) for layer in part.modules()
            if isinstance(layer, LINEAR)]


def _out_channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _weight(layer: nn.Module) -> Tensor:
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


def _settings(layer: nn.Module) -> dict:
    """Grid, clamp and exponents of a layer: those of `restore`, or chosen from the weights."""
    if getattr(layer, "exact_settings", None) is not None:
        return layer.exact_settings
    peak = _weight(layer).abs().reshape(_out_channels(layer), -1).amax(dim=1).cpu()
    exponent = torch.frexp(peak).exponent  # peak < 2^exponent
    shifts = (WEIGHT_BITS - 1 - exponent).clamp_max(MAX_SHIFT).int()
    return {"grid_bits": GRID_BITS, "clamp_bits": CLAMP_BITS, "shifts": shifts}


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents in float64. torch.ldexp uses a vectorised pow, which may not be exact."""
    return torch.tensor([math.ldexp(1.0, e) for e in exponents.tolist()], dtype=torch.float64)


def _prepare(layer: nn.Module, name: str, device: torch.device) -> _Layer:
    """Quantise a layer; the result is cached until its weights change.

    In-place changes through `.data` cannot be detected; `restore(layers, None)` clears the cache.
    """
    weight, bias = layer.weight, layer.bias
    key = (device, weight.device, weight.data_ptr(), weight._version)
    if bias is not None:
        key += (bias.data_ptr(), bias._version)
    if (known := _prepared.get(layer)) is not None and known[0] == key:
        return known[1]
    transposed, linear = isinstance(layer, nn.ConvTranspose2d), isinstance(layer, nn.Linear)
    if not linear and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        raise UserError(f"layer {name}: only zero padding given in numbers has an exact form")
    if transposed and layer.dilation != (1, 1):
        raise UserError(f"layer {name}: a dilated transposed convolution has no exact form")
    if not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
        raise UserError(f"layer {name} holds NaN or infinite weights: use an intact checkpoint")

    settings, phases = _settings(layer), math.prod(layer.stride) if transposed else 1
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
    known = _Layer(
        weight=q.to(device).contiguous(),
        bias=b.to(device).view(-1, 1, 1),
        scale=_power_of_two(-shifts - grid_bits).to(device).view(-1, 1, 1),
        stride=(1, 1) if transposed or linear else layer.stride,
        dilation=(1, 1) if linear else layer.dilation,
        groups=1 if linear else layer.groups,
        grid_bits=grid_bits,
        clamp_bits=clamp_bits,
    )
    # The cache keeps the tensors alive, so that no other weights can get the same addresses.
    _prepared[layer] = (key, known, weight.detach(), None if bias is None else bias.detach())
    return known


def _apply(layer: nn.Module, prepared: _Layer, x: Tensor) -> Tensor:
    """Apply one linear layer to real-valued x; the result is real-valued and exact."""
    x = exact_tables.quantise(x, prepared.grid_bits, prepared.clamp_bits)
    if isinstance(layer, nn.Linear):  # acts on the last dimension
        flat = x.reshape(-1, x.shape[-1]).t()[None, :, :, None]
        return _convolve(prepared, flat)[0, :, :, 0].t().reshape(*x.shape[:-1], -1)
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


def _convolve(layer: _Layer, x: Tensor) -> Tensor:
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


def _normalise(layer: nn.LayerNorm, name: str, x: Tensor) -> Tensor:
    """LayerNorm over the last dimension, or over the channels for timm's LayerNorm2d.

    The sums of the quantised x and of its squares are integers below 2^53, so their order does not
    matter; the rest is elementwise. x is rounded to multiples of 2^-NORM_BITS and clamped to
    +-2^NORM_CLAMP_BITS.
    """
    size, = layer.normalized_shape
    if size * 4 ** (NORM_BITS + NORM_CLAMP_BITS) >= 2**exact_tables.EXACT_BITS:
        raise UserError(f"layer {name}: LayerNorm over {size} channels has no exact form")
    dim = 1 if isinstance(layer, LayerNorm2d) else -1
    q = exact_tables.quantise(x, NORM_BITS, NORM_CLAMP_BITS)
    mean = q.sum(dim, keepdim=True) / size
    variance = (q.square().sum(dim, keepdim=True) / size - mean.square()).clamp_min_(0)
    eps = layer.eps * 4.0**NORM_BITS  # in units of the grid of x
    y = (q - mean) / torch.sqrt(variance + eps)
    if layer.elementwise_affine:
        weight, bias = (values(p, x).view((-1, 1, 1) if dim == 1 else (-1,))
                        for p in (layer.weight, layer.bias))
        y = y * weight + bias
    return y


def _divide(layer: GDN, x: Tensor) -> Tensor:
    """GDN, which divides by the norm, or inverse GDN, which multiplies; squares are integers."""
    beta = values(layer.beta_reparam(layer.beta), x).view(-1, 1, 1)
    gamma = round_to_grid(values(layer.gamma_reparam(layer.gamma), x), 20)
    if float(gamma.sum(1).max()) >= 2**9:
        raise UserError("GDN cannot be computed exactly: its gamma is too large")
    squares = round_to_grid(x.clamp(-256, 256).square(), 8)
    norm = torch.sqrt(torch.matmul(gamma, squares.flatten(2)).view_as(squares) + beta)
    return x * norm if layer.inverse else x / norm
