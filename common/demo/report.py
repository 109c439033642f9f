"""What was measured, as HTML for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from common.demo.coding import Result

MANY = 12  # steps of y from which on they are added up in groups


class Row(NamedTuple):
    """A line of a table; that of a sum, whose parts follow, has no bar."""

    name: str
    value: float
    text: str
    is_sum: bool = False


def message(text: str, kind: str = "note") -> str:
    """A paragraph above the results; kind: "note" or "error"."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="{kind}" role="{role}">{escape(text)}</p>'


def numbers(result: Result) -> str:
    """Size, rate and quality of a file."""
    height, width = result.original.shape[-2:]
    similarity = result.ms_ssim
    facts = {"file": f"{len(result.file):,} bytes", "rate": f"{result.bpp:.4f} bpp",
             "PSNR": f"{result.psnr:.2f} dB", "MS-SSIM": _similarity(similarity),
             "image": f"{width}x{height}"}
    if result.rate:
        name, _, value = result.rate.partition(" ")
        facts[name] = value
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
                    for name, text in facts.items())
    return f'<dl class="numbers">{cells}</dl>'


def _similarity(value: float) -> str:
    if math.isnan(value):
        return "needs 161 pixels a side"
    return f"{value:.4f}" + (f" ({-10 * math.log10(1 - value):.2f} dB)" if value < 1 else "")


def times(result: Result) -> str:
    """Seconds by stage; "rest" is what belongs to none: padding, rounding, header, checksum."""
    rows = [_seconds("read the image", result.seconds["read"])]
    for name, parts in (("compress", result.compress), ("decompress", result.decompress)):
        whole = result.seconds[name]
        rows.append(_seconds(name, whole, is_sum=True))
        rows += [_seconds(stage, parts[stage]) for stage in _order(parts, name == "compress")]
        rows.append(_seconds("rest", max(0.0, whole - sum(parts.values()))))
    return table("Time by stage", "seconds", rows)


def _order(parts: dict[str, float], forward: bool) -> list[str]:
    """The stages in the order of coding, or of decoding."""
    order = ["g_a", "h_a", "entropy parameters", "entropy coding", "g_s"]
    if not forward:
        order[2:4] = order[3:1:-1]
    return [name for name in order if name in parts]


def _seconds(name: str, value: float, is_sum: bool = False) -> Row:
    return Row(name, value, f"{value:.3f}", is_sum)


def rate(bits: dict[str, Any], size: int) -> str:
    """The bytes of a file of `size` bytes by what they are for."""
    rows: list[tuple[str, float]] = [("header and checksum", bits["header"])]
    rows += [(name, bits[name]) for name in bits
             if name not in ("header", "y", "step", "coder", "map")]
    rows += [*steps(bits["y"], bits["step"]), ("coder, beyond the estimate", bits["coder"])]
    return table("Where the bytes of the file go", "bytes", [
        Row(name, value, f"{value:,.0f} ({100 * value / size:.1f} %)") for name, value in rows])


def steps(values: Sequence[float], name: str) -> list[tuple[str, float]]:
    """Bytes of y by its steps; more than MANY of them in groups of neighbours."""
    if len(values) == 1:
        return [("y", values[0])]
    count = min(len(values), MANY)
    rows = []
    for i in range(count):
        first, end = (len(values) * k // count for k in (i, i + 1))
        many = f"{name}s {first + 1} to {end}" if end - first > 1 else f"{name} {first + 1}"
        rows.append((f"y, {many}", sum(values[first:end])))
    return rows


def table(title: str, unit: str, rows: Sequence[Row]) -> str:
    """A table of values, with a bar for each."""
    most = max([row.value for row in rows if not row.is_sum])
    lines = []
    for row in rows:
        width = 0 if row.is_sum else 100 * max(row.value, 0) / max(most, 1e-9)
        lines.append(f'<tr{" class=sum" if row.is_sum else ""}>'
                     f'<th scope="row">{escape(row.name)}</th><td>{escape(row.text)}</td>'
                     f'<td><span class="bar" style="width:{width:.1f}%"></span></td></tr>')
    return (f'<table class="bars"><caption>{escape(title)} ({escape(unit)})</caption>'
            f'<tbody>{"".join(lines)}</tbody></table>')
