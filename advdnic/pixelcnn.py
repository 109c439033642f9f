"""PixelCNN++ (Salimans et al., ICLR 2017, arXiv:1701.05517) over latents, without its strides, as a
context model that decodes.

Two streams walk over the plane: u sees the rows above, ul also what is to the left in its own row.

    rows above      . . . . .           u  at (i, j): all of the rows above within its reach
                    . . . . .
    row i           . . x                ul at (i, j): u, and the pixels left of j

The plane's whole pass (`forward`, in training) and the steps of a decoder (`Steps`: u once a row,
ul once a pixel, what has been computed kept) give the same numbers: in fixed point, the same bits.
"""

from __future__ import annotations

from typing import Any

from common import exact

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = {"down": (2, 3), "down_right": (2, 2), "row": (1, 3), "column": (2, 1)}  # kernels


def concat_elu(x: Tensor, dim: int = 1) -> Tensor:
    """ELU of x and of -x: twice the channels."""
    return F.elu(torch.cat([x, -x], dim))


class ShiftedConv(nn.Module):
    """Convolution that sees what is above and (down_right, column) to the left, or beside."""

    def __init__(self, inputs: int, outputs: int, kind: str):
        super().__init__()
        kh, kw = KINDS[kind]
        self.conv = nn.Conv2d(inputs, outputs, (kh, kw))
        nn.init.normal_(self.conv.weight, 0, (2 / (outputs * kh * kw)) ** 0.5)
        nn.init.zeros_(self.conv.bias)
        self.conv.register_buffer("mask", torch.ones_like(self.conv.weight), persistent=False)
        left = (kw - 1) // 2 if kw == 3 else kw - 1
        self.pads = (left, kw - 1 - left, kh - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pads))

    def exact(self, x: Tensor, run: Any) -> Tensor:
        return run(self.conv, F.pad(x, self.pads))


def shift_down(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def shift_right(x: Tensor) -> Tensor:
    return F.pad(x, (1, 0))[..., :-1]


class GatedResnet(nn.Module):
    """x + a * sigmoid(b), of (a, b) = conv(f(conv(f(x)) + 1x1(f(aux)))), f = concat_elu."""

    def __init__(self, channels: int, kind: str, aux: int = 0, dropout: float = 0.0):
        super().__init__()
        self.conv1 = ShiftedConv(2 * channels, channels, kind)
        self.aux = nn.Conv2d(2 * aux, channels, 1) if aux else None
        self.dropout = nn.Dropout(dropout)
        self.conv2 = ShiftedConv(2 * channels, 2 * channels, kind)
        self.elu, self.sigmoid = nn.ELU(), nn.Sigmoid()

    def forward(self, x: Tensor, aux: Tensor | None = None, run: Any = None) -> Tensor:
        """run: how a layer acts on a plane; None: as it is."""
        run = run or (lambda layer, x: layer(x))
        c = run(self.conv1, run(self.elu, torch.cat([x, -x], 1)))
        if self.aux is not None:
            c = c + run(self.aux, run(self.elu, torch.cat([aux, -aux], 1)))
        c = self.dropout(run(self.elu, torch.cat([c, -c], 1)))
        a, b = run(self.conv2, c).chunk(2, 1)
        return x + a * run(self.sigmoid, b)


class PixelCNN(nn.Module):
    """y_hat (B, N, h, w) -> phi (B, 2N, h, w), each position from those before it in raster order.

    Reach of `resnets` = r: 4r + 3 rows up, 4r + 2 to the left, 4r + 1 to the right.
    """

    def __init__(self, N: int, resnets: int = 1, dropout: float = 0.0):
        super().__init__()
        self.N, self.resnets = N, resnets
        self.u_stem = ShiftedConv(N + 1, N, "down")
        self.ul_row, self.ul_column = ShiftedConv(N + 1, N, "row"), ShiftedConv(N + 1, N, "column")

        def nets(kind: str, aux: int) -> nn.ModuleList:
            return nn.ModuleList(GatedResnet(N, kind, aux, dropout) for _ in range(resnets))

        self.u_up, self.ul_up = nets("down", 0), nets("down_right", N)
        self.u_down, self.ul_down = nets("down", N), nets("down_right", 2 * N)
        self.elu, self.out = nn.ELU(), nn.Conv2d(N, 2 * N, 1)

    def forward(self, y_hat: Tensor, run: Any = None) -> Tensor:
        plain = run is None
        run = run or (lambda layer, x: layer(x))
        x = with_ones(y_hat)
        u = [shift_down(run(self.u_stem, x))]
        ul = [shift_down(run(self.ul_row, x)) + shift_right(run(self.ul_column, x))]
        inner = None if plain else run
        for u_net, ul_net in zip(self.u_up, self.ul_up, strict=True):
            u.append(u_net(u[-1], None, inner))
            ul.append(ul_net(ul[-1], u[-1], inner))
        top, top_l = u.pop(), ul.pop()
        for u_net, ul_net in zip(self.u_down, self.ul_down, strict=True):
            top = u_net(top, u.pop(), inner)
            top_l = ul_net(top_l, torch.cat([top, ul.pop()], 1), inner)
        return run(self.out, run(self.elu, top_l))

    def exact(self, y_hat: Tensor, run: Any) -> Tensor:
        """The whole plane in fixed point: what `Steps` finds position by position."""
        return self(y_hat, run)


def with_ones(x: Tensor) -> Tensor:
    """A channel of ones tells the border from a zero."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


class Steps:
    """PixelCNN in fixed point, one position after the other in raster order.

    steps = Steps(net, batch, height, width, device)
    for each position: phi = steps.phi()  (B, 2N);  steps.put(y_hat)  (B, N)
    """

    @torch.no_grad()
    def __init__(self, net: PixelCNN, batch: int, height: int, width: int, device: torch.device):
        self.net, self.width, self.batch = net, width, batch
        self.i = self.j = 0
        kinds = {"dtype": torch.float64, "device": device}
        # y_hat with its ones, and of each u convolution's input: this row and the one before
        self.x = torch.zeros(batch, net.N + 1, 2, width, **kinds)
        self.u_nets = [*net.u_up, *net.u_down]
        self.u_rows = {(k, c): torch.zeros(batch, 2 * net.N, 2, width, **kinds)
                       for k in range(len(self.u_nets)) for c in (1, 2)}
        # of each ul convolution's input: two rows of positions, with a zero in front
        self.ul_nets = [*net.ul_up, *net.ul_down]
        self.ul_rows = {(k, c): torch.zeros(2, width + 1, batch, 2 * net.N, **kinds)
                        for k in range(len(self.ul_nets)) for c in (1, 2)}
        self.rows = {(k, c): exact.Rows(getattr(ul, f"conv{c}").conv, f"ul.{k}.conv{c}", device)
                     for k, ul in enumerate(self.ul_nets) for c in (1, 2)}
        self.aux = [exact.Rows(ul.aux, f"ul.{k}.aux", device) for k, ul in enumerate(self.ul_nets)]
        self.column = exact.Rows(net.ul_column.conv, "ul_column", device)
        self.out = exact.Rows(net.out, "out", device)
        self.begin_row()

    # ------------------------------------------------------------------------- once a row: u
    def begin_row(self) -> None:
        """u of row i from the rows above; and what ul needs of it, pixel by pixel (w, B, C)."""
        net, top = self.net, self.i == 0
        for rows in self.u_rows.values():
            rows[:, :, 0] = rows[:, :, 1]
        for rows in self.ul_rows.values():
            rows[0] = rows[1]
        zeros = self.x.new_zeros(self.batch, net.N, 1, self.width)
        above = F.pad(self.x, (1, 1))
        u = [zeros if top else exact.run(net.u_stem.conv, above)]
        first = zeros if top else exact.run(net.ul_row.conv, above[:, :, 1:])
        self.first = first[:, :, 0].permute(2, 0, 1)
        r = net.resnets
        for k in range(r):
            u.append(self.u_step(k, u[-1], None))
        ups, top_u = u[1:], u.pop()
        downs = []
        for k in range(r, 2 * r):
            top_u = self.u_step(k, top_u, u.pop())
            downs.append(top_u)
        self.u_of = [t[:, :, 0].permute(2, 0, 1) for t in [*ups, *downs]]
        self.x = torch.cat([self.x[:, :, 1:], torch.zeros_like(self.x[:, :, :1])], 2)
        self.x[:, -1, 1] = 1

    def u_step(self, k: int, x: Tensor, aux: Tensor | None) -> Tensor:
        """Row i of a GatedResnet of u: x (B, C, 1, w)."""
        net, run = self.u_nets[k], exact.run

        def conv(c: int, x: Tensor) -> Tensor:
            rows = self.u_rows[k, c]
            rows[:, :, 1:] = run(net.elu, torch.cat([x, -x], 1))
            return run(getattr(net, f"conv{c}").conv, F.pad(rows, (1, 1)))

        c = conv(1, x)
        if net.aux is not None:
            c = c + run(net.aux, run(net.elu, torch.cat([aux, -aux], 1)))
        a, b = conv(2, c).chunk(2, 1)
        return x + a * run(net.sigmoid, b)

    # ----------------------------------------------------------------------- once a pixel: ul
    def phi(self) -> Tensor:
        """Of the position that comes next: (B, 2N) float64."""
        j, net = self.j, self.net
        x = self.first[j]
        if j > 0:  # a convolution of two rows, shifted to the right
            x = x + self.column(self.x[:, :, :, j - 1].transpose(1, 2).flatten(1))
        ul, r = [x], net.resnets
        for k in range(r):
            ul.append(self.ul_step(k, ul[-1], self.u_of[k][j]))
        x = ul.pop()
        for k in range(r, 2 * r):
            x = self.ul_step(k, x, torch.cat([self.u_of[k][j], ul.pop()], 1))
        return self.out(exact.activate(net.elu, "elu", x))

    def ul_step(self, k: int, x: Tensor, aux: Tensor) -> Tensor:
        net, j = self.ul_nets[k], self.j

        def elu(x: Tensor) -> Tensor:
            return exact.activate(net.elu, "elu", torch.cat([x, -x], 1))

        def conv(c: int, x: Tensor) -> Tensor:
            kept = self.ul_rows[k, c]
            kept[1, j + 1] = elu(x)
            taps = kept[:, j : j + 2].permute(2, 0, 1, 3)  # (B, 2, 2, 2C)
            return self.rows[k, c](taps.flatten(1))

        c = conv(1, x) + self.aux[k](elu(aux))
        a, b = conv(2, c).chunk(2, 1)
        return x + a * exact.activate(net.sigmoid, "sigmoid", b)

    def put(self, y_hat: Tensor) -> None:
        """The latents (B, N) of the position whose phi was asked for."""
        self.x[:, :-1, 1, self.j] = y_hat
        self.j += 1
        if self.j == self.width:
            self.i, self.j = self.i + 1, 0
            self.begin_row()
