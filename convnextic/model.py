"""ConvNeXTIC, an entry to the VCIP 2022 image coding challenge (DomChennnn/ConvNeXTIC): the VAE of
TinyLIC (Lu, Ma, arXiv:2204.11448) with ConvNeXt blocks (Liu et al., CVPR 2022) in place of
attention. There is no paper; six revisions of the code are variants here, its ablations options.

State-dict keys are ours, as no weights were published. Everything that the decoder recomputes (h_s,
context model, entropy parameters) uses exact arithmetic (exact.py, context.py in common/coding).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common import UserError
from common.coding import entropy, exact
from common.coding.contract import Codec, Coded, RateRange
from common.coding.model_file import load_model
from common.coding.tiles import LIMIT, tiled
from common.compiling import not_compiled

import torch
from compressai.entropy_models import GaussianConditional
from timm.layers import trunc_normal_
from torch import Tensor, nn

from convnextic.blocks import SAMPLERS, Block, Down, ScalingNet, Up
from convnextic.context import MCM, SCCTX, lattices
from convnextic.variants import BASELINE, kernels_of, merged, options_of

HALO = 24  # latents that g_a and g_s see on each side
LMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483, 0.0932, 0.18)  # qualities 1 to 8
SMALLEST_LMBDA = 1e-6  # in the header of a file


# ------------------------------------------------------------------------------------------- model
class ConvNeXTIC(Codec):
    """The codec. Shapes are those of v2 with N, M = 128, 192:

        x (3,512,768) -> g_a: 4 Down -> y (M,32,48) -------------------> Q -> y_hat -> g_s: 4 Up
                                        |                                |     |
                                        |                 N(means, scales^2)  context model
                                        v                                |     v
                               h_a: 2 Down -> z (N,8,12) -> Q -> h_s: 2 Up -> params (2M,32,48)

    With the patch stem (v0, v1), y is at 1/32 and z at 1/128 of the resolution of the image.
    """

    tag = b"cnxt"  # in the header of this paper's files
    exact_parts = ("h_s", "context_model")
    options = ("variant", *BASELINE)  # from a checkpoint's config, as weights do not reveal them
    stem: str  # options that are read after the construction
    context: str
    variable_rate: bool
    external_attention: bool
    g_a: nn.Sequential
    g_s: nn.Sequential
    context_model: MCM | SCCTX

    def __init__(self, variant: str = "v2_stride2", embed_dim: int = 128, latent_dim: int = 192,
                 **options: Any):
        """options: options of BASELINE, which replace those of the variant."""
        super().__init__()
        o = merged(variant, options)
        if o["dw_groups"] and (embed_dim % o["dw_groups"] or latent_dim % o["dw_groups"]):
            raise UserError(f"dw_groups {o['dw_groups']}: give a divisor of {embed_dim} and "
                            f"{latent_dim}, the widths, or 0")
        self.variant, self.N, self.M = variant, embed_dim, latent_dim
        for key, value in o.items():
            setattr(self, key, value)
        self.downsampling_factor = self.stride * 4
        N, M, stem, other = embed_dim, latent_dim, o["stem"], o["resample"]
        normed, ea = o["resample_norm"] == "layernorm", o["external_attention"]
        depths = o["depths"]
        rates = torch.linspace(0, o["drop_path_rate"], sum(depths)).tolist()
        main, hyper = ({**o, "kernel_size": k} for k in kernels_of(o["kernel_size"]))

        def blocks(dim: int, depth: int, hyperprior: bool, decoder: bool) -> list[Block]:
            return [Block(dim, hyper if hyperprior else main, drops.pop(0), decoder)
                    for _ in range(depth)]

        def down(i: int, dim_in: int, dim_out: int, attention: bool = False) -> Down:
            norm = ("after" if i == 0 else "before") if normed else ""
            return Down(dim_in, dim_out, other if i else stem,
                        blocks(dim_out, depths[i], i > 3, False), norm, ea and attention)

        def up(i: int, dim_in: int, dim_out: int, attention: bool = False) -> Up:
            norm = ("after" if i == 5 else "before") if normed else ""
            return Up(dim_in, dim_out, other if i < 5 else stem,
                      blocks(dim_in, depths[5 - i], i < 2, True), norm, ea and attention)

        drops = list(rates)  # one ramp over the encoder ...
        self.g_a = nn.Sequential(down(0, 3, N), down(1, N, N, True), down(2, N, N),
                                 down(3, N, M, True))
        self.h_a = nn.Sequential(down(4, M, N), down(5, N, N, True))
        drops = list(rates)  # ... and the same over the decoder
        self.h_s = nn.Sequential(up(0, N, N, True), up(1, N, 2 * M))
        self.g_s = nn.Sequential(up(2, M, N, True), up(3, N, N), up(4, N, N, True), up(5, N, 3))
        self.context_model = MCM(M) if o["context"] == "mcm" else SCCTX(M)
        self.entropy_bottleneck = entropy.EntropyBottleneck(N)
        self.gaussian_conditional = GaussianConditional(None)
        if o["variable_rate"]:
            nets = [ScalingNet(c, o["lambda_input"]) for c in (N, N, N, M, M, N, N, N)]
            self.scale_a = nn.ModuleList(nets[:4])  # after the stages of g_a
            self.scale_s = nn.ModuleList(nets[4:])  # before those of g_s
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ScalingNet):
                module.initialise()

    @property
    def stride(self) -> int:
        """Image pixels per position of y."""
        return SAMPLERS[self.stem][1] * 8

    @property
    def tile_above(self) -> float:
        """Image pixels above which tiles are used; never with external attention."""
        return math.inf if self.external_attention else LIMIT

    def forward(self, x: Tensor, lmbda: Tensor | float | None = None) -> dict[str, Any]:
        """x (B, 3, H, W) in [0, 1], H and W multiples of 64 (patch stem: 128) -> x_hat and
        likelihoods of y, z. In eval mode, y_hat is that of the file.

        lmbda: rate of a variable-rate model, a number or (B,).
        """
        y = self.analyse(x, lmbda).float()
        z = self.h_a(y).float()
        with torch.autocast(x.device.type, enabled=False):  # likelihoods in float32
            z_hat, z_likelihoods = self.entropy_bottleneck(z)
        y_hat = None
        if not self.training:
            y_hat, _ = self._encode(y, self._params(z_hat))
        elif self.context == "scctx":
            z_hat = z + (entropy.dequantize(self.entropy_bottleneck, z) - z).detach()
        y_hat, scales, means = self.context_model(y, self.h_s(z_hat), y_hat)
        with torch.autocast(x.device.type, enabled=False):
            _, y_likelihoods = self.gaussian_conditional(y, scales.float(), means.float())
        x_hat = self.synthesize(y_hat, lmbda)
        return {"x_hat": x_hat, "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def analyse(self, x: Tensor, lmbda: Tensor | float | None = None) -> Tensor:
        """g_a: x (B, 3, H, W) -> y (B, M, H/16, W/16), or 1/32; scaled by lmbda in v5."""
        gains = self._gains("scale_a", x, lmbda)
        for stage, gain in zip(self.g_a, gains, strict=True):
            x = stage(x) * gain if gain is not None else stage(x)
        return x

    def synthesize(self, y_hat: Tensor, lmbda: Tensor | float | None = None) -> Tensor:
        """g_s: y_hat -> x_hat (B, 3, H, W), scaled by lmbda in v5."""
        gains = self._gains("scale_s", y_hat, lmbda)
        for stage, gain in zip(self.g_s, gains, strict=True):
            y_hat = stage(y_hat * gain if gain is not None else y_hat)
        return y_hat

    def _gains(self, name: str, x: Tensor, lmbda: Tensor | float | None
               ) -> list[Tensor | None]:
        if not self.variable_rate:
            return [None] * 4
        if lmbda is None:
            raise UserError("this model has a variable rate: give it a lmbda")
        lmbda = torch.as_tensor(lmbda, dtype=torch.float32, device=x.device).expand(len(x))
        return [net(lmbda) for net in getattr(self, name)]

    @torch.no_grad()
    def compress(self, x: Tensor, lmbda: float | None = None) -> Coded:
        """x as in forward -> {"strings": [y1, y2, y3, y4, z] or [y, z], "shape": of z}."""
        y = tiled(lambda part: self.analyse(part, lmbda), x, down=self.stride, halo=HALO,
                  limit=self.tile_above)
        z = self.h_a(y)
        z_strings = entropy.encode_bottleneck(self.entropy_bottleneck, z)
        _, coded = self._encode(y, self._params(entropy.dequantize(self.entropy_bottleneck, z)))
        tables = entropy.Tables.of(self.gaussian_conditional)
        strings = []
        for parts in coded:
            symbols, indexes = (torch.cat([t.flatten(1) for t in column], 1)
                                for column in zip(*parts, strict=True))
            strings.append(entropy.encode(symbols, indexes, tables))
        result: Coded = {"strings": [*strings, z_strings], "shape": (z.size(2), z.size(3))}
        if self.variable_rate:
            result["parameters"] = struct.pack("<f", lmbda)
        return result

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int],
                   lmbda: float | None = None) -> dict[str, Tensor]:
        """Inverse of `compress`; returns {"x_hat": (B, 3, H, W) in [0, 1]}."""
        *y_strings, z_strings = strings
        tables = entropy.Tables.of(self.gaussian_conditional)
        for string in y_strings:
            tables.refuse_impossible(string, self.M * 16 // len(y_strings) * shape[0] * shape[1])
        z_hat = entropy.decode_bottleneck(self.entropy_bottleneck, z_strings, shape)
        params = self._params(z_hat)
        decoders = self._decoders(y_strings, params, tables)
        y_hat = self._walk(params, lambda _, string, positions, indexes, means:
                           decoders[string].decode(indexes).to(means))
        for decoder in decoders:
            decoder.finish()
        x_hat = tiled(lambda part: self.synthesize(part, lmbda), y_hat.to(z_hat.device),
                      up=self.stride, halo=HALO, limit=self.tile_above)
        return {"x_hat": x_hat.clamp_(0, 1)}

    def _decoders(self, strings: list[list[bytes]], params: Tensor, tables: entropy.Tables
                  ) -> list[entropy.Decoders]:
        """Decoders of the strings of y: one per lattice of MCM, or one for SCCTX."""
        height, width = params.shape[-2:]
        counts = ([int(mask.sum()) for mask in lattices(height, width)] if self.context == "mcm"
                  else [height * width])
        return [entropy.Decoders(string, self.M * count, tables)
                for string, count in zip(strings, counts, strict=True)]

    def read_parameters(self, parameters: bytes) -> dict[str, Any]:
        """Return lmbda from the header of a variable-rate file; UserError for an impossible one."""
        if len(parameters) != 4 * self.variable_rate:
            raise UserError("the file's header holds no rate of this model: encode the image again")
        if not parameters:
            return {}
        lmbda, = struct.unpack("<f", parameters)
        if not SMALLEST_LMBDA <= lmbda <= 1 / SMALLEST_LMBDA:  # false for NaN
            raise UserError(f"the file's header states lmbda {lmbda:g}, from {SMALLEST_LMBDA:g} to "
                            f"{1 / SMALLEST_LMBDA:g} is possible: encode the image again")
        return {"lmbda": lmbda}

    def rate_range(self) -> RateRange | None:
        """The values of lmbda that a variable-rate model was trained with."""
        if not self.variable_rate:
            return None
        config = self.provenance.config
        return RateRange("lmbda", config.get("lambda_min", LMBDAS[0]),
                         config.get("lambda_max", LMBDAS[-1]))

    def coding_steps(self, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
        """The lattices of MCM, or both passes over each group of channels of SCCTX."""
        return self.context_model.coding_steps(shape)

    def _params(self, z_hat: Tensor) -> Tensor:
        return exact.run(self.h_s, z_hat.to(self.coding_device or z_hat.device))

    def _table(self) -> Tensor:
        return self.gaussian_conditional.scale_table

    @torch.no_grad()
    @not_compiled
    def _encode(self, y: Tensor, params: Tensor
                ) -> tuple[Tensor, list[list[tuple[Tensor, Tensor]]]]:
        """Return y_hat (B, M, h, w), and [(symbols, CDF indexes), ...] for each string of y."""
        strings = 4 if self.context == "mcm" else 1
        coded: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(strings)]
        rows = [section.flatten(2).transpose(1, 2)  # (B, h * w, channels)
                for section in y.to(params.device).split(self.context_model.sizes, 1)]

        def rounded(k: int, string: int, positions: Tensor, indexes: Tensor, means: Tensor
                    ) -> Tensor:
            symbols = torch.round(rows[k][:, positions].to(means) - means)
            coded[string].append((symbols, indexes))
            return symbols

        return self._walk(params, rounded).to(y.device), coded

    def _walk(self, params: Tensor, symbols: Callable[..., Tensor]) -> Tensor:
        """y_hat (B, M, h, w), channel group after channel group.

        symbols(k, string, positions, indexes, means): those of channel group k, which are coded in
        the y string of this number.
        """
        groups = []
        for k, context, blocks in self.context_model.passes(params, self._table()):
            for which, positions in blocks:
                string = which if self.context == "mcm" else 0
                context.walk([positions], partial(symbols, k, string), which)
            groups.append(context.y_hat())
        return torch.cat(groups, 1)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor], **options: Any) -> ConvNeXTIC:
        """Build the model with the N and M of the weights and load them strictly.

        options: of a checkpoint's config; without a variant, those of the weights (`options_of`).
        """
        N = len(state_dict["entropy_bottleneck.quantiles"])
        M = len(state_dict["g_a.3.blocks.0.scale.gamma"])
        options = options if "variant" in options else options_of(state_dict) | options
        net = cls(options.pop("variant", "v2_stride2"), N, M, **options)
        net.load_state_dict(state_dict)
        return net


def build(variant: str = "v2_stride2", embed_dim: int = 128, latent_dim: int = 192,
          **options: Any) -> ConvNeXTIC:
    """Build a variant, i.e. a revision of the source; options of BASELINE replace its own."""
    return ConvNeXTIC(variant, embed_dim, latent_dim, **options)


def load(path: str | Path, device: torch.device | str = "cpu") -> ConvNeXTIC:
    """Load a model from a checkpoint or a bare state dict, ready to code."""
    return load_model(path, ConvNeXTIC, device)
