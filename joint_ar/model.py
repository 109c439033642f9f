"""Joint autoregressive and hierarchical priors for learned image compression, D. Minnen, J. Balle,
G. Toderici, NeurIPS 2018 (arXiv:1809.02736).

State-dict keys are those of CompressAI's JointAutoregressiveHierarchicalPriors, so its published
weights load. Coding differs from CompressAI in two points: it processes wavefronts instead of
pixels, and everything that the decoder recomputes uses exact arithmetic (common/coding/context.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.coding import entropy, exact
from common.coding.context import CausalConv, Context, wave_numbers, wavefront
from common.coding.contract import Codec, Coded
from common.coding.model_file import load_model
from common.coding.tiles import tiled

import torch
from compressai.entropy_models import GaussianConditional
from compressai.layers import GDN, GDN1
from compressai.models import JointAutoregressiveHierarchicalPriors
from compressai.models.utils import conv, deconv
from torch import Tensor, nn

BASELINE = JointAutoregressiveHierarchicalPriors  # same network and keys, for `make bench`
ZOO = "mbt2018"  # its name in compressai.zoo

# for g_a, g_s; the report mixes GDN and GDN1, whose parameters have the same names and shapes
ACTIVATIONS = {"paper": ((GDN, GDN, GDN), (GDN, GDN, GDN)),
               "seminar": ((GDN1, GDN, GDN), (GDN1, GDN1, GDN1))}
QUANTIZERS = ("centred", "rounded")


def analysis(N: int, M: int, gdn_variant: str = "paper") -> nn.Sequential:
    """g_a: image (B, 3, H, W) -> y (B, M, H/16, W/16)  (Table 1, "Encoder")."""
    a, b, c = ACTIVATIONS[gdn_variant][0]
    return nn.Sequential(
        conv(3, N), a(N),
        conv(N, N), b(N),
        conv(N, N), c(N),
        conv(N, M),
    )


def synthesis(N: int, M: int, gdn_variant: str = "paper") -> nn.Sequential:
    """g_s: y_hat (B, M, H/16, W/16) -> image (B, 3, H, W)  (Table 1, "Decoder")."""
    a, b, c = ACTIVATIONS[gdn_variant][1]
    return nn.Sequential(
        deconv(M, N), a(N, inverse=True),
        deconv(N, N), b(N, inverse=True),
        deconv(N, N), c(N, inverse=True),
        deconv(N, 3),
    )


def hyper_analysis(N: int, M: int) -> nn.Sequential:
    """h_a: y (B, M, H/16, W/16) -> z (B, N, H/64, W/64)  (Table 1, "Hyper Encoder")."""
    return nn.Sequential(
        conv(M, N, kernel_size=3, stride=1), nn.LeakyReLU(inplace=True),
        conv(N, N), nn.LeakyReLU(inplace=True),
        conv(N, N),
    )


def hyper_synthesis(N: int, M: int) -> nn.Sequential:
    """h_s: z_hat (B, N, H/64, W/64) -> params (B, 2M, H/16, W/16)  (Table 1, "Hyper Decoder")."""
    return nn.Sequential(
        deconv(N, M), nn.LeakyReLU(inplace=True),
        deconv(M, M * 3 // 2), nn.LeakyReLU(inplace=True),
        conv(M * 3 // 2, M * 2, kernel_size=3, stride=1),
    )


def parameters_network(M: int) -> nn.Sequential:
    """params and context (B, 4M, ...) -> scales, means (B, 2M, ...)  ("Entropy Parameters")."""
    return nn.Sequential(
        nn.Conv2d(M * 4, M * 10 // 3, 1), nn.LeakyReLU(inplace=True),
        nn.Conv2d(M * 10 // 3, M * 8 // 3, 1), nn.LeakyReLU(inplace=True),
        nn.Conv2d(M * 8 // 3, M * 2, 1),
    )


class JointAutoregressive(Codec):
    """Codec that predicts means and scales from side information z and from decoded latents.

        x (3,512,768) -> g_a -> y (M,32,48) ------------------> Q -> y_hat -> g_s -> x_hat
                                |                               |      |
                                |                        p(y_hat)      v
                                |           N(means, scales^2) * U   context_prediction (2M,32,48)
                                |                               |      |
                                |         (M each) scales, means <- entropy_parameters
                                v                                      ^
                               h_a -> z (N,8,12) -> Q -> z_hat -> h_s -> params (2M,32,48)

    Q adds uniform noise in training. Otherwise y_hat = round(y - means) + means, in `forward` as in
    `compress`, so that the estimated rate is that of the file; the means depend on y_hat, so it is
    computed wavefront by wavefront. With `quantize="rounded"`, forward works as in CompressAI:
    context and g_s see y_hat = round(y), and the likelihood is that of round(y - means). This is
    parallel, but differs from the file.
    """

    tag = b"join"  # in the header of this paper's files
    exact_parts = ("h_s", "context_prediction", "entropy_parameters")
    options = ("gdn_variant",)  # from a checkpoint's config, as weights do not reveal it

    def __init__(self, N: int = 192, M: int = 192, gdn_variant: str = "paper",
                 quantize: str = "centred"):
        super().__init__()
        self.N, self.M, self.gdn_variant, self.quantize = N, M, gdn_variant, quantize
        self.entropy_bottleneck = entropy.EntropyBottleneck(N)
        self.g_a = analysis(N, M, gdn_variant)
        self.g_s = synthesis(N, M, gdn_variant)
        self.h_a = hyper_analysis(N, M)
        self.h_s = hyper_synthesis(N, M)
        self.context_prediction = CausalConv(M, 2 * M, kernel_size=5, padding=2)
        self.entropy_parameters = parameters_network(M)
        self.gaussian_conditional = GaussianConditional(None)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x (B, 3, H, W) in [0, 1], H and W multiples of 64 -> x_hat and likelihoods of y, z."""
        y = self.g_a(x).float()  # (B, M, H/16, W/16)
        z = self.h_a(y)  # (B, N, H/64, W/64)
        with torch.autocast(x.device.type, enabled=False):  # likelihoods in float32
            z_hat, z_likelihoods = self.entropy_bottleneck(z.float())
        params = self.h_s(z_hat)  # (B, 2M, H/16, W/16)
        if self.training:
            y_hat = self.gaussian_conditional.quantize(y, "noise")
        elif self.quantize == "rounded":
            y_hat = y.round()
        else:
            y_hat, _, _ = self._encode_waves(y, self._params(z_hat))
        context = self.context_prediction(y_hat)  # (B, 2M, H/16, W/16)
        scales, means = self.entropy_parameters(torch.cat([params, context], 1)).chunk(2, 1)
        with torch.autocast(x.device.type, enabled=False):
            _, y_likelihoods = self.gaussian_conditional(y, scales.float(), means.float())
        x_hat = self.g_s(y_hat)
        return {"x_hat": x_hat, "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    @torch.no_grad()
    def compress(self, x: Tensor) -> Coded:
        """x as in forward -> {"strings": [y_strings, z_strings], "shape": (H/64, W/64)}."""
        y = tiled(self.g_a, x, down=16)
        z = self.h_a(y)
        z_strings = entropy.encode_bottleneck(self.entropy_bottleneck, z)
        z_hat = entropy.dequantize(self.entropy_bottleneck, z)
        _, symbols, indexes = self._encode_waves(y, self._params(z_hat))
        y_strings = entropy.encode(symbols, indexes, entropy.Tables.of(self.gaussian_conditional))
        return {"strings": [y_strings, z_strings], "shape": (z.size(2), z.size(3))}

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Inverse of `compress`; returns {"x_hat": (B, 3, H, W) in [0, 1]}."""
        y_strings, z_strings = strings
        entropy.Tables.of(self.gaussian_conditional).refuse_impossible(
            y_strings, self.M * 16 * shape[0] * shape[1])
        z_hat = entropy.decode_bottleneck(self.entropy_bottleneck, z_strings, shape)
        y_hat = self._decode_waves(y_strings, self._params(z_hat)).to(z_hat.device)
        x_hat = tiled(self.g_s, y_hat, up=16)
        return {"x_hat": x_hat.clamp_(0, 1)}

    def _params(self, z_hat: Tensor) -> Tensor:
        return exact.run(self.h_s, z_hat.to(self.coding_device or z_hat.device))

    def _context(self, params: Tensor) -> Context:
        return Context(self.context_prediction, self.entropy_parameters, params,
                       self.gaussian_conditional.scale_table)

    @torch.no_grad()
    def _encode_waves(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return y_hat (B, M, h, w), and symbols and CDF indexes (B, h*w, M) in coding order."""
        context = self._context(params)
        y_rows = y.to(params).flatten(2).transpose(1, 2).contiguous()  # (B, h*w, M)
        coded = []

        def rounded(positions: Tensor, indexes: Tensor, means: Tensor) -> Tensor:
            symbols = torch.round(y_rows[:, positions] - means)
            coded.append((symbols, indexes))
            return symbols

        context.walk(wavefront(y.size(2), y.size(3), params.device), rounded)
        symbols, indexes = (torch.cat(parts, 1) for parts in zip(*coded, strict=True))
        return context.y_hat().to(y.device), symbols, indexes

    def _decode_waves(self, strings: list[bytes], params: Tensor) -> Tensor:
        """Decode y_hat (B, M, h, w) from one string per image."""
        context, tables = self._context(params), entropy.Tables.of(self.gaussian_conditional)
        h, w = params.shape[-2:]
        decoder = entropy.Decoders(strings, self.M * h * w, tables)
        context.walk(wavefront(h, w, params.device),
                     lambda _, indexes, means: decoder.decode(indexes).to(means))
        decoder.finish()
        return context.y_hat()

    def coding_steps(self, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
        """The wavefronts of latents that are coded at once."""
        return "wave", wave_numbers(shape)

    def scale_outputs(self) -> list[Tensor]:
        """The rows of the last layer of entropy_parameters that give the scales."""
        last = self.entropy_parameters[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        return [last.weight[:self.M], last.bias[:self.M]]

    def load_state_dict(  # type: ignore[override]  # as CompressAI's, it has no `assign`
            self, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
        """Load weights; RuntimeError also for another mask, as it could reveal future latents."""
        mask, given = self.context_prediction.mask, state_dict.get("context_prediction.mask")
        # one of another size fails below, where all sizes are named
        if given is not None and given.shape == mask.shape and not torch.equal(
                given.to(mask), mask):
            raise RuntimeError("its context_prediction.mask is not causal "
                               "(checkerboard's weights?)")
        return super().load_state_dict(state_dict, strict)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor], **options: Any) -> JointAutoregressive:
        """Build the model with the N and M of the weights and load them strictly."""
        net = cls(state_dict["g_a.0.weight"].size(0), state_dict["g_a.6.weight"].size(0), **options)
        net.load_state_dict(state_dict)
        return net


def build(N: int = 192, M: int = 192, gdn_variant: str = "paper",
          quantize: str = "centred") -> JointAutoregressive:
    """Build a model; (192, 192) is the report's low-rate size, (192, 320) its high-rate size."""
    return JointAutoregressive(N, M, gdn_variant, quantize)


def load(path: str | Path, device: torch.device | str = "cpu") -> JointAutoregressive:
    """Load a model from a checkpoint or a bare state dict, ready to code."""
    return load_model(path, JointAutoregressive, device)
