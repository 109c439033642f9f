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
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from common import UserError
from common.coding import exact_int8, exact_layers, exact_tables, schema
from common.coding.contract import ExactModule, Layers
from common.coding.exact_layers import Linear, Settings
from common.coding.stages import PARAMETERS, stage
from common.layers import mask_of

import numpy as np
import torch
import torch.nn.functional as F
from compressai.layers import GDN
from timm.layers import LayerNorm2d
from torch import Tensor, nn

VERSION = 1  # of the arithmetic; a stream can only be decoded with the version that wrote it
NORM_BITS, NORM_CLAMP_BITS = 12, 9  # LayerNorm squares its inputs: +-512 in steps of 2^-12
SMOOTH = (nn.GELU, nn.SiLU, nn.ELU, nn.Softplus, nn.Mish, nn.Sigmoid, nn.Tanh)


@torch.no_grad()
@stage(PARAMETERS)
def run(layers: Layers, x: Tensor) -> Tensor:
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
    if not math.isfinite(x.sum().item()):  # so is the sum if any element is not
        raise UserError(
            "NaN or infinity in the latent: the model's weights or its input are broken"
        )
    for name, layer in _flatten(layers):
        if isinstance(layer, exact_layers.LINEAR):
            x = exact_layers.apply_layer(layer, exact_layers.prepare(layer, name, x.device), x)
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
    A layer can be summed in parts: `sums` of some inputs may be computed beforehand. The weight is
    stored as (inputs, outputs): with few rows, MKL multiplies by a transposed matrix several times
    slower.

    Each output channel of the weight is multiplied by the power of two of its unit, so a sum needs
    no scaling: its terms are integers times that power, and remain exact. For a layer behind this
    one, outputs can be multiplied by 2^out_bits, too; inputs that come so have in_bits.
    """

    @torch.no_grad()
    def __init__(self, layer: Linear, name: str, device: torch.device, in_bits: int = 0,
                 out_bits: int = 0):
        prepared = exact_layers.prepare(layer, name, device)
        if (known := prepared.rows.get(out_bits)) is None:
            out, inputs, kh, kw = prepared.weight.shape
            mask = mask_of(layer)
            if prepared.groups != 1 or (mask is None and kh * kw > 1):
                raise UserError(f"layer {name} cannot be applied to rows")
            live = torch.ones(kh * kw) if mask is None else mask.flatten(2).amax(dim=(0, 1))
            taps = live.nonzero().flatten().tolist()
            kernel = prepared.weight.reshape(out, inputs, kh * kw)[:, :, taps]
            weight = kernel.transpose(1, 2).reshape(out, -1)
            # with few inputs, float64 is faster than splitting them
            bits = prepared.grid_bits + prepared.clamp_bits
            small = len(taps) == 1 or bits > exact_int8.INPUT_BITS
            digits = None if small else exact_int8.TapDigits.of(weight)
            scale = prepared.scale.view(-1) * 2.0**out_bits
            known = (weight.t() * scale).contiguous(), scale, digits, taps
            prepared.rows[out_bits] = known
        self.weight, self.scale, self.digits, self.taps = known
        self.bias = prepared.bias.view(-1)  # integers, in units of the scale
        self.offset = self.bias * self.scale
        self.grid_bits, self.clamp_bits = prepared.grid_bits, prepared.clamp_bits
        self.in_bits = in_bits

    def reorder(self, order: Tensor) -> None:
        """Let input k be what was input order[k]; order: a permutation of the inputs of a 1x1
        convolution.
        """
        self.weight = self.weight[order]

    def quantise(self, x: Tensor) -> Tensor:
        """Inputs as integers, in float64; overwrites x if it comes in their unit."""
        if self.in_bits == self.grid_bits:
            limit = 2.0 ** (self.grid_bits + self.clamp_bits)
            return x.round_().clamp_(-limit, limit)
        return exact_tables.quantise(x, self.grid_bits - self.in_bits,
                                     self.clamp_bits + self.in_bits)

    def __call__(self, x: Tensor, first: int = 0, begun: Tensor | None = None) -> Tensor:
        """Sums over the inputs x (n, inputs), float64, from input `first` on.

        begun: sums over other inputs, to which these are added; by default the bias. As all terms
        are integers times the same power of two, parts can be summed in any order.
        """
        weight = self.weight[first : first + x.shape[1]]
        # faster with few rows than torch.addmm
        return torch.mm(self.quantise(x), weight).add_(self.offset if begun is None else begun)


def rows_of(layers: nn.Sequential, name: str, device: torch.device
            ) -> tuple[Rows, list[Callable[[Tensor], Tensor]]]:
    """The first layer of a chain of 1x1 convolutions and activations, for rows; and the others.

    Between two convolutions, values are in the unit of the second one's input where the activation
    permits it. They are for the other layers only, which overwrite them.
    """
    chain = [*layers]
    bits = [0] * (len(chain) + 1)  # values before layer i are multiplied by 2^bits[i]
    for i in range(len(chain) - 2):
        conv, act, after = chain[i : i + 3]
        if (isinstance(conv, nn.Conv2d) and isinstance(after, nn.Conv2d)
                and isinstance(act, (nn.ReLU, nn.LeakyReLU))):  # which commute with a factor
            bits[i + 1] = bits[i + 2] = exact_layers.settings_of(after)["grid_bits"]
    first, *rest = (Rows(layer, f"{name}.{i}", device, bits[i], bits[i + 1])
                    if isinstance(layer, nn.Conv2d) else partial(activate, layer, f"{name}.{i}")
                    for i, layer in enumerate(chain))
    if not isinstance(first, Rows):
        raise UserError(f"layer {name}.0 cannot be applied to rows")
    return first, list(rest)


def spec(layers: nn.Module) -> dict[str, Any]:
    """Constants and exponents that a checkpoint stores so that its streams stay decodable.

    Consists of plain numbers and int32 tensors, which `torch.load(weights_only=True)` reads.
    """
    settings = [exact_layers.settings_of(layer) for layer in _linear(layers)]
    return {
        "version": VERSION,
        "weight_bits": exact_layers.WEIGHT_BITS,
        "grid_bits": [s["grid_bits"] for s in settings],
        "clamp_bits": [s["clamp_bits"] for s in settings],
        "shifts": [s["shifts"].clone() for s in settings],
    }


def restore(layers: nn.Module, spec: dict[str, Any] | None, where: str = "exact") -> None:
    """Compute with the `spec` of a checkpoint from now on; None chooses new exponents.

    where: name of the spec in errors. Raises UserError if it belongs to other layers or to another
    version of the arithmetic.
    """
    linear = _linear(layers)
    entries: list[Settings | None] = [None] * len(linear)
    if spec is not None:
        version = spec.get("version") if isinstance(spec, dict) else None
        if type(version) is int and version != VERSION:
            raise UserError(f"fixed-point arithmetic {version} is not known: update the code")
        schema.check_exact(spec, where)
        columns = [spec[key] for key in schema.EXACT[2:]]
        settings = [Settings(grid_bits=grid, clamp_bits=clamp, shifts=shifts)
                    for grid, clamp, shifts in zip(*columns, strict=True)]
        sizes = [s["shifts"].numel() for s in settings]
        if sizes != [exact_layers.out_channels(layer) for layer in linear]:
            raise UserError("the fixed-point entry does not match: it has other layers or widths")
        entries = [*settings]
    for layer, entry in zip(linear, entries, strict=True):
        # on the module, so that deep copies have it, too
        setattr(layer, exact_layers.SETTINGS, entry)
        exact_layers.prepared_layers.pop(layer, None)


def values(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter for an `exact` method, in float64 on the device of x."""
    return parameter.detach().to(x.device, torch.float64)


def scale_indexes(scales: Tensor, scale_table: Tensor) -> Tensor:
    """Row of the CDF tables for each scale (int32): the entry of `scale_table` nearest in ratio.

    The boundaries are the geometric means of neighbours; IEEE 754 defines sqrt exactly. For right
    scales they are optimal: with the boundaries at which a Gaussian of that scale costs the same
    under both tables, the files of the bundled models differ by 0.02 % at most. CompressAI's
    `build_indexes` picks the next larger entry, as if scales were 6 % larger. That costs up to
    0.4 %, and saves as much for the one model whose scales are too small even after
    common/recipes/export.py has corrected them. common/results/index_rule.json has the sizes,
    from `python -m common.evaluation.index_rule`.
    """
    scales = scales.double().contiguous()
    boundaries = scale_boundaries(scale_table.to(scales.device))
    return torch.bucketize(scales, boundaries, out_int32=True)


def scale_boundaries(scale_table: Tensor) -> Tensor:
    """Boundaries (float64) between neighbouring entries of `scale_table`, for `scale_indexes`."""
    table = scale_table.double()
    return sqrt(table[:-1] * table[1:])


class Intervals:
    """torch.bucketize(x, boundaries, out_int32=True) for float64, several times faster on CPUs.

    The leading bits of a positive float64 number the bins of a table: 32 for each power of two. A
    bin holds at most one boundary, with which x is compared; boundaries that are closer together,
    or not positive, leave the work to torch.bucketize, which searches through all of them.
    """

    SHIFT = 52 - 5

    def __init__(self, boundaries: Tensor):
        """boundaries: float64, increasing."""
        self.boundaries = boundaries
        self.lowest = 0
        self.below: Tensor | None = None
        if boundaries.device.type != "cpu" or not len(boundaries) or not boundaries[0] > 0:
            return
        bins = boundaries.view(torch.int64) >> self.SHIFT
        self.lowest, count = int(bins[0]), int(bins[-1] - bins[0]) + 1
        bins -= self.lowest
        if len(bins.unique()) == len(bins):
            self.below = torch.searchsorted(bins, torch.arange(count)).int()
            self.inside = torch.full((count,), math.inf, dtype=torch.float64)
            self.inside[bins] = boundaries

    def __call__(self, x: Tensor) -> Tensor:
        """For each x, float64, the number of boundaries that are smaller (int32)."""
        if self.below is None:
            return torch.bucketize(x.contiguous(), self.boundaries, out_int32=True)
        bins = (x.view(torch.int64) >> self.SHIFT).sub_(self.lowest).clamp_(0, len(self.below) - 1)
        return self.below.take(bins).add_(x > self.inside.take(bins))


def sqrt(x: Tensor) -> Tensor:
    """Square root of float64, rounded as IEEE 754 demands.

    On a CPU, torch.sqrt calls MKL, whose last bit depends on the CPU's instructions.
    """
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else torch.sqrt(x)


def round_to_grid(x: Tensor, bits: int = 8) -> Tensor:
    """Round to multiples of 2^-bits, ties to even; scaling by a power of two is exact."""
    return torch.round(x * 2.0**bits) * 2.0**-bits


def _flatten(layers: Layers, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) in order, including the layers of nested Sequentials."""
    if isinstance(layers, nn.Module) and not isinstance(layers, (nn.Sequential, nn.ModuleList)):
        yield prefix or type(layers).__name__, layers
        return
    for index, layer in enumerate(layers):
        yield from _flatten(layer, f"{prefix}.{index}" if prefix else str(index))


def _linear(layers: nn.Module) -> list[Linear]:
    """All linear layers at any depth, in the order of their registration."""
    return [layer for _, part in _flatten(layers) for layer in part.modules()
            if isinstance(layer, exact_layers.LINEAR)]


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
    y = (q - mean) / sqrt(variance + eps)
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
    norm = sqrt(torch.matmul(gamma, squares.flatten(2)).view_as(squares) + beta)
    return x * norm if layer.inverse else x / norm
