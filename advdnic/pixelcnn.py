"""PixelCNN++ (Salimans et al., ICLR 2017, arXiv:1701.05517) over latents, as a decodable context
model, with `stages` strided steps down and up again (2 in the paper and in the source), or none.

It has two streams: u sees the rows above, and ul also sees the positions to the left in its row.

    rows above      . . . . .           u  at (i, j): the rows above within its receptive field
                    . . . . .
    row i           . . x                ul at (i, j): u, and the positions left of j

A pass over the whole plane (`forward`, in training) and a decoder give the same values, in fixed
point the same bits. `Steps` decodes pixel by pixel: it computes u once per row and ul once per
pixel, and keeps all results. `Waves` decodes pixels of several rows at once, but has no strides.
"""

from __future__ import annotations

from typing import cast

from common.coding.contract import Run, in_floats

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = {"down": (2, 3), "down_right": (2, 2), "row": (1, 3), "column": (2, 1)}  # kernels


def concat_elu(x: Tensor, dim: int = 1) -> Tensor:
    """ELU of x and of -x, concatenated."""
    return F.elu(torch.cat([x, -x], dim))


class ShiftedConv(nn.Module):
    """Convolution shifted to see positions above, and to the left (down_right, column) or both."""

    def __init__(self, inputs: int, outputs: int, kind: str, stride: int = 1):
        super().__init__()
        kh, kw = KINDS[kind]
        self.conv = nn.Conv2d(inputs, outputs, (kh, kw), stride)
        assert self.conv.bias is not None
        nn.init.normal_(self.conv.weight, 0, (2 / (outputs * kh * kw)) ** 0.5)
        nn.init.zeros_(self.conv.bias)
        self.conv.register_buffer("mask", torch.ones_like(self.conv.weight), persistent=False)
        left = (kw - 1) // 2 if kw == 3 else kw - 1
        self.pads = (left, kw - 1 - left, kh - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(x, in_floats)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        return run(self.conv, F.pad(x, self.pads))


class ShiftedDeconv(nn.Module):
    """Upsampling by 2 after a strided ShiftedConv, such that the context stays causal."""

    def __init__(self, channels: int, kind: str):
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, KINDS[kind], 2)
        assert self.conv.bias is not None
        nn.init.normal_(self.conv.weight, 0, (2 / channels / self.conv.weight[0, 0].numel()) ** 0.5)
        nn.init.zeros_(self.conv.bias)
        self.left = (self.conv.kernel_size[1] - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(x, in_floats)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        return run(self.conv, x)[..., self.left : self.left + 2 * x.shape[3]]


def shift_down(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Tensor) -> Tensor:
    return F.pad(x, (1, 0))[..., :-1]


class GatedResnet(nn.Module):
    """x + a * sigmoid(b), where (a, b) = conv(f(conv(f(x)) + 1x1(f(aux)))), f = concat_elu."""

    def __init__(self, channels: int, kind: str, aux: int = 0):
        super().__init__()
        self.conv1 = ShiftedConv(2 * channels, channels, kind)
        self.aux = nn.Conv2d(2 * aux, channels, 1) if aux else None
        self.conv2 = ShiftedConv(2 * channels, 2 * channels, kind)
        self.elu, self.sigmoid = nn.ELU(), nn.Sigmoid()

    def forward(self, x: Tensor, aux: Tensor | None = None, run: Run = in_floats) -> Tensor:
        """run: applies a layer to a plane."""
        c = run(self.conv1, run(self.elu, torch.cat([x, -x], 1)))
        if self.aux is not None:
            assert aux is not None
            c = c + run(self.aux, run(self.elu, torch.cat([aux, -aux], 1)))
        a, b = run(self.conv2, run(self.elu, torch.cat([c, -c], 1))).chunk(2, 1)
        return x + a * run(self.sigmoid, b)


class PixelCNN(nn.Module):
    """y_hat (B, N, h, w) -> phi (B, 2N, h, w); positions depend on previous ones in raster order.

    Without stages, the receptive field for `resnets` = r is 4r + 3 rows up, 4r + 2 columns to the
    left and 4r + 1 to the right. With `stages`, h and w must be multiples of 2^stages.
    """

    def __init__(self, N: int, resnets: int = 1, stages: int = 0):
        super().__init__()
        self.N, self.resnets, self.stages = N, resnets, stages
        self.u_stem = ShiftedConv(N + 1, N, "down")
        self.ul_row, self.ul_column = ShiftedConv(N + 1, N, "row"), ShiftedConv(N + 1, N, "column")
        # number of GatedResnets per level before the next level and, one more, after it
        below = [resnets] * (stages + 1)
        after = [resnets + 1] * stages + [resnets]
        self.ups, self.downs = numbered(below), numbered(after)

        def nets(counts: list[int], kind: str, aux: int) -> nn.ModuleList:
            return nn.ModuleList(GatedResnet(N, kind, aux) for _ in range(sum(counts)))

        self.u_up, self.ul_up = nets(below, "down", 0), nets(below, "down_right", N)
        self.u_down, self.ul_down = nets(after, "down", N), nets(after, "down_right", 2 * N)
        self.u_strided, self.ul_strided = (
            nn.ModuleList(ShiftedConv(N, N, kind, 2) for _ in range(stages))
            for kind in ("down", "down_right"))
        self.u_deconv, self.ul_deconv = (
            nn.ModuleList(ShiftedDeconv(N, kind) for _ in range(stages))
            for kind in ("down", "down_right"))
        self.elu, self.out = nn.ELU(), nn.Conv2d(N, 2 * N, 1)

    def forward(self, y_hat: Tensor, run: Run = in_floats) -> Tensor:
        x = with_ones(y_hat)
        u = shift_down(run(self.u_stem, x))
        ul = shift_down(run(self.ul_row, x)) + shift_right(run(self.ul_column, x))
        _, ul = self.level(0, u, ul, run)
        return run(self.out, run(self.elu, ul))

    def level(self, k: int, u: Tensor, ul: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Apply level k of the two streams, and the levels below it."""
        us, uls = [u], [ul]
        for i in self.ups[k]:
            us.append(self.u_up[i](us[-1], None, run))
            uls.append(self.ul_up[i](uls[-1], us[-1], run))
        if k < self.stages:
            u, ul = self.level(k + 1, run(self.u_strided[k], us[-1]),
                               run(self.ul_strided[k], uls[-1]), run)
            u, ul = run(self.u_deconv[k], u), run(self.ul_deconv[k], ul)
        else:
            u, ul = us.pop(), uls.pop()
        for i in self.downs[k]:
            u = self.u_down[i](u, us.pop(), run)
            ul = self.ul_down[i](ul, torch.cat([u, uls.pop()], 1), run)
        return u, ul

    def exact(self, y_hat: Tensor, run: Run) -> Tensor:
        """The whole plane in fixed point; `Waves` and `Steps` give the same bits."""
        return self(y_hat, run)


def gated(*lists: nn.ModuleList) -> list[GatedResnet]:
    """All members of these lists of GatedResnets, in their order."""
    return [cast(GatedResnet, net) for nets in lists for net in nets]


def numbered(counts: list[int]) -> list[list[int]]:
    """[2, 3] -> [[0, 1], [2, 3, 4]]"""
    firsts = [sum(counts[:k]) for k in range(len(counts))]
    return [list(range(first, first + count)) for first, count in zip(firsts, counts, strict=True)]


def with_ones(x: Tensor) -> Tensor:
    """Append a channel of ones, which distinguishes padding from zeros."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)
