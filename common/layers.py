"""Layers of CompressAI's networks: one in a form that is safe on a CPU, and masks."""

from __future__ import annotations

import torch
from compressai.layers import ResidualBlockWithStride
from torch import Tensor, nn


class Shortcut(nn.Conv2d):
    """1x1 convolution of stride 2: the pixels that it skips are left out first.

    oneDNN's own (3.7, float32, channels last) writes beyond its buffers in the backward pass.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., ::2, ::2].contiguous(memory_format=torch.channels_last)
        return nn.functional.conv2d(x, self.weight, self.bias)


def replace_shortcuts(model: nn.Module) -> None:
    """Put a `Shortcut` into every ResidualBlockWithStride of `model`; keys and results stay."""
    for module in model.modules():
        if isinstance(module, ResidualBlockWithStride) and module.skip is not None:
            module.skip = Shortcut(*module.skip.weight.shape[1::-1])


def mask_of(layer: nn.Module) -> Tensor | None:
    """The mask of a masked convolution (context models): its weight counts where it is 1."""
    return dict(layer.named_buffers(recurse=False)).get("mask")
