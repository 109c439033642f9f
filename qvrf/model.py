"""QVRF: a quantization-error-aware variable rate framework for learned image compression, K. Tong,
Y. Wu, Y. Li, K. Zhang, L. Zhang, X. Jin, ICIP 2023 (arXiv:2303.05744).

A scalar, the regulator `a`, multiplies the latent before rounding: a larger value gives finer
quantisation and a higher rate. The vector `Gain` holds the regulators of eight levels, one for each
Lagrange multiplier, and is learned; any other positive number gives a rate between the levels. It
is implemented for three codecs with CompressAI's layers and state-dict keys: Balle (scale
hyperprior), Minnen (joint autoregressive) and Cheng (attention).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import UserError
from common.coding import entropy, exact
from common.coding.context import CausalConv, Context, wave_numbers, wavefront
from common.coding.contract import Codec, Coded, RateRange
from common.coding.model_file import load_model
from common.coding.tiles import tiled
from common.compiling import not_compiled
from common.layers import replace_shortcuts

import torch
from compressai.models import (
    Cheng2020Attention,
    JointAutoregressiveHierarchicalPriors,
    ScaleHyperprior,
)
from compressai.zoo.pretrained import load_pretrained
from torch import Tensor, nn

BASES = {"balle": ScaleHyperprior, "minnen": JointAutoregressiveHierarchicalPriors,
         "cheng": Cheng2020Attention}
ZOO = {"balle": "bmshj2018-hyperprior", "minnen": "mbt2018",
       "cheng": "cheng2020-attn"}  # their names in compressai.zoo
WIDTHS = {"balle": (192, 320), "minnen": (192, 320), "cheng": (192, 192)}  # the paper's N, M
HALO = {"balle": 2, "minnen": 2, "cheng": 12}  # latents that g_a and g_s see on each side
LMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483, 0.0932, 0.18, 0.36, 0.72, 1.44)
LEVELS = (8, 11)  # possible numbers of levels
SMALLEST_GAIN = 1e-4
FACTORS = (0.5, 12.0)  # the source's range of continuous rates


@dataclass
class Latents:
    """The latents of an image, which do not depend on the rate."""

    y: Tensor  # (B, M, H/16, W/16)
    z: Tensor  # (B, N, H/64, W/64)
    z_hat: Tensor  # rounded
    params: Tensor  # exact output of h_s (float64): scales (B, M, ...) in balle, else (B, 2M, ...)
    z_strings: list[bytes] | None = None  # set when first coded


class QVRF(Codec):
    """A codec with a regulator a, which is `Gain[s]` at level s, or any other positive factor.

        y --( - means )--( * a )-- Q --> symbols --( / a )--( + means )--> y_hat -- g_s -> x_hat
                                          |
                                p = N(0, (a * scales)^2) * U

    g_a, h_a, z and h_s do not depend on a: one analysis serves all rates, and z always has the same
    rate. The context model reads y_hat in the units of y. The rate increases with s and with a.

    `Gain[0]` stays 1, as it gets no gradient, so level 0 gives the same bytes as the base codec.
    """

    tag = b"qvrf"  # in the header of this paper's files
    context_prediction: CausalConv  # not in balle
    entropy_parameters: nn.Sequential

    def __init__(self, model: str = "cheng", levels: int = 8, N: int | None = None,
                 M: int | None = None):
        """model: balle, minnen or cheng (M = N); levels: 8 or 11; N, M: None for the paper's."""
        super().__init__()
        if model not in BASES or levels not in LEVELS:
            raise UserError(f"--model {model} --levels {levels}: choose from {', '.join(BASES)} "
                            f"and from {LEVELS[0]}, {LEVELS[1]}")
        N = N or WIDTHS[model][0]
        M = N if model == "cheng" else M or WIDTHS[model][1]
        self.model, self.levels, self.N, self.M = model, levels, N, M
        base = BASES[model](N) if model == "cheng" else BASES[model](N, M)
        for name, module in base.named_children():
            self.add_module(name, module)
        replace_shortcuts(self)
        self.exact_parts = ("h_s",)
        if model != "balle":
            self.context_prediction = CausalConv(M, 2 * M, kernel_size=5, padding=2)
            self.exact_parts = ("h_s", "context_prediction", "entropy_parameters")
        self.entropy_bottleneck.__class__ = entropy.EntropyBottleneck  # keeps its weights
        self.Gain = nn.Parameter(initial_gain(levels))

    # ------------------------------------------------------------------------------- the rate
    def gain(self, s: int | None = None, factor: float | None = None) -> Tensor:
        """The regulator a of level s, or `factor` if given, as a float32 scalar.

        Raises UserError for an unknown level, or a factor that is not a positive number.
        """
        unused = 0 * self.Gain.sum()  # DDP needs all parameters in the graph at each level
        if factor is not None:
            return check_factor(factor) + unused
        if s is None or not 0 <= s < self.levels:
            raise UserError(f"level {s}: this model has 0 to {self.levels - 1}")
        return (self.Gain[s] if s else self.Gain[0].detach()).clamp_min(SMALLEST_GAIN) + unused

    def rate_range(self) -> RateRange:
        """The factors between those of the lowest and the highest level."""
        gains = [self.gain(s).item() for s in range(self.levels)]
        return RateRange("factor", min(gains), max(gains))

    # ------------------------------------------------------------------------------- training
    def forward(self, x: Tensor, s: int = 2, factor: float | None = None, ste: bool = False
                ) -> dict[str, Any]:
        """x (B, 3, H, W) in [0, 1], H and W multiples of 64 -> x_hat and likelihoods of y, z.

        In training, at level s: additive noise (stages 1 and 2 of the paper) or, with `ste`,
        rounding around the means with a straight-through gradient (stage 3). In evaluation, as in
        `compress` and `decompress`, regardless of `ste`.
        """
        if not self.training:
            latents = self.analyse(x)
            output = self.estimate(latents, s, factor)
            output["likelihoods"]["z"] = self.z_likelihoods(latents)
            return output
        a = self.gain(s, factor)
        y = self.g_a(x).float()  # (B, M, H/16, W/16)
        z = self.h_a(y.abs() if self.model == "balle" else y).float()  # (B, N, H/64, W/64)
        with torch.autocast(x.device.type, enabled=False):  # likelihoods in float32
            z_hat, z_likelihoods = self.entropy_bottleneck(z)
        if ste:
            z_hat = z + (entropy.dequantize(self.entropy_bottleneck, z) - z).detach()
        params = self.h_s(z_hat)
        y_hat = (self.round_ste(y, params, a) if ste
                 else (y * a + torch.empty_like(y).uniform_(-0.5, 0.5)) / a.detach())
        y_likelihoods = self.y_likelihoods(y, y_hat, params, a)
        x_hat = self.g_s(y_hat)
        return {"x_hat": x_hat, "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def round_ste(self, y: Tensor, params: Tensor, a: Tensor) -> Tensor:
        """y_hat of stage 3: rounded around the means, with a straight-through gradient.

        The means get no gradient here, only from the rate; nor does the factor 1 / a of the
        decoder.
        """
        symbols, _, means = self._quantize(y.detach(), params.detach().double(), a.detach())
        symbols, means = symbols.float(), means.float()
        scaled = (y - means) * a
        return (scaled + (symbols - scaled).detach()) / a.detach() + means

    def y_likelihoods(self, y: Tensor, y_hat: Tensor, params: Tensor, a: Tensor) -> Tensor:
        """Likelihoods of y, given params of h_s and y_hat; with noise in training."""
        scales, means = self._distribution(params, y_hat)
        with torch.autocast(y.device.type, enabled=False):
            means = means.float() if isinstance(means, Tensor) else means
            return self.gaussian_conditional((y - means) * a, scales.float() * a)[1]

    def _distribution(self, params: Tensor, y_hat: Tensor) -> tuple[Tensor, Tensor | float]:
        """Scales and means of y, by a convolution over the whole y_hat."""
        if self.model == "balle":
            return params, 0.0
        context = self.context_prediction(y_hat)
        return self.entropy_parameters(torch.cat([params, context], 1)).chunk(2, 1)

    # --------------------------------------------------------------------------------- coding
    @torch.no_grad()
    def analyse(self, x: Tensor) -> Latents:
        """Analyse x, as in `forward`: everything that does not depend on the rate."""
        y = tiled(self.g_a, x, down=16, halo=HALO[self.model])
        z = self.h_a(y.abs() if self.model == "balle" else y)
        z_hat = entropy.dequantize(self.entropy_bottleneck, z)
        return Latents(y, z, z_hat, self._params(z_hat))

    @torch.no_grad()
    def estimate(self, latents: Latents, s: int = 2, factor: float | None = None
                 ) -> dict[str, Any]:
        """x_hat as decoded, and the likelihoods of y; `z_likelihoods` gives those of z."""
        y_hat, a = self._round(latents, s, factor), self.gain(s, factor)
        params = self.h_s(latents.z_hat)
        return {"x_hat": self._synthesize(y_hat),
                "likelihoods": {"y": self.y_likelihoods(latents.y, y_hat, params, a)}}

    @torch.no_grad()
    def reconstruct(self, latents: Latents, s: int = 2, factor: float | None = None) -> Tensor:
        """x_hat (B, 3, H, W) as decoded."""
        return self._synthesize(self._round(latents, s, factor)).clamp_(0, 1)

    @torch.no_grad()
    def z_likelihoods(self, latents: Latents) -> Tensor:
        return self.entropy_bottleneck(latents.z, training=False)[1]

    @torch.no_grad()
    def compress(self, x: Tensor, s: int = 2, factor: float | None = None) -> Coded:
        """x as in forward -> {"strings": [y_strings, z_strings], "shape": (H/64, W/64),
        "parameters": the rate, for `read_parameters`}.

        s: the level; factor: the regulator itself, instead of a level.
        """
        return self.encode(self.analyse(x), s, factor)

    @torch.no_grad()
    def encode(self, latents: Latents, s: int = 2, factor: float | None = None) -> Coded:
        """`compress` for the result of `analyse`, so that a search for a rate analyses x once."""
        a = self.gain(s, factor)
        symbols, indexes, _ = self._quantize(latents.y, latents.params, a)
        if self.model != "balle":  # in the order of decoding
            height, width = latents.y.shape[-2:]
            order = torch.cat(wavefront(height, width, symbols.device))
            symbols, indexes = (t.flatten(2).transpose(1, 2)[:, order] for t in (symbols, indexes))
        y_strings = entropy.encode(symbols, indexes, entropy.Tables.of(self.gaussian_conditional))
        if latents.z_strings is None:  # the same for all rates
            latents.z_strings = entropy.encode_bottleneck(self.entropy_bottleneck, latents.z)
        parameters = bytes([s]) if factor is None else struct.pack("<f", check_factor(factor))
        return {"strings": [y_strings, latents.z_strings],
                "shape": (latents.z.size(2), latents.z.size(3)), "parameters": parameters}

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int], s: int = 2,
                   factor: float | None = None) -> dict[str, Tensor]:
        """Inverse of `compress`; returns {"x_hat": (B, 3, H, W) in [0, 1]}."""
        y_strings, z_strings = strings
        a = self.gain(s, factor)
        tables = entropy.Tables.of(self.gaussian_conditional)
        tables.refuse_impossible(y_strings, self.M * 16 * shape[0] * shape[1])
        z_hat = entropy.decode_bottleneck(self.entropy_bottleneck, z_strings, shape)
        params = self._params(z_hat)
        if self.model == "balle":
            symbols = entropy.decode(y_strings, self._indexes(params, a), tables)
            y_hat = self._dequantize(symbols.to(params), 0.0, a).to(z_hat.device)
        else:
            y_hat = self._decode_waves(y_strings, params, tables, float(a)).to(z_hat.device)
        return {"x_hat": self._synthesize(y_hat).clamp_(0, 1)}

    @staticmethod
    def read_parameters(parameters: bytes) -> dict[str, Any]:
        """Return the rate in the header of a file, as arguments of `decompress`."""
        if len(parameters) == 1:
            return {"s": parameters[0]}
        if len(parameters) == 4:
            return {"factor": struct.unpack("<f", parameters)[0]}
        raise UserError("the file's header holds no rate: encode the image again")

    def coding_steps(self, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
        """Wavefronts, where the base codec has a context model."""
        return super().coding_steps(shape) if self.model == "balle" else (
            "wave", wave_numbers(shape))

    def _round(self, latents: Latents, s: int, factor: float | None) -> Tensor:
        """y_hat (B, M, H/16, W/16) of the encoder, on the device of y."""
        a = self.gain(s, factor)
        symbols, _, means = self._quantize(latents.y, latents.params, a)
        return self._dequantize(symbols, means, a).to(latents.y.device)

    def _synthesize(self, y_hat: Tensor) -> Tensor:
        return tiled(self.g_s, y_hat, up=16, halo=HALO[self.model])

    def _params(self, z_hat: Tensor) -> Tensor:
        return exact.run(self.h_s, z_hat.to(self.coding_device or z_hat.device))

    def _indexes(self, scales: Tensor, a: Tensor) -> Tensor:
        """CDF indexes of the scaled latents; the scale table applies to scales times a."""
        table = self.gaussian_conditional.scale_table.to(scales.device)
        boundaries = exact.scale_boundaries(table) / float(a)
        return torch.bucketize(scales.contiguous(), boundaries, out_int32=True)

    def _context(self, params: Tensor, a: float) -> Context:
        return Context(self.context_prediction, self.entropy_parameters, params,
                       self.gaussian_conditional.scale_table, gain=a)

    @staticmethod
    def _dequantize(symbols: Tensor, means: Tensor | float, a: Tensor | float) -> Tensor:
        """y_hat in float32, by float64 operations that IEEE 754 defines exactly."""
        return (symbols * (1 / float(a)) + means).float()

    @torch.no_grad()
    @not_compiled
    def _quantize(self, y: Tensor, params: Tensor, a: Tensor
                  ) -> tuple[Tensor, Tensor, Tensor]:
        """Symbols, CDF indexes and means, each (B, M, h, w); the means of balle are 0.

        params: result of h_s, exact if a decoder has to reproduce it. With a context model, the
        means depend on y_hat = symbols / a + means above and to the left, so they are computed
        wavefront by wavefront.
        """
        with torch.autocast(y.device.type, enabled=False):
            y = y.to(params)
            if self.model == "balle":
                return torch.round(y * float(a)), self._indexes(params, a), torch.zeros_like(y)
            context, (_, _, height, width) = self._context(params, float(a)), y.shape
            rows = y.flatten(2).transpose(1, 2).contiguous()  # (B, h * w, M)
            symbols, means = torch.empty_like(rows), torch.empty_like(rows)
            indexes = torch.empty_like(rows, dtype=torch.int32)

            def rounded(positions: Tensor, wave_indexes: Tensor, wave_means: Tensor) -> Tensor:
                wave = torch.round((rows[:, positions] - wave_means) * float(a))
                symbols[:, positions], means[:, positions] = wave, wave_means
                indexes[:, positions] = wave_indexes
                return wave

            context.walk(wavefront(height, width, params.device), rounded)
            return tuple(t.transpose(1, 2).unflatten(2, (height, width))
                         for t in (symbols, indexes, means))

    def _decode_waves(self, strings: list[bytes], params: Tensor, tables: entropy.Tables, a: float
                      ) -> Tensor:
        """Decode y_hat (B, M, h, w), float32, from one string per image."""
        context, (height, width) = self._context(params, a), params.shape[-2:]
        decoder = entropy.Decoders(strings, self.M * height * width, tables)
        context.walk(wavefront(height, width, params.device),
                     lambda _, indexes, means: decoder.decode(indexes).to(means))
        decoder.finish()
        return context.y_hat()

    # -------------------------------------------------------------------------------- weights
    def load_state_dict(  # type: ignore[override]  # as CompressAI's, it has no `assign`
            self, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
        """Load weights with any of CompressAI's key names; RuntimeError also for another mask."""
        state_dict = load_pretrained(state_dict)  # as `module.`, `_matrices.0`, `downsample`
        if self.model != "balle":
            mask, given = self.context_prediction.mask, state_dict.get("context_prediction.mask")
            # one of another size fails below, where all sizes are named
            if given is not None and given.shape == mask.shape and not torch.equal(
                    given.to(mask), mask):
                raise RuntimeError("its context_prediction.mask is not causal")
        return super().load_state_dict(state_dict, strict)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> QVRF:
        """Build the model with the base, widths and levels of the weights, and load them."""
        state_dict = load_pretrained(state_dict)
        levels = state_dict["Gain"].numel()
        if levels not in LEVELS:
            raise RuntimeError(f"Gain has {levels} levels, not {LEVELS[0]} or {LEVELS[1]}")
        net = cls(base_of(state_dict), levels, *widths_of(state_dict))
        net.load_state_dict(state_dict)
        return net


def initial_gain(levels: int) -> Tensor:
    """sqrt(lmbda_s / lmbda_0), for which the quantisation noise matches the multiplier."""
    return torch.tensor([math.sqrt(lmbda / LMBDAS[0]) for lmbda in LMBDAS[:levels]])


def with_gain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a fixed-rate base, which is level 0, as those of a model of eight levels."""
    return {**weights, "Gain": initial_gain(LEVELS[0])}


def check_factor(factor: float) -> float:
    """Return `factor` in float32, as in files; UserError unless it is positive and finite."""
    if not (SMALLEST_GAIN <= factor <= 1 / SMALLEST_GAIN):  # false for NaN
        raise UserError(f"factor {factor:g}: give a positive number from {SMALLEST_GAIN:g} to "
                        f"{1 / SMALLEST_GAIN:g}, as 1.5 or 1/2.5; {FACTORS[0]:g} to {FACTORS[1]:g} "
                        "is what eight levels are trained for")
    return struct.unpack("<f", struct.pack("<f", factor))[0]


def base_of(state_dict: dict[str, Tensor]) -> str:
    """Name of the codec that a state dict belongs to."""
    if "context_prediction.weight" not in state_dict:
        return "balle"
    return "cheng" if "g_a.0.conv1.weight" in state_dict else "minnen"


def widths_of(state_dict: dict[str, Tensor]) -> tuple[int, int]:
    """N and M of a state dict; KeyError if it belongs to none of the three codecs."""
    if "g_a.0.conv1.weight" in state_dict:
        return (state_dict["g_a.0.conv1.weight"].size(0),) * 2
    return state_dict["g_a.0.weight"].size(0), state_dict["g_a.6.weight"].size(0)


def build(model: str = "cheng", levels: int = 8, N: int | None = None, M: int | None = None
          ) -> QVRF:
    """Build a model. N, M: None for the paper's, i.e. (192, 320), or (192, 192) for cheng."""
    return QVRF(model, levels, N, M)


def load(path: str | Path, device: torch.device | str = "cpu") -> QVRF:
    """Load a model from a checkpoint or a bare state dict, ready to code."""
    return load_model(path, QVRF, device)
