"""The same network built from CompressAI's classes, for tests and `make bench`.

In CompressAI, the checkerboard is a latent codec. It concatenates context and hyper parameters in
the opposite order and has other names; `load_state_dict` accepts our weights.
"""

from __future__ import annotations

from typing import Any

import common  # noqa: F401  (first)

import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.latent_codecs import (
    CheckerboardLatentCodec,
    GaussianConditionalLatentCodec,
    HyperLatentCodec,
    HyperpriorLatentCodec,
)
from compressai.layers import CheckerboardMaskedConv2d
from compressai.models import SimpleVAECompressionModel
from torch import Tensor

from checkerboard import model

NAMES = {"h_a.": "latent_codec.hyper.h_a.", "h_s.": "latent_codec.hyper.h_s.",
         "entropy_bottleneck.": "latent_codec.hyper.entropy_bottleneck.",
         "context_prediction.": "latent_codec.y.context_prediction.",
         "entropy_parameters.": "latent_codec.y.entropy_parameters.",
         "gaussian_conditional.": "latent_codec.y.y.gaussian_conditional."}


class Baseline(SimpleVAECompressionModel):
    """g_a, g_s and latent codecs as in CompressAI's Cheng2020AnchorCheckerboard."""

    def __init__(self, N: int = 192, M: int = 192, anchor_parity: str = "even"):
        super().__init__()
        self.M = M
        self.g_a, self.g_s = model.analysis(N, M), model.synthesis(N, M)
        self.latent_codec = HyperpriorLatentCodec(latent_codec={
            "y": CheckerboardLatentCodec(
                latent_codec={"y": GaussianConditionalLatentCodec(quantizer="ste")},
                entropy_parameters=model.parameters_network(M),
                context_prediction=CheckerboardMaskedConv2d(M, 2 * M, kernel_size=5, padding=2),
                anchor_parity=anchor_parity),
            "hyper": HyperLatentCodec(EntropyBottleneck(N), model.hyper_analysis(N, M),
                                      model.hyper_synthesis(N, M), quantizer="ste")})

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
        """Load our weights, with our names."""
        weights = {}
        for key, value in state_dict.items():
            for ours, theirs in NAMES.items():
                if key.startswith(ours):
                    key = theirs + key.removeprefix(ours)
            weights[key] = value
        first = NAMES["entropy_parameters."] + "0.weight"
        weights[first] = torch.roll(weights[first], 2 * self.M, dims=1)
        return super().load_state_dict(weights, strict)


BASELINE = Baseline
