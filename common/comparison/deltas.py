"""BD-rates between curves, and the range of quality that they hold for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common import metrics
from common.comparison.gather import Curve

METHOD = ("BD-rate by the bjontegaard package: log-rate interpolated by PCHIP over the PSNR range "
          "that both curves cover (column \"overlap\"), no extrapolation. A curve of one point has "
          "no BD-rate: \"at one point\" is its rate against the anchor's at the same PSNR.")


@dataclass(frozen=True)
class Delta:
    """Rate of a curve against the anchor's in percent, and the common range of quality in dB."""

    rate: float
    low: float
    high: float

    @property
    def one_point(self) -> bool:
        return self.low == self.high

    def __str__(self) -> str:
        return f"{self.rate:+.1f}{' (at one point)' * self.one_point}"

    @property
    def overlap(self) -> str:
        return f"{self.low:.2f}" if self.one_point else f"{self.low:.1f}-{self.high:.1f}"


def delta(anchor: Curve, curve: Curve, quality: str = "psnr-rgb") -> Delta | None:
    """Compare a curve with the anchor; None if they have no quality in common."""
    return delta_of_points(*anchor.points(quality), *curve.points(quality))


def delta_of_points(rates_a: Sequence[float], qualities_a: Sequence[float],
                    rates: Sequence[float], qualities: Sequence[float]) -> Delta | None:
    """As `delta`, of curve against anchor a, given their rates and qualities."""
    if len(rates) == 1 and len(rates_a) > 1:
        # with the axes exchanged, the interpolation gives the log-rate at a quality
        at = metrics.interpolate([math.exp(q / 10) for q in qualities_a],
                                 [math.log(r) for r in rates_a], math.exp(qualities[0] / 10))
        return at if at is None else Delta(100 * (rates[0] / math.exp(at) - 1), qualities[0],
                                           qualities[0])
    if not rates or not rates_a:
        return None
    value = metrics.bd_rate(rates_a, qualities_a, rates, qualities)
    if value is None:
        return None
    return Delta(value, max(min(qualities_a), min(qualities)),
                 min(max(qualities_a), max(qualities)))


def matrix(curves: Sequence[Curve], quality: str = "psnr-rgb") -> list[list[float | None]]:
    """BD-rate of each curve (column) against each anchor (row), in percent."""
    points = [curve.points(quality) for curve in curves]
    rows: list[list[float | None]] = []
    for i, anchor in enumerate(points):
        row: list[float | None] = []
        for j, other in enumerate(points):
            if i == j:
                row.append(0.0)
                continue
            found = delta_of_points(*anchor, *other)
            row.append(None if found is None else round(found.rate, 2))
        rows.append(row)
    return rows
