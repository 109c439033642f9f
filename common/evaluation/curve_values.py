"""Values of a curve's operating points, and their text in tables.

A curve is a results JSON (see `common.evaluation.results`), of ours or published.
"""

from __future__ import annotations

import math
from typing import Any

from common import metrics

Results = dict[str, Any]


def rates_and_psnrs(curve: Results) -> tuple[list[float], list[float]]:
    """Rates and PSNRs, without points of infinite PSNR (identical images, null in JSON)."""
    points = [(b, p) for b, p in zip(curve["results"]["bpp"], curve["results"]["psnr-rgb"],
                                     strict=True) if p is not None and math.isfinite(p)]
    return [b for b, _ in points], [p for _, p in points]


def psnr_at(curve: Results, rate: float) -> float | None:
    """PSNR of a curve at a rate, interpolated; None where the curve does not reach it."""
    return metrics.interpolate(*rates_and_psnrs(curve), rate)


def nearest(points: list[float], rates: list[float]) -> set[float]:
    """Those of the rates `points` that are nearest, in ratio, to one of `rates`."""
    return {min(points, key=lambda point: abs(math.log(point / rate))) for rate in rates}


def entry(block: dict[str, Any], key: str, i: int) -> Any:
    """Entry of operating point i; a value that is not a list applies to all points."""
    value = block.get(key)
    return value[i] if isinstance(value, list) else value


def repeated(curve: Results) -> bool:
    """Whether the points are repetitions (seeds) of one, of the same lmbda, level and factor."""
    meta = curve.get("meta", {})
    points = [tuple(entry(meta, key, i) for key in ("lmbda", "level", "factor"))
              for i in range(len(curve["results"]["bpp"]))]
    return len(points) > 1 and len(set(points)) == 1 and points[0][0] is not None


def cost(rate: float, psnr: float, lmbda: float) -> float:
    """bpp + lmbda * 255^2 * MSE, the MSE being that of the PSNR."""
    return rate + lmbda * 255**2 * 10 ** (-psnr / 10)


def label(curve: Results, i: int) -> str:
    """Name of an operating point, with lmbda, widths and length of training."""
    meta = {key: entry(curve.get("meta", {}), key, i)
            for key in ("lmbda", "N", "M", "quality", "steps", "steps_source")}
    notes = [f"{key} {meta[key]}" for key in ("lmbda", "quality") if meta[key] is not None]
    if meta["N"]:
        notes.append(f"N={meta['N']}, M={meta['M']}")
    if meta["steps"]:
        of = f" of {count(meta['steps_source'])}" if meta["steps_source"] else ""
        notes.append(f"{count(meta['steps'])}{of} steps")
    return f"{curve['name']} ({'; '.join(notes)})" if notes else curve["name"]


def count(number: int) -> str:
    return f"{number / 1e6:g} M" if number % 100_000 == 0 else f"{number:,}"


def difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def number(value: float | None, form: str) -> str:
    """The value in this format; "-" if there is none, as for the MS-SSIM of small images (NaN)."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def markdown(lines: list[list[str]]) -> str:
    """Rows of cells, the first one is the head, as a table; the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    rows = [[line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:],
                                                                   strict=True))]
            for line in (lines[0], rule, *lines[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
