"""The comparison on the pages: tables and a plot, from files of the repository alone.

The front page has the plot and a table of PSNR at one rate, RESULTS.md a row for each curve.

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
from common.evaluation.classical import CODECS
from common.evaluation.curve_values import markdown, number, psnr_at
from common.evaluation.results import format_json, load_published
from common.files import write_atomic
from common.papers import papers
from common.recipes.pages import labels
from common.recipes.tables import write_table

NAME, EQUAL, DATASET = "compare", "equal", "Kodak"
RATE = 0.3  # bits per pixel, which the bundled weights of most papers reach
COLUMNS = {"curve": "curve", "from": "from", "points": "points", "bpp": "bits per pixel",
           "PSNR": "PSNR", "MS-SSIM": "MS-SSIM", "BD-rate %": "BD-rate %",
           "overlap dB": "overlap dB"}


def save_classical(root: Path, curves: Sequence[Curve]) -> None:
    """Write the results of classical codecs, without those of each image.

    Codecs that were not measured this time keep their results.
    """
    old = load_published(_classical(root)) if _classical(root).exists() else []
    new = [curve.results for curve in curves]
    by_name = {curve["name"]: {key: value for key, value in curve.items()
                               if key not in ("per_image", "dataset")} for curve in [*old, *new]}
    kept = [by_name.pop(codec.name) for codec in CODECS.values() if codec.name in by_name]
    kept += by_name.values()  # codecs that are no longer in CODECS
    content: dict[str, Any] = {
        "source": "make compare, with --publish", "dataset": f"{DATASET}, 24 images, mean over "
        "images", "reference": kept[0]["name"], "curves": kept}
    write_atomic(_classical(root), (format_json(content) + "\n").encode())


def curves_of(root: Path, problems: list[str]) -> list[Curve]:
    """The curves of the front page."""
    digest = image_sets.KNOWN[DATASET]
    measured = [Curve(table.classical_name(curve["name"]), "classical", curve)
                for curve in load_published(_classical(root))
                if gather.take_if_of(digest, curve, curve["name"], problems)]
    return [*gather.own_results(root, digest, problems), *measured,
            *gather.published(root, digest, problems)]


def text_of(curves: Sequence[Curve]) -> str:
    """The short table and the lines below it."""
    listed = [curve for curve in curves if curve.listed]
    anchor = next(curve for curve in curves if curve.kind == "published")
    indexes = [table.HEAD.index(name) for name in COLUMNS]
    rows = [list(COLUMNS.values())]
    for curve in listed:
        cells = table.curve_row(curve, anchor)
        rows.append([cells[i] for i in indexes])
    lines = [f"Anchor: {anchor.name}.", *table.checks(curves)]
    return "\n\n".join([markdown(rows), *(textwrap.fill(line, 100, break_on_hyphens=False)
                                          for line in lines)])


def at_equal_rate(root: Path, curves: Sequence[Curve]) -> str:
    """PSNR at RATE of one codec of each paper, and of its published reference.

    curves: those of `curves_of`, which are all of the same images. The codec is that of the bundled
    weights if their curve reaches RATE, else the first of the others that does.
    """
    rows = [["folder", "widths N, M", "steps", "PSNR", "reference (published)"]]
    for folder in (root / paper for paper in papers(root)):
        small = [curve for curve in curves if curve.kind == "ours" and curve.paper == folder.name
                 and curve.results["name"].startswith("small")]  # the bundled weights first
        if not small:
            continue
        ours = next((curve for curve in small if psnr_at(curve.results, RATE) is not None),
                    small[0])
        reference = load_published(folder / "results" / "published.json")[0]
        same = image_sets.digest_of(reference) == image_sets.digest_of(ours.results)
        widths = sorted({f"{N}, {M}" for N, M in zip(ours.meta("N"), ours.meta("M"), strict=True)
                         if N})
        steps = sorted({n for n in ours.meta("steps") if n})
        which = "" if ours is small[0] else labels(
            folder / "weights.yaml", folder.name, ours.results)[0].removeprefix(folder.name)
        rows.append([f"[{folder.name}]({folder.name}){which}", "; ".join(widths),
                     " to ".join(f"{n:,}" for n in dict.fromkeys((*steps[:1], *steps[-1:]))),
                     number(psnr_at(ours.results, RATE), ".2f"),
                     number(psnr_at(reference, RATE) if same else None, ".2f")])
    for curve in curves:
        if curve.kind == "classical" and (psnr := psnr_at(curve.results, RATE)) is not None:
            rows.append([curve.name, "", "", number(psnr, ".2f"), ""])
    return markdown(rows)


def write(root: Path) -> list[str]:
    """Write tables and plot; returns what was left out and why."""
    problems: list[str] = []
    curves = curves_of(root, problems)
    rows, equal = text_of(curves), at_equal_rate(root, curves)  # both, before anything is written
    write_table(root / "RESULTS.md", NAME, rows)
    write_table(root / "README.md", EQUAL, equal)
    plot.plot(curves, style.styles(curves), f"{image_sets.title(image_sets.KNOWN[DATASET])}, mean",
              root / "common" / "results" / f"{NAME}.png")
    return problems


def _classical(root: Path) -> Path:
    return root / "common" / "results" / "classical.json"
