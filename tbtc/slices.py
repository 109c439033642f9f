"""Base class of the five models: coding with a hyperprior, with latents in slices of channels.

    x (3,512,768) -> g_a -> y (D,32,48) -------------------------> Q -> y_hat -> g_s -> x_hat
                            |                                      |     |
                            |        N(means_i, scales_i^2) of slice i   slices before i
                            |                                      |     v
                           h_a -> z (Hd,8,12) -> Q -> z_hat -> h_s -> params

All positions of a slice are coded at once; the next slice depends on its y_hat. A model without
this context has a single slice. The decoder uses exact arithmetic (common/coding/exact.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.coding import entropy, exact
from common.coding.contract import Codec, Coded, Run, in_floats
from common.coding.tiles import tiled
from common.compiling import not_compiled

import torch
from compressai.entropy_models import GaussianConditional
from compressai.ops import quantize_ste
from torch import Tensor


class SliceCoder(Codec):
    """A codec; models add g_a, g_s, h_a, exact_parts and the methods `hyper`, `predict` and maybe
    `refine`.
    """

    tag = b"tbtc"  # in the header of this paper's files
    halo = 2  # latents that g_a and g_s see on each side

    def __init__(self, slices: list[int], hyper_channels: int):
        """slices: number of channels of each slice; their sum is D."""
        super().__init__()
        self.slices = slices
        self.entropy_bottleneck = entropy.EntropyBottleneck(hyper_channels)
        self.gaussian_conditional = GaussianConditional(None)

    def hyper(self, z_hat: Tensor, run: Run) -> Any:
        """Result of h_s, in the form that `predict` takes."""
        raise NotImplementedError

    def predict(self, i: int, params: Any, before: list[Tensor], run: Run
                ) -> tuple[Tensor, Tensor, Any]:
        """Scales and means of slice i, given y_hat of previous slices; and input of `refine`."""
        raise NotImplementedError

    def refine(self, i: int, y_hat: Tensor, support: Any, run: Run) -> Tensor:
        """Improve y_hat of slice i (latent residual prediction in TCM)."""
        return y_hat

    def coding_steps(self, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
        """The slices of channels."""
        numbers = torch.arange(len(self.slices)).repeat_interleave(torch.tensor(self.slices))
        return "slice", numbers[:, None, None].expand(shape)

    # ---------------------------------------------------------------------------------- training
    def forward(self, x: Tensor) -> dict[str, Any]:
        """x (B, 3, H, W) in [0, 1], H and W multiples of 64 -> x_hat and likelihoods of y, z.

        In training, likelihoods use noise and the reconstruction uses rounding ("mixed"
        quantisation). In eval mode, y_hat, means and scales are those of the file.
        """
        y = self.g_a(x).float()
        z = self.h_a(y).float()
        with torch.autocast(x.device.type, enabled=False):  # likelihoods in float32
            _, z_likelihoods = self.entropy_bottleneck(z)
        z_hat = z + (entropy.dequantize(self.entropy_bottleneck, z) - z).detach()
        if self.training:
            y_hat, scales, means = self.walk(
                self.hyper(z_hat, in_floats), in_floats,
                lambda i, scales, means: quantize_ste(y.split(self.slices, 1)[i] - means))
        else:
            y_hat, scales, means, _ = self.encode(y, z_hat)
        with torch.autocast(x.device.type, enabled=False):
            _, y_likelihoods = self.gaussian_conditional(y, scales.float(), means.float())
        x_hat = self.g_s(y_hat)
        return {"x_hat": x_hat, "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def walk(self, params: Any, run: Run, symbols: Callable[[int, Tensor, Tensor], Tensor]
             ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute y_hat, scales and means (B, D, h, w), slice by slice.

        symbols(i, scales, means): rounded y - means of slice i.
        """
        found: list[tuple[Tensor, Tensor]] = []
        before: list[Tensor] = []
        for i in range(len(self.slices)):
            scales, means, support = self.predict(i, params, before, run)
            if run is not in_floats:
                means = exact.round_to_grid(means)
            y_hat = symbols(i, scales, means) + means
            before.append(self.refine(i, y_hat, support, run))
            found.append((scales, means))
        scales, means = (torch.cat(t, 1) for t in zip(*found, strict=True))
        return torch.cat(before, 1), scales, means

    # ------------------------------------------------------------------------------------ coding
    @torch.no_grad()
    def compress(self, x: Tensor) -> Coded:
        """x as in forward -> {"strings": [y_strings, z_strings], "shape": (H / 64, W / 64)}."""
        y = tiled(self.g_a, x, down=16, halo=self.halo)
        z = self.h_a(y)
        z_strings = entropy.encode_bottleneck(self.entropy_bottleneck, z)
        z_hat = entropy.dequantize(self.entropy_bottleneck, z)
        *_, coded = self.encode(y, z_hat)
        symbols, indexes = (torch.cat([t.flatten(1) for t in column], 1)
                            for column in zip(*coded, strict=True))
        y_strings = entropy.encode(symbols, indexes, entropy.Tables.of(self.gaussian_conditional))
        return {"strings": [y_strings, z_strings], "shape": (z.size(2), z.size(3))}

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Inverse of `compress`; returns {"x_hat": (B, 3, H, W) in [0, 1]}."""
        y_strings, z_strings = strings
        entropy.Tables.of(self.gaussian_conditional).refuse_impossible(
            y_strings, self.M * 16 * shape[0] * shape[1])
        z_hat = entropy.decode_bottleneck(self.entropy_bottleneck, z_strings, shape)
        y_hat = self.decode(y_strings, z_hat)
        x_hat = tiled(self.g_s, y_hat, up=16, halo=self.halo)
        return {"x_hat": x_hat.clamp_(0, 1)}

    @torch.no_grad()
    @not_compiled
    def encode(self, y: Tensor, z_hat: Tensor
               ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Return y_hat, scales, means (B, D, h, w), and (symbols, CDF indexes) of each slice."""
        coded = []
        slices = y.to(self.coding_device or y.device).double().split(self.slices, 1)

        def symbols(i: int, scales: Tensor, means: Tensor) -> Tensor:
            q = torch.round(slices[i] - means)
            coded.append((q, exact.scale_indexes(scales, self.gaussian_conditional.scale_table)))
            return q

        found = self.walk(self.hyper(z_hat.to(slices[0].device), exact.run), exact.run, symbols)
        y_hat, scales, means = (t.to(y) for t in found)
        return y_hat, scales, means, coded

    @torch.no_grad()
    def decode(self, strings: list[bytes], z_hat: Tensor) -> Tensor:
        """Decode y_hat (B, D, h, w) from one string per image; ValueError if one is damaged."""
        device = self.coding_device or z_hat.device
        h, w = (4 * side for side in z_hat.shape[-2:])
        decoder = entropy.Decoders(strings, sum(self.slices) * h * w,
                                   entropy.Tables.of(self.gaussian_conditional))

        def symbols(i: int, scales: Tensor, means: Tensor) -> Tensor:
            indexes = exact.scale_indexes(scales, self.gaussian_conditional.scale_table)
            return decoder.decode(indexes).to(means)

        y_hat, _, _ = self.walk(self.hyper(z_hat.to(device), exact.run), exact.run, symbols)
        decoder.finish()
        return y_hat.to(z_hat)
