"""Rate, distortion, and the comparison of rate-distortion curves.

Distortion is measured per image, on 8-bit images as they would be saved. Averages over a data set
are means of the values of the images; those of PSNR are means in dB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pytorch_msssim import ms_ssim as _ms_ssim
from torch import Tensor

MS_SSIM_SIDE = 161  # five scales of an 11-tap window need more than 160 pixels


def bpp(num_bytes: int, height: int, width: int) -> float:
    """Bits per pixel of the original image, without padding."""
    return 8 * num_bytes / (height * width)


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB of a uint8 image (3, H, W), or the mean over a batch (B, 3, H, W).

    10 log10(255^2 / MSE), MSE over all three channels; inf for identical images.
    """
    difference = _batch(a).float() - _batch(b).float()  # exact, as these are small integers
    error = difference.square_().mean(dim=(1, 2, 3), dtype=torch.float64)
    return float((10 * torch.log10(255**2 / error)).mean())


def ms_ssim(a: Tensor, b: Tensor) -> float:
    """MS-SSIM in [0, 1] of a uint8 image (3, H, W), or the mean over a batch (B, 3, H, W).

    NaN if a side is shorter than 161 pixels, where the five scales are not defined.
    """
    a, b = _batch(a).float(), _batch(b).float()
    if min(a.shape[-2:]) < MS_SSIM_SIDE:
        return float("nan")
    return float(_ms_ssim(a, b, data_range=255.0))


def _batch(image: Tensor) -> Tensor:
    if image.dtype != torch.uint8:
        raise TypeError("8-bit images expected: round first (common.data.to_uint8)")
    return image if image.dim() == 4 else image[None]


def interpolate(bpp: Sequence[float], psnr: Sequence[float], at_bpp: float) -> float | None:
    """PSNR of a rate-distortion curve at a given rate, by PCHIP interpolation over log(bpp).

    None outside the rates of the curve, which is not extrapolated.
    """
    from scipy.interpolate import PchipInterpolator

    rates, order = np.unique(bpp, return_index=True)
    if len(rates) < 2 or not rates[0] <= at_bpp <= rates[-1]:
        return None
    curve = PchipInterpolator(np.log(rates), np.asarray(psnr, dtype=float)[order])
    return float(curve(np.log(at_bpp)))


def bd_rate(rate_a: Sequence[float], psnr_a: Sequence[float], rate_b: Sequence[float],
            psnr_b: Sequence[float]) -> float | None:
    """Bjontegaard delta rate of curve b against the reference a, in percent.

    -10 means that b needs 10 % fewer bits at equal PSNR, averaged over the common range of PSNR.
    The log-rate is interpolated by PCHIP, which allows any number of points. None if there is no
    common range, or if a curve has fewer than two points or does not rise.
    """
    import bjontegaard  # loads matplotlib, too

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
