"""End-to-end optimized image compression, J. Balle, V. Laparra, E. P. Simoncelli, ICLR 2017
(arXiv:1611.01704), in the form of the factorized-prior baseline of Balle et al., ICLR 2018
(arXiv:1802.01436): four 5x5 stride-2 stages and the cumulative density network of its appendix 6.1.

State-dict keys are those of CompressAI's FactorizedPrior, so its published weights load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.coding import entropy
from common.coding.contract import Codec, Coded
from common.coding.model_file import load_model
from common.coding.tiles import tiled

import torch
from compressai.layers import GDN
from compressai.models import FactorizedPrior
from compressai.models.utils import conv, deconv
from torch import Tensor, nn

BASELINE = FactorizedPrior  # same network and keys, for tests and `make bench`
ZOO = "bmshj2018-factorized"  # its name in compressai.zoo


def analysis(N: int, M: int) -> nn.Sequential:
    """g_a: image (B, 3, H, W) -> y (B, M, H/16, W/16).  5x5 convolutions, stride 2."""
    return nn.Sequential(
        conv(3, N), GDN(N),
        conv(N, N), GDN(N),
        conv(N, N), GDN(N),
        conv(N, M),
    )


def synthesis(N: int, M: int) -> nn.Sequential:
    """g_s: y_hat (B, M, H/16, W/16) -> image (B, 3, H, W).  Mirrors g_a, with inverse GDN."""
    return nn.Sequential(
        deconv(M, N), GDN(N, inverse=True),
        deconv(N, N), GDN(N, inverse=True),
        deconv(N, N), GDN(N, inverse=True),
        deconv(N, 3),
    )


class Factorized(Codec):
    """Transform coding with a learned density for each latent channel.

        x (3,512,768) -> g_a -> y (M,32,48) -> Q -> y_hat -> g_s -> x_hat
                                               |
                              p(y_hat) = prod_i p_channel(i)(y_hat_i)   entropy_bottleneck

    In training, Q adds uniform noise (ICLR 2017, eq. 6); otherwise it rounds around the median of
    the channel.
    """

    tag = b"fact"  # in the header of this paper's files
    exact_parts = ()  # the decoder only uses integers: symbols and stored CDF tables
    downsampling_factor = 16

    def __init__(self, N: int = 128, M: int = 192):
        super().__init__()
        self.N, self.M = N, M
        self.entropy_bottleneck = entropy.EntropyBottleneck(M)
        self.g_a = analysis(N, M)
        self.g_s = synthesis(N, M)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x (B, 3, H, W) in [0, 1], H and W multiples of 16 -> x_hat and likelihoods of y."""
        y = self.g_a(x)  # (B, M, H/16, W/16)
        with torch.autocast(x.device.type, enabled=False):  # likelihoods in float32
            y_hat, y_likelihoods = self.entropy_bottleneck(y.float())
        x_hat = self.g_s(y_hat)
        return {"x_hat": x_hat, "likelihoods": {"y": y_likelihoods}}

    @torch.no_grad()
    def compress(self, x: Tensor) -> Coded:
        """x as in forward -> {"strings": [y_strings], "shape": (H/16, W/16)}."""
        y = tiled(self.g_a, x, down=16)
        y_strings = entropy.encode_bottleneck(self.entropy_bottleneck, y)
        return {"strings": [y_strings], "shape": (y.size(2), y.size(3))}

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Inverse of `compress`; returns {"x_hat": (B, 3, H, W) in [0, 1]}."""
        (y_strings,) = strings
        y_hat = entropy.decode_bottleneck(self.entropy_bottleneck, y_strings, shape)
        x_hat = tiled(self.g_s, y_hat, up=16)
        return {"x_hat": x_hat.clamp_(0, 1)}

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> Factorized:
        """Build the model with the N and M of the weights and load them strictly."""
        net = cls(state_dict["g_a.0.weight"].size(0), state_dict["g_a.6.weight"].size(0))
        net.load_state_dict(state_dict)
        return net


def build(N: int = 128, M: int = 192) -> Factorized:
    """Build a model; (128, 192) is the report's low-rate size, (192, 320) its high-rate size."""
    return Factorized(N, M)


def load(path: str | Path, device: torch.device | str = "cpu") -> Factorized:
    """Load a model from a checkpoint or a bare state dict, ready to code."""
    return load_model(path, Factorized, device)
