"""Compare results JSONs in a Markdown table and a rate-distortion plot.

    python -m common.evaluation.compare --published P.json --results A.json B.json [--plot rd.png]

The `published.json` of a paper's folder holds {"dataset", "units", "reference", "curves": [...]}.
Each curve has the form of a results JSON; "reference" names the one to compare with.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from common import UserError, cli, data, metrics
from common.evaluation import classical
from common.evaluation.results import MEASURES, load_published, load_results, save_results
from common.files import refuse_folder, write_atomic

Results = dict[str, Any]


def table(results: list[Results], published: list[Results], jpeg: Results) -> str:
    """Markdown tables of operating points and of the PSNR at our rates, and BD-rates.

    results: our curves; published: published curves, the first one is the reference; jpeg: measured
    on the same images. PSNR between two points is interpolated (PCHIP over log rate); "-" where a
    curve does not reach the rate.
    """
    parts = [_points(results, published, jpeg), _same_rate(results, [*published, jpeg])]
    parts += [_bd_rates(results, published[0])] if published else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _points(results: list[Results], published: list[Results], jpeg: Results) -> str:
    """A row per operating point; of the published points, only those nearest to our rates."""
    reference = published[0] if published else jpeg
    rates = [rate for r in results for rate in r["results"]["bpp"]]
    lines = [["codec", "bpp", "PSNR", "MS-SSIM", f"dB above {jpeg['name']}", "dB above ref.",
              "encode s", "decode s"]]
    for curve in [*results, *published]:
        values = curve["results"]
        for i, rate in enumerate(values["bpp"]):
            if curve in published and rate not in _nearest(values["bpp"], rates):
                continue
            psnr = values["psnr-rgb"][i]
            above = [_minus(psnr, _psnr_at(other, rate)) for other in (jpeg, reference)]
            get = {key: _at(values, key, i) for key in MEASURES}
            lines.append([_label(curve, i), f"{rate:.4f}", _number(psnr, ".2f"),
                          _number(get["ms-ssim-rgb"], ".4f"), *(_number(a, "+.2f") for a in above),
                          _number(get["encoding_time"], ".3f"),
                          _number(get["decoding_time"], ".3f")])
    return (f"{_markdown(lines)}\n\nref.: {reference['name']}; dB at equal rate. Published times "
            "are those of the publishers' machines.")


def _same_rate(results: list[Results], others: list[Results]) -> str:
    """A row per operating point of ours, with the PSNR of all other curves at its rate."""
    lines = [["PSNR at the same rate", "bpp", "this", *(c["name"] for c in others)]]
    for curve in results:
        for i, rate in enumerate(curve["results"]["bpp"]):
            psnrs = [curve["results"]["psnr-rgb"][i], *(_psnr_at(c, rate) for c in others)]
            lines.append([_label(curve, i), f"{rate:.4f}", *(_number(p, ".2f") for p in psnrs)])
    return _markdown(lines)


def _bd_rates(results: list[Results], reference: Results) -> str:
    """A line with the BD-rate of each curve of ours that has several points."""
    lines = []
    for curve in results:
        if len(curve["results"]["bpp"]) > 1:
            value = metrics.bd_rate(*_curve(reference), *_curve(curve))
            text = "no common range of PSNR" if value is None else f"{value:+.1f} %"
            lines.append(f"BD-rate of {curve['name']} against {reference['name']}: {text}")
    return "\n".join(lines)


def plot(results: list[Results], published: list[Results], jpeg: Results,
         path: str | Path) -> None:
    """Write a PNG with all curves: ours thick, published ones thin, JPEG dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    rates = [rate for r in results for rate in r["results"]["bpp"]]
    for curve, color in zip(published, matplotlib.color_sequences["Set2"] * 9, strict=False):
        axes.plot(*_curve(curve), marker=".", linewidth=1.2, color=color, label=curve["name"])
    axes.plot(*_curve(jpeg), "--", color="0.4", linewidth=1.2, label=f"{jpeg['name']}, measured")
    for i, curve in enumerate(results):
        axes.plot(*_curve(curve), marker="osD^v"[i % 5], markersize=7, linewidth=2.5, zorder=3,
                  color=matplotlib.color_sequences["tab10"][(3, 0, 2, 4, 1)[i % 5]],
                  label=_label(curve, 0) if len(curve["results"]["bpp"]) == 1 else curve["name"])
    right = max([2 * max(rates), 1.0])
    visible = [p for c in [*results, *published, jpeg] for b, p in zip(*_curve(c), strict=True)
               if b <= right]
    axes.set(xlim=(0, right), ylim=(min(visible) - 0.5, max(visible) + 0.5),
             xlabel="bits per pixel (whole file)", ylabel="PSNR (dB), RGB, 8 bit",
             title=f"{_at(results[0].get('meta', {}), 'images', 0) or ''} test images, mean")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure in the format given by the file name, and close it."""
    from matplotlib import pyplot as plt

    refuse_folder(path)
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"cannot write {path}: name a plot .png, .pdf or .svg")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format=kind)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def distinct(*choices: list[str]) -> list[str]:
    """The first list of names without duplicates, or the last list if there is none."""
    return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def report(results: list[Results], published: Path, paths: list[Path], folder: Path,
           name: str) -> None:
    """Write <name>-<curve>.json, <name>-<curve>.csv and rd.png into `folder`; print the table.

    published: a paper's published.json; paths: the images that were coded.
    """
    if published.exists():
        curves = load_published(published)
    else:
        curves = []
        print(f"{published}: no published results to compare with")
    jpeg = classical.jpeg(paths, ms_ssim=False)
    for curve in results:
        stem = f"{name}-{curve['name']}".replace(" ", "-")
        save_results(folder / f"{stem}.json", curve)
        write_atomic(folder / f"{stem}.csv", _csv(curve).encode())
    plot(results, curves, jpeg, folder / "rd.png")
    print(table(results, curves, jpeg), end="")
    print(f"\nresults: {folder / name}-*; plot: {folder / 'rd.png'}")


# -------------------------------------------------------------------------------------- helpers
def _csv(curve: Results) -> str:
    """The table of the seminar: a row per operating point, with means over the images."""
    lines = ["lmbda,bits,bpp,psnr,ms-ssim,time(enc),time(dec)"]
    for i, rows in enumerate(curve["per_image"]):
        bits = sum(8 * row["bytes"] for row in rows) / len(rows)
        values = [_at(curve["meta"], "lmbda", i), bits,
                  *(curve["results"][key][i] for key in MEASURES[:5])]
        lines.append(",".join("" if v is None else f"{v:.8g}" for v in values))
    return "\n".join(lines) + "\n"


def _curve(curve: Results) -> tuple[list[float], list[float]]:
    """Rates and PSNRs, without points of infinite PSNR (identical images, null in JSON)."""
    points = [(b, p) for b, p in zip(curve["results"]["bpp"], curve["results"]["psnr-rgb"],
                                     strict=True) if p is not None and math.isfinite(p)]
    return [b for b, _ in points], [p for _, p in points]


def _psnr_at(curve: Results, rate: float) -> float | None:
    return metrics.interpolate(*_curve(curve), rate)


def _nearest(points: list[float], rates: list[float]) -> set[float]:
    """Those of the rates `points` that are nearest, in ratio, to one of `rates`."""
    return {min(points, key=lambda point: abs(math.log(point / rate))) for rate in rates}


def _at(block: dict[str, Any], key: str, i: int) -> Any:
    """Entry of operating point i; a value that is not a list applies to all points."""
    value = block.get(key)
    return value[i] if isinstance(value, list) else value


def _label(curve: Results, i: int) -> str:
    """Name of an operating point, with lmbda, widths and length of training."""
    meta = {key: _at(curve.get("meta", {}), key, i)
            for key in ("lmbda", "N", "M", "quality", "steps", "steps_source")}
    notes = [f"{key} {meta[key]}" for key in ("lmbda", "quality") if meta[key] is not None]
    if meta["N"]:
        notes.append(f"N={meta['N']}, M={meta['M']}")
    if meta["steps"]:
        of = f" of {_count(meta['steps_source'])}" if meta["steps_source"] else ""
        notes.append(f"{_count(meta['steps'])}{of} steps")
    return f"{curve['name']} ({'; '.join(notes)})" if notes else curve["name"]


def _count(number: int) -> str:
    return f"{number / 1e6:g} M" if number % 100_000 == 0 else f"{number:,}"


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _markdown(lines: list[list[str]]) -> str:
    """Rows of cells, the first one is the head, as a table; the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    rows = [[line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:],
                                                                   strict=True))]
            for line in (lines[0], rule, *lines[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, nargs="+", required=True,
                        help="results JSONs of eval.py")
    parser.add_argument("--published", type=Path, help="published.json of a paper's folder")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    parser.add_argument("--dataset", type=Path, default=data.KODAK,
                        help="folder of the images of the results; JPEG is measured on them")
    args = parser.parse_args(argv)
    results = [load_results(path) for path in args.results]
    pairs = list(zip(args.results, results, strict=True))
    names = distinct([r["name"] for r in results],
                     [f"{p.resolve().parents[1].name} {r['name']}" for p, r in pairs],
                     [str(p) for p in args.results])
    for result, name in zip(results, names, strict=True):
        result["name"] = name
    published = load_published(args.published) if args.published else []
    jpeg = classical.jpeg(data.list_images(args.dataset), ms_ssim=False)
    print(table(results, published, jpeg), end="")
    if args.plot:
        plot(results, published, jpeg, args.plot)
        print(f"\nplot: {args.plot}")


if __name__ == "__main__":
    cli.run(main)
