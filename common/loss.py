"""Rate-distortion losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common import UserError

from pytorch_msssim import ms_ssim
from torch import Tensor, nn
from torch.nn import functional as F

METRICS = ("mse", "ms-ssim")
MS_SSIM_SIDE = 161  # pixels; below, the coarsest of the five scales is smaller than the window


class RateDistortionLoss(nn.Module):
    """Rate-distortion loss R + lmbda * D, or D + beta * R.

    With `lmbda`:  loss = bpp + lmbda * 255^2 * MSE        (metric "mse")
                   loss = bpp + lmbda * (1 - MS-SSIM)      (metric "ms-ssim")
    With `beta`:   loss = 255^2 * MSE + beta * bits of one crop (bits = bpp * H * W)

    The MSE is computed on images in [0, 1]; bpp = sum of -log2 p over all latents / (B * H * W)
    (seminar report, eq. of section 2.1). Everything is computed in float32.
    """

    def __init__(self, lmbda: float | None = None, metric: str = "mse", beta: float | None = None):
        super().__init__()
        if metric not in METRICS:
            raise UserError(f"--metric {metric}: choose from {', '.join(METRICS)}")
        if (lmbda is None) == (beta is None):
            raise UserError("set exactly one of lmbda and beta")
        if beta is not None and metric != "mse":
            raise UserError(f"--metric {metric}: beta weighs bits against mse; use lmbda")
        self.lmbda, self.metric, self.beta = lmbda, metric, beta

    def forward(self, output: dict[str, Any], x: Tensor, lmbda: Tensor | None = None
                ) -> dict[str, Tensor]:
        """output: a model's forward result for x (B, 3, H, W) in [0, 1].

        lmbda: (B,), replaces the single lmbda; the loss averages lmbda * MSE over the samples.

        Returns scalars: "loss"; "bpp" and one "bpp_<latent>" per latent; "mse" (times 255^2, as in
        all logs); "ms_ssim" if that is the metric. Raises UserError if x is too small for
        MS-SSIM.
        """
        batch, _, height, width = x.shape
        check_size(self.metric, (height, width))
        terms = {f"bpp_{name}": bits(p) / (batch * height * width)
                 for name, p in output["likelihoods"].items()}
        bpp = sum(terms.values())
        x_hat = output["x_hat"].float()
        mse = 255**2 * F.mse_loss(x_hat, x)
        if lmbda is not None:
            each = 255**2 * (x_hat - x).square().mean(dim=(1, 2, 3))
            loss = bpp + (lmbda * each).mean()
        elif self.beta is not None:
            loss = mse + self.beta * bpp * height * width
        else:
            assert self.lmbda is not None  # exactly one of the two is set
            if self.metric == "ms-ssim":
                terms["ms_ssim"] = ms_ssim(x_hat, x, data_range=1.0)
                loss = bpp + self.lmbda * (1 - terms["ms_ssim"])
            else:
                loss = bpp + self.lmbda * mse
        return {"loss": loss, "bpp": bpp, **terms, "mse": mse}


def check_size(metric: str, size: Iterable[int], name: object = "") -> None:
    """Raise UserError if (height, width) of an image or a crop is too small for the metric."""
    height, width = size
    if metric == "ms-ssim" and min(height, width) < MS_SSIM_SIDE:
        what, remedy = (f"{name}: ", "remove it") if name else ("", "set a larger --patch-size")
        raise UserError(f"{what}--metric ms-ssim needs images and crops of {MS_SSIM_SIDE} pixels "
                        f"or more, not {width}x{height}; {remedy}")


def bits(likelihoods: Tensor) -> Tensor:
    """Total information content -sum log2 p of a tensor of likelihoods, in bits."""
    return -likelihoods.float().log2().sum()
