"""Transforms of the ten experiments: g_a, g_s, h_a, h_s.

The SignalConv of tensorflow-compression is an ordinary convolution here, padded so that output 0 is
centred on input 0. Widths, kernels and peculiarities (an inverse GDN in the encoder of mod2, a
product instead of a sum in DPN) are those of the source.
"""

from __future__ import annotations

from collections.abc import Callable

from common import UserError
from common.coding import exact
from common.coding.contract import Run, in_floats

import torch
import torch.nn.functional as F
from compressai.layers import GDN
from timm.layers import SqueezeExcite
from torch import Tensor, nn

Act = Callable[[], nn.Module]
CHUNK = 2**24  # maximum number of entries of an attention matrix in memory


# -------------------------------------------------------------------------------- convolutions
def conv(inputs: int, outputs: int, k: int, stride: int = 1, bias: bool = True,
         reflect: bool = False) -> nn.Module:
    """SignalConv: a Conv2d whose first output is centred on the first input."""
    layer = nn.Conv2d(inputs, outputs, k, stride, 0 if reflect else k // 2, bias=bias)
    return nn.Sequential(Reflect(k // 2), layer) if reflect else layer


def deconv(inputs: int, outputs: int, k: int, bias: bool = True) -> nn.ConvTranspose2d:
    """SignalConv that upsamples by 2; every second output is centred on an input."""
    return nn.ConvTranspose2d(inputs, outputs, k, 2, k // 2, output_padding=1, bias=bias)


class Reflect(nn.Module):
    """Reflection padding; replication for feature maps that are too small for it."""

    def __init__(self, pad: int):
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        mode = "reflect" if min(x.shape[-2:]) > self.pad else "replicate"
        return F.pad(x, (self.pad,) * 4, mode=mode)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        return self(x)  # copies values, without arithmetic


class Down2(nn.Conv2d):
    """Full 2x2 SignalConv of stride 2, whose kernel extends by one up and to the left."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0, 1, 0)))


class Up2(nn.ConvTranspose2d):
    """Full 2x2 SignalConv that upsamples by 2."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 2, 2, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # it has one size of output
        return super().forward(x)[..., 1:, 1:]


class Subpixel(nn.Module):
    """1x1 convolution to s * s values per pixel, LeakyReLU, pixel shuffle.

    Initially, it is nearest-neighbour upsampling (ICNR, Aitken et al., arXiv:1707.02937): the s * s
    filters of a channel start equal. blur: averages 2x2 pixels, which removes checkerboard
    artifacts (Sugawara et al., arXiv:1806.02658).
    """

    def __init__(self, channels: int, scale: int = 2, blur: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * scale**2, 1)
        kernel = torch.empty(channels, channels, 1, 1).normal_(0, (2 / channels) ** 0.5)
        assert self.conv.bias is not None
        with torch.no_grad():
            self.conv.weight.copy_(kernel.repeat_interleave(scale**2, 0))
            self.conv.bias.zero_()
        self.act, self.shuffle = nn.LeakyReLU(0.2), nn.PixelShuffle(scale)
        self.blur = blur

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(x, in_floats)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        return self.smooth(run([self.conv, self.act, self.shuffle], x))

    def smooth(self, x: Tensor) -> Tensor:
        """Mean of a pixel and its upper, left and upper-left neighbours; the border is repeated."""
        if not self.blur:
            return x
        x = F.pad(x, (1, 0, 1, 0), mode="replicate")
        return (x[..., 1:, 1:] + x[..., :-1, 1:] + x[..., 1:, :-1] + x[..., :-1, :-1]) / 4


def same(x: Tensor, k: int, stride: int) -> Tensor:
    """TensorFlow's "same" padding: an odd remainder is added on the right and at the bottom."""
    pads = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + k - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


# ------------------------------------------------------------------------------------- MB blocks
class MBConv(nn.Module):
    """Depthwise convolution, squeeze-and-excite, 1x1 (EfficientNet's block with expansion 1).

    Stride 2 halves the resolution; scale 2 doubles it, with Subpixel instead of the convolution.
    """

    def __init__(self, inputs: int, outputs: int, k: int = 3, stride: int = 1, scale: int = 1,
                 norm: bool = False, act: Act = nn.SiLU, blur: bool = False):
        super().__init__()
        self.stride, self.k = stride, k
        self.spatial = (Subpixel(inputs, scale, blur) if scale > 1 else
                        nn.Conv2d(inputs, inputs, k, stride, groups=inputs, bias=False))
        self.norm1, self.norm2 = (nn.BatchNorm2d(c, eps=1e-3, momentum=0.01) if norm
                                  else nn.Identity() for c in (inputs, outputs))
        self.act = act()
        self.se = ExactSE(inputs, rd_channels=max(1, inputs // 4), act_layer=act)
        self.project = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.skip = stride == scale == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(x, in_floats)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        y = x if isinstance(self.spatial, Subpixel) else same(x, self.k, self.stride)
        for layer in (self.spatial, self.norm1, self.act, self.se, self.project, self.norm2):
            y = run(layer, y)
        return x + y if self.skip else y


class ExactSE(SqueezeExcite):
    """Squeeze-and-excite whose mean is exact: in fixed point, it is a sum of integers."""

    def exact(self, x: Tensor, run: Run) -> Tensor:
        mean = exact.round_to_grid(x.clamp(-4096, 4096), 12).sum((2, 3), keepdim=True) / (
            x.shape[2] * x.shape[3])
        return x * run([self.fc1, self.act, self.fc2, self.sigmoid], mean)

    def __init__(self, channels: int, rd_channels: int, act_layer: Act):
        super().__init__(channels, rd_channels=rd_channels,
                         act_layer=act_layer)  # type: ignore[arg-type]  # any function will do
        self.act, self.sigmoid = act_layer(), nn.Sigmoid()


class MBSignal(nn.Module):
    """Block of mod2: MBConv with SignalConvs, and GDN (encoder) or inverse GDN (decoder).

    Blocks of stride 2 have full 2x2 kernels and, in the encoder, an inverse GDN.
    """

    def __init__(self, inputs: int, outputs: int, k: int = 3, stride: int = 1, scale: int = 1,
                 decoder: bool = False, down_inverse: bool = True):
        super().__init__()
        if stride > 1:
            self.spatial: nn.Module = Down2(inputs)
        elif scale > 1:
            self.spatial = Up2(inputs)
        else:
            self.spatial = nn.Conv2d(inputs, inputs, k, padding=k // 2, groups=inputs, bias=False)
        reduced = max(1, inputs // 4)
        self.gdn = GDN(inputs, inverse=decoder or (stride > 1 and down_inverse))
        self.norm1, self.norm2 = (nn.BatchNorm2d(c, eps=1e-3, momentum=0.01)
                                  for c in (inputs, outputs))
        self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, reduced, 1),
                                GDN(reduced, inverse=decoder), nn.Conv2d(reduced, inputs, 1),
                                nn.Sigmoid())
        self.project = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.skip = stride == scale == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.gdn(self.spatial(x)))
        y = self.norm2(self.project(y * self.se(y)))
        return x + y if self.skip else y


# --------------------------------------------------------------------- base, mod1, mod4, variants
def base_analysis(N: int, between: Callable[[], list[nn.Module]] = list) -> nn.Sequential:
    """g_a of Balle et al. 2018: (B, 3, H, W) -> y (B, N, H/16, W/16). between: after each GDN."""
    return nn.Sequential(conv(3, N, 5, 2), GDN(N), *between(), conv(N, N, 5, 2), GDN(N), *between(),
                         conv(N, N, 5, 2), GDN(N), *between(), conv(N, N, 5, 2))


def base_synthesis(N: int, between: Callable[[], list[nn.Module]] = list) -> nn.Sequential:
    """g_s: y_hat (B, N, H/16, W/16) -> (B, 3, H, W). between: after each inverse GDN."""
    return nn.Sequential(deconv(N, N, 5), GDN(N, inverse=True), *between(), deconv(N, N, 5),
                         GDN(N, inverse=True), *between(), deconv(N, N, 5), GDN(N, inverse=True),
                         *between(), deconv(N, 3, 5))


def hyper_analysis(y: int, N: int, z: int, act: Act) -> nn.Sequential:
    """h_a: |y| (B, y, h, w) -> (B, z, h/4, w/4)."""
    return nn.Sequential(conv(y, N, 3), act(), conv(N, N, 5, 2), act(), conv(N, z, 5, 2, False))


def hyper_synthesis(z: int, N: int, y: int, act: Act) -> nn.Sequential:
    """h_s: z_hat -> scales, or means, of y."""
    return nn.Sequential(deconv(z, z, 5) if z != N else deconv(N, N, 5), act(), deconv(z, N, 5),
                         act(), conv(N, y, 3))


def subpixel_synthesis(N: int) -> nn.Sequential:
    """g_s of mod4: reflection padding, 3x3 convolution to four values per pixel, pixel shuffle."""
    def up(outputs: int) -> list[nn.Module]:
        return [conv(N, 4 * outputs, 3, reflect=True), nn.PixelShuffle(2)]

    return nn.Sequential(*up(N), GDN(N, inverse=True), *up(N), GDN(N, inverse=True), *up(N),
                         GDN(N, inverse=True), *up(3))


# --------------------------------------------------------------------------------- mod2 and mod3
ENCODER = ((32, 16, 3, 1), (16, 16, 3, 1), (16, 24, 3, 2), (24, 24, 3, 1), (24, 40, 5, 2),
           (40, 40, 5, 1), (40, 80, 3, 2), (80, 80, 3, 1), (80, 112, 5, 1), (112, 112, 5, 1),
           (112, 192, 3, 1))  # in, out, kernel, stride
DECODER = ((192, 112, 3, 1), (112, 112, 5, 1), (112, 80, 5, 1), (80, 80, 3, 1), (80, 40, 3, 2),
           (40, 40, 5, 1), (40, 24, 5, 2), (24, 24, 3, 1), (24, 16, 3, 2), (16, 16, 3, 1),
           (16, 32, 3, 1))  # in, out, kernel, scale
EFF_Y, EFF_Z = 192, 320  # channels of y and z, independent of N


def signal_analysis(down_inverse: bool = True) -> nn.Sequential:
    """g_a of mod2: SignalConvs with the widths of EfficientNet-B0."""
    return nn.Sequential(
        conv(3, 16, 3), GDN(16), conv(16, 32, 3, 2), GDN(32),
        *(MBSignal(i, o, k, s, down_inverse=down_inverse) for i, o, k, s in ENCODER),
        conv(EFF_Y, EFF_Y, 5))


def signal_synthesis() -> nn.Sequential:
    return nn.Sequential(
        conv(EFF_Y, EFF_Y, 5),
        *(MBSignal(i, o, k, scale=s, decoder=True) for i, o, k, s in DECODER),
        deconv(32, 32, 3), GDN(32, inverse=True), conv(32, 16, 3), GDN(16, inverse=True),
        conv(16, 3, 3))


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(same(x, self.kernel_size[0], self.stride[0]))


def efficient_analysis() -> nn.Sequential:
    """g_a of mod3: as mod2, with ordinary convolutions, swish and batch norm."""
    return nn.Sequential(
        SameConv(3, 32, 3, 2, bias=False), nn.SiLU(), nn.BatchNorm2d(32, eps=1e-3, momentum=0.01),
        *(MBConv(i, o, k, s, norm=True) for i, o, k, s in ENCODER), conv(EFF_Y, EFF_Y, 5))


def efficient_synthesis() -> nn.Sequential:
    return nn.Sequential(
        conv(EFF_Y, EFF_Y, 5),
        *(MBConv(i, o, k, scale=s, norm=True, blur=i == 24) for i, o, k, s in DECODER),
        Subpixel(32), conv(32, 32, 3, bias=False), nn.SiLU(),
        nn.BatchNorm2d(32, eps=1e-3, momentum=0.01), conv(32, 3, 3))


# -------------------------------------------------------------------------------------- variant4
class NonLocal(nn.Module):
    """x + W(softmax(theta(x) phi(x)^T) g(x)), attention over all positions (Wang et al. 2018).

    phi and g are max-pooled over two neighbours in a row. Rows of the softmax are computed in
    parts, so that memory does not grow with the square of the image.
    """

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.theta, self.phi, self.g = (nn.Conv2d(channels, half, 1, bias=False) for _ in range(3))
        self.out = nn.Conv2d(half, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.theta(x).flatten(2).transpose(1, 2)  # (B, h * w, C / 2)
        phi, g = (F.max_pool1d(layer(x).flatten(2), 2) if x.shape[2] * x.shape[3] > 1
                  else layer(x).flatten(2) for layer in (self.phi, self.g))
        rows = max(1, CHUNK // (len(x) * phi.shape[2]))
        y = torch.cat([self.attend(part, phi, g) for part in theta.split(rows, 1)], 1)
        return x + self.out(y.transpose(1, 2).unflatten(2, x.shape[-2:]))

    def product_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of the two products between positions."""
        positions = x.shape[2] * x.shape[3]
        return 2 * len(x) * positions * max(1, positions // 2) * self.out.in_channels

    def attend(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """(B, n, C / 2)"""
        weights = torch.matmul(theta, phi).float().softmax(2).to(g.dtype)
        return torch.matmul(weights, g.transpose(1, 2))


class NLAM(nn.Module):
    """Non-local attention module: features times a mask, plus the input."""

    def __init__(self, channels: int):
        super().__init__()
        c = channels
        self.non_local, self.first = NonLocal(c), MBConv(c, c)
        self.mask = nn.Sequential(MBConv(c, c, stride=2), MBConv(c, c),
                                  MBConv(c, c, scale=2, blur=True))
        self.last = nn.Sequential(MBConv(c, c), nn.Conv2d(c, c, 1, bias=False), nn.Sigmoid())
        self.features = nn.Sequential(MBConv(c, c, stride=2), MBConv(c, c),
                                      MBConv(c, c, scale=2, blur=True))

    def forward(self, x: Tensor) -> Tensor:
        r = self.first(self.non_local(x))
        return x + self.last(self.mask(r) + r) * self.features(x)


class DPN(nn.Module):
    """Dual path block; as in the source, the residual and the dense path are multiplied.

    This requires N = 128, as the dense path has 128 channels.
    """

    DENSE = 64

    def __init__(self, N: int):
        super().__init__()
        if N != 2 * self.DENSE:
            raise UserError(f"variant4 needs num_filters {2 * self.DENSE}, not {N}: its dual path "
                            "block multiplies N channels with 128")
        wide = N + self.DENSE
        self.N = N
        self.project = nn.Sequential(nn.Conv2d(N, wide, 1, bias=False), nn.Mish(),
                                     nn.Conv2d(wide, wide, 1, bias=False))
        self.main = nn.Sequential(nn.Conv2d(N, 96, 1, bias=False), nn.Mish(),
                                  nn.Conv2d(96, 96, 1, bias=False),
                                  nn.Conv2d(96, 96, 3, padding=1, groups=32, bias=False), nn.Mish(),
                                  nn.Conv2d(96, wide, 1, bias=False), nn.Mish(),
                                  nn.Conv2d(wide, wide, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.project(x), self.main(x)
        residual = a[:, : self.N] + b[:, : self.N]
        return residual * torch.cat([a[:, self.N :], b[:, self.N :]], 1)


class Variant4Analysis(nn.Module):
    """g_a of variant4: four downsampling steps, three shortcuts to y, attention at 1/4 and 1/16."""

    def __init__(self, N: int):
        super().__init__()
        h, t, q = N // 2, 3 * N // 4, N // 4
        self.d1 = nn.Sequential(conv(3, h, 3, 2), GDN(h))
        self.d2 = nn.Sequential(conv(h, h, 3, 2), GDN(h))
        self.d3 = nn.Sequential(conv(h, t, 3, 2), GDN(t))
        self.d4 = nn.Sequential(conv(t, N, 3, 2), NLAM(N))
        self.skip8, self.skip4, self.skip2 = conv(h, h, 3, 8), conv(h, h, 3, 4), conv(t, q, 3, 2)
        self.attention = NLAM(h)
        wide = N + 2 * h + q
        self.join = nn.Sequential(NonLocal(wide), nn.Conv2d(wide, N, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.d1(x)
        b = self.d2(a)
        c = self.d3(self.attention(b))
        return self.join(torch.cat([self.skip8(a), self.skip4(b), self.skip2(c), self.d4(c)], 1))


def variant4_synthesis(N: int) -> nn.Sequential:
    h, t = N // 2, 3 * N // 4
    return nn.Sequential(
        DPN(N), NonLocal(N), NLAM(N), deconv(N, N, 3), GDN(N, inverse=True), deconv(N, t, 3),
        GDN(t, inverse=True), NLAM(t), deconv(t, h, 3), GDN(h, inverse=True), deconv(h, 3, 3))


class Variant4HyperAnalysis(nn.Module):
    """h_a of variant4: |y| -> z, with three shortcuts."""

    def __init__(self, N: int):
        super().__init__()
        h, t, q = N // 2, 3 * N // 4, N // 4
        self.first = nn.Sequential(conv(N, q, 3, bias=False, reflect=True), nn.Mish())
        self.r1, self.b1 = conv(q, h, 3, 4), MBConv(q, h, stride=2, act=nn.Mish)
        self.r2, self.b2 = conv(h, h, 3, 2), MBConv(h, h, act=nn.Mish)
        self.r3, self.last = conv(q, h, 3, 2), conv(h, t, 3, 2, False, reflect=True)
        self.join = conv(t + 3 * h, N, 3, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        a = self.first(y)
        b = self.b1(a)
        c = self.b2(b)
        return self.join(torch.cat([self.last(c), self.r1(a), self.r2(b), self.r3(c[:, ::2])], 1))


def variant4_hyper_synthesis(N: int) -> nn.Sequential:
    return nn.Sequential(
        conv(N, N, 3, bias=False, reflect=True), Subpixel(N), nn.Mish(),
        MBConv(N, 3 * N // 2, act=nn.Mish), MBConv(3 * N // 2, 2 * N, scale=2, act=nn.Mish),
        conv(2 * N, 2 * N, 3, reflect=True))


# -------------------------------------------------------------------------------------- variant3
def psi_synthesis(N: int) -> nn.Sequential:
    """h_s of variant3: z_hat -> psi (B, 2N, h, w)."""
    return nn.Sequential(deconv(N, N, 5), nn.LeakyReLU(0.1), deconv(N, 3 * N // 2, 5),
                         nn.LeakyReLU(0.1), conv(3 * N // 2, 2 * N, 3))
