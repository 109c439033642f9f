"""Variational image compression with a scale hyperprior, J. Balle, D. Minnen, S. Singh,
S. J. Hwang, N. Johnston, ICLR 2018 (arXiv:1802.01436).

State-dict keys are those of CompressAI's ScaleHyperprior, so its published weights load.
Coding differs from CompressAI in two points. h_s runs in exact arithmetic (common/coding/exact.py),
so that files can be decoded on every machine. Of the 64 CDF tables, a latent uses the one with the
nearest scale; CompressAI uses the one with the next larger scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.coding import entropy, exact
from common.coding.contract import Codec, Coded
from common.coding.model_file import load_model
from common.coding.tiles import LIMIT, tiled

import torch
from compressai.entropy_models import GaussianConditional
from compressai.layers import GDN
from compressai.models import ScaleHyperprior
from compressai.models.utils import conv, deconv
from torch import Tensor, nn

BASELINE = ScaleHyperprior  # same network and keys, for tests and `make bench`
ZOO = "bmshj2018-hyperprior"  # its name in compressai.zoo


def analysis(N: int, M: int) -> nn.Sequential:
    """g_a: image (B, 3, H, W) -> y (B, M, H/16, W/16)  (Fig. 4, left)."""
    return nn.Sequential(
        conv(3, N), GDN(N),
        conv(N, N), GDN(N),
        conv(N, N), GDN(N),
        conv(N, M),
    )


def synthesis(N: int, M: int) -> nn.Sequential:
    """g_s: y_hat (B, M, H/16, W/16) -> image (B, 3, H, W)  (Fig. 4, left)."""
    return nn.Sequential(
        deconv(M, N), GDN(N, inverse=True),
        deconv(N, N), GDN(N, inverse=True),
        deconv(N, N), GDN(N, inverse=True),
        deconv(N, 3),
    )


def hyper_analysis(N: int, M: int) -> nn.Sequential:
    """h_a: |y| (B, M, H/16, W/16) -> z (B, N, H/64, W/64)  (Fig. 4, right)."""
    return nn.Sequential(
        conv(M, N, kernel_size=3, stride=1), nn.ReLU(inplace=True),
        conv(N, N), nn.ReLU(inplace=True),
        conv(N, N),
    )


def hyper_synthesis(N: int, M: int) -> nn.Sequential:
    """h_s: z_hat (B, N, H/64, W/64) -> scales (B, M, H/16, W/16)  (Fig. 4, right)."""
    return nn.Sequential(
        deconv(N, N), nn.ReLU(inplace=True),
        deconv(N, N), nn.ReLU(inplace=True),
        conv(N, M, kernel_size=3, stride=1), nn.ReLU(inplace=True),
    )


class Hyperprior(Codec):
    """Codec that transmits the scales of the latents as side information z.

        x (3,512,768) -> g_a -> y (M,32,48) ------------------> Q -> y_hat -> g_s -> x_hat
                                |                               |
                               |y|                   p(y_hat) = N(0, scales^2) * U(-1/2, 1/2)
                                |                               |
                               h_a -> z (N,8,12) -> Q -> z_hat -> h_s -> scales (M,32,48)
                                                    |
                                        entropy_bottleneck: p(z_hat)

    Q adds uniform noise in training and rounds otherwise (eq. 4 and 5). The decoder needs the same
    scales as the encoder, to the last bit, so both compute h_s in exact arithmetic.
    """

    tag = b"hype"  # in the header of this paper's files
    exact_parts = ("h_s",)

    def __init__(self, N: int = 128, M: int = 192):
        super().__init__()
        self.N, self.M = N, M
        self.entropy_bottleneck = entropy.EntropyBottleneck(N)
        self.g_a = analysis(N, M)
        self.g_s = synthesis(N, M)
        self.h_a = hyper_analysis(N, M)
        self.h_s = hyper_synthesis(N, M)
        self.gaussian_conditional = GaussianConditional(None)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x (B, 3, H, W) in [0, 1], H and W multiples of 64 -> x_hat and likelihoods of y, z."""
        y = self.g_a(x)  # (B, M, H/16, W/16)
        z = self.h_a(torch.abs(y))  # (B, N, H/64, W/64)
        with torch.autocast(x.device.type, enabled=False):  # likelihoods in float32
            z_hat, z_likelihoods = self.entropy_bottleneck(z.float())
        scales = self.h_s(z_hat)  # (B, M, H/16, W/16)
        with torch.autocast(x.device.type, enabled=False):
            y_hat, y_likelihoods = self.gaussian_conditional(y.float(), scales.float())
        x_hat = self.g_s(y_hat)
        return {"x_hat": x_hat, "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    @torch.no_grad()
    def compress(self, x: Tensor) -> Coded:
        """x as in forward -> {"strings": [y_strings, z_strings], "shape": (H/64, W/64)}."""
        y = tiled(self.g_a, x, down=16)
        z = self.h_a(torch.abs(y))
        z_strings = entropy.encode_bottleneck(self.entropy_bottleneck, z)
        z_hat = entropy.dequantize(self.entropy_bottleneck, z)
        y_strings = entropy.encode(y.round(), self._indexes(z_hat),
                                   entropy.Tables.of(self.gaussian_conditional))
        return {"strings": [y_strings, z_strings], "shape": (z.size(2), z.size(3))}

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Inverse of `compress`; returns {"x_hat": (B, 3, H, W) in [0, 1]}."""
        y_strings, z_strings = strings
        tables = entropy.Tables.of(self.gaussian_conditional)
        tables.refuse_impossible(y_strings, self.M * 16 * shape[0] * shape[1])
        z_hat = entropy.decode_bottleneck(self.entropy_bottleneck, z_strings, shape)
        y_hat = entropy.decode(y_strings, self._indexes(z_hat), tables).to(z_hat)
        x_hat = tiled(self.g_s, y_hat, up=16)
        return {"x_hat": x_hat.clamp_(0, 1)}

    def _indexes(self, z_hat: Tensor) -> Tensor:
        """Index of the CDF table of each y, (B, M, H/16, W/16); the same on every machine.

        h_s is exact, so tiles give the same bits. A z_hat position sees two others on each side.
        """
        table = self.gaussian_conditional.scale_table

        def indexes(z_hat: Tensor) -> Tensor:
            scales = exact.run(self.h_s, z_hat.to(self.coding_device or z_hat.device))
            return exact.scale_indexes(scales, table.to(scales.device))

        return tiled(indexes, z_hat, up=4, tile=256, limit=LIMIT / 16**2)

    def scale_outputs(self) -> list[Tensor]:
        """The last convolution of h_s, which only a ReLU follows."""
        last = list(self.h_s.children())[-2]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        return [last.weight, last.bias]

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> Hyperprior:
        """Build the model with the N and M of the weights and load them strictly."""
        net = cls(state_dict["g_a.0.weight"].size(0), state_dict["g_a.6.weight"].size(0))
        net.load_state_dict(state_dict)
        return net


def build(N: int = 128, M: int = 192) -> Hyperprior:
    """Build a model; (128, 192) is the report's low-rate size, (192, 320) its high-rate size."""
    return Hyperprior(N, M)


def load(path: str | Path, device: torch.device | str = "cpu") -> Hyperprior:
    """Load a model from a checkpoint or a bare state dict, ready to code."""
    return load_model(path, Hyperprior, device)
