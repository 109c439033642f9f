"""Transformer-based transform coding, Y. Zhu, Y. Yang, T. Cohen, ICLR 2022 (OpenReview
IDwN6xjHnK8): {Conv, SwinT} transforms x {Hyperprior, ChARM}. ChARM is Minnen and Singh's
channel-wise prior (ICIP 2020, arXiv:2007.08739). The fifth model, TCM, is in tcm.py.

State-dict keys are those of ali-zafari/TBTC. In coding, h_s and the networks of ChARM are exact.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from common import UserError
from common.coding.model_file import load_checkpoint, load_model

import torch
from compressai.layers import GDN
from compressai.models.utils import conv, deconv
from torch import Tensor, nn

from tbtc.slices import Run, SliceCoder, in_floats
from tbtc.swin import HEAD, SwinAnalysis, SwinSynthesis
from tbtc.tcm import TCM, our_name

SLICE = 32  # channels per slice of ChARM
DEPTHS, HYPER_DEPTHS = (2, 2, 6, 2), (5, 1)  # blocks per stage of g_a and of h_a
WINDOW, HYPER_WINDOW = 8, 4
# D, Hd of Conv; C1, ..., C6 of SwinT; N of TCM. XS is ours, for CPUs: there, Conv has 64 channels
# near the image, but latents have 128, which cost little at 1/16 of the resolution
SIZES = {
    "XS": ((128, 64, 64), (32, 64, 96, 128, 64, 64), 32),
    "S": ((192, 128), (96, 128, 160, 192, 96, 128), 64),
    "M": ((320, 192), (128, 192, 256, 320, 192, 192), 96),
    "L": ((448, 256), (160, 256, 352, 448, 192, 256), 128),
}
ZOO = {f"zyc2022-{t}-{p}": (t, p) for t in ("conv", "swint") for p in ("hyperprior", "charm")}
MODELS = (*ZOO, "tcm")
CHARM_WIDTHS = ("src", "paper")
SPLITS = ("pre", "post")
TABLES = ("_quantized_cdf", "_cdf_length", "_offset")
Slices = tuple[Tensor, ...]


# -------------------------------------------------------------------------------------- transforms
def conv_transforms(D: int, N: int, Hd: int) -> dict[str, nn.Module]:
    """g_a, g_s, h_a, h_s of the Conv models (Minnen et al. 2018); in the paper's sizes, N = D."""
    return {
        "g_a": nn.Sequential(conv(3, N), GDN(N), conv(N, N), GDN(N), conv(N, N), GDN(N),
                             conv(N, D)),
        "g_s": nn.Sequential(deconv(D, N), GDN(N, inverse=True), deconv(N, N),
                             GDN(N, inverse=True), deconv(N, N), GDN(N, inverse=True),
                             deconv(N, 3)),
        "h_a": nn.Sequential(conv(D, Hd, 3, 1), nn.ReLU(), conv(Hd, Hd), nn.ReLU(), conv(Hd, Hd)),
        "h_s": nn.Sequential(deconv(Hd, Hd), nn.ReLU(), deconv(Hd, Hd), nn.ReLU(),
                             conv(Hd, 2 * D, 3, 1)),
    }


def swin_transforms(dims: tuple[int, ...], heads: int | None, split: str) -> dict[str, nn.Module]:
    """g_a, g_s, h_a, h_s of the SwinT models (Figure 2; widths in Table 4 of the appendix)."""
    main, hyper = dims[:4], dims[4:]
    return {
        "g_a": SwinAnalysis(3, main, DEPTHS, WINDOW, heads),
        "g_s": SwinSynthesis(main[::-1], 3, DEPTHS[::-1], WINDOW, heads, split),
        "h_a": SwinAnalysis(main[3], hyper, HYPER_DEPTHS, HYPER_WINDOW, heads, "patch_merger"),
        "h_s": SwinSynthesis(hyper[::-1], 2 * main[3], HYPER_DEPTHS[::-1], HYPER_WINDOW, heads,
                             split),
    }


class SliceNet(nn.Module):
    """Mean or scale of slice i (B, 32, h, w), by three 3x3 convolutions.

    The input is the slice's 32 channels of the hyper parameters, and the previous slices
    (B, 32 * i, h, w).
    """

    def __init__(self, i: int, widths: str = "src"):
        """widths: the hidden widths are interpolated between input and output, rounded as in the
        PyTorch code ("src") or as in the authors' log ("paper").
        """
        super().__init__()
        inputs = SLICE * (i + 1)
        if widths == "src":
            a, b = (k * (SLICE - inputs) // 3 + inputs for k in (1, 2))
        else:
            a, b = (k * (max(inputs, 2 * SLICE) + SLICE) // 3 for k in (2, 1))
        self.layers = nn.Sequential(nn.Conv2d(inputs, a, 3, padding=1), nn.ReLU(),
                                    nn.Conv2d(a, b, 3, padding=1), nn.ReLU(),
                                    nn.Conv2d(b, SLICE, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(x, in_floats)

    def exact(self, x: Tensor, run: Run) -> Tensor:
        return run(self.layers, x)


# ------------------------------------------------------------------------------------------ models
class ZYC2022(SliceCoder):
    """One of the four models. In ChARM, slice i of D / 32 (Figure 3 of the appendix):

        params --- scales_i (32,h,w) --+--> charm_scale_transforms.i --> scales
            \\                          |
             \\---- means_i (32,h,w) ---|--+--> charm_mean_transforms.i --> means
                                       |  |                                 |
           y_hat of slices 0 ... i-1 --+--+     y_hat_i = round(y_i - means) + means
    """

    charm_mean_transforms: nn.ModuleList
    charm_scale_transforms: nn.ModuleList

    def __init__(self, transform: str = "swint", prior: str = "charm",
                 widths: tuple[int, ...] = SIZES["M"][1], charm_widths: str = "src",
                 split: str = "pre", heads: int | None = None):
        """widths: (D, Hd) for conv, or (D, N, Hd) with N channels between image and latents;
        (C1, ..., C6) for swint. heads: None for channels / 32.
        """
        channels, hyper = widths[0 if transform == "conv" else 3], widths[-1]
        slices = [SLICE] * (channels // SLICE) if prior == "charm" else [channels]
        if sum(slices) != channels:
            raise UserError(f"ChARM codes slices of {SLICE} channels, not {channels}")
        super().__init__(slices, hyper)
        self.name, self.N, self.M = f"zyc2022-{transform}-{prior}", hyper, channels
        parts = (conv_transforms(channels, widths[-2], hyper) if transform == "conv"
                 else swin_transforms(widths, heads, split))
        for name, part in parts.items():
            self.add_module(name, part)
        if transform == "swint":
            self.halo = 24  # receptive field: 20 in g_a, 16 in g_s; multiple of the window
        self.charm = prior == "charm"
        if self.charm:
            for name in ("charm_mean_transforms", "charm_scale_transforms"):
                nets = nn.ModuleList(SliceNet(i, charm_widths) for i in range(len(slices)))
                self.add_module(name, nets)
        self.exact_parts = ("h_s", *(("charm_mean_transforms", "charm_scale_transforms")
                                     if self.charm else ()))

    def hyper(self, z_hat: Tensor, run: Run) -> tuple[Slices, Slices]:
        scales, means = run(self.h_s, z_hat).chunk(2, 1)  # scales first
        return scales.split(self.slices, 1), means.split(self.slices, 1)

    def predict(self, i: int, params: tuple[Slices, Slices], before: list[Tensor], run: Run
                ) -> tuple[Tensor, Tensor, None]:
        scales, means = (part[i] for part in params)
        if self.charm:
            scales = run(self.charm_scale_transforms[i], torch.cat([scales, *before], 1))
            means = run(self.charm_mean_transforms[i], torch.cat([means, *before], 1))
        return scales, means, None

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> SliceCoder:
        """Build the model of the weights, TCM or any size of the four, and load them strictly."""
        if "h_mean_s.0.subpel_conv.0.weight" in state_dict:
            return TCM.from_state_dict(state_dict)
        state_dict = {key: value for key, value in state_dict.items()
                      if not key.endswith(("relative_position_index", "attn_mask"))}
        options: dict[str, Any] = {
            "prior": "charm" if "charm_mean_transforms.0.layers.0.weight" in state_dict
            else "hyperprior"}
        if "g_a.0.weight" in state_dict:
            widths = tuple(len(state_dict[f"{key}.weight"]) for key in ("g_a.6", "g_a.0", "h_a.0"))
            options |= {"transform": "conv", "widths": widths}
        else:
            names = [f"g_a.layers.{i}" for i in range(4)] + [f"h_a.layers.{i}" for i in range(2)]
            block = "blocks.0.norm1.weight"
            widths = tuple(len(state_dict[f"{name}.{block}"]) for name in names)
            table = "blocks.0.attn.relative_position_bias_table"
            heads = [state_dict[f"{name}.{table}"].shape[1] for name in names]
            norm = state_dict["g_s.layers.0.downsample.norm.weight"]
            options |= {"transform": "swint", "widths": widths,
                        "heads": None if heads == [w // HEAD for w in widths] else heads[0],
                        "split": "pre" if len(norm) == widths[3] else "post"}
        if options["prior"] == "charm":
            a = len(state_dict["charm_mean_transforms.1.layers.0.weight"])
            options["charm_widths"] = "src" if a == 53 else "paper"
        net = cls(**options)
        net.load_state_dict(state_dict)
        return net


def build(model: str = "zyc2022-swint-charm", quality: str = "M", charm_widths: str = "src",
          split: str = "pre", num_heads: int | None = None) -> SliceCoder:
    """Build a model of the source's zoo, in one of the sizes S, M, L, or our XS.

    charm_widths: widths of the networks of ChARM, "src" (PyTorch code) or "paper"; split: place of
    the norms in g_s and h_s, "pre" (PyTorch) or "post" (TensorFlow, paper). num_heads: None for
    channels / 32, as in the paper; 4 for weights of the first PyTorch code.
    """
    if quality not in SIZES:
        raise UserError(f"quality {quality}: choose a size, {', '.join(SIZES)}")
    if model not in MODELS:
        raise UserError(f"model {model}: choose from {', '.join(MODELS)}")
    conv_widths, swin_widths, N = SIZES[quality]
    if model == "tcm":
        return TCM(N, *((160, 96) if quality == "XS" else ()))
    transform, prior = ZOO[model]
    return ZYC2022(transform, prior, conv_widths if transform == "conv" else swin_widths,
                   charm_widths, split, num_heads)


def load(path: str | Path, device: torch.device | str = "cpu") -> SliceCoder:
    """Load a model from a checkpoint or a bare state dict, ours or the source's, ready to code.

    Averaged weights are used if there are any; those of the source's fork are a list in the order
    of the parameters.
    """
    state = load_checkpoint(path)
    state["model"] = {re.sub(r"^((net|module|_orig_mod)\.)+", "", key): value
                      for key, value in state["model"].items()}
    if "ema_state_dict" in state:
        state["model"] |= _averaged(path, state)
        for key in state["model"]:
            if key.endswith(TABLES):  # tables of other weights; `load_model` makes new ones
                state["model"][key] = torch.empty(0, dtype=torch.int32)
    try:
        return load_model(path, ZYC2022, device, state)
    except (AttributeError, IndexError, TypeError):
        raise UserError(f"{path}: not the weights of one of these models") from None


def _averaged(path: str | Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """Weights in "shadow_params" of torch_ema, by name."""
    try:
        shadow = state["ema_state_dict"]["shadow_params"]
        trained = dict(ZYC2022.from_state_dict(state["model"]).named_parameters())
        names = [key for key in state["model"] if our_name(key) in trained]  # in their order
        pairs = dict(zip(names, shadow, strict=True))
        if any(value.shape != state["model"][key].shape for key, value in pairs.items()):
            raise ValueError
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path}: its averaged weights (ema_state_dict) do not fit its others") \
            from None
    return pairs
