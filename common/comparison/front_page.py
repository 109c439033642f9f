"""The comparison on the front page: a short table and a plot, from files of the repository alone.

Classical codecs are in common/results/classical.json, which `python -m common.comparison --publish`
writes. After results of a paper have changed, `--front-page` brings table and plot up to date.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.comparison import gather, plot, style, table
from common.comparison.gather import Curve
from common.evaluation import image_sets
from common.evaluation.curve_values import markdown
from common.evaluation.results import format_json, load_published
from common.files import write_atomic
from common.recipes.tables import write_table

NAME, DATASET = "compare", "Kodak"
COLUMNS = {"curve": "curve", "from": "from", "points": "points", "bpp": "bits per pixel",
           "PSNR": "PSNR", "MS-SSIM": "MS-SSIM", "BD-rate %": "BD-rate %",
           "overlap dB": "overlap dB"}


def save_classical(root: Path, curves: Sequence[Curve]) -> None:
    """Write the results of classical codecs, without those of each image."""
    kept = [{key: value for key, value in curve.results.items() if key != "per_image"}
            for curve in curves]
    content: dict[str, Any] = {
        "source": "make compare, with --publish", "dataset": f"{DATASET}, 24 images, mean over "
        "images", "reference": kept[0]["name"], "curves": kept}
    write_atomic(_classical(root), (format_json(content) + "\n").encode())


def curves_of(root: Path, problems: list[str]) -> list[Curve]:
    """The curves of the front page."""
    digest = image_sets.KNOWN[DATASET]
    measured = [Curve(table.classical_name(curve["name"]), "classical", curve)
                for curve in load_published(_classical(root))]
    return [*gather.own_results(root, digest, problems), *measured,
            *gather.published(root, digest, problems)]


def text_of(curves: Sequence[Curve]) -> str:
    """The short table and the lines below it."""
    shown = [curve for curve in curves if curve.shown]
    anchor = next(curve for curve in curves if curve.kind == "published")
    indexes = [table.HEAD.index(name) for name in COLUMNS]
    rows = [list(COLUMNS.values())]
    for curve in shown:
        cells = table.curve_row(curve, anchor)
        rows.append([cells[i] for i in indexes])
    lines = [f"Anchor: {anchor.name}.", *table.checks(curves)]
    return "\n\n".join([markdown(rows), *(textwrap.fill(line, 100) for line in lines)])


def write(root: Path) -> list[str]:
    """Write table and plot; returns what was left out and why."""
    problems: list[str] = []
    curves = curves_of(root, problems)
    write_table(root / "README.md", NAME, text_of(curves))
    plot.plot(curves, style.styles(curves), f"{image_sets.title(image_sets.KNOWN[DATASET])}, mean",
              root / "common" / "results" / f"{NAME}.png")
    return problems


def _classical(root: Path) -> Path:
    return root / "common" / "results" / "classical.json"
