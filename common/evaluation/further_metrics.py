"""Further full-reference metrics, by the package piq: those that need no weights from the network.

They are measured on 8-bit decoded images, as PSNR and MS-SSIM are, with piq's default settings.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import UserError

from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """name: for tables; function: in piq; distance: 0 for equal images, where others have 1."""

    name: str
    function: str
    distance: bool = False


METRICS = {"vif": Metric("VIF", "vif_p"), "fsim": Metric("FSIMc", "fsim"),
           "gmsd": Metric("GMSD", "gmsd", distance=True), "haarpsi": Metric("HaarPSI", "haarpsi"),
           "mdsi": Metric("MDSI", "mdsi", distance=True)}


def missing() -> str:
    """What must be installed before anything is measured, in words; "" if nothing."""
    return "" if importlib.util.find_spec("piq") else "pip install piq"


def chosen(text: str) -> list[str]:
    """The keys in METRICS that a text such as "vif,fsim" or "all" names; "" names none."""
    keys = list(dict.fromkeys(text.lower().replace(",", " ").split()))
    known = [*METRICS, "all"]
    if unknown := [key for key in keys if key not in known]:
        raise UserError(f"--metrics {unknown[0]}: there is no such metric; choose from: "
                        f"{', '.join(known)}")
    return list(METRICS) if "all" in keys else keys


def measure(keys: Sequence[str], x: Tensor, x_hat: Tensor) -> dict[str, float | None]:
    """The metrics of a decoded image; x, x_hat: (3, H, W), uint8.

    None where a metric is not defined, as VIF is for images of fewer than 41 pixels a side.
    """
    piq: Any = importlib.import_module("piq") if keys else None
    a, b = x_hat[None].float() / 255, x[None].float() / 255  # piq: the distorted image comes first
    found: dict[str, float | None] = {}
    for key in keys:
        try:
            value = float(getattr(piq, METRICS[key].function)(a, b, data_range=1.0))
        except ValueError:
            value = math.nan
        found[key] = value if math.isfinite(value) else None
    return found


def decibels(quality: str, value: float) -> float | None:
    """A quality on the scale of curves, where more is better: PSNR as it is, -10 log10(1 - s) of a
    similarity s such as MS-SSIM, -10 log10(d) of a distance d; None for equal images.
    """
    if quality.startswith("psnr"):
        return value
    rest = value if quality in METRICS and METRICS[quality].distance else 1 - value
    return -10 * math.log10(rest) if rest > 0 else None
