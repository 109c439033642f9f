"""Rate, distortion, curves, and the size of a network.

Distortion is measured on 8-bit images, as they would be saved, per image; averages over a data set
are means of the images' values in dB.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import bjontegaard
import numpy as np
import torch
from compressai.entropy_models import EntropyBottleneck
from compressai.layers import GDN
from pytorch_msssim import ms_ssim as _ms_ssim
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

MS_SSIM_SIDE = 161  # five scales of an 11-tap window need more than 160 pixels


def bpp(num_bytes: int, height: int, width: int) -> float:
    """Bits per pixel of the image as it was before padding."""
    return 8 * num_bytes / (height * width)


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB of uint8 images (3, H, W); the mean over the images of (B, 3, H, W).

    10 log10(255^2 / MSE), MSE over all three channels; inf for identical images.
    """
    difference = _batch(a).float() - _batch(b).float()  # small integers: exact
    error = difference.square_().mean(dim=(1, 2, 3), dtype=torch.float64)
    return float((10 * torch.log10(255**2 / error)).mean())


def ms_ssim(a: Tensor, b: Tensor) -> float:
    """MS-SSIM in 0..1 of uint8 images (3, H, W); the mean over the images of (B, 3, H, W).

    NaN when a side is shorter than 161 pixels: five scales are not defined there.
    """
    a, b = _batch(a).float(), _batch(b).float()
    if min(a.shape[-2:]) < MS_SSIM_SIDE:
        return float("nan")
    return float(_ms_ssim(a, b, data_range=255.0))


def _batch(image: Tensor) -> Tensor:
    if image.dtype != torch.uint8:
        raise TypeError("8-bit images expected: round first (common.data.to_uint8)")
    return image if image.dim() == 4 else image[None]


# ------------------------------------------------------------------------------------- curves
def interpolate(bpp: Sequence[float], psnr: Sequence[float], at_bpp: float) -> float | None:
    """PSNR of a rate-distortion curve at a rate: monotone cubic (PCHIP) over log(bpp).

    None outside the curve's rates: nothing is extrapolated.
    """
    rates, order = np.unique(bpp, return_index=True)
    if len(rates) < 2 or not rates[0] <= at_bpp <= rates[-1]:
        return None
    curve = PchipInterpolator(np.log(rates), np.asarray(psnr, dtype=float)[order])
    return float(curve(np.log(at_bpp)))


def bd_rate(rate_a: Sequence[float], psnr_a: Sequence[float], rate_b: Sequence[float],
            psnr_b: Sequence[float]) -> float | None:
    """Bjontegaard delta rate of curve b against the reference a, in percent.

    -10 means that b needs 10 % fewer bits at equal PSNR, averaged over the common range of PSNR;
    log-rate is interpolated by PCHIP, which allows any number of points. None when there is no
    common range, or a curve has fewer than two points or does not rise.
    """
    curves = []
    for rate, quality in ((rate_a, psnr_a), (rate_b, psnr_b)):
        order = np.argsort(quality)
        curves += [np.asarray(rate, dtype=float)[order], np.asarray(quality, dtype=float)[order]]
    qualities = curves[1], curves[3]
    if any(len(q) < 2 or not (np.diff(q) > 0).all() for q in qualities):
        return None
    if min(q[-1] for q in qualities) <= max(q[0] for q in qualities):
        return None
    return float(bjontegaard.bd_rate(*curves, method="pchip", require_matching_points=False,
                                     min_overlap=0))


# --------------------------------------------------------------------------------- complexity
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.InstanceNorm2d, nn.PReLU)


def complexity(model: nn.Module, size: tuple[int, int] = (512, 768), **rate: float
               ) -> dict[str, int]:
    """Parameters of a model, and multiply-accumulates (MACs) of forward on one (height, width).

    params_total  every parameter, quantiles of the entropy bottlenecks included
    params_thop   what the tool thop counts: convolutions, linear layers and norms, but neither GDN
                  nor entropy models nor masked convolutions
    macs_true     convolutions and linear layers; a transposed convolution costs its weights once
                  per input pixel
    macs_thop     the same, but once per output pixel, as thop has it: 4x too much at stride 2
    macs_gdn      the 1x1 convolutions inside GDN
    macs_masked   convolutions with a `mask` (context models), all taps counted
    macs_products products of two activations: what a module's `product_macs(x)` says of its input
    Biases, activations and entropy models cost nothing here. The forward runs on tensors without
    values, so that it takes no time. rate: what forward of a variable-rate model takes.
    """
    parts = complexity_of_parts(model, size, **rate).values()
    found = {key: sum(part[key] for part in parts) for key in next(iter(parts))}
    # a parameter of the model itself is no child's
    return found | {"params_total": sum(p.numel() for p in model.parameters())}


def complexity_of_parts(model: nn.Module, size: tuple[int, int] = (512, 768), **rate: float
                        ) -> dict[str, dict[str, int]]:
    """`complexity` of each of the model's children by name (g_a, h_s, ...)."""
    model = copy.deepcopy(model).train()  # coding needs values, not shapes alone
    kinds = ("true", "thop", "gdn", "masked", "products")

    def count(part: dict[str, int], layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if hasattr(layer, "product_macs"):
            part["macs_products"] += layer.product_macs(args[0])
        elif isinstance(layer, GDN):
            part["macs_gdn"] += out.numel() * layer.gamma.shape[1]
        elif isinstance(layer, nn.Linear):
            for key in ("macs_true", "macs_thop"):
                part[key] += out.numel() * layer.in_features
        else:
            inputs, outputs = args[0][0, 0].numel(), out[0, 0].numel()
            weights = layer.weight.numel()
            if hasattr(layer, "mask"):
                part["macs_masked"] += outputs * weights
                return
            part["macs_true"] += (inputs if isinstance(layer, _TRANSPOSED) else outputs) * weights
            part["macs_thop"] += outputs * weights

    found = {}
    for name, child in model.named_children():
        part = found[name] = {"params_total": sum(p.numel() for p in child.parameters()),
                              "params_thop": 0} | {f"macs_{kind}": 0 for kind in kinds}
        for layer in child.modules():
            if (isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, GDN))
                    or hasattr(layer, "product_macs")):
                layer.register_forward_hook(functools.partial(count, part))
            if (isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear, *_NORMS))
                    and not hasattr(layer, "mask")):
                part["params_thop"] += sum(p.numel() for p in layer.parameters())
            if isinstance(layer, EntropyBottleneck):  # its forward needs values, not shapes alone
                layer.forward = lambda x, *_: (x, x)
    device = next(model.parameters()).device
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.empty(1, 3, *size, device=device), **rate)
    return found
