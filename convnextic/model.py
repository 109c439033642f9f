"""ConvNeXTIC, an entry to the VCIP 2022 image coding challenge (DomChennnn/ConvNeXTIC): the VAE of
TinyLIC (Lu, Ma, arXiv:2204.11448) with ConvNeXt blocks (Liu et al., CVPR 2022) in place of
attention. There is no paper; six revisions of the code are variants here, its ablations options.

State-dict keys are ours, as no weights were published. Everything that the decoder recomputes (h_s,
context model, entropy parameters) uses exact arithmetic (exact.py, context.py in common/coding).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from common import UserError
from common.coding import entropy, exact, exact_tables
from common.coding.context import Context
from common.coding.contract import Codec
from common.coding.model_file import load_model
from common.coding.tiles import LIMIT, tiled

import torch
from compressai.entropy_models import GaussianConditional
from compressai.layers import GDN
from compressai.ops import quantize_ste
from timm.layers import DropPath, LayerNorm2d, LayerScale, trunc_normal_
from torch import Tensor, nn

HALO = 24  # latents that g_a and g_s see on each side
BLOCK = 4096  # positions coded at a time, to bound memory
LMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483, 0.0932, 0.18)  # qualities 1 to 8
GROUPS = (16, 16, 32, 64)  # channels of the groups of SCCTX; the last has the rest

BASELINE = {
    "depths": (2, 4, 6, 2, 2, 2), "kernel_size": 7, "mlp_ratio": 4, "dw_groups": 0,
    "block_norm": "layernorm", "decoder_dw": "conv", "drop_path_rate": 0.0,
    "layer_scale_init": 1e-6, "stem": "patch4", "resample": "k2s2", "resample_norm": "none",
    "context": "mcm", "variable_rate": False, "lambda_input": "log",
    "external_attention": False}
STRIDE2 = BASELINE | {"stem": "k5s2", "resample": "k3s2", "drop_path_rate": 0.1}
VARIANTS = {  # revisions of the source, oldest first
    "v0_ln": BASELINE | {"resample_norm": "layernorm"},
    "v1_patch": BASELINE,
    "v2_stride2": STRIDE2,
    "v3_scctx": STRIDE2 | {"context": "scctx"},
    "v4_ea": STRIDE2 | {"context": "scctx", "external_attention": True},
    "v5_vr": STRIDE2 | {"context": "scctx", "variable_rate": True},
}
CHOICES = {
    "block_norm": ("layernorm", "gdn", "batchnorm", "none"),
    "decoder_dw": ("conv", "convtranspose"),
    "stem": ("patch4", "k2s2", "k5s2"), "resample": ("k2s2", "k3s2"),
    "resample_norm": ("none", "layernorm"), "context": ("mcm", "scctx"),
    "lambda_input": ("log", "raw")}
SAMPLERS = {"patch4": (4, 4, 0, 0), "k2s2": (2, 2, 0, 0), "k3s2": (3, 2, 1, 1),
            "k5s2": (5, 2, 2, 1)}  # kernel, stride, padding, output padding


# -------------------------------------------------------------------------------------- transforms
class Block(nn.Module):
    """ConvNeXt block on (B, dim, H, W): depthwise 7x7, norm, two 1x1, layer scale.

    Liu et al. 2022, Figure 4. `gamma` starts at 1e-6, so the block is initially the identity.
    """

    def __init__(self, dim: int, options: dict[str, Any], drop: float, decoder: bool = False):
        super().__init__()
        k, groups = options["kernel_size"], options["dw_groups"] or dim
        conv = (nn.ConvTranspose2d if decoder and options["decoder_dw"] == "convtranspose"
                else Depthwise if groups == dim else nn.Conv2d)
        self.dwconv = conv(dim, dim, k, padding=k // 2, groups=groups)
        self.norm = {"layernorm": LayerNorm2d, "batchnorm": BatchNorm, "gdn": GDN,
                     "none": nn.Identity}[options["block_norm"]](dim)
        hidden = options["mlp_ratio"] * dim
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.scale = LayerScale(dim, options["layer_scale_init"])
        self.drop_path = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x)).permute(0, 2, 3, 1)  # (B, H, W, dim)
        y = self.scale(self.mlp(y)).permute(0, 3, 1, 2)
        return x + self.drop_path(y)

    def exact(self, x: Tensor, run: Any) -> Tensor:
        y = run([self.dwconv, self.norm], x).permute(0, 2, 3, 1)
        y = run(self.mlp, y) * exact.values(self.scale.gamma, x)
        return x + y.permute(0, 3, 1, 2)


class Depthwise(nn.Conv2d):
    """Depthwise convolution with padding k // 2, whose gradients are fast on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and x.device.type == "cpu"):
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        return DepthwiseFunction.apply(x, weight, bias)


class DepthwiseFunction(torch.autograd.Function):
    """Depthwise convolution whose weight gradient uses dense blocks of 16 channels.

    oneDNN does not use matrix units for the gradient of depthwise weights. With dense blocks, of
    which only the diagonals are kept, 16 times the work takes a third of the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.conv2d(x, weight, bias, padding=weight.shape[2] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dim, _, k, _ = weight.shape
        grad = grad.contiguous(memory_format=torch.channels_last)
        width = next(n for n in (16, 8, 4, 2, 1) if dim % n == 0)
        blocks = torch.ops.aten.convolution_backward(
            grad, x, weight.expand(-1, width, -1, -1), None, (1, 1), (k // 2, k // 2), (1, 1),
            False, (0, 0), dim // width, (False, True, False))[1]
        diagonal = blocks.view(-1, width, width, k, k).diagonal(dim1=1, dim2=2)  # (., k, k, width)
        grad_weight = diagonal.movedim(-1, 1).reshape(dim, 1, k, k)
        grad_x = torch.conv2d(grad, weight.flip(2, 3), padding=k // 2, groups=dim)
        return grad_x, grad_weight, grad.sum((0, 2, 3))


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d; in evaluation it is elementwise and therefore exact."""

    def exact(self, x: Tensor, run: Any) -> Tensor:
        mean, variance, weight, bias = (exact.values(t, x).view(-1, 1, 1) for t in (
            self.running_mean, self.running_var, self.weight, self.bias))
        return (x - mean) / torch.sqrt(variance + self.eps) * weight + bias


class Down(nn.Module):
    """Encoder stage: downsampling, then blocks with a skip connection around all of them."""

    def __init__(self, dim_in: int, dim_out: int, sampler: str, blocks: list[Block],
                 norm: str = "", attention: bool = False):
        """norm: place of a LayerNorm, "before" or "after" the convolution."""
        super().__init__()
        kernel, stride, padding, _ = SAMPLERS[sampler]
        self.down = nn.Sequential(*filter(None, (
            LayerNorm2d(dim_in) if norm == "before" else None,
            nn.Conv2d(dim_in, dim_out, kernel, stride, padding),
            LayerNorm2d(dim_out) if norm == "after" else None)))
        self.blocks = nn.Sequential(*blocks)
        self.attention = ExternalAttention(dim_out) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.attention(self.blocks(x) + x)


class Up(nn.Module):
    """Decoder stage: blocks with a skip connection around all of them, then upsampling."""

    def __init__(self, dim_in: int, dim_out: int, sampler: str, blocks: list[Block],
                 norm: str = "", attention: bool = False):
        super().__init__()
        kernel, stride, padding, output_padding = SAMPLERS[sampler]
        self.attention = ExternalAttention(dim_in) if attention else nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.up = nn.Sequential(*filter(None, (
            LayerNorm2d(dim_in) if norm == "before" else None,
            nn.ConvTranspose2d(dim_in, dim_out, kernel, stride, padding, output_padding),
            LayerNorm2d(dim_out) if norm == "after" else None)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        return self.up(self.blocks(x) + x)

    def exact(self, x: Tensor, run: Any) -> Tensor:
        x = run(self.attention, x)
        return run(self.up, run(self.blocks, x) + x)


class ExternalAttention(nn.Module):
    """Attention to 64 learned tokens instead of positions (Guo et al., arXiv:2105.02358)."""

    TOKENS = 64

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.keys = nn.Conv2d(dim, self.TOKENS, 1, bias=False)
        self.values = nn.Conv2d(self.TOKENS, dim, 1, bias=False)
        self.conv2 = nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), BatchNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        attention = self.keys(self.conv1(x)).float()
        attention = attention.flatten(2).softmax(2).view_as(attention)  # over positions
        attention = attention / (1e-9 + attention.sum(1, keepdim=True))  # over tokens
        return torch.relu(x + self.conv2(self.values(attention)))

    def exact(self, x: Tensor, run: Any) -> Tensor:
        """Both sums are over integers, and exp is read from a table."""
        logits = run([self.conv1, self.keys], x)
        peak = logits.flatten(2).amax(2)[..., None, None]
        weight = exact_tables.exp(logits - peak)
        total = weight.sum((2, 3), keepdim=True)
        attention = exact.round_to_grid(weight / total, 40)
        attention = attention / (1e-9 + attention.sum(1, keepdim=True))
        return (x + run([self.values, self.conv2], attention)).clamp_min(0)


class ScalingNet(nn.Module):
    """lmbda (B,) -> a factor for each channel (B, C, 1, 1), initially 1.

    In the source, the input is lmbda itself ("raw"), which is so small that the networks stay
    constant for thousands of steps; here it is log(lmbda / 0.01) ("log").
    """

    def __init__(self, channels: int, lambda_input: str):
        super().__init__()
        self.log = lambda_input == "log"
        self.layers = nn.Sequential(nn.Linear(1, channels // 2), nn.ReLU(),
                                    nn.Linear(channels // 2, channels))

    def initialise(self) -> None:
        if self.log:  # kinks at different rates
            nn.init.normal_(self.layers[0].weight)
            nn.init.normal_(self.layers[0].bias)
        nn.init.zeros_(self.layers[2].weight)
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, lmbda: Tensor) -> Tensor:
        with torch.autocast(lmbda.device.type, enabled=False):
            x = torch.log(lmbda.float() / 0.01) if self.log else lmbda.float()
            return self.layers(x[:, None]).exp()[:, :, None, None]


# ---------------------------------------------------------------------------------- context models
class MaskedConv(nn.Conv2d):
    """Convolution with some taps masked; the weight is masked in each call."""

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

    def passes(self, params: Tensor, table: Tensor) -> Iterator[tuple[int, Context, list]]:
        """Yield in coding order: group of channels, its Context, [(context number, positions)]."""
        context = Context(list(self.contexts), self.parameters_network, params, table)
        masks = [mask.flatten().to(params.device) for mask in lattices(*params.shape[-2:])]
        yield 0, context, [(k, block) for k, mask in enumerate(masks)
                           for block in mask.nonzero().flatten().split(BLOCK)]


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

    def _predict(self, k: int, params: Tensor, space: Tensor, channel: Tensor) -> tuple:
        return self.parameters_networks[k](torch.cat([params, space, channel], 1)).chunk(2, 1)

    def passes(self, params: Tensor, table: Tensor) -> Iterator[tuple[int, Context, list]]:
        """As in MCM; the Context of a group must be complete before the next one is requested."""
        anchor = anchors(*params.shape[-2:]).flatten().to(params.device)
        order = [(k, block) for k, mask in enumerate((anchor, ~anchor))
                 for block in mask.nonzero().flatten().split(BLOCK)]
        done: list[Tensor] = []
        for k in range(len(self.sizes)):
            channel = exact.run(self.channel_contexts[k], torch.cat([params, *done], 1))
            context = Context(self.space_contexts[k], self.parameters_networks[k], params, table,
                              extra=channel)
            yield k, context, order
            done.append(context.y_hat().double())


def anchors(height: int, width: int) -> Tensor:
    """Mask (height, width), bool, of the latents of the first pass: row + column odd."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (row + column) % 2 == 1


# ------------------------------------------------------------------------------------------- model
class ConvNeXTIC(Codec):
    """The codec. Shapes are those of v2 with N, M = 128, 192:

        x (3,512,768) -> g_a: 4 Down -> y (M,32,48) -------------------> Q -> y_hat -> g_s: 4 Up
                                        |                                |     |
                                        |                 N(means, scales^2)  context model
                                        v                                |     v
                               h_a: 2 Down -> z (N,8,12) -> Q -> h_s: 2 Up -> params (2M,32,48)

    With the patch stem (v0, v1), y is at 1/32 and z at 1/128 of the resolution of the image.
    """

    tag = b"cnxt"  # in the header of this paper's files
    exact_parts = ("h_s", "context_model")
    options = ("variant", *BASELINE)  # from a checkpoint's config, as weights do not reveal them

    def __init__(self, variant: str = "v2_stride2", embed_dim: int = 128, latent_dim: int = 192,
                 **options: Any):
        """options: options of BASELINE, which replace those of the variant."""
        super().__init__()
        o = merged(variant, options)
        if o["dw_groups"] and (embed_dim % o["dw_groups"] or latent_dim % o["dw_groups"]):
            raise UserError(f"dw_groups {o['dw_groups']}: give a divisor of {embed_dim} and "
                            f"{latent_dim}, the widths, or 0")
        self.variant, self.N, self.M = variant, embed_dim, latent_dim
        for key, value in o.items():
            setattr(self, key, value)
        N, M, stem, other = embed_dim, latent_dim, o["stem"], o["resample"]
        normed, ea = o["resample_norm"] == "layernorm", o["external_attention"]
        depths = o["depths"]
        rates = torch.linspace(0, o["drop_path_rate"], sum(depths)).tolist()

        def blocks(dim: int, depth: int, decoder: bool) -> list[Block]:
            return [Block(dim, o, drops.pop(0), decoder) for _ in range(depth)]

        def down(i: int, dim_in: int, dim_out: int, attention: bool = False) -> Down:
            norm = ("after" if i == 0 else "before") if normed else ""
            return Down(dim_in, dim_out, other if i else stem, blocks(dim_out, depths[i], False),
                        norm, ea and attention)

        def up(i: int, dim_in: int, dim_out: int, attention: bool = False) -> Up:
            norm = ("after" if i == 5 else "before") if normed else ""
            return Up(dim_in, dim_out, other if i < 5 else stem,
                      blocks(dim_in, depths[5 - i], True), norm, ea and attention)

        drops = list(rates)  # one ramp over the encoder ...
        self.g_a = nn.Sequential(down(0, 3, N), down(1, N, N, True), down(2, N, N),
                                 down(3, N, M, True))
        self.h_a = nn.Sequential(down(4, M, N), down(5, N, N, True))
        drops = list(rates)  # ... and the same over the decoder
        self.h_s = nn.Sequential(up(0, N, N, True), up(1, N, 2 * M))
        self.g_s = nn.Sequential(up(2, M, N, True), up(3, N, N), up(4, N, N, True), up(5, N, 3))
        self.context_model = {"mcm": MCM, "scctx": SCCTX}[o["context"]](M)
        self.entropy_bottleneck = entropy.EntropyBottleneck(N)
        self.gaussian_conditional = GaussianConditional(None)
        if o["variable_rate"]:
            nets = [ScalingNet(c, o["lambda_input"]) for c in (N, N, N, M, M, N, N, N)]
            self.scale_a = nn.ModuleList(nets[:4])  # after the stages of g_a
            self.scale_s = nn.ModuleList(nets[4:])  # before those of g_s
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ScalingNet):
                module.initialise()

    @property
    def stride(self) -> int:
        """Image pixels per position of y."""
        return SAMPLERS[self.stem][1] * 8

    @property
    def tile_above(self) -> float:
        """Image pixels above which tiles are used; never with external attention."""
        return math.inf if self.external_attention else LIMIT

    @property
    def downsampling_factor(self) -> int:
        return self.stride * 4

    def forward(self, x: Tensor, lmbda: Tensor | float | None = None) -> dict[str, Any]:
        """x (B, 3, H, W) in [0, 1], H and W multiples of 64 (patch stem: 128) -> x_hat and
        likelihoods of y, z. In eval mode, y_hat is that of the file.

        lmbda: rate of a variable-rate model, a number or (B,).
        """
        y = self.analyse(x, lmbda).float()
        z = self.h_a(y).float()
        with torch.autocast(x.device.type, enabled=False):  # likelihoods in float32
            z_hat, z_likelihoods = self.entropy_bottleneck(z)
        y_hat = None
        if not self.training:
            y_hat, _ = self._encode(y, self._params(z_hat))
        elif self.context == "scctx":
            z_hat = z + (entropy.dequantize(self.entropy_bottleneck, z) - z).detach()
        y_hat, scales, means = self.context_model(y, self.h_s(z_hat), y_hat)
        with torch.autocast(x.device.type, enabled=False):
            _, y_likelihoods = self.gaussian_conditional(y, scales.float(), means.float())
        x_hat = self.synthesize(y_hat, lmbda)
        return {"x_hat": x_hat, "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def analyse(self, x: Tensor, lmbda: Tensor | float | None = None) -> Tensor:
        """g_a: x (B, 3, H, W) -> y (B, M, H/16, W/16), or 1/32; scaled by lmbda in v5."""
        gains = self._gains("scale_a", x, lmbda)
        for stage, gain in zip(self.g_a, gains, strict=True):
            x = stage(x) * gain if gain is not None else stage(x)
        return x

    def synthesize(self, y_hat: Tensor, lmbda: Tensor | float | None = None) -> Tensor:
        """g_s: y_hat -> x_hat (B, 3, H, W), scaled by lmbda in v5."""
        gains = self._gains("scale_s", y_hat, lmbda)
        for stage, gain in zip(self.g_s, gains, strict=True):
            y_hat = stage(y_hat * gain if gain is not None else y_hat)
        return y_hat

    def _gains(self, name: str, x: Tensor, lmbda: Tensor | float | None) -> list:
        if not self.variable_rate:
            return [None] * 4
        if lmbda is None:
            raise UserError("this model has a variable rate: give it a lmbda")
        lmbda = torch.as_tensor(lmbda, dtype=torch.float32, device=x.device).expand(len(x))
        return [net(lmbda) for net in getattr(self, name)]

    @torch.no_grad()
    def compress(self, x: Tensor, lmbda: float | None = None) -> dict[str, Any]:
        """x as in forward -> {"strings": [y1, y2, y3, y4, z] or [y, z], "shape": of z}."""
        y = tiled(lambda part: self.analyse(part, lmbda), x, down=self.stride, halo=HALO,
                  limit=self.tile_above)
        z = self.h_a(y)
        z_strings = entropy.encode_bottleneck(self.entropy_bottleneck, z)
        _, coded = self._encode(y, self._params(entropy.dequantize(self.entropy_bottleneck, z)))
        tables = entropy.Tables.of(self.gaussian_conditional)
        strings = [entropy.encode(*(torch.cat([t.flatten(1) for t in column], 1)
                                    for column in zip(*parts, strict=True)), tables)
                   for parts in coded]
        result = {"strings": [*strings, z_strings], "shape": tuple(z.shape[-2:])}
        if self.variable_rate:
            result["parameters"] = struct.pack("<f", lmbda)
        return result

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int],
                   lmbda: float | None = None) -> dict[str, Tensor]:
        """Inverse of `compress`; returns {"x_hat": (B, 3, H, W) in [0, 1]}."""
        *y_strings, z_strings = strings
        z_hat = entropy.decode_bottleneck(self.entropy_bottleneck, z_strings, shape)
        params, tables = self._params(z_hat), entropy.Tables.of(self.gaussian_conditional)
        decoders = self._decoders(y_strings, params, tables)
        y_hat = self._walk(params, lambda _, string, positions, indexes, means:
                           decoders[string].decode(indexes).to(means))
        for decoder in decoders:
            decoder.finish()
        x_hat = tiled(lambda part: self.synthesize(part, lmbda), y_hat.to(z_hat.device),
                      up=self.stride, halo=HALO, limit=self.tile_above)
        return {"x_hat": x_hat.clamp_(0, 1)}

    def _decoders(self, strings: list[list[bytes]], params: Tensor, tables: entropy.Tables) -> list:
        """Decoders of the strings of y: one per lattice of MCM, or one for SCCTX."""
        height, width = params.shape[-2:]
        counts = ([int(mask.sum()) for mask in lattices(height, width)] if self.context == "mcm"
                  else [height * width])
        return [entropy.Decoders(string, self.M * count, tables)
                for string, count in zip(strings, counts, strict=True)]

    @staticmethod
    def read_parameters(parameters: bytes) -> dict[str, Any]:
        """Return lmbda from the header of a variable-rate file."""
        return {"lmbda": struct.unpack("<f", parameters)[0]} if len(parameters) == 4 else {}

    def _params(self, z_hat: Tensor) -> Tensor:
        return exact.run(self.h_s, z_hat.to(self.coding_device or z_hat.device))

    def _table(self) -> Tensor:
        return self.gaussian_conditional.scale_table

    @torch.no_grad()
    @torch.compiler.disable
    def _encode(self, y: Tensor, params: Tensor) -> tuple[Tensor, list[list]]:
        """Return y_hat (B, M, h, w), and [(symbols, CDF indexes), ...] for each string of y."""
        coded: list[list] = [[] for _ in range(4 if self.context == "mcm" else 1)]
        rows = [section.flatten(2).transpose(1, 2)  # (B, h * w, channels)
                for section in y.to(params.device).split(self.context_model.sizes, 1)]

        def rounded(k: int, string: int, positions: Tensor, indexes: Tensor, means: Tensor
                    ) -> Tensor:
            symbols = torch.round(rows[k][:, positions].to(means) - means)
            coded[string].append((symbols, indexes))
            return symbols

        return self._walk(params, rounded).to(y.device), coded

    def _walk(self, params: Tensor, symbols: Callable[..., Tensor]) -> Tensor:
        """y_hat (B, M, h, w), channel group after channel group.

        symbols(k, string, positions, indexes, means): those of channel group k, which are coded in
        the y string of this number.
        """
        groups = []
        for k, context, blocks in self.context_model.passes(params, self._table()):
            for which, positions in blocks:
                string = which if self.context == "mcm" else 0
                context.walk([positions], partial(symbols, k, string), which)
            groups.append(context.y_hat())
        return torch.cat(groups, 1)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor], **options: Any) -> ConvNeXTIC:
        """Build the model with the N and M of the weights and load them strictly.

        options: of a checkpoint's config; without a variant, those of the weights (`options_of`).
        """
        N = len(state_dict["entropy_bottleneck.quantiles"])
        M = len(state_dict["g_a.3.blocks.0.scale.gamma"])
        options = options if "variant" in options else options_of(state_dict) | options
        net = cls(options.pop("variant", "v2_stride2"), N, M, **options)
        net.load_state_dict(state_dict)
        return net


def merged(variant: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a variant, with some replaced; UserError for unknown names and values."""
    if variant not in VARIANTS:
        raise UserError(f"variant {variant}: choose from {', '.join(VARIANTS)}")
    result = dict(VARIANTS[variant])
    for key, value in options.items():
        if key not in result:
            raise UserError(f"there is no option {key}: {', '.join(result)}")
        if value is None:
            continue
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{key} {value}: choose from {', '.join(CHOICES[key])}")
        result[key] = tuple(value) if key == "depths" else value
    if len(result["depths"]) != 6 or min(result["depths"]) < 1:
        raise UserError(f"depths {result['depths']}: give six positive numbers")
    if result["kernel_size"] % 2 == 0:
        raise UserError(f"kernel_size {result['kernel_size']}: give an odd number")
    if not 0 <= result["drop_path_rate"] < 1:
        raise UserError(f"drop_path_rate {result['drop_path_rate']}: give 0 or more, below 1")
    return result


def options_of(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The options that names and shapes of weights reveal.

    They do not reveal `decoder_dw` of depthwise kernels (assumed to be "conv"), `lambda_input`
    ("log"), and options that only affect training.
    """
    def kernel(stage: str) -> int:
        return next(t.shape[2] for key, t in state_dict.items()
                    if key.startswith(f"{stage}.down.") and t.dim() == 4)

    block = "g_a.1.blocks.0"
    depths = [len({key.split(".")[3] for key in state_dict if key.startswith(f"{stage}.blocks.")})
              for stage in ("g_a.0", "g_a.1", "g_a.2", "g_a.3", "h_a.0", "h_a.1")]
    norms = {f"{block}.norm.beta": "gdn", f"{block}.norm.running_mean": "batchnorm",
             f"{block}.norm.weight": "layernorm"}
    N, inputs, size, _ = state_dict[f"{block}.dwconv.weight"].shape
    return {
        "depths": tuple(depths), "kernel_size": size,
        "mlp_ratio": len(state_dict[f"{block}.mlp.0.weight"]) // N,
        "dw_groups": 0 if inputs == 1 else N // inputs,
        "block_norm": next((norm for key, norm in norms.items() if key in state_dict), "none"),
        "stem": {4: "patch4", 2: "k2s2", 5: "k5s2"}[kernel("g_a.0")],
        "resample": {2: "k2s2", 3: "k3s2"}[kernel("g_a.1")],
        "resample_norm": "layernorm" if "g_a.1.down.1.weight" in state_dict else "none",
        "context": "mcm" if "context_model.contexts.0.weight" in state_dict else "scctx",
        "variable_rate": "scale_a.0.layers.0.weight" in state_dict,
        "external_attention": "g_a.1.attention.conv1.weight" in state_dict}


def build(variant: str = "v2_stride2", embed_dim: int = 128, latent_dim: int = 192,
          **options: Any) -> ConvNeXTIC:
    """Build a variant, i.e. a revision of the source; options of BASELINE replace its own."""
    return ConvNeXTIC(variant, embed_dim, latent_dim, **options)


def load(path: str | Path, device: torch.device | str = "cpu") -> ConvNeXTIC:
    """Load a model from a checkpoint or a bare state dict, ready to code."""
    return load_model(path, ConvNeXTIC, device)
