"""The comparison as one HTML file that needs no network: data, scripts, styles and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import html_page
from common.comparison import deltas, table
from common.comparison.gather import KINDS, Curve
from common.comparison.style import Style
from common.evaluation.further_metrics import METRICS
from common.files import write_atomic

PARTS = Path(__file__).parent / "page"
SCRIPTS = ("plots.js", "tables.js", "viewer.js", "page.js")  # over those of `common.html_page`
LIMIT = 15_000_000  # bytes of the page; the last images are left out beyond
QUALITIES = {"psnr-rgb": "PSNR (dB)", "ms-ssim-rgb": "MS-SSIM (dB)"}


def write(path: Path, title: str, curves: Sequence[Curve], styles: Sequence[Style], anchor: Curve,
          pictures: dict[str, Any] | None, notes: Sequence[str], further: Sequence[str] = ()
          ) -> None:
    """Write the page; pictures: of `viewer`, or None; notes: lines below the tables; further: keys
    of `further_metrics`.
    """
    qualities = QUALITIES | {key: f"{METRICS[key].name} (dB)" for key in further}
    content: dict[str, Any] = {
        "title": f"{title}: comparison of image codecs", "notes": list(notes),
        "anchor": anchor.name, "kinds": dict(KINDS), "method": deltas.METHOD, "macs": table.MACS,
        "head": table.head(further), "qualities": qualities,
        "curves": [_curve(curve, style, list(qualities), table.curve_row(curve, anchor, further))
                   for curve, style in zip(curves, styles, strict=True)],
        "matrices": _matrices(curves, list(qualities)), "viewer": pictures}
    html = html_page.assemble(PARTS, "page", SCRIPTS, content)
    while pictures and len(pictures["images"]) > 1 and len(html) > LIMIT:
        name = _drop_last(pictures)
        content["notes"].append(f"{name} is left out, as the page would exceed "
                                f"{LIMIT / 1e6:g} MB")
        html = html_page.assemble(PARTS, "page", SCRIPTS, content)
    write_atomic(path, html)


def _curve(curve: Curve, style: Style, qualities: list[str], row: list[str]) -> dict[str, Any]:
    points = range(len(curve.values("bpp")))
    return {"name": curve.name, "kind": curve.kind, "shown": curve.shown,
            "listed": curve.listed,
            "color": style.color, "symbol": style.symbol, "glyph": style.glyph, "dash": style.dash,
            "width": style.width, "source": next((s for s in curve.meta("source") if s), ""),
            "description": curve.results.get("description", ""),
            "labels": [table.point_name(curve, i) for i in points],
            "qualities": {key: curve.points(key) for key in qualities}, "row": row}


def _matrices(curves: Sequence[Curve], qualities: list[str]) -> dict[str, Any]:
    """BD-rates between all curves that are listed and have several points."""
    listed = [c for c in curves if c.listed and len(c.points()[0]) > 1]
    return {"names": [c.name for c in listed],
            "values": {key: deltas.matrix(listed, key) for key in qualities}}


def _drop_last(pictures: dict[str, Any]) -> str:
    """Remove the last image and return its name."""
    name: str = pictures["images"].pop()["name"]
    for codec in pictures["codecs"]:
        for point in codec["points"]:
            point["views"].pop()
    return name
