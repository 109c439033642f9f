"""Ten experiments of fl0wbar/advDNIC.estimator in one framework: transforms (base, mod1 to mod4)
with a scale hyperprior (Balle et al., ICLR 2018), and entropy models (variant1 to variant4) with
means (Minnen et al., NeurIPS 2018) and autoregressive contexts. There is no paper.

The contexts of the source cannot be decoded (README). Here, variant3 and variant4 have a PixelCNN++
that can be, and variant3_old has a masked convolution. In coding, h_s, context and entropy
parameters are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import UserError
from common.coding import entropy, exact
from common.coding.context import CausalConv, Context, wave_numbers, wavefront
from common.coding.contract import Codec, Coded
from common.coding.model_file import load_model
from common.coding.tiles import LIMIT, tiled
from common.compiling import not_compiled

import torch
from compressai.entropy_models import GaussianConditional
from torch import Tensor, nn

from advdnic import transforms as t
from advdnic.pixelcnn import PixelCNN
from advdnic.pixelcnn_decoders import Steps, Waves

EXPERIMENTS = ("base", "mod1", "mod2", "mod3", "mod4", "variant1", "variant2", "variant3",
               "variant3_old", "variant4")
Symbols = Callable[[Tensor, Tensor, Tensor], Tensor]
Code = Callable[[Tensor, Tensor, Tensor], Tensor]
FILTERS = (3, 3, 3)  # of the network of p(z), as in tensorflow-compression 1.2


class CodedInSteps(Coded):
    """Result of `compress`, with the intermediate results of the encoder."""

    y: Tensor
    z: Tensor
    y_hat: Tensor
    scales: Tensor
    means: Tensor


class Experiment(Codec):
    """The codec of one of the ten experiments.

        x (3,512,768) -> g_a -> y (C,32,48) ---------------> Q -> y_hat -> g_s -> x_hat
                                |                            |      |
                                |           N(means, scales^2)   context_model -> phi
                                v                            |      v
                           h_a(|y|) -> z (Z,8,12) -> Q -> h_s -> psi, or scales, or both

    base, mod1 to mod4 and variant1 predict scales only, and means are 0. variant2 has two h_s.
    variant3, variant3_old and variant4 have entropy_parameters, whose input is psi and phi.
    C = Z = num_filters, except in mod2 and mod3, where they are 192 and 320.
    """

    tag = b"advd"  # in the header of this paper's files
    options = ("experiment", "variant1", "ep_compat", "mod2_down_inverse", "scales_min",
               "scales_max", "scales_levels")

    def __init__(self, experiment: str = "base", num_filters: int = 128, variant1: str = "base",
                 ep_compat: bool = False, mod2_down_inverse: bool = True, resnets: int = 1,
                 stages: int = 0, scales_min: float = 0.11, scales_max: float = 256.0,
                 scales_levels: int = 64):
        """variant1: its transforms, "base" (the source's code) or "mod3" (the source's README).

        ep_compat: entropy parameters without their first layer, which the source does not use;
        mod2_down_inverse: inverse GDN after downsampling in the encoder, as in the source;
        resnets, stages: residual blocks per level and strided steps of PixelCNN++ (the paper has 2
        steps); scales_min, scales_max, scales_levels: the scale table of the coder.
        """
        super().__init__()
        if experiment not in EXPERIMENTS:
            raise UserError(f"experiment {experiment}: choose from {', '.join(EXPERIMENTS)}")
        N = num_filters
        self.experiment, self.N, self.variant1 = experiment, N, variant1
        self.resnets, self.stages = resnets, stages
        self.ep_compat, self.mod2_down_inverse = ep_compat, mod2_down_inverse
        self.kind = kind = variant1 if experiment == "variant1" else experiment
        C, Z = (t.EFF_Y, t.EFF_Z) if kind in ("mod2", "mod3") else (N, N)
        self.M = C
        self.g_a, self.g_s = self._transforms(kind, N)
        self.entropy_bottleneck = entropy.EntropyBottleneck(Z, filters=FILTERS)
        self.gaussian_conditional = GaussianConditional(None, scale_bound=scales_min)
        self.scales_min, self.scales_max = scales_min, scales_max
        self.scales_levels = scales_levels
        self.prior = ("context" if experiment in ("variant3", "variant3_old", "variant4")
                      else "means" if experiment == "variant2" else "scales")
        parts: dict[str, tuple[str, ...]] = {
            "scales": ("h_s",), "means": ("h_scale_s", "h_mean_s"),
            "context": ("h_s", "context_model", "entropy_parameters")}
        self.exact_parts = parts[self.prior]
        if experiment == "variant4":
            self.h_a, self.h_s = t.Variant4HyperAnalysis(N), t.variant4_hyper_synthesis(N)
        else:
            slope = {"scales": None, "means": 0.2, "context": 0.1}[self.prior]
            act = nn.ReLU if slope is None else (lambda: nn.LeakyReLU(slope))
            wide = C if kind in ("mod2", "mod3") else N
            self.h_a = t.hyper_analysis(C, wide, Z, act)
            if self.prior == "context":
                self.h_s = t.psi_synthesis(N)
            elif self.prior == "means":
                self.h_scale_s = t.hyper_synthesis(Z, wide, C, act)
                self.h_mean_s = t.hyper_synthesis(Z, wide, C, act)
            else:
                self.h_s = t.hyper_synthesis(Z, wide, C, act)
        if self.prior == "context":
            self.context_model = (CausalConv(N, 2 * N, kernel_size=5, padding=2)
                                  if experiment == "variant3_old" else PixelCNN(N, resnets, stages))
            first = [] if ep_compat else [nn.Conv2d(4 * N, 4 * N, 1), nn.LeakyReLU(0.1)]
            self.entropy_parameters = nn.Sequential(
                *first, nn.Conv2d(4 * N, 2 * N, 1), nn.LeakyReLU(0.1),
                nn.Conv2d(2 * N, 2 * N, 1, bias=False))  # two heads: scales, means

    def _transforms(self, kind: str, N: int) -> tuple[nn.Module, nn.Module]:
        if kind == "mod1":
            return (t.base_analysis(N, lambda: [t.MBConv(N, N)]),
                    t.base_synthesis(N, lambda: [t.MBConv(N, N)]))
        if kind == "mod2":
            return t.signal_analysis(self.mod2_down_inverse), t.signal_synthesis()
        if kind == "mod3":
            return t.efficient_analysis(), t.efficient_synthesis()
        if kind == "variant4":
            return t.Variant4Analysis(N), t.variant4_synthesis(N)
        return t.base_analysis(N), (t.subpixel_synthesis(N) if kind == "mod4"
                                    else t.base_synthesis(N))

    @property
    def tile_above(self) -> float:
        """Image pixels above which tiles are used; never with squeeze-excite or attention."""
        local = not any(isinstance(m, (t.ExactSE, t.NonLocal, t.MBSignal)) for m in self.modules())
        return LIMIT if local else math.inf

    def update(self, scale_table: Tensor | None = None, force: bool = False,
               update_quantiles: bool = False) -> bool:
        """Compute the CDF tables, by default for the scale table of this model."""
        if scale_table is None:
            scale_table = torch.linspace(math.log(self.scales_min), math.log(self.scales_max),
                                         self.scales_levels).exp()
        return super().update(scale_table, force, update_quantiles)

    # ---------------------------------------------------------------------------------- training
    def forward(self, x: Tensor) -> dict[str, Any]:
        """x (B, 3, H, W) in [0, 1], H and W multiples of 64 -> x_hat and likelihoods of y, z.

        The context and the likelihood see the same noise on y. In eval mode, y_hat is the file's.
        """
        y = self.g_a(x).float()
        z = self.h_a(y.abs()).float()
        with torch.autocast(x.device.type, enabled=False):  # likelihoods in float32
            z_hat, z_likelihoods = self.entropy_bottleneck(z)
        if self.training:
            y_hat = self.gaussian_conditional.quantize(y, "noise")
            scales, means = self._predict(z_hat, y_hat)
        else:
            y_hat, scales, means, _ = self._encode(y, entropy.dequantize(self.entropy_bottleneck,
                                                                         z))
        with torch.autocast(x.device.type, enabled=False):
            likelihoods = self.gaussian_conditional._likelihood(y_hat, scales.float(),
                                                                means.float())
            y_likelihoods = self.gaussian_conditional.likelihood_lower_bound(likelihoods)
        x_hat = self.g_s(y_hat)
        return {"x_hat": x_hat, "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def _predict(self, z_hat: Tensor, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and means (B, C, h, w)."""
        if self.prior == "scales":
            scales = self.h_s(z_hat)
            return scales, torch.zeros_like(scales)
        if self.prior == "means":
            return self.h_scale_s(z_hat), self.h_mean_s(z_hat)
        both = torch.cat([self.h_s(z_hat), self.context_model(y_hat)], 1)
        return tuple(self.entropy_parameters(both).chunk(2, 1))

    # ------------------------------------------------------------------------------------ coding
    @torch.no_grad()
    def compress(self, x: Tensor) -> CodedInSteps:
        """x as in forward -> {"strings": [y_strings, z_strings], "shape": (H / 64, W / 64)}, and
        the intermediate results y, z, y_hat, scales, means.
        """
        y = tiled(self.g_a, x, down=16, limit=self.tile_above)
        z = self.h_a(y.abs())
        z_strings = entropy.encode_bottleneck(self.entropy_bottleneck, z)
        y_hat, scales, means, coded = self._encode(
            y, entropy.dequantize(self.entropy_bottleneck, z))
        symbols, indexes = (torch.cat([part.flatten(1) for part in column], 1)
                            for column in zip(*coded, strict=True))
        y_strings = entropy.encode(symbols, indexes, entropy.Tables.of(self.gaussian_conditional))
        return {"strings": [y_strings, z_strings], "shape": (z.size(2), z.size(3)), "y": y, "z": z,
                "y_hat": y_hat, "scales": scales, "means": means}

    @torch.no_grad()
    def decoded(self, y_hat: Tensor) -> Tensor:
        """g_s: y_hat -> x_hat (B, 3, H, W) in [0, 1]."""
        return tiled(self.g_s, y_hat, up=16, limit=self.tile_above).clamp_(0, 1)

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Inverse of `compress`; returns {"x_hat": (B, 3, H, W) in [0, 1]}."""
        y_strings, z_strings = strings
        entropy.Tables.of(self.gaussian_conditional).refuse_impossible(
            y_strings, self.M * 16 * shape[0] * shape[1])
        z_hat = entropy.decode_bottleneck(self.entropy_bottleneck, z_strings, shape)
        y_hat = self._decode(y_strings, z_hat)
        return {"x_hat": self.decoded(y_hat)}

    @torch.no_grad()
    @not_compiled
    def _encode(self, y: Tensor, z_hat: Tensor
                ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """y_hat, scales, means (B, C, h, w); [(symbols, CDF indexes), ...] in coding order."""
        device = self.coding_device or y.device
        rows = y.to(device).double().flatten(2).transpose(1, 2)  # (B, h * w, C)
        coded = []

        def symbols(positions: Tensor, indexes: Tensor, means: Tensor) -> Tensor:
            q = torch.round(rows[:, positions] - means)
            coded.append((q, indexes))
            return q

        y_hat, scales, means = (part.to(y) for part in self._walk(z_hat.to(device), symbols))
        return y_hat, scales, means, coded

    @torch.no_grad()
    def _decode(self, strings: list[bytes], z_hat: Tensor) -> Tensor:
        """Decode y_hat (B, C, h, w) from one string per image; ValueError if one is damaged."""
        h, w = (4 * side for side in z_hat.shape[-2:])
        decoder = entropy.Decoders(strings, self.M * h * w,
                                   entropy.Tables.of(self.gaussian_conditional))
        y_hat, _, _ = self._walk(z_hat.to(self.coding_device or z_hat.device),
                                 lambda _, indexes, means: decoder.decode(indexes).to(means))
        decoder.finish()
        return y_hat.to(z_hat)

    def _walk(self, z_hat: Tensor, symbols: Symbols) -> tuple[Tensor, Tensor, Tensor]:
        """Compute y_hat, scales and means in fixed point, for groups of positions.

        symbols(positions, indexes, means): rounded y - means at these positions (B, n, C).
        """
        table = self.gaussian_conditional.scale_table
        h, w = (4 * side for side in z_hat.shape[-2:])
        found = torch.zeros(3, len(z_hat), h * w, self.M, dtype=torch.float64, device=z_hat.device)

        def code(positions: Tensor, scales: Tensor, means: Tensor) -> Tensor:
            means = exact.round_to_grid(means)
            y_hat = symbols(positions, exact.scale_indexes(scales, table), means) + means
            for part, values in zip(found, (y_hat, scales, means), strict=True):
                part[:, positions] = values
            return y_hat

        if self.prior != "context":
            h_scale_s = self.h_scale_s if self.prior == "means" else self.h_s
            scales = exact.run(h_scale_s, z_hat).flatten(2).transpose(1, 2)
            means = (exact.run(self.h_mean_s, z_hat).flatten(2).transpose(1, 2)
                     if self.prior == "means" else torch.zeros_like(scales))
            code(torch.arange(h * w, device=z_hat.device), scales, means)
        else:
            psi = exact.run(self.h_s, z_hat)
            walk = self._masked if self.experiment == "variant3_old" else self._pixelcnn
            walk(psi, code)
        return tuple(part.transpose(1, 2).unflatten(2, (h, w)) for part in found)

    def _masked(self, psi: Tensor, code: Code) -> None:
        """variant3_old: the masked 5x5 convolution, wavefront by wavefront."""
        assert isinstance(self.context_model, CausalConv)
        context = Context(self.context_model, self.entropy_parameters, psi,
                          self.gaussian_conditional.scale_table)
        for positions in wavefront(psi.size(2), psi.size(3), psi.device):
            scales, means = context.parameters(positions)
            context.put(positions, code(positions, scales, means))

    def _pixelcnn(self, psi: Tensor, code: Code) -> None:
        """variant3, variant4: PixelCNN++, in wavefronts or, with strides, pixel by pixel."""
        batch, _, height, width = psi.shape
        assert isinstance(self.context_model, PixelCNN)
        first, rest = exact.rows_of(self.entropy_parameters, "entropy_parameters", psi.device)
        known = first(psi.permute(0, 2, 3, 1).reshape(batch * height * width, -1))
        known = known.unflatten(0, (batch, -1))
        kind = Steps if self.context_model.stages else Waves
        decoded = kind(self.context_model, batch, height, width, psi.device)
        for positions, phi in decoded:
            x = first(phi.flatten(0, 1), 2 * self.N, known[:, positions].flatten(0, 1))
            for layer in rest:
                x = layer(x)
            scales, means = x.unflatten(0, (batch, -1)).chunk(2, 2)
            decoded.put(code(positions, scales, means))

    def coding_steps(self, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
        """Wavefronts of the experiments with a context; with strides, single positions."""
        if self.prior != "context":
            return super().coding_steps(shape)
        net = self.context_model
        if not isinstance(net, PixelCNN):
            return "wave", wave_numbers(shape)
        # a raster scan is a wavefront whose rows follow one another
        return "wave", wave_numbers(shape, shape[2] if net.stages else 4 * net.resnets + 2)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor], **options: Any) -> Experiment:
        """Build the model with the N of the weights and load them strictly."""
        if "experiment" not in options:
            raise UserError("these weights do not tell their experiment: give a checkpoint of "
                            "train.py")
        key = "h_a.first.0.1.weight" if options["experiment"] == "variant4" else "h_a.2.weight"
        N = state_dict[key].shape[1 if options["experiment"] == "variant4" else 0]
        nets, stages = (len({k.split(".")[2] for k in state_dict if k.startswith(
            f"context_model.{part}.")}) for part in ("u_up", "u_strided"))
        net = cls(num_filters=N, resnets=nets // (stages + 1) or 1, stages=stages, **options)
        net.load_state_dict(state_dict)
        return net


def build(experiment: str = "base", num_filters: int = 128, **options: Any) -> Experiment:
    """Build a model of one of the ten experiments."""
    return Experiment(experiment, num_filters, **options)


def load(path: str | Path, device: torch.device | str = "cpu") -> Experiment:
    """Load a model from a checkpoint, ready to code."""
    model = load_model(path, Experiment, device)
    if model.prior == "context":  # few positions at a time, too little for a GPU
        model.coding_device = torch.device("cpu")
    return model
