"""The comparison as Markdown: one row per curve, and one per operating point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.comparison import deltas, gather
from common.comparison.gather import KINDS, Curve
from common.evaluation.curve_values import count, markdown, number
from common.evaluation.further_metrics import METRICS

HEAD = ["curve", "from", "points", "bpp", "PSNR", "MS-SSIM", "BD-rate %", "overlap dB", "M param.",
        "GMAC", "GMAC thop", "encode s", "decode s", "hardware", "steps"]
MACS = ("GMAC: multiply-accumulates of a forward pass over one 768x512 image, with GDN, masked "
        "convolutions and attention, a transposed convolution counted per input pixel; \"thop\" "
        "counts as that tool does, per output pixel and without GDN and masked convolutions.")


def head(further: Sequence[str] = ()) -> list[str]:
    """HEAD with columns of further metrics after that of MS-SSIM."""
    at = HEAD.index("MS-SSIM") + 1
    return [*HEAD[:at], *(METRICS[key].name for key in further), *HEAD[at:]]


def classical_name(name: str) -> str:
    """Name of the measured curve of a classical codec; published ones have its bare name."""
    return f"{name} (measured)"


def macs(curve: Curve) -> tuple[float | None, float | None]:
    """Multiply-accumulates in 10^9: all of them, and as the tool thop counts."""
    if not curve.cost:
        return None, None
    kinds = ("true", "gdn", "masked", "products")
    return (sum(curve.cost[f"macs_{kind}"] for kind in kinds) / 1e9,
            curve.cost["macs_thop"] / 1e9)


def span(values: Sequence[float | None], form: str) -> str:
    """The range of the values: "0.24-0.37"; "-" if there are none."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "-"
    low, high = format(min(numbers), form), format(max(numbers), form)
    return low if low == high else f"{low}-{high}"


def steps(curve: Curve) -> str:
    """Training steps of the points, and those of the source's recipe."""
    known = sorted({s for s in curve.meta("steps") if s})
    if not known:
        return "-"
    words = count(known[0]) if len(known) == 1 else f"{count(known[0])}-{count(known[-1])}"
    source = next((s for s in curve.meta("steps_source") if s), None)
    return f"{words} of {count(source)}" if source else words


def hardware(curve: Curve) -> str:
    """Where the times were measured; for published curves, the publisher's machine."""
    named = next((h for h in [*curve.meta("hardware"), *curve.meta("device")] if h), None)
    if curve.kind == "published":
        return f"publisher's {named}" if named else "publisher's" if _timed(curve) else "-"
    return str(named) if named and _timed(curve) else "-"


def _timed(curve: Curve) -> bool:
    return any(v is not None for key in ("encoding_time", "decoding_time")
               for v in curve.values(key))


def curve_row(curve: Curve, anchor: Curve, further: Sequence[str] = ()) -> list[str]:
    """Cells of a curve's row, in the order of `head`."""
    found = None if curve is anchor else deltas.delta(anchor, curve)
    rate = "anchor" if curve is anchor else "-" if found is None else str(found)
    params = curve.cost.get("params_total")
    every, thop = macs(curve)
    return [curve.name, KINDS[curve.kind], str(len(curve.values("bpp"))),
            span(curve.values("bpp"), ".3f"), span(curve.values("psnr-rgb"), ".2f"),
            span(curve.values("ms-ssim-rgb"), ".4f"),
            *(span(curve.values(key), ".4f") for key in further), rate,
            found.overlap if found else "-", number(params and params / 1e6, ".2f"),
            number(every, ".1f"), number(thop, ".1f"), span(curve.values("encoding_time"), ".3f"),
            span(curve.values("decoding_time"), ".3f"), hardware(curve), steps(curve)]


def curves_table(curves: Sequence[Curve], anchor: Curve, further: Sequence[str] = ()) -> str:
    """A row per curve, and how its numbers are to be read."""
    rows = [head(further), *(curve_row(curve, anchor, further) for curve in curves)]
    return f"{markdown(rows)}\n\nAnchor: {anchor.name}. {deltas.METHOD}\n\n{MACS}"


def point_name(curve: Curve, i: int) -> str:
    """What tells a point from others of its curve: lmbda, level, quality."""
    keys: dict[str, str] = {"level": "level {}", "lmbda": "lmbda {:g}", "quality": "quality {}",
                            "compression ratio": "ratio {}", "QP": "QP {}"}
    words: list[str] = []
    for key, form in keys.items():
        value: Any = curve.meta(key)[i]
        if value is not None and (key != "quality" or curve.kind == "classical"):
            words.append(form.format(value))
    return ", ".join(words) or str(i + 1)


def points_table(curves: Sequence[Curve], further: Sequence[str] = ()) -> str:
    """A row per operating point."""
    rows = [["curve", "from", "point", "bpp", "PSNR", "MS-SSIM",
             *(METRICS[key].name for key in further), "encode s", "decode s"]]
    for curve in curves:
        keys = {"bpp": ".4f", "psnr-rgb": ".2f", "ms-ssim-rgb": ".4f",
                **dict.fromkeys(further, ".4f"), "encoding_time": ".3f", "decoding_time": ".3f"}
        columns = {key: curve.values(key) for key in keys}
        rows += [[curve.name, KINDS[curve.kind], point_name(curve, i),
                  *(number(columns[key][i], form) for key, form in keys.items())]
                 for i in range(len(columns["bpp"]))]
    return markdown(rows)


def checks(curves: Sequence[Curve]) -> list[str]:
    """Lines that compare the classical codecs measured here with published curves of them."""
    lines = []
    by_name = {(curve.kind, curve.name): curve for curve in curves}
    pairs = [(ours, theirs) for ours, names in gather.same_codecs().items() for theirs in names]
    for ours, theirs in pairs:
        a, b = by_name.get(("published", theirs)), by_name.get(("classical", classical_name(ours)))
        if a and b and (found := deltas.delta(a, b)):
            version = next((f" ({v})" for v in a.meta("version") if v and v != theirs), "")
            lines.append(f"{ours} measured here against the published {theirs}{version}: "
                         f"BD-rate {found} %, over {found.overlap} dB.")
    return lines
