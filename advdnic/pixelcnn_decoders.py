"""PixelCNN++ as a decoder uses it: only the positions that can be decoded next are computed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

from common.coding import exact

import torch
import torch.nn.functional as F
from torch import Tensor

from advdnic.pixelcnn import GatedResnet, PixelCNN, ShiftedConv, ShiftedDeconv, gated

# of a convolution in Steps: (number of its net, 1 or 2) or ("strided", level)
Key = tuple[int | str, int]


class Waves:
    """PixelCNN without stages in fixed point, which computes all positions of a wavefront at once.

        waves = Waves(net, batch, height, width, device)
        for positions, phi in waves:  # i * width + j, (n,); (B, n, 2N)
            waves.put(y_hat)          # (B, n, N)

    u is the result of L convolutions of three columns, so u at (i, j) sees row i - 1 up to column
    j + L + 1. With t = j + (L + 2) i, that latent has t - 1, so latents of equal t form a
    wavefront. At time t, the first u is computed at column j + L, the result of the next
    convolution at j + L - 1, and so on, and ul at j.
    """

    @torch.no_grad()
    def __init__(self, net: PixelCNN, batch: int, height: int, width: int, device: torch.device):
        if net.stages:
            raise ValueError("a PixelCNN with strides has no waves: use Steps")
        self.net, self.batch, self.height, self.width = net, batch, height, width
        count = 2 * net.resnets
        self.ahead = 2 * count  # L
        self.lag = self.ahead + 2
        # Ring buffers of rows (B, places, C), with a column of zeros on either side: the rows in
        # progress, and two above. The zeros above the first row are the last rows of the ring,
        # which are not in use yet.
        stride = width + 2
        ring = min((width + self.ahead) // self.lag + 4, height + 2)
        self.ring = ring * stride
        planes = partial(torch.zeros, batch, self.ring, dtype=torch.float64, device=device)
        self.x = planes(net.N + 1)
        self.u = [planes(net.N) for _ in range(count)]  # of the stem, of nets but the last
        wide = [[planes(2 * net.N) for _ in range(n)] for n in (count + 1, count, count, count)]
        self.u_elu, self.u_mid, self.ul_elu, self.ul_mid = wide  # inputs of convolutions
        rows = torch.arange(height, device=device)
        self.places = rows % ring * stride - rows * self.lag + 1  # of (i, t - lag i), less t
        self.positions = rows * (width - self.lag)
        up = torch.tensor([-stride - 1, -stride, -stride + 1], device=device)
        here = torch.tensor([-1, 0, 1], device=device)
        self.taps = {"stem": torch.cat([up - stride, up]), "row": up, "down": torch.cat([up, here]),
                     "column": torch.cat([up[:1], here[:1]]), "here": here[1:2],
                     "down_right": torch.cat([up[:2], here[:2]])}

        def nets(name: str, layers: list[GatedResnet]
                 ) -> list[tuple[exact.Rows, exact.Rows, exact.Rows | None]]:
            return [(exact.Rows(layer.conv1.conv, f"{name}.{k}", device),
                     exact.Rows(layer.conv2.conv, f"{name}.{k}", device),
                     None if layer.aux is None else exact.Rows(layer.aux, f"{name}.{k}", device))
                    for k, layer in enumerate(layers)]

        self.u_nets = nets("u", gated(net.u_up, net.u_down))
        self.ul_nets = nets("ul", gated(net.ul_up, net.ul_down))
        parts = torch.arange(4 * net.N, device=device).view(2, 2, net.N)
        for _, _, aux in self.ul_nets[net.resnets :]:  # u, ul, -u, -ul: to u, -u, ul, -ul
            assert aux is not None  # only nets of u_up have no other input
            aux.reorder(parts.transpose(0, 1).flatten())
        self.stem = exact.Rows(net.u_stem.conv, "stem", device)
        self.row = exact.Rows(net.ul_row.conv, "row", device)
        self.column = exact.Rows(net.ul_column.conv, "column", device)
        self.out = exact.Rows(net.out, "out", device)
        self.sigmoid = gated(net.u_up)[0].sigmoid

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for t in range(-self.ahead, self.width + self.lag * (self.height - 1)):
            due = [self.due(t + column) for column in range(self.ahead + 1)]
            at = [self.places[rows] + (t + column) for column, rows in enumerate(due)]
            self.u_stem(due[-1], at[-1])
            for k in range(len(self.u_nets)):
                self.u_net(k, at[self.ahead - 2 * k - 1], at[self.ahead - 2 * k - 2])
            self.coded = at[0]
            if len(at[0]):
                phi = self.phi(due[0], at[0], t == self.lag * (due[0].stop - 1))
                yield self.positions[due[0]] + t, phi.unflatten(0, (self.batch, -1))

    def due(self, t: int) -> slice:
        """Rows i for which column t - lag * i exists."""
        return slice(max(0, (t - self.width) // self.lag + 1), min(self.height, t // self.lag + 1))

    def put(self, y_hat: Tensor) -> None:
        """Store the latents (B, n, N) of the latest positions."""
        self.x[:, self.coded] = F.pad(y_hat, (0, 1), value=1.0)

    # -------------------------------------------------------------- rows are (B * places, channels)
    def seen(self, plane: Tensor, at: Tensor, kernel: str) -> Tensor:
        """Inputs of a kernel at these places: (B * n, taps * C)."""
        places = (at[:, None] + self.taps[kernel]).flatten() % self.ring
        found = plane.index_select(1, places)
        return found.view(self.batch * len(at), -1)

    def keep(self, plane: Tensor, at: Tensor, rows: Tensor) -> None:
        plane.index_copy_(1, at, rows.view(self.batch, len(at), -1))

    def elus(self, x: Tensor) -> Tensor:
        return exact.activate(self.net.elu, "elu", torch.cat([x, -x], 1))

    def gated(self, x: Tensor, ab: Tensor) -> Tensor:
        a, b = ab.chunk(2, 1)
        return x + a * exact.activate(self.sigmoid, "sigmoid", b)

    def twin(self, k: int) -> int | None:
        """Index of the u, or of the input of an ul net, that is the shortcut input of net k."""
        return len(self.u_nets) - 1 - k if k >= self.net.resnets else None

    def u_stem(self, rows: slice, at: Tensor) -> None:
        if len(at):
            u = self.stem(self.seen(self.x, at, "stem"))
            if rows.start == 0:  # there is no row above
                u.view(self.batch, len(at), -1)[:, 0] = 0
            self.keep(self.u[0], at, u)
            self.keep(self.u_elu[0], at, self.elus(u))

    def u_net(self, k: int, middle: Tensor, at: Tensor) -> None:
        """Net k of u: the first convolution at places `middle`, the second one at `at`."""
        conv1, conv2, aux = self.u_nets[k]
        if len(middle):
            c = conv1(self.seen(self.u_elu[k], middle, "down"))
            if aux is not None and (twin := self.twin(k)) is not None:  # both in u_down
                c += aux(self.seen(self.u_elu[twin], middle, "here"))
            self.keep(self.u_mid[k], middle, self.elus(c))
        if len(at):
            u = self.gated(self.seen(self.u[k], at, "here"),
                           conv2(self.seen(self.u_mid[k], at, "down")))
            if k + 1 < len(self.u):
                self.keep(self.u[k + 1], at, u)
            self.keep(self.u_elu[k + 1], at, self.elus(u))

    def phi(self, rows: slice, at: Tensor, begins: bool) -> Tensor:
        """Compute ul and phi (B * n, 2N); begins: the last place is the first of its row."""
        x = self.row(self.seen(self.x, at, "row"))
        if rows.start == 0:
            x.view(self.batch, len(at), -1)[:, 0] = 0
        left = self.column(self.seen(self.x, at, "column"))
        if begins:
            left.view(self.batch, len(at), -1)[:, -1] = 0
        x += left
        for k, (conv1, conv2, aux) in enumerate(self.ul_nets):
            assert aux is not None  # u is an input of all nets of ul
            self.keep(self.ul_elu[k], at, self.elus(x))
            beside = self.seen(self.u_elu[k + 1], at, "here")
            if (twin := self.twin(k)) is not None:
                beside = torch.cat([beside, self.seen(self.ul_elu[twin], at, "here")], 1)
            c = conv1(self.seen(self.ul_elu[k], at, "down_right")) + aux(beside)
            self.keep(self.ul_mid[k], at, self.elus(c))
            x = self.gated(x, conv2(self.seen(self.ul_mid[k], at, "down_right")))
        return self.out(exact.activate(self.net.elu, "elu", x))


class Steps:
    """PixelCNN in fixed point, one position after the other in raster order; used like `Waves`.

    Level k has a row for every 2^k rows of y_hat and a column for every 2^k columns. These are
    computed when the first of them is needed, as their inputs are known by then.
    """

    @torch.no_grad()
    def __init__(self, net: PixelCNN, batch: int, height: int, width: int, device: torch.device):
        if height % 2**net.stages or width % 2**net.stages:
            raise ValueError(f"{height}x{width} latents are not whole {2**net.stages}s")
        self.net, self.batch, self.height, self.width = net, batch, height, width
        self.i = self.j = 0
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        N, ups = net.N, len(net.u_up)
        self.downs = [[ups + k for k in numbers] for numbers in net.downs]
        self.u_nets, self.ul_nets = gated(net.u_up, net.u_down), gated(net.ul_up, net.ul_down)
        self.u_strided = [cast(ShiftedConv, layer) for layer in net.u_strided]
        self.u_deconv = [cast(ShiftedDeconv, layer) for layer in net.u_deconv]
        self.ul_deconv = [cast(ShiftedDeconv, layer) for layer in net.ul_deconv]
        # (level, channels) of the inputs of the convolutions over two rows, by (net, number of its
        # convolution) and ("strided", level)
        inputs: dict[Key, tuple[int, int]] = {
            (k, c): (level, 2 * N) for numbers in (net.ups, self.downs)
            for level, ks in enumerate(numbers) for k in ks for c in (1, 2)}
        inputs |= {("strided", level): (level, N) for level in range(net.stages)}
        self.level_of = {key: level for key, (level, _) in inputs.items()}
        # two rows of y_hat with its channel of ones, and of the input of each u convolution: the
        # previous row and the current one
        self.x = zeros(batch, N + 1, 2, width)
        self.u_rows = {key: zeros(batch, channels, 2, width >> level)
                       for key, (level, channels) in inputs.items()}
        # two rows of the input of each ul convolution, with a zero in front
        self.ul_rows = {key: zeros(2, (width >> level) + 1, batch, channels)
                        for key, (level, channels) in inputs.items()}
        # two rows of the upsampled result of the level below
        self.u_below = [zeros(batch, N, 2, width >> k) for k in range(net.stages)]
        self.ul_below = [zeros(2, width >> k, batch, N) for k in range(net.stages)]
        self.rows: dict[Key, exact.Rows] = {
            (k, c): exact.Rows(getattr(ul, f"conv{c}").conv, f"ul.{k}.conv{c}", device)
            for k, ul in enumerate(self.ul_nets) for c in (1, 2)}
        self.rows |= {("strided", k): exact.Rows(cast(ShiftedConv, layer).conv, f"ul_strided.{k}",
                                                 device)
                      for k, layer in enumerate(net.ul_strided)}
        self.aux = [exact.Rows(ul.aux, f"ul.{k}.aux", device)
                    for k, ul in enumerate(self.ul_nets) if ul.aux is not None]
        self.column = exact.Rows(net.ul_column.conv, "ul_column", device)
        self.out = exact.Rows(net.out, "out", device)
        self.begin_row()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for position in torch.arange(self.height * self.width, device=self.x.device)[:, None]:
            yield position, self.phi()[:, None]

    # ----------------------------------------------------------------------- once per row: u
    def begin_row(self) -> None:
        """Compute u of row i from the rows above, and store what ul needs per pixel (w, B, C)."""
        net, top = self.net, self.i == 0
        for key, level in self.level_of.items():
            if self.i % 2**level == 0:
                self.u_rows[key][:, :, 0] = self.u_rows[key][:, :, 1]
                self.ul_rows[key][0] = self.ul_rows[key][1]
        zeros = self.x.new_zeros(self.batch, net.N, 1, self.width)
        above = F.pad(self.x, (1, 1))
        self.first = by_pixel(zeros if top else exact.run(net.ul_row.conv, above[:, :, 1:]))
        self.u_of: dict[int, Tensor] = {}
        self.u_level(0, zeros if top else exact.run(net.u_stem.conv, above))
        self.x = torch.cat([self.x[:, :, 1:], torch.zeros_like(self.x[:, :, :1])], 2)
        self.x[:, -1, 1] = 1

    def u_level(self, level: int, u: Tensor) -> Tensor:
        """Compute the current row (B, C, 1, w) of level `level`, and those of the levels below."""
        net, us = self.net, [u]
        for k in net.ups[level]:
            us.append(self.u_step(k, us[-1], None))
        if level < net.stages:
            rows, odd = self.u_rows["strided", level], (self.i >> level) % 2
            rows[:, :, 1:] = us[-1]
            if not odd:
                below = exact.run(self.u_strided[level].conv, F.pad(rows, (1, 1)))
                self.u_below[level] = self.u_deconv[level].exact(self.u_level(level + 1, below),
                                                                 exact.run)
            u = self.u_below[level][:, :, odd][:, :, None]
        else:
            u = us.pop()
        for k in self.downs[level]:
            u = self.u_step(k, u, us.pop())
        return u

    def u_step(self, k: int, x: Tensor, aux: Tensor | None) -> Tensor:
        """Compute the current row of GatedResnet k of u; x: (B, C, 1, w)."""
        net, run = self.u_nets[k], exact.run

        def conv(c: int, x: Tensor) -> Tensor:
            rows = self.u_rows[k, c]
            rows[:, :, 1:] = run(net.elu, torch.cat([x, -x], 1))
            return run(getattr(net, f"conv{c}").conv, F.pad(rows, (1, 1)))

        c = conv(1, x)
        if net.aux is not None:
            assert aux is not None
            c = c + run(net.aux, run(net.elu, torch.cat([aux, -aux], 1)))
        a, b = conv(2, c).chunk(2, 1)
        x = x + a * run(net.sigmoid, b)
        self.u_of[k] = by_pixel(x)
        return x

    # --------------------------------------------------------------------- once per pixel: ul
    def phi(self) -> Tensor:
        """phi of the next position, (B, 2N), float64."""
        x = self.first[self.j]
        if self.j > 0:  # a convolution of two rows, shifted to the right
            x = x + self.column(self.x[:, :, :, self.j - 1].transpose(1, 2).flatten(1))
        return self.out(exact.activate(self.net.elu, "elu", self.ul_level(0, x)))

    def ul_level(self, level: int, x: Tensor) -> Tensor:
        """Compute the current position (B, C) of level `level`, and those of the levels below."""
        net, uls, j = self.net, [x], self.j >> level
        for k in net.ups[level]:
            uls.append(self.ul_step(k, j, uls[-1], self.u_of[k][j]))
        if level < net.stages:
            rows, odd = self.ul_rows["strided", level], (self.i >> level) % 2
            rows[1, j + 1] = uls[-1]
            if not odd and not j % 2:
                below = self.ul_level(level + 1, self.rows["strided", level](taps(rows, j)))
                above = exact.run(self.ul_deconv[level].conv, below[:, :, None, None])
                self.ul_below[level][:, j : j + 2] = above.permute(2, 3, 0, 1)
            x = self.ul_below[level][odd, j]
        else:
            x = uls.pop()
        for k in self.downs[level]:
            x = self.ul_step(k, j, x, torch.cat([self.u_of[k][j], uls.pop()], 1))
        return x

    def ul_step(self, k: int, j: int, x: Tensor, aux: Tensor) -> Tensor:
        net = self.ul_nets[k]

        def elu(x: Tensor) -> Tensor:
            return exact.activate(net.elu, "elu", torch.cat([x, -x], 1))

        def conv(c: int, x: Tensor) -> Tensor:
            rows = self.ul_rows[k, c]
            rows[1, j + 1] = elu(x)
            return self.rows[k, c](taps(rows, j))

        c = conv(1, x) + self.aux[k](elu(aux))
        a, b = conv(2, c).chunk(2, 1)
        return x + a * exact.activate(net.sigmoid, "sigmoid", b)

    def put(self, y_hat: Tensor) -> None:
        """Store the latent (B, 1, N) of the latest position."""
        self.x[:, :-1, 1, self.j] = y_hat[:, 0]
        self.j += 1
        if self.j == self.width:
            self.i, self.j = self.i + 1, 0
            self.begin_row()


def by_pixel(row: Tensor) -> Tensor:
    """(B, C, 1, w) -> (w, B, C)"""
    return row[:, :, 0].permute(2, 0, 1)


def taps(rows: Tensor, j: int) -> Tensor:
    """Inputs of a 2x2 kernel at column j: (2, w + 1, B, C) -> (B, 4 C)."""
    return rows[:, j : j + 2].permute(2, 0, 1, 3).flatten(1)
