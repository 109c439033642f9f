"""Compare results JSONs in a Markdown table and a rate-distortion plot.

    python -m common.evaluation.compare --published P.json --results A.json B.json [--plot rd.png]

The `published.json` of a paper's folder holds {"dataset", "units", "reference", "curves": [...]}.
Each curve has the form of a results JSON; "reference" names the one to compare with. Published
curves are only shown beside results on the images that "dataset" names.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

from common import UserError, cli, data, metrics
from common.evaluation import classical, image_sets
from common.evaluation.curve_values import (
    Results,
    difference,
    entry,
    label,
    markdown,
    nearest,
    number,
    psnr_at,
    rates_and_psnrs,
)
from common.evaluation.results import MEASURES, load_published, load_results, save_results
from common.files import refuse_folder, write_atomic

from PIL import Image

CLASSICAL = Path(__file__).parents[1] / "results" / "classical.json"  # by `make compare`
PUBLISHED_MARKERS = "+x1234|_"  # of bare lines, so that no published curve looks measured
DPI, COLOURS = 150, 128  # of a plot as PNG


class Others(NamedTuple):
    """The curves that results are compared with, all measured on the same images."""

    published: list[Results]  # the first one is the reference
    jpeg: Results
    note: str  # a line on what is left out and why, or ""


def others(results: list[Results], published: Path | None, images: list[Path]) -> Others:
    """JPEG measured on `images`, and those curves of a published.json that are of these images.

    Raises UserError if a result states that it was measured on other images.
    """
    curves = load_published(published) if published and published.exists() else []
    jpeg = classical.jpeg(images, ms_ssim=False)
    folder = images[0] if len(images) == 1 else images[0].parent
    stated = {curve["name"]: image_sets.digest_of(curve) for curve in results}
    for name, digest in stated.items():
        if digest not in (None, image_sets.digest_of(jpeg)):
            raise UserError(f"{name}: was measured on {image_sets.title(digest)}, not on {folder}: "
                            "name the folder of its images with --dataset")
    note = image_sets.why_not(curves, jpeg)
    if published and not published.exists():
        note = f"{published}: no published results to compare with"
    if unknown := [name for name, digest in stated.items() if digest is None]:
        note = (f"{', '.join(unknown)} does not state its images (evaluate it again): published "
                f"curves are left out, and JPEG is measured on {folder}.")
    return Others([] if note else curves, jpeg, note)


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
    references = {f"dB above {jpeg['name']}": jpeg}
    if published:
        references["dB above ref."] = published[0]
    rates = [rate for r in results for rate in r["results"]["bpp"]]
    lines = [["codec", "bpp", "PSNR", "MS-SSIM", *references, "encode s", "decode s"]]
    for curve in [*results, *published]:
        values = curve["results"]
        for i, rate in enumerate(values["bpp"]):
            if curve in published and rate not in nearest(values["bpp"], rates):
                continue
            psnr = values["psnr-rgb"][i]
            above = [difference(psnr, psnr_at(other, rate)) for other in references.values()]
            get = {key: entry(values, key, i) for key in MEASURES}
            lines.append([label(curve, i), f"{rate:.4f}", number(psnr, ".2f"),
                          number(get["ms-ssim-rgb"], ".4f"), *(number(a, "+.2f") for a in above),
                          number(get["encoding_time"], ".3f"),
                          number(get["decoding_time"], ".3f")])
    notes = (f"ref.: {published[0]['name']}; dB at equal rate. Published times are those of the "
             "publishers' machines." if published else "dB at equal rate.")
    return f"{markdown(lines)}\n\n{notes}"


def _same_rate(results: list[Results], others: list[Results]) -> str:
    """A row per operating point of ours, with the PSNR of all other curves at its rate."""
    lines = [["PSNR at the same rate", "bpp", "this", *(c["name"] for c in others)]]
    for curve in results:
        for i, rate in enumerate(curve["results"]["bpp"]):
            psnrs = [curve["results"]["psnr-rgb"][i], *(psnr_at(c, rate) for c in others)]
            lines.append([label(curve, i), f"{rate:.4f}", *(number(p, ".2f") for p in psnrs)])
    return markdown(lines)


def _bd_rates(results: list[Results], reference: Results) -> str:
    """A line with the BD-rate of each curve of ours that has several points."""
    lines = []
    for curve in results:
        if len(curve["results"]["bpp"]) > 1:
            value = metrics.bd_rate(*rates_and_psnrs(reference), *rates_and_psnrs(curve))
            text = "no common range of PSNR" if value is None else f"{value:+.1f} %"
            lines.append(f"BD-rate of {curve['name']} against {reference['name']}: {text}")
    return "\n".join(lines)


def webp(digest: str | None) -> list[Results]:
    """The WebP curve on record for a set of images, or nothing if there is none."""
    known = load_published(CLASSICAL) if CLASSICAL.exists() else []
    return [curve for curve in known
            if curve["name"] == "WebP" and digest == image_sets.digest_of(curve) is not None]


def plot(results: list[Results], published: list[Results], jpeg: Results,
         path: str | Path) -> None:
    """Write a PNG with all curves: ours solid, published ones dotted, JPEG and WebP dashed.

    WebP is shown where it is on record for the images of JPEG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    rates = [rate for r in results for rate in r["results"]["bpp"]]
    for i, (curve, color) in enumerate(
            zip(published, matplotlib.color_sequences["Dark2"] * 9, strict=False)):
        axes.plot(*rates_and_psnrs(curve), ":", marker=PUBLISHED_MARKERS[i % 8], linewidth=1.3,
                  color=color, label=f"{curve['name']}, published")
    classical = [jpeg, *webp(image_sets.digest_of(jpeg))]
    for curve, color, marker in zip(classical, ("0.3", "0.55"), "os", strict=False):
        axes.plot(*rates_and_psnrs(curve), "--", color=color, linewidth=1.2, marker=marker,
                  markersize=4, markerfacecolor="none", label=f"{curve['name']}, measured")
    for i, curve in enumerate(results):
        axes.plot(*rates_and_psnrs(curve), marker="osD^v"[i % 5], markersize=7, linewidth=2.5,
                  zorder=3, color=matplotlib.color_sequences["tab10"][(3, 0, 2, 4, 1)[i % 5]],
                  label=label(curve, 0) if len(curve["results"]["bpp"]) == 1 else curve["name"])
    right = max([2 * max(rates), 1.0])
    visible = [p for c in [*results, *published, *classical]
               for b, p in zip(*rates_and_psnrs(c), strict=True) if b <= right]
    axes.set(xlim=(0, right), ylim=(min(visible) - 0.5, max(visible) + 0.5),
             xlabel="bits per pixel (whole file)", ylabel="PSNR (dB), RGB, 8 bit",
             title=f"{image_sets.title(image_sets.digest_of(results[0]))}, mean")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure in the format given by the file name, and close it.

    A PNG is reduced to 128 colours, which looks the same and takes a third of the space.
    """
    from matplotlib import pyplot as plt

    refuse_folder(path)
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"cannot write {path}: name a plot .png, .pdf or .svg")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format=kind)
    plt.close(figure)
    if kind == "png":
        plot = Image.open(buffer).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        plot.save(buffer, kind, optimize=True, dpi=(DPI, DPI))
    write_atomic(path, buffer.getvalue())


def distinct(*choices: list[str]) -> list[str]:
    """The first list of names without duplicates, or the last list if there is none."""
    return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def report(results: list[Results], published: Path, paths: list[Path], folder: Path,
           name: str) -> None:
    """Write <name>-<curve>.json, <name>-<curve>.csv and rd.png into `folder`; print the table.

    published: a paper's published.json; paths: the images that were coded.
    """
    for curve in results:
        stem = f"{name}-{curve['name']}".replace(" ", "-")
        save_results(folder / f"{stem}.json", curve)
        write_atomic(folder / f"{stem}.csv", _csv(curve).encode())
    curves, jpeg, note = others(results, published, paths)
    plot(results, curves, jpeg, folder / "rd.png")
    print(table(results, curves, jpeg) + f"\n{note}\n" * bool(note), end="")
    print(f"\nresults: {folder / name}-*; plot: {folder / 'rd.png'}")


def _csv(curve: Results) -> str:
    """The table of the seminar: a row per operating point, with means over the images."""
    lines = ["lmbda,bits,bpp,psnr,ms-ssim,time(enc),time(dec)"]
    for i, rows in enumerate(curve["per_image"]):
        bits = sum(8 * row["bytes"] for row in rows) / len(rows)
        values = [entry(curve["meta"], "lmbda", i), bits,
                  *(curve["results"][key][i] for key in MEASURES[:5])]
        lines.append(",".join("" if v is None else f"{v:.8g}" for v in values))
    return "\n".join(lines) + "\n"


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
    if args.published:
        load_published(args.published)  # which must exist
    published, jpeg, note = others(results, args.published, data.list_images(args.dataset))
    print(table(results, published, jpeg) + f"\n{note}\n" * bool(note), end="")
    if args.plot:
        plot(results, published, jpeg, args.plot)
        print(f"\nplot: {args.plot}")


if __name__ == "__main__":
    cli.run(main)
