"""Compare all papers, classical codecs and published curves on the same images.

    python -m common.comparison                       Kodak; or  make compare
    python -m common.comparison --dataset DIR         any folder: bundled weights are coded on it
    python -m common.comparison --anchor "JPEG (measured)" --codecs jpeg webp

Writes compare.md, compare.json, compare.png and compare.html, a page that works without a network,
into the folder of --into, and keeps there what was measured: a second call takes seconds.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import UserError, cli, data, html_page
from common.comparison import front_page, gather, measured, own, page, plot, style, table, viewer
from common.comparison.gather import Curve, Kind
from common.datasets import Item
from common.evaluation import further_metrics, image_sets
from common.evaluation.classical import CODECS
from common.evaluation.further_metrics import METRICS
from common.evaluation.results import format_json
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
    add("--metrics", default="", help="metrics besides PSNR and MS-SSIM: " + ", ".join(METRICS)
        + ", with commas between them, or all; on Kodak, the bundled weights then code all images")
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


@dataclass
class Comparison:
    """What is compared: images with their digests, and everything that was measured on them.

    bundled: our weights, coded on some or all images; classical: results by names in CODECS;
    further: keys of `further_metrics`.
    """

    root: Path
    images: dict[Path, str]
    cache: Path
    problems: list[str]
    further: list[str]
    bundled: list[own.Bundled] = field(default_factory=list)
    classical: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return image_sets.set_digest(list(self.images.values()))

    @property
    def title(self) -> str:
        return image_sets.title(self.digest)

    @property
    def official(self) -> bool:
        return self.digest in image_sets.KNOWN.values()

    def of_kind(self, kind: Kind) -> list[Curve]:
        return [curve for curve in self.curves if curve.kind == kind]


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    args = flags().parse_args(argv)
    if args.front_page:
        for problem in front_page.write(root):
            print(f"note: {problem}")
        return
    found = begin(args, root)
    shown = viewed(found.images, args.images)
    code_own(found, args, shown)
    found.curves += own_curves(found, args.results)
    measure_classical(found, args.codecs, args.jobs)
    found.curves += gather.published(root, found.digest, found.problems)
    if not found.curves:
        raise UserError("there is no curve to compare: " + "; ".join(found.problems))
    anchor = gather.find(found.curves, args.anchor) if args.anchor else default_anchor(found.curves)
    checks = write_tables(found, anchor, args.into)
    if args.publish:
        front_page.save_classical(root, found.of_kind("classical"))
        front_page.write(root)
    written = ["compare.md", "compare.json", "compare.png"]
    styles = style.styles(found.curves)
    plot.plot(found.curves, styles, f"{found.title}, mean", args.into / "compare.png")
    if need := html_page.missing():
        found.problems.append(f"compare.html is not written: {need}")
    else:
        pictures = None if args.no_viewer else viewer.pictures(
            shown, found.bundled, found.classical, found.cache, found.problems)
        page.write(args.into / "compare.html", found.title, found.curves, styles, anchor, pictures,
                   [*checks, *found.problems], found.further)
        written.append("compare.html")
    for problem in found.problems:
        print(f"note: {problem}")
    print(f"\n{', '.join(str(args.into / name) for name in written)}")


def begin(args: argparse.Namespace, root: Path) -> Comparison:
    """A comparison without curves, as yet: its images are read, and its metrics are chosen."""
    problems: list[str] = []
    further = further_metrics.chosen(args.metrics)
    images = usable_images(args.dataset, problems)
    if further and (need := further_metrics.missing()):
        names = ", ".join(METRICS[key].name for key in further)
        problems.append(f"{names} left out: this needs {need}")
        further = []
    found = Comparison(root, images, args.into / "cache", problems, further)
    if args.publish and not found.official:
        raise UserError(f"--publish: {found.title} do not belong on the front page")
    return found


def code_own(found: Comparison, args: argparse.Namespace, shown: list[Path]) -> None:
    """Code images with the bundled weights: all of them, or those that the page shows where the
    results on all images are known and no further metrics are asked for.
    """
    known = found.official or bool(args.results)
    if known and args.no_viewer and not found.further:
        return
    few = shown if known and not found.further else found.images
    found.bundled = own.code_all(found.root, {path: found.images[path] for path in few},
                                 found.cache, found.problems, args.threads)
    own.add_metrics(found.bundled, list(found.images), found.further)


def own_curves(found: Comparison, results: list[Path] | None) -> list[Curve]:
    """Our curves with their costs: those of the results named, of the papers' results, or of the
    bundled weights.
    """
    if results:
        curves = gather.named_results(results, found.digest, found.problems)
    elif found.official:
        curves = gather.own_results(found.root, found.digest, found.problems)
    else:
        curves = [own.as_curve(curve) for curve in found.bundled]
    found.problems += own.of_other_weights(curves, found.bundled)
    costs = own.costs(found.root, found.bundled, found.cache, found.problems)
    for curve in curves:
        known = [costs[f] for f in curve.meta("fingerprint") if f in costs]
        curve.cost = known[0] if known else {}
        own.take_metrics(curve, found.bundled, found.further)
    return curves


def measure_classical(found: Comparison, codecs: list[str] | None, jobs: int) -> None:
    """Measure the classical codecs; if none are named, all but OPTIONAL."""
    chosen = [c for c in CODECS if c not in OPTIONAL] if codecs is None else (
        list(CODECS) if "all" in codecs else codecs)
    found.classical = measured.measure_all(found.images, found.cache, chosen, found.problems, jobs,
                                           found.further)
    found.curves += [Curve(table.classical_name(curve["name"]), "classical", curve)
                     for curve in found.classical.values()]


def write_tables(found: Comparison, anchor: Curve, into: Path) -> list[str]:
    """Write compare.md and compare.json and print the table of curves; returns `table.checks`."""
    published = found.of_kind("published")
    if not published:
        found.problems.append("published curves are left out: they are not of these images "
                              f"({found.title})")
    checks = table.checks(found.curves)
    summary = table.curves_table([c for c in found.curves if c.listed], anchor, found.further)
    write_atomic(into / "compare.md", "\n\n".join([
        f"# {found.title}: comparison", summary, *checks,
        "## Operating points, ours and classical codecs",
        table.points_table([c for c in found.curves if c.kind != "published"], found.further),
        "## All published curves",
        table.curves_table(published, anchor) if published else "None of these images.",
        "## Left out", "\n".join(f"- {problem}" for problem in found.problems) or "Nothing.",
        ""]).encode())
    write_atomic(into / "compare.json", (format_json({
        "dataset": found.title, "reference": anchor.name, "left_out": found.problems,
        "curves": [{key: value for key, value in (curve.results | {
            "name": curve.name, "kind": curve.kind}).items() if key != "per_image"}
            for curve in found.curves]}) + "\n").encode())
    print(summary, *checks, sep="\n\n")
    return checks


def default_anchor(curves: list[Curve]) -> Curve:
    """The reference of the published curves; otherwise the first classical codec."""
    for kind in ("published", "classical"):
        if named := [curve for curve in curves if curve.kind == kind]:
            return named[0]
    return curves[0]


if __name__ == "__main__":
    cli.run(main)
