"""A colour and a marker for each curve: no two share both, and the three kinds differ by eye.

Measured curves of ours are solid with filled markers, classical codecs dashed with open ones, and
published curves dotted and thin with markers of bare lines. A paper's curves share a hue.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

from common.comparison.gather import Curve, Kind

# for each kind: the names in matplotlib and in Plotly, and a character that looks like it
MARKERS: dict[Kind, Sequence[tuple[str, str, str]]] = {
    "ours": [("o", "circle", "●"), ("s", "square", "■"), ("D", "diamond", "◆"),
             ("^", "triangle-up", "▲"), ("v", "triangle-down", "▼"), ("P", "cross", "✚"),
             ("X", "x", "✖"), ("p", "pentagon", "⬟"), ("*", "star", "★"), ("h", "hexagon", "⬢")],
    "classical": [("o", "circle-open", "○"), ("s", "square-open", "□"),
                  ("D", "diamond-open", "◇"), ("^", "triangle-up-open", "△"),
                  ("v", "triangle-down-open", "▽"), ("<", "triangle-left-open", "◁"),
                  (">", "triangle-right-open", "▷"), ("p", "pentagon-open", "⬠"),
                  ("h", "hexagon-open", "⬡")],
    "published": [("+", "cross-thin-open", "+"), ("x", "x-thin-open", "×"),
                  ("1", "y-down-open", "Y"), ("2", "y-up-open", "⅄"), ("3", "y-left-open", "≻"),
                  ("4", "y-right-open", "≺"), ("|", "line-ns-open", "|"),
                  ("_", "line-ew-open", "–")],
}
LINES: dict[Kind, tuple[str, str, float]] = {  # in matplotlib, in Plotly, width
    "ours": ("-", "solid", 2.2), "classical": ("--", "dash", 1.5), "published": (":", "dot", 1.2)}
GOLDEN = 0.618034  # of a turn; consecutive hues are far apart


@dataclass(frozen=True)
class Style:
    color: str  # #rrggbb
    marker: str  # matplotlib
    symbol: str  # Plotly
    glyph: str
    line: str  # matplotlib
    dash: str  # Plotly
    width: float


def styles(curves: Sequence[Curve]) -> list[Style]:
    """The style of each curve; those that are shown at first take the first of their kind."""
    hues = {paper: i for i, paper in enumerate(dict.fromkeys(
        curve.paper for curve in curves if curve.kind == "ours"))}
    numbers: dict[str, int] = {}  # curves so far of a paper, or of a kind
    used: set[str] = set()
    found: dict[int, Style] = {}
    for i in sorted(range(len(curves)), key=lambda i: not curves[i].shown):
        curve = curves[i]
        group = f"ours {curve.paper}" if curve.kind == "ours" else curve.kind
        number = numbers[group] = numbers.get(group, -1) + 1
        total = numbers[curve.kind + "s"] = numbers.get(curve.kind + "s", -1) + 1
        if curve.kind == "ours":
            hue, light, saturation = hues[curve.paper] / len(hues), 0.42 + 0.13 * (number % 3), 0.85
        elif curve.kind == "classical":
            hue, light, saturation = number * GOLDEN, 0.45, 0.22
        else:
            hue, light, saturation = 0.1 + number * GOLDEN, 0.55, 0.6
        while (color := _hex(hue, light, saturation)) in used:
            hue += 0.013
        used.add(color)
        marker, symbol, glyph = MARKERS[curve.kind][total % len(MARKERS[curve.kind])]
        found[i] = Style(color, marker, symbol, glyph, *LINES[curve.kind])
    return [found[i] for i in range(len(curves))]


def _hex(hue: float, light: float, saturation: float) -> str:
    parts = colorsys.hls_to_rgb(hue % 1, light, saturation)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)
