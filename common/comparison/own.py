"""The bundled weights of every paper, coded on a folder of images by the paper's own eval.py.

What it writes is kept: compressed files, decoded images and results of every operating point. The
page shows them, and reads from them how many bits each part of a file takes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import UserError, data
from common.coding import bitstream
from common.coding.codecs import loader
from common.coding.contract import Codec
from common.comparison.gather import Curve
from common.complexity import complexity
from common.evaluation import further_metrics
from common.evaluation.image_sets import set_digest
from common.evaluation.results import folders_of_points, image_names, load_results, mean
from common.files import write_atomic
from common.papers import papers
from common.recipes.recipe_file import as_list, read_recipe
from common.recipes.report import bundled_curves, run

from tqdm import tqdm

SIZE = (512, 768)  # height and width of the image that multiply-accumulates are counted for


@dataclass
class Bundled:
    """A curve of bundled weights, coded on some images.

    results: as of eval.py; points: the folder of files and decoded images of each operating point,
    in the same order; weights: the files.
    """

    paper: str
    curve: str
    weights: list[Path]
    results: dict[str, Any]
    points: list[Path]


def code_all(root: Path, images: dict[Path, str], cache: Path, problems: list[str], threads: int
             ) -> list[Bundled]:
    """Code the images, whose digests are the values, with the bundled weights of all papers.

    A paper that fails is left out; `problems` gets a line that names it.
    """
    folder = cache / "own" / set_digest(list(images.values())).split()[-1]
    linked = folder / "images"
    shutil.rmtree(linked, ignore_errors=True)
    linked.mkdir(parents=True)
    for path in images:
        (linked / path.name).symlink_to(path.resolve())
    todo = []
    for paper in papers(root):
        try:
            recipe = read_recipe(root / paper / "weights.yaml")
            curves = bundled_curves(root / paper, recipe["curves"])
            dataset = [*as_list(recipe["eval"]["dataset"]), linked.resolve()]
            todo += [(paper, name, files, [*dataset, *flags])
                     for name, (files, flags) in curves.items()]
        except UserError as e:
            problems.append(f"{paper}: its bundled weights are left out: {e}")
    found = []
    with tqdm(todo, desc="bundled weights", unit="curve", disable=None) as bar:
        for paper, name, files, flags in bar:
            bar.set_postfix_str(f"{paper}, {name}")
            try:
                found.append(_code(root, paper, name, files, flags, folder / paper, threads))
            except UserError as e:
                problems.append(f"{paper}, {name}: its bundled weights are left out: {e}")
    return found


def as_curve(bundled: Bundled) -> Curve:
    """The curve of bundled weights on the images that were coded."""
    return Curve(f"{bundled.paper}, {bundled.curve}", "ours", bundled.results, bundled.paper)


def _code(root: Path, paper: str, curve: str, files: list[Path], flags: list[Any], folder: Path,
          threads: int) -> Bundled:
    """Code the images with the weights of one curve, or take what an earlier call has left."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]
    folder = folder / f"{curve}-{digest}"
    points = _points(folder)
    if points is None:
        shutil.rmtree(folder, ignore_errors=True)
        run(["eval.py", *flags, "--checkpoint", *files, "--resultdir",
             (folder / "results").resolve(), "--outdir", (folder / "output").resolve(),
             "--threads", threads], root / paper, root, curve, quiet=True)
        points = _points(folder)
        if points is None:
            raise UserError("eval.py did not write one results file with all its images")
    return Bundled(paper, curve, files, *points)


def _points(folder: Path) -> tuple[dict[str, Any], list[Path]] | None:
    """Results in a folder of `_code` and the folders of their points; None if a file is missing."""
    found = sorted((folder / "results").glob("*.json"))
    if len(found) != 1:
        return None
    results = load_results(found[0])
    try:
        points = folders_of_points(results, folder)
    except KeyError:
        return None
    files = [point / f"{row['image']}{suffix}"
             for point, rows in zip(points, results["per_image"], strict=True)
             for row in rows for suffix in (".bin", ".png")]
    return (results, points) if all(file.exists() for file in files) else None


def of_other_weights(curves: Sequence[Curve], bundled: Sequence[Bundled]) -> list[str]:
    """A line for each of our curves whose results are not those of the bundled weights."""
    coded = {f"{b.paper}, {b.curve}": as_curve(b).meta("fingerprint") for b in bundled}
    return [f"{curve.name}: its results are of other weights than those of {curve.paper}/weights, "
            f"which the viewer shows: run make report-{curve.paper}"
            for curve in curves if curve.kind == "ours" and curve.name in coded
            and set(curve.meta("fingerprint")) != set(coded[curve.name])]


def add_metrics(bundled: Sequence[Bundled], paths: Sequence[Path], further: Sequence[str]) -> None:
    """Add further metrics (keys of `further_metrics`) of the decoded images to the results."""
    originals = {name: path for path, name in image_names(list(paths)).items()}
    with tqdm(bundled, desc="further metrics", unit="curve", disable=None) as bar:
        for curve in bar if further else []:
            for folder, rows in zip(curve.points, curve.results["per_image"], strict=True):
                for row in rows:
                    name = row["image"]
                    row |= _metrics(originals[name], folder / f"{name}.png", further)
            for key in further:
                curve.results["results"][key] = [mean([row[key] for row in rows])
                                                 for rows in curve.results["per_image"]]


def take_metrics(curve: Curve, bundled: Sequence[Bundled], further: Sequence[str]) -> None:
    """Give a curve the further metrics of the bundled weights, where paper and rates are the same.
    """
    rates = curve.results["results"]["bpp"]
    for other in bundled:
        found = other.results["results"]
        if other.paper == curve.paper and len(found["bpp"]) == len(rates) and all(
                math.isclose(a, b, rel_tol=1e-6) for a, b in zip(found["bpp"], rates, strict=True)):
            curve.results["results"] |= {key: found[key] for key in further}


def _metrics(original: Path, decoded: Path, further: Sequence[str]) -> dict[str, float | None]:
    """Metrics of a decoded image, from the file beside it where that has them."""
    kept = decoded.with_suffix(".metrics.json")
    try:
        found: dict[str, float | None] = json.loads(kept.read_text())
    except (OSError, ValueError):
        found = {}
    if new := [key for key in further if key not in found]:
        x, x_hat = (data.read_image(path, lambda _: None) for path in (original, decoded))
        found |= further_metrics.measure(new, x, x_hat)
        write_atomic(kept, json.dumps(found).encode())
    return {key: found[key] for key in further}


def rate_of(model: Codec, file: bytes) -> dict[str, Any]:
    """The `rate` arguments of a model's forward that a file was coded with."""
    part = bitstream.unpack(file, model.tag, bitstream.fingerprint(model))
    return model.read_parameters(part.parameters)


def costs(root: Path, bundled: list[Bundled], cache: Path, problems: list[str]
          ) -> dict[str, dict[str, int]]:
    """Complexity (`common.complexity`) of all bundled weights, by fingerprint in hexadecimal."""
    found: dict[str, dict[str, int]] = {}
    for curve in bundled:
        for weights in curve.weights:
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
            kept = cache / "complexity" / f"{digest}.json"
            try:
                if not kept.exists():
                    write_atomic(kept, json.dumps(_cost(curve, weights)).encode())
                found |= json.loads(kept.read_text())
            except (UserError, OSError, ValueError, RuntimeError) as e:
                problems.append(f"{os.path.relpath(weights, root)}: its complexity is not known: "
                                f"{e}")
    return found


def _cost(curve: Bundled, weights: Path) -> dict[str, dict[str, int]]:
    model = loader(curve.paper)(weights)
    fingerprint = bitstream.fingerprint(model)
    for folder in curve.points:
        file = next(iter(sorted(folder.glob("*.bin")))).read_bytes()
        if bitstream.unpack(file, model.tag).fingerprint == fingerprint:
            return {fingerprint.hex(): complexity(model, SIZE, **rate_of(model, file))}
    raise UserError("no file was coded with these weights")
