"""Checkerboard context model for efficient learned image compression, D. He, Y. Zheng, B. Sun,
Y. Wang, H. Qin, CVPR 2021 (arXiv:2103.15306), on the network of Minnen et al., NeurIPS 2018.

State-dict keys are those of joint_ar (CompressAI's JointAutoregressiveHierarchicalPriors), whose
weights can initialise this model. Everything that the decoder recomputes uses exact arithmetic
(common/coding/context.py).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from common.coding import entropy, exact
from common.coding.context import Context
from common.coding.contract import Codec, Coded
from common.coding.model_file import load_model
from common.coding.tiles import tiled

import torch
from compressai.entropy_models import GaussianConditional
from compressai.layers import GDN, CheckerboardMaskedConv2d
from compressai.models.utils import conv, deconv
from compressai.ops import quantize_ste
from torch import Tensor, nn

FORWARDS = ("onepass", "twopass")
PARITIES = ("even", "odd")
BLOCK = 4096  # positions coded at a time, to bound memory


def analysis(N: int, M: int) -> nn.Sequential:
    """g_a: image (B, 3, H, W) -> y (B, M, H/16, W/16)  (Minnen 2018, Table 1)."""
    return nn.Sequential(
        conv(3, N), GDN(N),
        conv(N, N), GDN(N),
        conv(N, N), GDN(N),
        conv(N, M),
    )


def synthesis(N: int, M: int) -> nn.Sequential:
    """g_s: y_hat (B, M, H/16, W/16) -> image (B, 3, H, W)  (Minnen 2018, Table 1)."""
    return nn.Sequential(
        deconv(M, N), GDN(N, inverse=True),
        deconv(N, N), GDN(N, inverse=True),
        deconv(N, N), GDN(N, inverse=True),
        deconv(N, 3),
    )


def hyper_analysis(N: int, M: int) -> nn.Sequential:
    """h_a: y (B, M, H/16, W/16) -> z (B, N, H/64, W/64)  (ibid.)."""
    return nn.Sequential(
        conv(M, N, kernel_size=3, stride=1), nn.LeakyReLU(inplace=True),
        conv(N, N), nn.LeakyReLU(inplace=True),
        conv(N, N),
    )


def hyper_synthesis(N: int, M: int) -> nn.Sequential:
    """h_s: z_hat (B, N, H/64, W/64) -> params (B, 2M, H/16, W/16)  (ibid.)."""
    return nn.Sequential(
        deconv(N, M), nn.LeakyReLU(inplace=True),
        deconv(M, M * 3 // 2), nn.LeakyReLU(inplace=True),
        conv(M * 3 // 2, M * 2, kernel_size=3, stride=1),
    )


def parameters_network(M: int) -> nn.Sequential:
    """params and context (B, 4M, ...) -> scales, means (B, 2M, ...)  (ibid.)."""
    return nn.Sequential(
        nn.Conv2d(M * 4, M * 10 // 3, 1), nn.LeakyReLU(inplace=True),
        nn.Conv2d(M * 10 // 3, M * 8 // 3, 1), nn.LeakyReLU(inplace=True),
        nn.Conv2d(M * 8 // 3, M * 2, 1),
    )


class CheckerboardConv(CheckerboardMaskedConv2d):
    """5x5 convolution that sees the 12 neighbours of the other colour:

        . 1 . 1 .
        1 . 1 . 1
        . 1 x 1 .        x the predicted latent, which is masked, too
        1 . 1 . 1
        . 1 . 1 .

    It equals CompressAI's layer, but masks the weight in each call instead of overwriting it.
    """

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def anchors(height: int, width: int, parity: str = "even") -> Tensor:
    """Mask (height, width), bool, of the latents of the first pass: x + y even (or odd)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (x + y) % 2 == PARITIES.index(parity)


class Checkerboard(Codec):
    """The codec of joint_ar, but latents are decoded in two passes instead of one by one.

        x (3,512,768) -> g_a -> y (M,32,48) ------------------> Q -> y_hat -> g_s -> x_hat
                                |                               |      |
                                |                        p(y_hat)      v  (anchors only)
                                |           N(means, scales^2) * U   context_prediction (2M,32,48)
                                |                               |      |  (0 at anchors)
                                |         (M each) scales, means <- entropy_parameters
                                v                                      ^
                               h_a -> z (N,8,12) -> Q -> z_hat -> h_s -> params (2M,32,48)

    Pass 1 decodes the anchors, every second latent, from the hyper parameters alone; their context
    is zero. Pass 2 decodes the other latents, whose context consists of anchors only.
    entropy_parameters is pointwise, so in training a single pass over noisy latents is enough
    (Section 3.2; `onepass`). `twopass` rounds as in coding, with a straight-through gradient.
    """

    tag = b"ckbd"  # in the header of this paper's files
    exact_parts = ("h_s", "context_prediction", "entropy_parameters")
    options = ("anchor_parity",)  # from a checkpoint's config, as weights do not reveal it

    def __init__(self, N: int = 192, M: int = 192, ckbd_forward: str = "onepass",
                 anchor_parity: str = "even"):
        super().__init__()
        self.N, self.M, self.ckbd_forward, self.anchor_parity = N, M, ckbd_forward, anchor_parity
        self.entropy_bottleneck = entropy.EntropyBottleneck(N)
        self.g_a = analysis(N, M)
        self.g_s = synthesis(N, M)
        self.h_a = hyper_analysis(N, M)
        self.h_s = hyper_synthesis(N, M)
        self.context_prediction = CheckerboardConv(M, 2 * M, kernel_size=5, padding=2)
        self.context_prediction.weight.data *= self.context_prediction.mask
        self.entropy_parameters = parameters_network(M)
        self.gaussian_conditional = GaussianConditional(None)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x (B, 3, H, W) in [0, 1], H and W multiples of 64 -> x_hat and likelihoods of y, z.

        In eval mode, y_hat is that of the file.
        """
        y = self.g_a(x).float()  # (B, M, H/16, W/16)
        z = self.h_a(y)  # (B, N, H/64, W/64)
        with torch.autocast(x.device.type, enabled=False):  # likelihoods in float32
            z_hat, z_likelihoods = self.entropy_bottleneck(z.float())
        params = self.h_s(z_hat)  # (B, 2M, H/16, W/16)
        is_anchor = anchors(y.size(2), y.size(3), self.anchor_parity).to(x.device)
        if not self.training:
            y_hat, _ = self._encode(y, self._params(z_hat))
        elif self.ckbd_forward == "onepass":
            y_hat = self.gaussian_conditional.quantize(y, "noise")
        else:  # only its anchors are used
            _, means = self._predict(params, torch.zeros_like(params))
            y_hat = quantize_ste(y - means) + means
        context = self.context_prediction(y_hat) * ~is_anchor  # sees anchors only
        scales, means = self._predict(params, context)
        if self.training and self.ckbd_forward == "twopass":
            y_hat = torch.where(is_anchor, y_hat, quantize_ste(y - means) + means)
        with torch.autocast(x.device.type, enabled=False):
            _, y_likelihoods = self.gaussian_conditional(y, scales.float(), means.float())
        x_hat = self.g_s(y_hat)
        return {"x_hat": x_hat, "likelihoods": {"y": y_likelihoods, "z": z_likelihoods}}

    def _predict(self, params: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and means, (B, M, h, w) each."""
        return self.entropy_parameters(torch.cat([params, context], 1)).chunk(2, 1)

    @torch.no_grad()
    def compress(self, x: Tensor) -> Coded:
        """x as in forward -> {"strings": [anchors, others, z], "shape": (H/64, W/64)}."""
        y = tiled(self.g_a, x, down=16)
        z = self.h_a(y)
        z_strings = entropy.encode_bottleneck(self.entropy_bottleneck, z)
        params = self._params(entropy.dequantize(self.entropy_bottleneck, z))
        _, coded = self._encode(y, params)
        tables = entropy.Tables.of(self.gaussian_conditional)
        strings = [entropy.encode(symbols, indexes, tables) for symbols, indexes in coded]
        return {"strings": [*strings, z_strings], "shape": (z.size(2), z.size(3))}

    @torch.no_grad()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Inverse of `compress`; returns {"x_hat": (B, 3, H, W) in [0, 1]}."""
        *y_strings, z_strings = strings
        tables = entropy.Tables.of(self.gaussian_conditional)
        for string in y_strings:
            tables.refuse_impossible(string, self.M * 8 * shape[0] * shape[1])
        z_hat = entropy.decode_bottleneck(self.entropy_bottleneck, z_strings, shape)
        params = self._params(z_hat)
        context = self._context(params)
        for string, (use_context, blocks) in zip(y_strings, self._passes(params), strict=True):
            count = self.M * sum(map(len, blocks))
            decoder = entropy.Decoders(string, count, tables)
            context.walk(blocks, partial(_decoded, decoder), use_context)
            decoder.finish()
        x_hat = tiled(self.g_s, context.y_hat().to(z_hat.device), up=16)
        return {"x_hat": x_hat.clamp_(0, 1)}

    def _params(self, z_hat: Tensor) -> Tensor:
        return exact.run(self.h_s, z_hat.to(self.coding_device or z_hat.device))

    def _context(self, params: Tensor) -> Context:
        return Context(self.context_prediction, self.entropy_parameters, params,
                       self.gaussian_conditional.scale_table)

    @torch.no_grad()
    def _encode(self, y: Tensor, params: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return y_hat (B, M, h, w), and symbols and CDF indexes (B, h*w/2, M) of both passes."""
        context = self._context(params)
        y_rows = y.to(params.device).flatten(2).transpose(1, 2)  # (B, h*w, M)
        coded = []
        for use_context, blocks in self._passes(params):
            parts: list[tuple[Tensor, Tensor]] = []

            def rounded(positions: Tensor, indexes: Tensor, means: Tensor,
                        parts: list[tuple[Tensor, Tensor]] = parts) -> Tensor:
                symbols = torch.round(y_rows[:, positions].to(means) - means)
                parts.append((symbols, indexes))
                return symbols

            context.walk(blocks, rounded, use_context)
            symbols, indexes = (torch.cat(column, 1) for column in zip(*parts, strict=True))
            coded.append((symbols, indexes))
        return context.y_hat().to(y.device), coded

    def _passes(self, params: Tensor) -> list[tuple[bool, list[Tensor]]]:
        """For each pass: whether it uses the context, and its positions y * w + x in blocks.

        Only these positions are coded; zeros at the other positions would cost 0.5-3 bits each.
        """
        is_anchor = anchors(params.size(2), params.size(3), self.anchor_parity)
        is_anchor = is_anchor.flatten().to(params.device)
        return [(use_context, list(mask.nonzero().flatten().split(BLOCK)))
                for use_context, mask in ((False, is_anchor), (True, ~is_anchor))]

    def coding_steps(self, shape: tuple[int, int, int]) -> tuple[str, Tensor]:
        """Pass 0 codes the anchors, pass 1 the other latents."""
        is_anchor = anchors(shape[1], shape[2], self.anchor_parity)
        return "pass", (~is_anchor).long().expand(shape)

    def scale_outputs(self) -> list[Tensor]:
        """The rows of the last layer of entropy_parameters that give the scales."""
        last = self.entropy_parameters[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        return [last.weight[:self.M], last.bias[:self.M]]

    def load_state_dict(  # type: ignore[override]  # as CompressAI's, it has no `assign`
            self, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
        """Load weights, or those of joint_ar, from whose kernel the taps in both masks are used."""
        key = "context_prediction.mask"
        mask = self.context_prediction.mask
        if key in state_dict and state_dict[key].shape == mask.shape:
            used = state_dict[key].to(mask) * mask
            weight = state_dict["context_prediction.weight"].to(mask) * used
            state_dict = {**state_dict, "context_prediction.weight": weight, key: mask}
        return super().load_state_dict(state_dict, strict)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor], **options: Any) -> Checkerboard:
        """Build with the N and M of the weights and load them strictly; refuse joint_ar's."""
        net = cls(state_dict["g_a.0.weight"].size(0), state_dict["g_a.6.weight"].size(0), **options)
        mask = net.context_prediction.mask
        if not torch.equal(state_dict["context_prediction.mask"].to(mask), mask):
            raise RuntimeError("its context_prediction.mask is no checkerboard (joint_ar's weights "
                               "can start a training, with --init_ckpt)")
        net.load_state_dict(state_dict)
        return net


def _decoded(decoder: entropy.Decoders, _: Tensor, indexes: Tensor, means: Tensor) -> Tensor:
    """Symbols of the next positions, for `Context.walk`."""
    return decoder.decode(indexes).to(means)


def build(N: int = 192, M: int = 192, ckbd_forward: str = "onepass",
          anchor_parity: str = "even") -> Checkerboard:
    """Build a model; (192, 192) is the report's low-rate size, (192, 320) its high-rate size."""
    return Checkerboard(N, M, ckbd_forward, anchor_parity)


def load(path: str | Path, device: torch.device | str = "cpu") -> Checkerboard:
    """Load a model from a checkpoint or a bare state dict, ready to code."""
    return load_model(path, Checkerboard, device)
