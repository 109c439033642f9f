"""The two context models of ConvNeXTIC: MCM, four lattices, and SCCTX, groups of channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from common import UserError
from common.coding import exact
from common.coding.context import Context

import torch
from compressai.ops import quantize_ste
from torch import Tensor, nn

BLOCK = 4096  # positions coded at a time, to bound memory
GROUPS = (16, 16, 32, 64)  # channels of the groups of SCCTX; the last has the rest

# number of a group of channels, its Context, [(number of the context, positions), ...]
Pass = tuple[int, Context, list[tuple[int, Tensor]]]


class MaskedConv(nn.Conv2d):
    """Convolution with some taps masked; the weight is masked in each call."""

    mask: Tensor

    def __init__(self, in_channels: int, out_channels: int, taps: list[list[int]]):
        size = len(taps)
        super().__init__(in_channels, out_channels, size, padding=size // 2)
        self.register_buffer("mask", torch.tensor(taps).float().expand_as(self.weight).clone())

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


CORNERS = [[1, 0, 1], [0, 0, 0], [1, 0, 1]]  # context of y2: y1
EDGES = [[0, 1, 0], [1, 0, 1], [0, 1, 0]]  # context of y3: y1, y2
AROUND = [[1, 1, 1], [1, 0, 1], [1, 1, 1]]  # context of y4: y1, y2, y3
CHECKERBOARD = [[(i + j) % 2 for j in range(5)] for i in range(5)]


def lattices(height: int, width: int) -> list[Tensor]:
    """Masks (height, width), bool, of y1 to y4: (row, column) is (even, even), (odd, odd), (even,
    odd), (odd, even).
    """
    row, column = torch.meshgrid(torch.arange(height) % 2, torch.arange(width) % 2, indexing="ij")
    return [(row == r) & (column == c) for r, c in ((0, 0), (1, 1), (0, 1), (1, 0))]


class MCM(nn.Module):
    """Multistage context model (TinyLIC): four sub-lattices of y, each predicted from the previous.

        y1 . y1 .       y1 is predicted from the hyper parameters alone,
        . y2 . y2       y2 also from the corners (y1),
        y1 . y1 .       y3 also from the edges (y1, y2), at (even, odd),
        . y2 . y2       y4 also from all neighbours, at (odd, even).
    """

    def __init__(self, M: int):
        super().__init__()
        self.M, self.sizes = M, (M,)
        self.contexts = nn.ModuleList(MaskedConv(M, 2 * M, taps)
                                      for taps in (CORNERS, EDGES, AROUND))
        self.parameters_network = nn.Sequential(
            nn.Conv2d(8 * M, 6 * M, 1), nn.GELU(), nn.Conv2d(6 * M, 4 * M, 1), nn.GELU(),
            nn.Conv2d(4 * M, 2 * M, 1))

    def forward(self, y: Tensor, params: Tensor, y_hat: Tensor | None
                ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y_hat, scales, means (B, M, h, w). y_hat None: y with noise, as in training."""
        if y_hat is None:
            y_hat = y + torch.empty_like(y).uniform_(-0.5, 0.5)
        kept = [mask.to(y.device) for mask in lattices(*y.shape[-2:])[1:]]
        contexts = [conv(y_hat) * mask for conv, mask in zip(self.contexts, kept, strict=True)]
        scales, means = self.parameters_network(torch.cat([params, *contexts], 1)).chunk(2, 1)
        return y_hat, scales, means

    def passes(self, params: Tensor, table: Tensor) -> Iterator[Pass]:
        """Yield in coding order: group of channels, its Context, [(context number, positions)]."""
        contexts = cast(Sequence[MaskedConv], self.contexts)
        context = Context(contexts, self.parameters_network, params, table)
        masks = [mask.flatten().to(params.device) for mask in lattices(*params.shape[-2:])]
        yield 0, context, [(k, block) for k, mask in enumerate(masks)
                           for block in mask.nonzero().flatten().split(BLOCK)]

    def coding_steps(self, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
        """As in `Codec`: the number of the lattice of each latent (M, h, w)."""
        masks = torch.stack(lattices(shape[1], shape[2])).int()
        return "lattice", masks.argmax(0).expand(shape)


class SCCTX(nn.Module):
    """Space-channel context model: five groups of channels, each coded in two checkerboard passes.

    A group depends on the hyper parameters and on the previous groups (5x5 convolutions); its
    second pass, at row + column even, also depends on its first. It follows ELIC (He et al. 2022),
    but with GELU and with hyper parameters in the channel context. If M <= 128, all widths shrink
    by M / 192.
    """

    def __init__(self, M: int):
        super().__init__()
        if M < 12:
            raise UserError(f"latent_dim {M}: this context model needs 12 or more")
        small = 1 if M > sum(GROUPS) else M / 192  # for smaller sizes than the source's
        groups = [int(small * c) for c in GROUPS]
        self.M, self.sizes = M, (*groups, M - sum(groups))
        width, narrow = int(small * 224), int(small * 128)
        before = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        self.channel_contexts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * M + s, width, 5, padding=2), nn.GELU(),
                          nn.Conv2d(width, narrow, 5, padding=2), nn.GELU(),
                          nn.Conv2d(narrow, 2 * c, 3, padding=1))
            for s, c in zip(before, self.sizes, strict=True))
        self.space_contexts = nn.ModuleList(MaskedConv(c, 2 * c, CHECKERBOARD) for c in self.sizes)
        self.parameters_networks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * M + 4 * c, 3 * c, 1), nn.GELU(),
                          nn.Conv2d(3 * c, 2 * c, 1), nn.GELU(), nn.Conv2d(2 * c, 2 * c, 1))
            for c in self.sizes)

    def forward(self, y: Tensor, params: Tensor, y_hat: Tensor | None
                ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y_hat, scales, means (B, M, h, w). y_hat None: y rounded, straight-through."""
        anchor = anchors(*y.shape[-2:]).to(y.device)
        given = None if y_hat is None else y_hat.split(self.sizes, 1)
        done: list[Tensor] = []
        all_scales, all_means = [], []
        for k, y_k in enumerate(y.split(self.sizes, 1)):
            channel = self.channel_contexts[k](torch.cat([params, *done], 1))
            none = torch.zeros_like(channel)
            if given is None:
                _, means = self._predict(k, params, none, channel)
                first = quantize_ste(y_k - means) + means
            else:
                first = given[k]
            space = self.space_contexts[k](first * anchor) * ~anchor
            scales, means = self._predict(k, params, space, channel)
            done.append(quantize_ste(y_k - means) + means if given is None else given[k])
            all_scales.append(scales)
            all_means.append(means)
        return torch.cat(done, 1), torch.cat(all_scales, 1), torch.cat(all_means, 1)

    def _predict(self, k: int, params: Tensor, space: Tensor, channel: Tensor
                 ) -> tuple[Tensor, Tensor]:
        return self.parameters_networks[k](torch.cat([params, space, channel], 1)).chunk(2, 1)

    def passes(self, params: Tensor, table: Tensor) -> Iterator[Pass]:
        """As in MCM; the Context of a group must be complete before the next one is requested."""
        anchor = anchors(*params.shape[-2:]).flatten().to(params.device)
        order = [(k, block) for k, mask in enumerate((anchor, ~anchor))
                 for block in mask.nonzero().flatten().split(BLOCK)]
        done: list[Tensor] = []
        for k in range(len(self.sizes)):
            channel = exact.run(self.channel_contexts[k], torch.cat([params, *done], 1))
            context = Context(cast(MaskedConv, self.space_contexts[k]),
                              cast(nn.Sequential, self.parameters_networks[k]), params, table,
                              extra=channel)
            yield k, context, order
            done.append(context.y_hat().double())

    def coding_steps(self, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
        """As in `Codec`: twice the number of the group, and one more in its second pass."""
        groups = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        second = (~anchors(shape[1], shape[2])).long()
        return "pass", 2 * groups[:, None, None] + second


def anchors(height: int, width: int) -> Tensor:
    """Mask (height, width), bool, of the latents of the first pass: row + column odd."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (row + column) % 2 == 1
