"""The rate-distortion plot as a PNG: ours, classical codecs, and a few published curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.comparison.gather import KINDS, Curve, Kind
from common.comparison.style import Style
from common.evaluation.compare import save_figure

TICKS = (0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3, 4)


def limits(curves: Sequence[Curve]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ranges of bpp and PSNR in which our curves lie, with some room; all curves if none is ours.

    The PSNR range reaches from our lowest point to the highest point of any curve at these rates.
    """
    ours = [curve for curve in curves if curve.kind == "ours"] or list(curves)
    points = [pair for curve in ours for pair in zip(*curve.points(), strict=True)]
    left, right = min(b for b, _ in points) * 0.85, max(b for b, _ in points) * 1.15
    seen = [p for curve in curves for b, p in zip(*curve.points(), strict=True)
            if left <= b <= right]
    return (left, right), (min(p for _, p in points) - 1.5, max(seen) + 0.5)


def plot(curves: Sequence[Curve], styles: Sequence[Style], title: str, path: Path) -> None:
    """Write a PNG with the curves that are shown; the rate axis is logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator

    pairs = [(c, s) for c, s in zip(curves, styles, strict=True) if c.shown and c.points()[0]]
    if not pairs:
        return
    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    handles: dict[Kind, list[Any]] = {kind: [] for kind in KINDS}
    for curve, style in pairs:
        handles[curve.kind] += axes.plot(
            *curve.points(), style.line, marker=style.marker, color=style.color, label=curve.name,
            linewidth=style.width, markersize=7 if curve.kind == "ours" else 6,
            markerfacecolor=style.color if curve.kind == "ours" else "none",
            zorder=4 if curve.kind == "ours" else 3 if curve.kind == "classical" else 2)
    x, y = limits([curve for curve, _ in pairs])
    axes.set_xscale("log")
    axes.set(xlim=x, ylim=y, xlabel="bits per pixel (whole file, logarithmic)",
             ylabel="PSNR (dB), RGB, 8 bit", title=title)
    axes.set_xticks([t for t in TICKS if x[0] <= t <= x[1]],
                    [f"{t:g}" for t in TICKS if x[0] <= t <= x[1]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    listed: list[Any] = []
    for kind, words in KINDS.items():
        if handles[kind]:
            listed += [Line2D([], [], linestyle="none", label=f"$\\bf{{{words}}}$".replace(
                " ", "\\ ")), *handles[kind]]
    figure.legend(handles=listed, loc="outside right upper", fontsize=8, frameon=False)
    save_figure(figure, path)
