"""Publish a results JSON of eval.py: results/<curve>.json, plot, picture, and rows of the READMEs.

    python -m common.recipes.pages hyperprior small hyperprior/ckpts/weights/small/results/FILE.json

The rows of the curve are replaced in the table between `<!-- results: small -->` and `<!-- end of
results -->` of the paper's README, and those of the paper (of the curve "small" only) in the table
between `<!-- results -->` and `<!-- end of results -->` of RESULTS.md. Other rows are kept; a table
of several curves names them all, as in `<!-- results: small-v2, small-v3 -->`. The last column of
these tables is the PSNR of the reference that the paper's published.json names.
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import Any

from common import UserError, cli, data
from common.evaluation import compare, image_sets
from common.evaluation.curve_values import difference, entry, number, psnr_at
from common.evaluation.results import MEASURES, load_results, save_results
from common.files import write_atomic
from common.papers import ROOT
from common.recipes import picture
from common.recipes.recipe_file import read_recipe

END = "<!-- end of results -->"


def cells(results: dict[str, Any], reference: dict[str, Any] | None, jpeg: dict[str, Any]
          ) -> list[dict[str, str]]:
    """Cells of a row for each operating point, by the first words of the heads of their columns."""
    points = []
    for i, rate in enumerate(results["results"]["bpp"]):
        values = {key: entry(results["results"], key, i) for key in MEASURES}
        meta = {key: entry(results["meta"], key, i) for key in ("N", "M", "steps", "lmbda")}
        psnr = values["psnr-rgb"]
        above = difference(psnr, psnr_at(jpeg, rate))
        points.append({
            "lmbda": "" if meta["lmbda"] is None else f"{meta['lmbda']:g}",
            "widths": f"{meta['N']}, {meta['M']}" if meta["N"] else "",
            "steps": f"{meta['steps']:,}" if meta["steps"] else "",
            "bpp": f"{rate:.4f}", "PSNR": number(psnr, ".2f"),
            "MS-SSIM": number(values["ms-ssim-rgb"], ".4f"),
            "above JPEG": "-" if above is None else f"{above:+.2f} dB",
            "reference": number(psnr_at(reference, rate) if reference else None, ".2f")})
    return points


def replace(page: str, begin: str, name: str, labels: list[str], points: list[dict[str, str]]
            ) -> tuple[str, list[str]]:
    """Return the page with these points instead of the rows `name` or `name, ...`, and new rows.

    A table must follow the line `begin`; otherwise the page is unchanged. Its last column is that
    of the reference.
    """
    before, found, rest = page.partition(f"{begin}\n")
    table, end, after = rest.partition(END)
    lines = table.strip().splitlines() if found and end else []
    head = ([cell.strip() for cell in lines[0].strip("| ").split("|")] if lines else
            ["codec", "widths", "steps", "bpp", "PSNR", "MS-SSIM", "above JPEG", "reference"])
    rows = []
    for label, point in zip(labels, points, strict=True):
        known = {"codec": label, **point, head[-1]: point["reference"]}
        rows.append([next((known[key] for key in known if column.startswith(key)), "")
                     for column in head])
    texts = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return page, texts
    mine = re.compile(rf"\| {re.escape(name)}( \([^|]*\))?(,(?! quick\b)| \|)")
    old = [i for i, line in enumerate(lines) if mine.match(line)]
    place = old[0] if old else 2  # below the head of the table
    kept = [line for i, line in enumerate(lines) if i not in old]
    lines = [*kept[:place], *texts, *kept[place:]]
    return f"{before}{found}\n" + "\n".join(lines) + f"\n\n{end}{after}", texts


def begin_of(name: str) -> str:
    """The line above the table `name` of a page."""
    return f"<!-- results: {name} -->"


def marker(page: str, curve: str) -> str:
    """The line above the table of a curve, which may name other curves, too."""
    line = begin_of(r"([\w, -]+)")
    tables = re.findall(f"^{line}$", page, re.M)
    return begin_of(next((names for names in tables if curve in names.split(", ")), curve))


def check_official(paper: str, digest: str | None) -> None:
    """Raise UserError if results on these images do not belong into the tables of the READMEs."""
    if digest not in image_sets.KNOWN.values():
        raise UserError(f"{paper}: results on {image_sets.title(digest)} do not go to the tables "
                        f"of {', '.join(image_sets.KNOWN)}: name another folder with --into")


def labels(recipe: Path, paper: str, results: dict[str, Any]) -> list[str]:
    """Name of each operating point on the front page, by the "label" in weights.yaml."""
    curve, meta = results["name"], results["meta"]
    options = read_recipe(recipe)["curves"].get(curve, {}) if recipe.exists() else {}
    try:
        return [options.get("label", paper).format(**{key: entry(meta, key, i) for key in meta})
                for i in range(len(results["results"]["bpp"]))]
    except (IndexError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{recipe}: curves: {curve}: label does not fit the results "
                        f"({type(e).__name__}: {e})") from None


def publish(root: Path, paper: str, results: dict[str, Any], into: Path | None,
            images: list[Path], output: Path | None = None) -> Path:
    """Write results and plot to `into` and return it; by default to the paper's results/, and then
    the rows to the READMEs, too, which takes results on a known set of images.

    output: eval.py's folder of files and decoded images, if there is one, for the picture.
    """
    curve, official = results["name"], root / paper / "results"
    into = into or official
    if into.resolve() == official.resolve():
        check_official(paper, image_sets.digest_of(results))
        front = labels(root / paper / "weights.yaml", paper, results)
    published, jpeg, note = compare.others([results], official / "published.json", images)
    if note:
        print(note.replace(f"{root}/", ""))
    points = cells(results, published[0] if published else None, jpeg)
    save_results(into / f"{curve}.json", results)
    compare.plot([results], published, jpeg, into / f"{curve}.png")
    if output:
        picture.write(into / f"{curve}-picture.webp", results, output, images)
    if into.resolve() != official.resolve():
        return into
    readme = root / paper / "README.md"
    places = [(readme, marker(readme.read_text(), curve), curve,
               [f"{curve}, lmbda {point['lmbda']}" if point["lmbda"] else curve
                for point in points], points)]
    if curve == "small":  # the curve that `make compare` shows
        places.append((root / "RESULTS.md", "<!-- results -->", paper, front, points))
    lock = os.open(root, os.O_RDONLY)  # other processes may write to RESULTS.md, too
    fcntl.flock(lock, fcntl.LOCK_EX)
    for path, begin, name, names, listed in places:
        page = path.read_text()
        new, rows = replace(page, begin, name, names, listed)
        if new != page:
            write_atomic(path, new.encode())
        if any(row not in new for row in rows):
            print(f"{path.relative_to(root)} has no table after {begin}; its rows would be:",
                  *rows, sep="\n")
    os.close(lock)
    return into


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("paper")
    parser.add_argument("curve")
    parser.add_argument("results", type=Path, help="results JSON of eval.py")
    parser.add_argument("--into", type=Path,
                        help="folder to write to; the paper's results/ if not given")
    parser.add_argument("--dataset", type=Path, default=data.KODAK,
                        help="folder of the images of the results; JPEG is measured on them")
    parser.add_argument("--output", type=Path,
                        help="folder of eval.py's files and decoded images, to make a picture of")
    args = parser.parse_args(argv)
    results = load_results(args.results) | {"name": args.curve}
    publish(root, args.paper, results, args.into, data.list_images(args.dataset), args.output)


if __name__ == "__main__":
    cli.run(main)
