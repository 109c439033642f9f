"""Find every curve that can be compared: results of the papers, published curves, classical codecs.

A file of the wrong form is left out, and a line names it; the rest is compared all the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common import UserError
from common.evaluation import further_metrics, image_sets
from common.evaluation.curve_values import Results, entry, repeated
from common.evaluation.results import load_published, load_results
from common.papers import ROOT, papers

# curves of ours that the plot leaves out at first: these names, and networks of fewer steps
SHORT, STEPS = ("quick", "fixed"), 5_000
PUBLISHED = Path(__file__).parents[1] / "results" / "published.json"
Kind = Literal["ours", "classical", "published"]
KINDS: dict[Kind, str] = {"ours": "ours, measured", "classical": "classical, measured",
                          "published": "published"}


@dataclass
class Curve:
    """A rate-distortion curve with what is known of the codec; results: as of eval.py.

    shown: whether the plots show it at first. cost: `common.complexity`, or {}.
    """

    name: str
    kind: Kind
    results: Results
    paper: str = ""
    shown: bool = True
    cost: dict[str, int] = field(default_factory=dict)

    @property
    def listed(self) -> bool:
        """Whether the tables have the curve at first; all of ours, and those that are shown."""
        return self.shown or self.kind == "ours"

    def values(self, key: str) -> list[float | None]:
        """The value of each operating point; None where there is none, or where it is infinite."""
        block = self.results["results"]
        listed = [entry(block, key, i) for i in range(len(block["bpp"]))]
        return [v if v is not None and math.isfinite(v) else None for v in listed]

    def meta(self, key: str) -> list[Any]:
        """The entry of "meta" for each operating point."""
        block = self.results.get("meta", {})
        return [entry(block, key, i) for i in range(len(self.results["results"]["bpp"]))]

    def points(self, quality: str = "psnr-rgb") -> tuple[list[float], list[float]]:
        """Rates and qualities of the points that have both, the latter in decibels."""
        pairs = zip(self.values("bpp"), self.values(quality), strict=True)
        scaled = [(b, further_metrics.decibels(quality, q)) for b, q in pairs
                  if b is not None and q is not None]
        both = [(b, q) for b, q in scaled if q is not None]
        return [b for b, _ in both], [q for _, q in both]


def own_results(root: Path, digest: str, problems: list[str]) -> list[Curve]:
    """The curves of all results JSONs in the papers' folders that are of these images.

    Other JSONs there (a table of variants, say) have no "results" and are no curves.
    """
    found = []
    for paper in papers(root):
        for path in sorted((root / paper / "results").glob("*.json"), key=_bundled_first):
            if path.name == "published.json":
                continue
            try:
                content = json.loads(path.read_bytes())
                if isinstance(content, dict) and "results" not in content:
                    continue
                curve = load_results(path)
            except (OSError, ValueError, UserError) as e:
                problems.append(_named(path, root, e))
                continue
            if repeated(curve):
                continue  # seeds of one operating point, which `make claims` compares
            if take_if_of(digest, curve, _shown(path, root), problems):
                own = Curve(f"{paper}, {path.stem}", "ours", curve, paper)
                steps = [n for n in own.meta("steps") if n]
                own.shown = path.stem not in SHORT and min(steps, default=STEPS) >= STEPS
                found.append(own)
    return found


def named_results(paths: Sequence[Path], digest: str, problems: list[str]) -> list[Curve]:
    """The curves of the results JSONs that the user names; folder/results/FILE is of `folder`."""
    found = []
    for path in paths:
        try:
            curve = load_results(path)
        except UserError as e:
            problems.append(str(e))
            continue
        if take_if_of(digest, curve, str(path), problems):
            parts = path.resolve().parts
            paper = parts[-3] if parts[-2:-1] == ("results",) else curve["name"]
            found.append(Curve(f"{paper}, {path.stem}", "ours", curve, paper))
    return found


def take_if_of(digest: str, curve: Results, what: str, problems: list[str]) -> bool:
    """Whether a curve was measured on the images with this digest; if not, `problems` says so."""
    stated = image_sets.digest_of(curve)
    if stated == digest:
        return True
    problems.append(f"{what}: left out, as it "
                    + (f"was measured on {image_sets.title(stated)}, not on "
                       f"{image_sets.title(digest)}" if stated else "does not state its images"))
    return False


def published(root: Path, digest: str, problems: list[str]) -> list[Curve]:
    """Published curves of these images: the general collection, then what papers have beside it."""
    found: list[Curve] = []
    seen: set[tuple[float, ...]] = set()
    files = [("", PUBLISHED), *((paper, root / paper / "results" / "published.json")
                                for paper in papers(root))]
    general = _general(problems)
    names: set[str] = set()
    for paper, path in files:
        if not path.exists():
            problems.append(f"{_shown(path, root)}: does not exist")
            continue
        try:
            curves = load_published(path)
        except UserError as e:
            problems.append(_named(path, root, e))
            continue
        if curves and image_sets.digest_of(curves[0]) != digest:
            continue
        for curve in curves:
            rates = tuple(round(rate, 3) for rate in curve["results"]["bpp"])
            quality = tuple(round(p, 1) for p in curve["results"]["psnr-rgb"] if p is not None)
            if paper and rates + quality in seen:
                continue  # a paper repeats the curves that it is compared with
            seen.add(rates + quality)
            name = curve["name"] if curve["name"] not in names else f"{curve['name']}, {paper}"
            names.add(name)
            shown = not paper and name in general.get("shown", [])
            found.append(Curve(name, "published", curve, paper, shown))
    for name in general.get("shown", []):
        if found and name not in names:
            problems.append(f"{_shown(PUBLISHED, root)}: there is no curve {name}")
    return found


def same_codecs() -> dict[str, list[str]]:
    """Names of published curves, by the classical codec that we measure too."""
    return dict(_general([]).get("same_codec", {}))


def _general(problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(PUBLISHED.read_bytes())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError) as e:
        problems.append(f"{PUBLISHED.name}: {e}")
        return {}


def find(curves: Sequence[Curve], name: str) -> Curve:
    """The curve of this name; UserError with all names if there is none."""
    for curve in curves:
        if curve.name == name:
            return curve
    raise UserError(f"--anchor {name}: there is no such curve; choose one of: "
                    f"{'; '.join(curve.name for curve in curves)}")


def _bundled_first(path: Path) -> tuple[bool, str]:
    return not path.stem.startswith("small"), path.stem


def _named(path: Path, root: Path, error: Exception) -> str:
    words = str(error).removeprefix(f"{path}: ")
    return f"{_shown(path, root)}: left out: {words}"


def _shown(path: Path, root: Path = ROOT) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
