"""Layers of CompressAI's networks: a shortcut that is safe on CPUs, and masks."""

from __future__ import annotations

import torch
from compressai.layers import ResidualBlockWithStride
from torch import Tensor, nn


class Shortcut(nn.Conv2d):
    """1x1 convolution of stride 2, computed as subsampling and a convolution of stride 1.

    oneDNN's strided convolution (3.7, float32, channels last) writes beyond its buffers in the
    backward pass.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., ::2, ::2].contiguous(memory_format=torch.channels_last)
        return nn.functional.conv2d(x, self.weight, self.bias)


def replace_shortcuts(model: nn.Module) -> None:
    """Replace the shortcut in every ResidualBlockWithStride; keys and results do not change."""
    for module in model.modules():
        if isinstance(module, ResidualBlockWithStride) and isinstance(module.skip, nn.Conv2d):
            module.skip = Shortcut(module.skip.in_channels, module.skip.out_channels)


def mask_of(layer: nn.Module) -> Tensor | None:
    """The mask of a masked convolution (context model), 1 where the weight is used; or None."""
    return dict(layer.named_buffers(recurse=False)).get("mask")
