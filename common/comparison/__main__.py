"""Compare all papers, classical codecs and published curves on the same images.

    python -m common.comparison                       Kodak; or  make compare
    python -m common.comparison --dataset DIR         any folder: bundled weights are coded on it
    python -m common.comparison --anchor "JPEG (measured)" --codecs jpeg webp

Writes compare.md, compare.png and compare.html, a page that works without a network, into the
folder of --into, and keeps there what was measured: a second call takes seconds.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from common import UserError, cli, data, pages
from common.comparison import front_page, gather, measured, own, page, plot, style, table, viewer
from common.comparison.gather import Curve
from common.datasets import Item
from common.evaluation import image_sets
from common.evaluation.classical import CODECS
from common.files import write_atomic
from common.image_check import find_unusable
from common.papers import ROOT

OPTIONAL = ("hevc", "vvc")  # minutes an image: only if they are asked for
VIEWED = 3  # images of the page


def flags() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", type=Path, default=data.KODAK, help="folder of test images")
    add("--into", type=Path, default=Path("output", "compare"),
        help="folder of table, plot, page and of what was measured")
    add("--results", type=Path, nargs="+", help="results JSONs of eval.py; if not given, those of "
        "the papers' folders, or on other images than Kodak those of the bundled weights")
    add("--anchor", help="name of the curve that BD-rates refer to; if not given, the reference of "
        "the published curves, or JPEG where these are of other images")
    add("--codecs", nargs="+", choices=[*CODECS, "all"],
        help="classical codecs to measure; if not given, all but " + " and ".join(OPTIONAL))
    add("--images", nargs="+", help=f"names of the images that the page shows; {VIEWED} of them if "
        "not given")
    add("--no-viewer", action="store_true",
        help="leave out the images of the page, and on Kodak the costs of the bundled weights")
    add("--publish", action="store_true",
        help="keep the results of the classical codecs, and write table and plot of the front page")
    add("--front-page", action="store_true",
        help="only write table and plot of the front page, from the results that are kept")
    add("--jobs", type=cli.positive_int, default=os.cpu_count() or 1,
        help="number of processes that code with classical codecs")
    add("--threads", type=cli.threads, default=0, help="number of CPU threads; 0 uses all")
    return parser


def usable_images(folder: Path, problems: list[str]) -> dict[Path, str]:
    """The images of a folder with their digests; broken ones are left out and named."""
    paths = data.list_images(folder, print)
    broken = find_unusable([Item(path) for path in paths], whole=folder != data.KODAK)
    problems += [f"{why}; it is left out" for why in broken.values()]
    good = [path for i, path in enumerate(paths) if i not in broken]
    if not good:
        raise UserError(f"{folder}: no image in it can be decoded")
    return {path: image_sets.image_digest(data.read_image(path, lambda _: None)) for path in good}


def viewed(images: dict[Path, str], names: list[str] | None) -> list[Path]:
    """The images of the page: those named, or a few of them."""
    if names:
        by_name = {key: path for path in images for key in (path.stem, path.name)}
        if unknown := [name for name in names if name not in by_name]:
            raise UserError(f"--images {unknown[0]}: there is no such image")
        return list(dict.fromkeys(by_name[name] for name in names))
    paths, number = list(images), min(VIEWED, len(images))
    return [paths[(4 * i + 3) * len(paths) // (4 * number)] for i in range(number)]


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    args = flags().parse_args(argv)
    if args.front_page:
        for problem in front_page.write(root):
            print(f"note: {problem}")
        return
    problems: list[str] = []
    images = usable_images(args.dataset, problems)
    digest = image_sets.set_digest(list(images.values()))
    title = image_sets.title(digest)
    official = digest in image_sets.KNOWN.values()
    if args.publish and not official:
        raise UserError(f"--publish: {title} do not belong on the front page")
    cache = args.into / "cache"
    shown_images = viewed(images, args.images)

    bundled: list[own.Bundled] = []
    if not (args.no_viewer and (official or args.results)):
        few = {path: images[path] for path in shown_images}
        bundled = own.code_all(root, few if official or args.results else images, cache, problems,
                               args.threads)
    if args.results:
        ours = gather.named_results(args.results, digest, problems)
    elif official:
        ours = gather.own_results(root, digest, problems)
    else:
        ours = [own.as_curve(curve) for curve in bundled]
    costs = own.costs(root, bundled, cache, problems)
    for curve in ours:
        known = [costs[f] for f in curve.meta("fingerprint") if f in costs]
        curve.cost = known[0] if known else {}

    codecs = [c for c in CODECS if c not in OPTIONAL] if args.codecs is None else (
        list(CODECS) if "all" in args.codecs else args.codecs)
    found = measured.measure_all(images, cache, codecs, problems, args.jobs)
    classical = [Curve(table.classical_name(curve["name"]), "classical", curve)
                 for curve in found.values()]
    published = gather.published(root, digest, problems)
    curves = [*ours, *classical, *published]
    if not curves:
        raise UserError("there is no curve to compare: " + "; ".join(problems))
    anchor = gather.find(curves, args.anchor) if args.anchor else default_anchor(curves)

    if not published:
        problems.append(f"published curves are left out: they are not of these images ({title})")
    styles = style.styles(curves)
    plot.plot(curves, styles, f"{title}, mean", args.into / "compare.png")
    checks = table.checks(curves)
    summary = table.curves_table([c for c in curves if c.shown], anchor)
    write_atomic(args.into / "compare.md", "\n\n".join([
        f"# {title}: comparison", summary, *checks,
        "## Operating points, ours and classical codecs",
        table.points_table([c for c in curves if c.kind != "published"]),
        "## All published curves",
        table.curves_table([c for c in curves if c.kind == "published"], anchor)
        if published else "None of these images.",
        "## Left out", "\n".join(f"- {problem}" for problem in problems) or "Nothing.",
        ""]).encode())
    print(summary, *checks, sep="\n\n")
    if args.publish:
        front_page.save_classical(root, classical)
        front_page.write(root)
    written = ["compare.md", "compare.png"]
    if not pages.missing():
        pictures = (None if args.no_viewer else
                    viewer.pictures(shown_images, bundled, found, cache, problems))
        page.write(args.into / "compare.html", title, curves, styles, anchor, pictures,
                   [*checks, *problems])
        written.append("compare.html")
    else:
        problems.append(f"compare.html is not written: {pages.missing()}")
    for problem in problems:
        print(f"note: {problem}")
    print(f"\n{', '.join(str(args.into / name) for name in written)}")


def default_anchor(curves: list[Curve]) -> Curve:
    """The reference of the published curves; otherwise the first classical codec."""
    for kind in ("published", "classical"):
        if named := [curve for curve in curves if curve.kind == kind]:
            return named[0]
    return curves[0]


if __name__ == "__main__":
    cli.run(main)
