"""Swin Transformer blocks as transforms of a codec (Liu et al., ICCV 2021; Zhu, Yang, Cohen, ICLR
2022, Figure 2): stages of window attention that halve or double the resolution.

Feature maps are (B, H, W, C) inside; inputs and outputs are (B, C, H, W), as everywhere else. Sides
that are not a multiple of the window are padded, and the padding is masked. State-dict keys are
those of the paper's PyTorch code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from common import UserError
from common.coding import exact, exact_tables
from common.coding.contract import Run, in_floats

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, gen_relative_position_index
from torch import Tensor, nn

HEAD = 32  # channels per head
MASKED = -100.0  # logit of masked positions; its exp is 0 in float32
MASKS = 64  # maximum size of the cache
PART = 2**13  # tokens at a time without gradients, to bound memory and fit CPU caches

_masks: dict[tuple[object, ...], Tensor] = {}


class WindowAttention(nn.Module):
    """Self-attention within windows (n, w * w, dim), with a bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, heads: int | None = None, head_dim: int = HEAD):
        """heads: None for dim / head_dim; the first PyTorch code always used 4 heads, with the
        scale of heads of 32 channels.
        """
        super().__init__()
        if dim % (heads or head_dim):
            raise UserError(f"{dim} channels cannot be divided into "
                            f"{f'{heads} heads' if heads else f'heads of {head_dim}'}")
        self.heads, self.scale = heads or dim // head_dim, head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window - 1) ** 2, self.heads))
        index = gen_relative_position_index((window, window))  # (w * w, w * w)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (windows per image, w * w, w * w), added to the logits."""
        return self.in_parts(self.attend, x, mask)

    def exact(self, x: Tensor, mask: Tensor | None, run: Run) -> Tensor:
        """Attention in fixed point: products of quantised q, k and weights, v; exp by table."""
        return self.in_parts(partial(self.attend_exactly, run=run), x, mask)

    def in_parts(self, attend: Callable[..., Tensor], x: Tensor, mask: Tensor | None) -> Tensor:
        """Process a limited number of windows at a time when there are no gradients."""
        if torch.is_grad_enabled() or x.shape[0] * x.shape[1] <= PART:
            return attend(x, mask)
        found, count = torch.empty_like(x), max(1, PART // x.shape[1])
        for i in range(0, len(x), count):
            part = x[i : i + count]
            here = None if mask is None else mask[
                torch.arange(i, i + len(part), device=x.device) % len(mask)]
            found[i : i + count] = attend(part, here)
        return found

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        logits = torch.matmul(q * self.scale, k.transpose(2, 3)) + self.bias().to(q.dtype)
        logits = masked(logits, mask)
        y = torch.matmul(logits.softmax(3).to(v.dtype), v)
        return self.proj(y.transpose(1, 2).flatten(2))

    def attend_exactly(self, x: Tensor, mask: Tensor | None, run: Run) -> Tensor:
        q, k, v = self.split(run(self.qkv, x))
        logits = exact_tables.matmul(q * self.scale, k.transpose(2, 3))
        logits = logits + exact.values(self.bias(), x)
        y = exact_tables.matmul(exact_tables.softmax(masked(logits, mask)), v, (20, 0))
        return run(self.proj, y.transpose(1, 2).flatten(2))

    def product_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of the products q, k and weights, v."""
        return 2 * x.numel() * x.shape[1]

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (n, heads, w * w, dim / heads)."""
        q, k, v = rearrange(qkv, "n t (three heads c) -> three n heads t c", three=3,
                            heads=self.heads).unbind(0)
        return q, k, v

    def bias(self) -> Tensor:
        """Relative position bias (heads, w * w, w * w)."""
        table = self.relative_position_bias_table[self.relative_position_index.flatten()]
        side = len(self.relative_position_index)
        return table.view(side, side, -1).permute(2, 0, 1)


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Add mask (windows per image, w * w, w * w) to logits (n, heads, w * w, w * w)."""
    if mask is None:
        return logits
    return (logits.unflatten(0, (-1, len(mask))) + mask.to(logits.dtype)[:, None]).flatten(0, 1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); every second block shifts its windows."""

    def __init__(self, dim: int, window: int, shift: int, heads: int | None = None,
                 head_dim: int = HEAD):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads, head_dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x), self.attn)
        if torch.is_grad_enabled() or x[..., 0].numel() <= PART:
            return x + self.mlp(self.norm2(x))
        x = x.contiguous()
        for part in x.view(-1, x.shape[3]).split(PART):
            part += self.mlp(self.norm2(part))
        return x

    def exact(self, x: Tensor, run: Run) -> Tensor:
        x = x + self.attend(run(self.norm1, x), partial(self.attn.exact, run=run))
        return x + run([self.mlp.fc1, self.mlp.act, self.mlp.fc2], run(self.norm2, x))

    def attend(self, x: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        """Attention within the windows of x (B, H, W, C).

            . . . | . . .       shift 0          . | . . . | .      shift 3 / 2 = 1: the map is
            . 1 . | . 2 .                        --+-------+--      rolled up and left by 1, and
            . . . | . . .                        . | . 1 . | .      positions that wrap around
                                                 . | . . . | .      are masked
        """
        _, height, width, _ = x.shape
        window, shift = self.window, self.shift
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        rows, columns = x.shape[1] // window, x.shape[2] // window
        windows = rearrange(x, "b (i h) (j w) c -> (b i j) (h w) c", h=window, w=window)
        windows = attention(windows, shift_mask(height, width, window, shift, x.device))
        x = rearrange(windows, "(b i j) (h w) c -> b (i h) (j w) c", i=rows, j=columns, h=window)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :height, :width]


def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device
               ) -> Tensor | None:
    """Mask (windows, w * w, w * w): 0 within a region, otherwise -100; None if all are 0.

    After the roll, a window at the border contains up to four regions that are not adjacent and, if
    a side is not a multiple of the window, a region of padding.
    """
    if not shift and height % window == width % window == 0:
        return None
    key, kept = (height, width, window, shift, device), not torch.compiler.is_compiling()
    if kept and key in _masks:
        return _masks[key]
    lines = []
    for side in (height, width):
        full = -(-side // window) * window
        place = torch.arange(full)
        region = (place >= full - window).long() + (place >= full - shift) if shift else 0 * place
        lines.append(region + 3 * ((place + shift) % full >= side))  # 3: padding
    region = 6 * lines[0][:, None] + lines[1]
    region = rearrange(region, "(i h) (j w) -> (i j) (h w)", h=window, w=window)
    differ = region[:, :, None] != region[:, None, :]
    mask = torch.zeros(differ.shape).masked_fill(differ, MASKED).to(device)
    if kept and type(mask) is Tensor:  # not a FakeTensor
        if len(_masks) >= MASKS:
            _masks.clear()
        _masks[key] = mask
    return mask


class PatchEmbed(nn.Module):
    """(B, in, H, W) -> (B, H / 2, W / 2, dim)"""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class PatchMerge(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, out): concatenate 2x2 positions, norm, projection."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # pixels (0, 0), (1, 0), (0, 1), (1, 1) of (row, column)
        x = rearrange(x, "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)
        return self.reduction(self.norm(x))


class PatchSplit(nn.Module):
    """(B, H, W, C) -> (B, 2H, 2W, out): projection to 2x2 positions.

    split: place of the norm. "pre": before the projection (PyTorch code); "post": after it, while
    the last stage of a transform has a bias instead of a norm (TensorFlow code, and the parameter
    count of the paper).
    """

    def __init__(self, dim: int, out: int, split: str = "pre", last: bool = False):
        super().__init__()
        self.pre, bare = split == "pre", split == "post" and last
        self.norm = nn.Identity() if bare else nn.LayerNorm(dim if self.pre else 4 * out)
        self.reduction = nn.Linear(dim, 4 * out, bias=bare)

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(x, in_floats)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        layers = [self.norm, self.reduction] if self.pre else [self.reduction, self.norm]
        return rearrange(run(layers, x), "b h w (c p q) -> b (h p) (w q) c", p=2, q=2)


class Stage(nn.Module):
    """Blocks, then a merge or a split, which is called `downsample` in the decoder, too."""

    def __init__(self, dim: int, depth: int, window: int, heads: int | None,
                 resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, window, i % 2 * (window // 2), heads)
                                    for i in range(depth))
        self.downsample = resample

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(x, in_floats)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        x = run(self.blocks, x)
        return x if self.downsample is None else run(self.downsample, x)


class SwinAnalysis(nn.Module):
    """g_a or h_a: an embedding at half the resolution, then stages with merges in between."""

    def __init__(self, channels: int, dims: tuple[int, ...], depths: tuple[int, ...], window: int,
                 heads: int | None = None, embed: str = "patch_embed"):
        """embed: name of the embedding in the state dict ("patch_merger" in h_a)."""
        super().__init__()
        self.embed = embed
        self.add_module(embed, PatchEmbed(channels, dims[0]))
        outs = [*dims[1:], None]
        self.layers = nn.ModuleList(
            Stage(dim, depth, window, heads, None if out is None else PatchMerge(dim, out))
            for dim, depth, out in zip(dims, depths, outs, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(self, self.embed)(x)
        for stage in self.layers:
            x = stage(x)
        return x.permute(0, 3, 1, 2)


class SwinSynthesis(nn.Module):
    """g_s or h_s: stages, each followed by a split."""

    def __init__(self, dims: tuple[int, ...], out: int, depths: tuple[int, ...], window: int,
                 heads: int | None = None, split: str = "pre"):
        super().__init__()
        outs = [*dims[1:], out]
        self.layers = nn.ModuleList(
            Stage(dim, depth, window, heads, PatchSplit(dim, o, split, i == len(dims) - 1))
            for i, (dim, depth, o) in enumerate(zip(dims, depths, outs, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(x, in_floats)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        return run(self.layers, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
