"""Means and scales that depend on latents already decoded, for some positions at a time.

A context model predicts a latent from its decoded neighbours (a masked convolution) and from the
hyper decoder's parameters, by a chain of 1x1 convolutions. Encoder and decoder walk over groups of
positions, each of which depends on earlier groups only: a pixel, a wave, half of a checkerboard.
Both must find the same bits, so everything here is exact arithmetic (exact.py).

    context = Context(context_prediction, entropy_parameters, params, scale_table)
    for positions in groups:
        indexes, means = context.predict(positions)
        symbols = ...                                   # rounded from y, or from the decoder
        context.put(positions, symbols + means)
    y_hat = context.y_hat()
"""

from functools import partial

import torch
from torch import Tensor, nn

from . import exact

MEAN_BITS = 8  # means are multiples of 2^-8
HYPER_BYTES = 2**28  # hyper parameters go through their first layer at once up to this size


class Context:
    """What is decoded so far, and what it says about other positions.

    context_prediction: masked convolution (M -> 2M, odd kernel, stride 1).
    entropy_parameters: Sequential of 1x1 convolutions and activations, 4M -> ... -> 2M, on hyper
        parameters and context concatenated in this order; its result is scales, then means.
    params: hyper parameters (B, 2M, H, W), float64 from `exact.run`.
    Positions are y * W + x, the same for all images of the batch.
    """

    @torch.no_grad()
    def __init__(self, context_prediction: nn.Conv2d, entropy_parameters: nn.Sequential,
                 params: Tensor, scale_table: Tensor):
        batch, _, height, width = params.shape
        device, channels = params.device, context_prediction.in_channels
        self.shape = (batch, channels, height, width)
        self.boundaries = exact.scale_boundaries(scale_table.to(device))
        self.neighbours = exact.Rows(context_prediction, "context_prediction", device)
        self.first, *self.rest = (
            exact.Rows(layer, f"entropy_parameters.{i}", device) if isinstance(layer, nn.Conv2d)
            else partial(exact.activate, layer, f"entropy_parameters.{i}")
            for i, layer in enumerate(entropy_parameters))
        # decoded latents as rows of M, of a plane with a border of zeros
        k = context_prediction.kernel_size[0]
        self.border, self.stride = k // 2, width + 2 * (k // 2)
        self.plane = (height + 2 * self.border) * self.stride
        self.rows = params.new_zeros(batch * self.plane, channels)
        self.taps = torch.tensor(
            [(t // k - k // 2) * self.stride + t % k - k // 2 for t in self.neighbours.taps],
            device=device)
        self.params = params.flatten(2).transpose(1, 2)  # (B, H*W, 2M)
        self.hyper = None
        if batch * height * width * 8 * len(self.first.bias) <= HYPER_BYTES:
            rows = self.first.sums(self.params.reshape(-1, self.params.shape[2]))
            self.hyper = rows.view(batch, height * width, -1)

    def predict(self, positions: Tensor, context: bool = True) -> tuple[Tensor, Tensor]:
        """CDF indexes and means, each (B, n, M), of the latents at positions (n,).

        context: whether neighbours are looked at. Without, the context is zero, its bias included.
        """
        batch, channels, _, _ = self.shape
        if self.hyper is None:
            params = self.params[:, positions]
            x = self.first.sums(params.reshape(-1, params.shape[2]))
        else:
            x = self.hyper.index_select(1, positions).flatten(0, 1)
        if context:
            taps = (self._rows(positions)[:, None] + self.taps).view(-1)
            patches = self.rows.index_select(0, taps).view(len(x), -1)
            x = self.first(self.neighbours(patches), x)
        else:
            x = x * self.first.scale
        for layer in self.rest:
            x = layer(x)
        scales, means = x.view(batch, len(positions), -1).chunk(2, dim=2)
        return (torch.bucketize(scales.contiguous(), self.boundaries, out_int32=True),
                exact.round_to_grid(means, MEAN_BITS))

    def put(self, positions: Tensor, y_hat: Tensor) -> None:
        """Enter decoded latents y_hat (B, n, M) at positions (n,)."""
        self.rows[self._rows(positions)] = y_hat.flatten(0, 1)

    def y_hat(self) -> Tensor:
        """All latents (B, M, H, W), float32."""
        batch, channels, height, width = self.shape
        border = self.border
        plane = self.rows.view(batch, -1, self.stride, channels)
        inner = plane[:, border : border + height, border : border + width]
        return inner.permute(0, 3, 1, 2).float()

    def _rows(self, positions: Tensor) -> Tensor:
        """Rows of `self.rows` that hold these positions, image by image: (B * n,)."""
        batch, _, _, width = self.shape
        y, x = positions // width, positions % width
        rows = (y + self.border) * self.stride + x + self.border
        images = torch.arange(batch, device=positions.device) * self.plane
        return (images[:, None] + rows).view(-1)
