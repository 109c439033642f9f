"""Learned image compression with mixed Transformer-CNN architectures (TCM), J. Liu, H. Sun, J.
Katto, CVPR 2023 (arXiv:2303.14978): half of the channels go through a residual block, half through
a Swin block; five slices, with attention over their context and a predicted residual.

State-dict keys are those of jmliu206/LIC_TCM, except in the Swin blocks (`_renamed`). In coding,
both h_s, attention, entropy parameters and latent residual prediction are exact.
"""

from __future__ import annotations

import re

from common.layers import replace_shortcuts

import torch
from compressai.layers import (
    AttentionBlock,
    ResidualBlock,
    ResidualBlockUpsample,
    ResidualBlockWithStride,
    conv1x1,
    conv3x3,
    subpel_conv3x3,
)
from timm.layers import trunc_normal_
from torch import Tensor, nn

from tbtc.slices import Run, SliceCoder, in_floats
from tbtc.swin import Block, WindowAttention

SLICES = 5
HEADS = (8, 16, 32)  # channels per head in the stages of g_a, reversed in g_s
WINDOW, HYPER_WINDOW = 8, 4
# keys of the source's Swin blocks, and ours
SWIN_KEYS = (("ln1.", "norm1."), ("ln2.", "norm2."), ("mlp.0.", "mlp.fc1."),
             ("mlp.2.", "mlp.fc2."), ("msa.embedding_layer.", "attn.qkv."),
             ("msa.linear.", "attn.proj."),
             ("msa.relative_position_params", "attn.relative_position_bias_table"))


class SwinBlock(Block):
    """Swin block on (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        return super().exact(x.permute(0, 2, 3, 1), run).permute(0, 3, 1, 2)


class ConvTransBlock(nn.Module):
    """(B, 2N, H, W) -> same shape; one half in a residual block, the other in Swin (Fig. 3)."""

    def __init__(self, N: int, head_dim: int, window: int, shift: int):
        super().__init__()
        self.trans_block = SwinBlock(N, window, shift, head_dim=head_dim)
        self.conv1_1, self.conv1_2 = nn.Conv2d(2 * N, 2 * N, 1), nn.Conv2d(2 * N, 2 * N, 1)
        self.conv_block = ExactResidualBlock(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(x, in_floats)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        conv, trans = run(self.conv1_1, x).chunk(2, 1)
        conv = run(self.conv_block, conv) + conv
        return x + run(self.conv1_2, torch.cat([conv, run(self.trans_block, trans)], 1))


class ExactResidualBlock(ResidualBlock):
    def exact(self, x: Tensor, run: Run) -> Tensor:
        return run([self.conv1, self.leaky_relu, self.conv2, self.leaky_relu], x) + x


class ExactUpsample(ResidualBlockUpsample):
    def exact(self, x: Tensor, run: Run) -> Tensor:
        return run([self.subpel_conv, self.leaky_relu, self.conv, self.igdn], x) + (
            run(self.upsample, x))


class SWAtten(AttentionBlock):
    """Attention over the context of a slice (Fig. 5): a gate with window attention, and a skip."""

    def __init__(self, channels: int, inner: int, head_dim: int = 16):
        super().__init__(inner)
        self.in_conv, self.out_conv = conv1x1(channels, inner), conv1x1(inner, channels)
        self.non_local_block = nn.ModuleDict({
            f"block_{1 + i}": SwinBlock(inner, WINDOW, i * WINDOW // 2, head_dim=head_dim)
            for i in range(2)})
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_conv(x)
        z = x
        for block in self.non_local_block.values():
            z = block(z)
        return self.out_conv(self.conv_a(x) * self.gate(self.conv_b(z)) + x)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        x = run(self.in_conv, x)
        z = run(list(self.non_local_block.values()), x)

        def branch(layers: nn.Sequential, x: Tensor) -> Tensor:
            for layer in layers:  # CompressAI's residual units, and a last 1x1
                x = (run(layer, x) if isinstance(layer, nn.Conv2d)
                     else (run(layer.get_submodule("conv"), x) + x).clamp_min(0))
            return x

        gated = branch(self.conv_a, x) * run(self.gate, branch(self.conv_b, z))
        return run(self.out_conv, gated + x)


class TCM(SliceCoder):
    """TCM. Means and scales of slice i depend on all hyper parameters and all previous slices:

        h_mean_s -> (M,h,w) --+-> atten_mean.i -> support -+-> cc_mean_transforms.i -> means
        y_hat_0 ... y_hat_i-1-+                            |
        round(y_i - means) + means ------------------------+-> lrp_transforms.i -> 0.5 tanh: y_hat_i

    and the same with h_scale_s, atten_scale, cc_scale_transforms for the scales.
    """

    exact_parts = ("h_mean_s", "h_scale_s", "atten_mean", "atten_scale", "cc_mean_transforms",
                   "cc_scale_transforms", "lrp_transforms")
    h_mean_s: nn.Sequential
    h_scale_s: nn.Sequential
    atten_mean: nn.ModuleList
    atten_scale: nn.ModuleList
    cc_mean_transforms: nn.ModuleList
    cc_scale_transforms: nn.ModuleList

    def __init__(self, N: int = 128, M: int = 320, Hd: int = 192):
        """2N: width of the transforms; M, Hd: channels of y, z."""
        super().__init__([M // SLICES] * SLICES, Hd)
        self.name, self.N, self.M = "tcm", N, M
        self.halo = 16  # g_a sees 6 + 3 + 2 latents; a multiple of the window

        def blocks(head_dim: int, window: int = WINDOW) -> list[nn.Module]:
            return [ConvTransBlock(N, head_dim, window, shift) for shift in (0, window // 2)]

        a, b, c = HEADS
        down, up = (lambda: ResidualBlockWithStride(2 * N, 2 * N, 2),
                    lambda: ResidualBlockUpsample(2 * N, 2 * N, 2))
        self.g_a = nn.Sequential(ResidualBlockWithStride(3, 2 * N, 2), *blocks(a), down(),
                                 *blocks(b), down(), *blocks(c), conv3x3(2 * N, M, stride=2))
        self.g_s = nn.Sequential(ResidualBlockUpsample(M, 2 * N, 2), *blocks(c), up(),
                                 *blocks(b), up(), *blocks(a), subpel_conv3x3(2 * N, 3, 2))
        self.h_a = nn.Sequential(ResidualBlockWithStride(M, 2 * N, 2), *blocks(c, HYPER_WINDOW),
                                 conv3x3(2 * N, Hd, stride=2))
        for name in ("h_mean_s", "h_scale_s"):
            self.add_module(name, nn.Sequential(
                ExactUpsample(Hd, 2 * N, 2), *blocks(c, HYPER_WINDOW), subpel_conv3x3(2 * N, M, 2)))

        def net(inputs: int) -> nn.Sequential:
            return nn.Sequential(conv3x3(inputs, 7 * M // 10), nn.GELU(),
                                 conv3x3(7 * M // 10, 2 * M // 5), nn.GELU(),
                                 conv3x3(2 * M // 5, M // SLICES))

        supports = [M + sum(self.slices[:i]) for i in range(SLICES)]
        for name in ("mean", "scale"):
            self.add_module(f"atten_{name}", nn.ModuleList(
                nn.Sequential(SWAtten(s, 2 * M // 5)) for s in supports))
            self.add_module(f"cc_{name}_transforms", nn.ModuleList(map(net, supports)))
        self.lrp_transforms = nn.ModuleList(net(s + M // SLICES) for s in supports)
        self.tanh = nn.Tanh()
        with torch.random.fork_rng(devices=[]):  # keeps the initial weights of other layers
            replace_shortcuts(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                trunc_normal_(module.relative_position_bias_table, std=0.02)

    def hyper(self, z_hat: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        return run(self.h_scale_s, z_hat), run(self.h_mean_s, z_hat)

    def predict(self, i: int, params: tuple[Tensor, Tensor], before: list[Tensor], run: Run
                ) -> tuple[Tensor, Tensor, Tensor]:
        scale_support, mean_support = (torch.cat([part, *before], 1) for part in params)
        scales = run(self.cc_scale_transforms[i], run(self.atten_scale[i], scale_support))
        support = run(self.atten_mean[i], mean_support)
        return scales, run(self.cc_mean_transforms[i], support), support

    def refine(self, i: int, y_hat: Tensor, support: Tensor, run: Run) -> Tensor:
        residual = run(self.lrp_transforms[i], torch.cat([support, y_hat], 1))
        return y_hat + 0.5 * run(self.tanh, residual)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> TCM:
        """Build with N and M of the weights (ours or the source's) and load them strictly."""
        net = cls(len(state_dict["g_a.0.conv1.weight"]) // 2,
                  len(state_dict["cc_mean_transforms.0.4.weight"]) * SLICES,
                  len(state_dict["entropy_bottleneck.quantiles"]))
        net.load_state_dict(_renamed(state_dict))
        return net


def our_name(key: str) -> str:
    """Our name for a weight of the source's Swin blocks; other names do not change."""
    for theirs, ours in SWIN_KEYS:
        key = re.sub(rf"(trans_block|block_[12])\.{re.escape(theirs)}", rf"\1.{ours}", key)
    return key


def _renamed(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The source's weights by our names; biases (heads, 2w - 1, 2w - 1) -> (offsets, heads)."""
    return {our_name(key): value.flatten(1).t() if key.endswith("relative_position_params")
            else value for key, value in state_dict.items()}
