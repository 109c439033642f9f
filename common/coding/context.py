"""Means and scales of a context model, computed for groups of positions.

A context model predicts a latent from its decoded neighbours (a masked convolution) and from the
parameters of the hyper decoder, by a chain of 1x1 convolutions. Encoder and decoder process groups
of positions, each of which depends on earlier groups only: a pixel, a wavefront, or half of a
checkerboard. Both must obtain the same bits, so all arithmetic here is exact (exact.py).

    context = Context(context_prediction, entropy_parameters, params, scale_table)
    context.walk(groups, symbols)       # symbols(positions, indexes, means): rounded, or decoded
    y_hat = context.y_hat()
"""

import math
from collections.abc import Callable, Iterable, Sequence

from common.coding import exact, exact_int8
from common.coding.stages import PARAMETERS, stage

import torch
from compressai.layers import MaskedConv2d
from torch import Tensor, nn

MEAN_BITS = 8  # means are multiples of 2^-8, of 2^-9 for a gain above 1, 2^-10 above 2, ...
HYPER_BYTES = 2**28  # up to this size, the first layer sees all hyper parameters at once
ROWS = 4  # CPUs multiply matrices with a multiple of 4 rows up to 1.6 times faster


Symbols = Callable[[Tensor, Tensor, Tensor], Tensor]  # positions, CDF indexes, means -> symbols


class CausalConv(MaskedConv2d):
    """5x5 convolution that sees the 12 latents above and to the left:

        1 1 1 1 1
        1 1 1 1 1
        1 1 . 0 0        . the predicted latent, which is masked, too
        0 0 0 0 0
        0 0 0 0 0

    It equals CompressAI's layer, but masks the weight in each call instead of overwriting it.
    """

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def wavefront(height: int, width: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Positions y * width + x in coding order, as a list of wavefronts.

    A latent depends on rows above, at x - 2, ..., x + 2, and on two latents to its left. With
    t = x + 3y, all of these have a smaller t: (x + 2, y - 1) has t - 1, and so has (x - 1, y). So
    all latents of equal t can be decoded at once; 32x48 latents take 141 waves instead of 1,536
    steps. The first values of t:

        0 1 2 3 4 5 6
        3 4 5 6 7 8 9
        6 7 8 9 ...
    """
    t = wave_numbers((1, height, width)).flatten()
    order = torch.argsort(t, stable=True).to(device)
    return [wave for wave in order.split(torch.bincount(t).tolist()) if len(wave)]


def wave_numbers(shape: tuple[int, int, int], lag: int = 3) -> Tensor:
    """The t = x + lag * y at which each latent of y (M, h, w) is coded, as in `wavefront`; int64.
    """
    _, height, width = shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (x + lag * y).expand(shape)


class Context:
    """The latents decoded so far, and the means and scales that they predict for other positions.

    context_prediction: masked convolution (M -> 2M, odd kernel, stride 1), or several of the same
        size; a position uses one of them, and the contexts of the others are zero there.
    entropy_parameters: Sequential of 1x1 convolutions and activations. Its input is the hyper
        parameters, the contexts in their order, and `extra`; its output is scales, then means (2M).
    params: hyper parameters (B, P, H, W), float64 from `exact.run`.
    extra: further hyper parameters (B, E, H, W), which follow the contexts.
    gain: factor by which latents, and so their scales, are multiplied before rounding.
    Positions are y * W + x, the same for all images of the batch.
    """

    @stage(PARAMETERS)
    @torch.no_grad()
    def __init__(self, context_prediction: nn.Conv2d | Sequence[nn.Conv2d],
                 entropy_parameters: nn.Sequential, params: Tensor, scale_table: Tensor,
                 gain: float = 1.0, extra: Tensor | None = None):
        layers = ([context_prediction] if isinstance(context_prediction, nn.Conv2d)
                  else list(context_prediction))
        batch, width_of_params, height, width = params.shape
        device, channels = params.device, layers[0].in_channels
        self.shape = (batch, channels, height, width)
        self.boundaries = exact.scale_boundaries(scale_table.to(device)) / gain
        self.intervals = exact.Intervals(self.boundaries)
        self.gain = gain
        mantissa, exponent = math.frexp(gain)
        self.mean_bits = MEAN_BITS + max(0, exponent - (mantissa == 0.5))
        self.neighbours = [exact.Rows(layer, f"context_prediction.{i}", device)
                           for i, layer in enumerate(layers)]
        self.places_in_first = [width_of_params + i * layers[0].out_channels
                                for i in range(len(layers) + 1)]
        self.first, self.rest = exact.rows_of(entropy_parameters, "entropy_parameters", device)
        # decoded latents of a plane with a border of zeros, one row of M values per position
        k = layers[0].kernel_size[0]
        self.border, self.stride = k // 2, width + 2 * (k // 2)
        self.plane = (height + 2 * self.border) * self.stride
        self.rows = params.new_zeros(batch * self.plane, channels)
        self.digits: exact_int8.LatentDigits | None = None
        if (all(rows.digits for rows in self.neighbours)
                and len({(rows.grid_bits, rows.clamp_bits) for rows in self.neighbours}) == 1):
            self.digits = exact_int8.LatentDigits(batch * self.plane, channels)
        self.taps = [torch.tensor(
            [(t // k - k // 2) * self.stride + t % k - k // 2 for t in rows.taps], device=device)
            for rows in self.neighbours]
        places = torch.arange(batch * height * width, device=device)
        lines, x = places // width, places % width
        above = lines // height * 2 * self.border + self.border  # lines of the borders above
        self.row_of = (lines + above) * self.stride + x + self.border
        known = [(params, 0)] + ([] if extra is None else [(extra, self.places_in_first[-1])])
        self.known = [(t.flatten(2).transpose(1, 2).reshape(batch * height * width, -1), place)
                      for t, place in known]
        self.hyper: Tensor | None = None
        if batch * height * width * len(self.first.bias) * 8 <= HYPER_BYTES:
            self.hyper = self._sums_of_known()

    def _sums_of_known(self, places: Tensor | None = None) -> Tensor:
        """Contribution of params and extra to the first layer of entropy_parameters."""
        sums: Tensor | None = None
        for rows, place in self.known:
            rows = rows if places is None else rows.index_select(0, places)
            sums = self.first(rows, place, sums)
        assert sums is not None  # `params` is always known
        return sums

    def predict(self, positions: Tensor, context: int | bool = True) -> tuple[Tensor, Tensor]:
        """CDF indexes and means, each (B, n, M), of the latents at positions (n,)."""
        scales, means = self.parameters(positions, context)
        return self.intervals(scales), exact.round_to_grid(means, self.mean_bits)

    def parameters(self, positions: Tensor, context: int | bool = True) -> tuple[Tensor, Tensor]:
        """Scales and means, each (B, n, M) float64, of the latents at positions (n,).

        context: whether to use the decoded neighbours; otherwise the context, including its bias,
        is zero. With several contexts, the number of the one to use, counted from 1.
        """
        batch, channels, height, width = self.shape
        n = batch * len(positions)
        places = self._images(positions, height * width)
        if (missing := -n % ROWS) > 0:
            places = torch.cat([places, places[:1].expand(missing)])
        x = (self._sums_of_known(places) if self.hyper is None
             else self.hyper.index_select(0, places))
        if context:
            which = int(context) - 1
            taps = self.row_of.index_select(0, places)[:, None] + self.taps[which]
            seen = self._seen(self.neighbours[which], taps)
            x = self.first(seen, self.places_in_first[which], x)
        for layer in self.rest:
            x = layer(x)
        scales, means = x[:n].view(batch, len(positions), -1).chunk(2, dim=2)
        return scales, means

    def _seen(self, layer: exact.Rows, taps: Tensor) -> Tensor:
        """The context of positions whose neighbours are in the rows `taps` (n, t)."""
        if self.digits is None or layer.digits is None:
            return layer(self.rows.index_select(0, taps.view(-1)).view(len(taps), -1))
        return torch.addcmul(layer.offset, self.digits.sums(layer.digits, taps), layer.scale)

    @stage(PARAMETERS)
    def walk(self, groups: Iterable[Tensor], symbols: Symbols, context: int | bool = True) -> None:
        """Code one group of positions after the other, as encoder or as decoder.

        symbols(positions, indexes, means): the symbols at these positions (B, n, M), which the
        encoder rounds from (y - means) * gain and the decoder reads from its string; context: as
        in `predict`.
        """
        for positions in groups:
            indexes, means = self.predict(positions, context)
            self.put(positions, symbols(positions, indexes, means) * (1 / self.gain) + means)

    def put(self, positions: Tensor, y_hat: Tensor) -> None:
        """Store the decoded latents y_hat (B, n, M) of positions (n,)."""
        places = self._images(positions, self.shape[2] * self.shape[3])
        rows, y_hat = self.row_of.index_select(0, places), y_hat.flatten(0, 1)
        self.rows.index_copy_(0, rows, y_hat)
        if self.digits is not None:
            self.digits.put(rows, self.neighbours[0].quantise(y_hat))

    def y_hat(self) -> Tensor:
        """All latents (B, M, H, W), float32."""
        batch, channels, height, width = self.shape
        border = self.border
        plane = self.rows.view(batch, -1, self.stride, channels)
        inner = plane[:, border : border + height, border : border + width]
        return inner.permute(0, 3, 1, 2).float()

    def _images(self, positions: Tensor, plane: int) -> Tensor:
        """Indexes of the positions in all images, image by image: (B * n,)."""
        if self.shape[0] == 1:
            return positions
        images = torch.arange(0, self.shape[0] * plane, plane, device=positions.device)
        return (images[:, None] + positions).view(-1)
