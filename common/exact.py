"""Networks in fixed-point arithmetic: the same bits on every machine.

A decoder must find the same CDF indexes and means as the encoder, to the last bit, or the rest of the stream is garbage.
Floating-point convolutions do not give that: the order of summation depends on threads, layout, instruction set and
device. Here every number is an integer held in float64: weights `q` of 16 bits with one power of two per output channel,
activations on a grid of 2^-12. As long as `sum |q| * max |activation| + |bias| < 2^53`, every product and every
partial sum is an exact integer, so the order of summation cannot matter. The bound is checked, per output channel, when a
layer is prepared. Between layers only operations that IEEE 754 defines exactly are used; smooth activations (GELU,
sigmoid, ...) are read from a table indexed by the quantised input.

    params = exact.run(h_s, z_hat)                              # float64, instead of h_s(z_hat)
    indexes = exact.scale_indexes(scales, gaussian_conditional.scale_table)
"""

import math
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import UserError

VERSION = 1  # of the arithmetic; goes into spec(), because old streams need the arithmetic they were written with
WEIGHT_BITS = 16  # |q| <= 2^15
GRID_BITS = 12  # activations are multiples of 2^-12 ...
CLAMP_BITS = 12  # ... and lie in [-2^12, 2^12]
MAX_SHIFT = 30  # weights are multiples of 2^-30 or of something coarser, so that biases fit beside them
EXACT_BITS = 53  # float64 holds every integer up to 2^53
TABLE_RANGE = 16  # smooth activations are tabulated on [-16, 16]
STRIP_ELEMENTS = 2**23  # rows are processed in strips whose unfolded input has at most this many float64 (64 MiB)

LINEAR = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
SMOOTH = (nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Mish, nn.Sigmoid, nn.Tanh)


@dataclass
class _Layer:
    """One linear layer, ready to run. A transposed convolution is held as an ordinary one (see `_polyphase`)."""

    weight: Tensor  # integers in float64, (out, in / groups, kh, kw)
    bias: Tensor  # integers in float64, (out, 1, 1)
    scale: Tensor  # powers of two, (out, 1, 1): value of one unit of the accumulator
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    grid_bits: int
    clamp_bits: int


_prepared: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()
_tables: dict[tuple, Tensor] = {}


@torch.no_grad()
def run(layers: nn.Module, x: Tensor) -> Tensor:
    """Apply convolutional layers in exact arithmetic.

    layers: a Sequential or a list of Conv2d, ConvTranspose2d, Linear, ReLU, LeakyReLU, Identity and smooth activations.
    x: (B, C, H, W), any float or integer type. Returns float64; its last bit depends on x and the weights, on nothing
    else. The input and every layer's input are rounded to multiples of 2^-12 and clamped to +-2^12, so the result is
    close to, not equal to, `layers(x)`.
    Raises UserError for a non-finite x, for weights that cannot be computed exactly and for unsupported layers.
    """
    if not torch.isfinite(x).all():
        raise UserError("NaN or infinity entered the exact path: the model's weights or its input are broken")
    x = x.double()
    for name, layer in _flatten(layers):
        if isinstance(layer, LINEAR):
            x = _apply(layer, _prepare(layer, name), x)
        elif isinstance(layer, nn.ReLU):
            x = x.clamp_min(0)
        elif isinstance(layer, nn.LeakyReLU):
            x = torch.where(x < 0, x * layer.negative_slope, x)
        elif isinstance(layer, SMOOTH):
            x = _smooth(layer, name, x)
        elif isinstance(layer, nn.PixelShuffle):
            x = layer(x)  # moves numbers, computes none
        elif not isinstance(layer, (nn.Identity, nn.Dropout)):
            raise UserError(f"layer {name} ({type(layer).__name__}) has no exact form")
    return x


def spec(layers: nn.Module) -> dict:
    """What a checkpoint must keep so that its streams stay decodable: the arithmetic's constants and all exponents.

    Plain numbers and int32 tensors; `torch.load(weights_only=True)` reads it.
    """
    settings = [_settings(layer) for _, layer in _flatten(layers) if isinstance(layer, LINEAR)]
    return {
        "version": VERSION,
        "weight_bits": WEIGHT_BITS,
        "grid_bits": [s["grid_bits"] for s in settings],
        "clamp_bits": [s["clamp_bits"] for s in settings],
        "shifts": [s["shifts"].clone() for s in settings],
    }


def restore(layers: nn.Module, spec: dict | None) -> None:
    """Compute with a checkpoint's `spec` from now on; with None, choose the exponents from the weights again.

    Raises UserError when the spec belongs to other layers or to a newer version of this arithmetic.
    """
    linear = [layer for _, layer in _flatten(layers) if isinstance(layer, LINEAR)]
    if spec is None:
        for layer in linear:
            layer.__dict__.pop("exact_settings", None)
            _prepared.pop(layer, None)
        return
    try:
        version, rows = spec["version"], list(zip(spec["grid_bits"], spec["clamp_bits"], spec["shifts"], strict=True))
        sizes = [shifts.numel() for _, _, shifts in rows]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError("the checkpoint's fixed-point entry is damaged: use an intact checkpoint") from error
    if version != VERSION:
        raise UserError(f"the checkpoint uses fixed-point arithmetic {version}, this code has {VERSION}: update the code")
    if sizes != [_out_channels(layer) for layer in linear]:
        raise UserError("the checkpoint's fixed-point entry does not match the network: other layers or channels")
    for layer, (grid_bits, clamp_bits, shifts) in zip(linear, rows):
        _prepared.pop(layer, None)
        # On the module, not in a table beside it, so that a deep copy of the model computes with it too.
        layer.exact_settings = {"grid_bits": int(grid_bits), "clamp_bits": int(clamp_bits), "shifts": shifts.int().cpu()}


def scale_indexes(scales: Tensor, scale_table: Tensor) -> Tensor:
    """Row of the CDF table for each scale: the first entry of `scale_table` that is not smaller (int32, shape of scales).

    Equals `GaussianConditional.build_indexes` for every float32 input. Everything up to the table's first
    entry (float32 0.11) falls into row 0, which is what the lower bound there does.
    """
    table = scale_table.double()  # float32 to float64 is exact, so ties with a table entry stay ties
    return torch.bucketize(scales.double().contiguous(), table[:-1], out_int32=True)


def round_to_grid(x: Tensor, bits: int = 8) -> Tensor:
    """Round to multiples of 2^-bits, ties to even. Scaling by a power of two is exact, so the result is too."""
    return torch.round(x * 2.0**bits) * 2.0**-bits


def _flatten(layers: nn.Module, prefix: str = ""):
    """Yield (name, layer) in order, Sequentials within Sequentials included."""
    if isinstance(layers, nn.Module) and not isinstance(layers, (nn.Sequential, nn.ModuleList)):
        yield prefix or type(layers).__name__, layers
        return
    for index, layer in enumerate(layers):
        yield from _flatten(layer, f"{prefix}.{index}" if prefix else str(index))


def _out_channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _weight(layer: nn.Module) -> Tensor:
    """The weight in float64 as (out, in / groups, kh, kw) of an ordinary convolution."""
    weight = layer.weight.detach().double()
    if getattr(layer, "mask", None) is not None:  # masked convolutions
        weight = weight * layer.mask
    if isinstance(layer, nn.Linear):
        return weight[:, :, None, None]
    return _polyphase(layer, weight) if isinstance(layer, nn.ConvTranspose2d) else weight


def _polyphase(layer: nn.ConvTranspose2d, weight: Tensor) -> Tensor:
    """Kernel of the ordinary convolution whose output, pixel-shuffled, is the transposed convolution.

    Output row t = q * stride + r (before cropping the padding) is the sum over m of input row q - m with tap
    r + m * stride: for each phase r a convolution with ceil(k / stride) taps. (in, out / groups, kh, kw) ->
    (out * sh * sw, in / groups, ceil(kh / sh), ceil(kw / sw)), channels ordered for pixel_shuffle.
    """
    (sh, sw), groups = layer.stride, layer.groups
    channels, out, kh, kw = weight.shape
    nh, nw = -(-kh // sh), -(-kw // sw)
    weight = F.pad(weight, (0, nw * sw - kw, 0, nh * sh - kh))
    weight = weight.reshape(groups, channels // groups, out, nh, sh, nw, sw).flip(3, 5)
    return weight.permute(0, 2, 4, 6, 1, 3, 5).reshape(groups * out * sh * sw, channels // groups, nh, nw)


def _phases(layer: nn.Module) -> int:
    return layer.stride[0] * layer.stride[1] if isinstance(layer, nn.ConvTranspose2d) else 1


def _settings(layer: nn.Module) -> dict:
    """Grid, clamp and exponents: the checkpoint's where `restore` put some, else chosen from the weights."""
    if (restored := layer.__dict__.get("exact_settings")) is not None:
        return restored
    peak = _weight(layer).abs().reshape(_out_channels(layer), -1).amax(dim=1).cpu()
    exponent = torch.frexp(peak).exponent  # peak < 2^exponent
    shifts = (WEIGHT_BITS - 1 - exponent).clamp_max(MAX_SHIFT).int()
    return {"grid_bits": GRID_BITS, "clamp_bits": CLAMP_BITS, "shifts": shifts}


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents in float64. torch.ldexp and torch.pow go through a vectorised pow, which nobody promises to be exact."""
    return torch.tensor([math.ldexp(1.0, e) for e in exponents.tolist()], dtype=torch.float64)


def _prepare(layer: nn.Module, name: str) -> _Layer:
    """Quantise a layer, once for each state of its weights (in-place changes through `.data` leave no trace to see)."""
    weight, bias = layer.weight, layer.bias
    key = (weight.device, weight.data_ptr(), weight._version)
    if bias is not None:
        key += (bias.data_ptr(), bias._version)
    if (known := _prepared.get(layer)) is not None and known[0] == key:
        return known[1]
    if getattr(layer, "padding_mode", "zeros") != "zeros" or isinstance(getattr(layer, "padding", 0), str):
        raise UserError(f"layer {name}: only zero padding given in numbers has an exact form")
    if isinstance(layer, nn.ConvTranspose2d) and layer.dilation != (1, 1):
        raise UserError(f"layer {name}: a dilated transposed convolution has no exact form")
    if not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
        raise UserError(f"layer {name} holds NaN or infinite weights: use an intact checkpoint")

    settings, phases = _settings(layer), _phases(layer)
    grid_bits, clamp_bits = settings["grid_bits"], settings["clamp_bits"]
    shifts = settings["shifts"].repeat_interleave(phases)
    unit = _power_of_two(shifts).to(weight.device)
    q = torch.round(_weight(layer) * unit.view(-1, 1, 1, 1))
    b = torch.zeros_like(unit) if bias is None else bias.detach().double().repeat_interleave(phases)
    b = torch.round(b * unit * 2.0**grid_bits)
    bound = q.abs().sum(dim=(1, 2, 3)) * 2.0 ** (grid_bits + clamp_bits) + b.abs()
    if (worst := float(bound.max())) >= 2.0**EXACT_BITS:
        raise UserError(
            f"layer {name} cannot be computed exactly: sums reach {worst:.3g}, the limit is 2^{EXACT_BITS};"
            " its weights or biases are too large"
        )
    column = (-1, 1, 1)
    transposed, linear = isinstance(layer, nn.ConvTranspose2d), isinstance(layer, nn.Linear)
    known = _Layer(
        weight=q.contiguous(),
        bias=b.view(column),
        scale=_power_of_two(-shifts - grid_bits).to(weight.device).view(column),
        stride=(1, 1) if transposed or linear else layer.stride,
        dilation=(1, 1) if linear else layer.dilation,
        groups=1 if linear else layer.groups,
        grid_bits=grid_bits,
        clamp_bits=clamp_bits,
    )
    # Holding the storages keeps their addresses from being given to other weights, which would look unchanged.
    _prepared[layer] = (key, known, weight.detach(), None if bias is None else bias.detach())
    return known


def _quantise(x: Tensor, grid_bits: int, clamp_bits: int) -> Tensor:
    limit = 2.0 ** (grid_bits + clamp_bits)
    return (x * 2.0**grid_bits).round_().clamp_(-limit, limit)


def _apply(layer: nn.Module, prepared: _Layer, x: Tensor) -> Tensor:
    """One linear layer on real-valued x; the result is real-valued and exact."""
    x = _quantise(x, prepared.grid_bits, prepared.clamp_bits)
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
    """Integer convolution without padding, strip by strip: large planes in bounded memory, with the same result."""
    (kh, kw), (sh, sw), (dh, dw) = layer.weight.shape[-2:], layer.stride, layer.dilation
    rows = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    columns = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    out = x.new_empty(x.shape[0], len(layer.weight), rows, columns)
    strip = max(1, STRIP_ELEMENTS // (x.shape[0] * x.shape[1] * kh * kw * columns))
    for top in range(0, rows, strip):
        n = min(strip, rows - top)
        part = x[:, :, top * sh : (top + n - 1) * sh + dh * (kh - 1) + 1]
        sums = _multiply(layer, part, n, columns).add_(layer.bias)
        torch.mul(sums, layer.scale, out=out[:, :, top : top + n])
    return out


def _multiply(layer: _Layer, x: Tensor, rows: int, columns: int) -> Tensor:
    """Unfold and multiply. A GPU library's own convolution may be Winograd or FFT, which are not exact in any format."""
    kernel, batch = layer.weight.shape[-2:], x.shape[0]
    patches = x if kernel == (1, 1) == layer.stride else F.unfold(x, kernel, layer.dilation, 0, layer.stride)
    weight = layer.weight.view(layer.groups, len(layer.weight) // layer.groups, -1)
    patches = patches.reshape(batch, layer.groups, weight.shape[-1], rows * columns)
    return torch.matmul(weight, patches).view(batch, -1, rows, columns)


def _smooth(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """A smooth activation by table: quantised input -> output on the same grid; constant or linear beyond the table."""
    limit = TABLE_RANGE << GRID_BITS
    table = _tables.get(key := (repr(layer), x.device))
    if table is None:
        table = _tables[key] = _tabulate(layer, name).to(x.device)
    index = _quantise(x, GRID_BITS, CLAMP_BITS)
    inside = index.clamp(-limit, limit)
    y = table[(inside + limit).long()]
    if table[-1] == TABLE_RANGE:  # GELU, SiLU, ...: the identity from here on
        y += (index - inside).clamp_min_(0) * 2.0**-GRID_BITS
    return y


def _tabulate(layer: nn.Module, name: str) -> Tensor:
    """Values on the grid, rounded to it. Refused where another machine's exp or erf could round to another value."""
    limit = TABLE_RANGE << GRID_BITS
    units = torch.arange(-limit, limit + 1, dtype=torch.float64)
    exact = layer(units * 2.0**-GRID_BITS) * 2.0**GRID_BITS
    tie_distance = (exact - exact.floor() - 0.5).abs().min()
    ends = layer(torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64) * TABLE_RANGE) * 2.0**GRID_BITS
    left, right = ends[1] - ends[0], ends[3] - ends[2]
    flat = min(abs(right), abs(right - limit))
    if not (tie_distance > 2.0**-30 and abs(left) < 0.5 and flat < 0.5):
        raise UserError(f"layer {name} ({layer}) has no exact table")
    return torch.round(exact) * 2.0**-GRID_BITS


