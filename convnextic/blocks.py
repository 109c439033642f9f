"""Building blocks of ConvNeXTIC: ConvNeXt blocks, changes of resolution, external attention."""

from __future__ import annotations

from typing import Any

from common.coding import exact, exact_tables
from common.coding.contract import Run, in_floats

import torch
from compressai.layers import GDN
from timm.layers import DropPath, LayerNorm2d, LayerScale
from torch import Tensor, nn

SAMPLERS = {"patch4": (4, 4, 0, 0), "k2s2": (2, 2, 0, 0), "k3s2": (3, 2, 1, 1),
            "k5s2": (5, 2, 2, 1)}  # kernel, stride, padding, output padding


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

    def exact(self, x: Tensor, run: Run) -> Tensor:
        y = run([self.dwconv, self.norm], x).permute(0, 2, 3, 1)
        y = run(self.mlp, y) * exact.values(self.scale.gamma, x)
        return x + y.permute(0, 3, 1, 2)


class Depthwise(nn.Conv2d):
    """Depthwise convolution with padding k // 2 and a fast weight gradient on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and x.device.type == "cpu"):
            return super().forward(x)
        weight, bias = self.weight, self.bias
        assert bias is not None  # `Block` makes it with a bias
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

    def exact(self, x: Tensor, run: Run) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None  # by default
        mean, variance, weight, bias = (exact.values(t, x).view(-1, 1, 1) for t in (
            self.running_mean, self.running_var, self.weight, self.bias))
        return (x - mean) / exact.sqrt(variance + self.eps) * weight + bias


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
        return self.exact(x, in_floats)

    def exact(self, x: Tensor, run: Run) -> Tensor:
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

    def exact(self, x: Tensor, run: Run) -> Tensor:
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
        first, _, last = self.layers
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        if self.log:  # kinks at different rates
            nn.init.normal_(first.weight)
            nn.init.normal_(first.bias)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, lmbda: Tensor) -> Tensor:
        with torch.autocast(lmbda.device.type, enabled=False):
            x = torch.log(lmbda.float() / 0.01) if self.log else lmbda.float()
            return self.layers(x[:, None]).exp()[:, :, None, None]
