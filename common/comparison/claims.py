"""What papers claim, beside what equal trainings of ours show.

    python -m common.comparison.claims            or  make claims

claims.yaml in the root lists the claims, where their published numbers are, and which results of
ours test them. Both are compared as percentages. Published curves give a BD-rate. Trainings of ours
at one lmbda give costs J = bpp + lmbda * MSE; as J is minimal with respect to the quantisation of a
trained model, a small difference of J at equal lmbda is the difference in rate at equal quality,
and in percent of the rate it is 100 * (J - J_other) / bpp_other. Where the difference is not small,
or where the published number is a difference of J, claims.yaml asks for that of ours.

A difference counts if it exceeds twice its standard error: that of the seeds, or, where there are
one or two runs of each, that of runs whose costs vary by SPREAD.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import UserError, cli
from common.comparison.deltas import delta_of_points
from common.evaluation.curve_values import Results, cost, entry, markdown, rates_and_psnrs, repeated
from common.evaluation.image_sets import digest_of
from common.evaluation.results import is_number, load_published, load_results
from common.files import read_file
from common.papers import ROOT
from common.recipes.recipe_file import NUMBER, check
from common.recipes.tables import write_table

import yaml

SPREAD = 0.0094  # relative standard deviation of J between seeds, from <paper>/results/equal.json
COSTS = ("J", "loss", "test_loss")  # names of J in results files
NAME = "claims"
# keys and types of claims.yaml: those that are required, and those that may be left out
CLAIM = {"claim": str, "paper": str, "published": dict, "ours": dict}, {
    "within": NUMBER, "unit": str}
CURVES = {"this": str, "other": str}, {"in": str}
STATED = {"percent": NUMBER, "source": str}
OURS = {"this": str, "other": str, "budget": str}, {"file": str}


@dataclass(frozen=True)
class Measured:
    """A difference in percent, its standard error, and how many runs of each side it is from; the
    smaller number, if they differ."""

    percent: float
    error: float
    runs: int

    def __str__(self) -> str:
        return f"{self.percent:+.1f} ± {self.error:.1f} %"


@dataclass(frozen=True)
class Run:
    """The costs of one row of a results file, one for each seed, and their mean rate."""

    costs: list[float]
    rate: float


def read_claims(path: Path) -> list[dict[str, Any]]:
    """The checked claims of claims.yaml; UserError names the claim, by its number, and the key."""
    try:
        content = yaml.safe_load(read_file(path))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path.name}: not YAML ({' '.join(str(e).split())})") from None
    claims = content.get("claims") if isinstance(content, dict) else None
    if not isinstance(claims, list) or not claims:
        raise UserError(f'{path.name}: must hold a list of claims under the key "claims"')
    for i, claim in enumerate(claims, 1):
        check(claim, where := f"{path.name}: claim {i}", *CLAIM)
        known = claim["published"]
        check(known, f"{where}: published", *((STATED,) if "percent" in known else CURVES))
        check(claim["ours"], f"{where}: ours", *OURS)
        if known.get("percent") == 0:
            raise UserError(f"{where}: published: percent: 0 has no direction to compare with")
        if {"|", "\n"} & set(claim["claim"].strip()):
            raise UserError(f"{where}: claim: one line without |, as it goes into a table")
        if claim.get("unit", "rate") not in ("rate", "cost"):
            raise UserError(f"{where}: unit: {claim['unit']!r} is neither rate nor cost")
    return claims


def published_percent(root: Path, claim: Mapping[str, Any]) -> tuple[float, str]:
    """The published difference in percent, and in words where it is from."""
    known = claim["published"]
    if "percent" in known:
        return float(known["percent"]), str(known["source"])
    path = (root / known["in"] / "results" / "published.json" if "in" in known
            else root / "common" / "results" / "published.json")
    curves = {curve["name"]: curve for curve in load_published(path)}
    for name in (known["this"], known["other"]):
        if name not in curves:
            raise UserError(f"claims.yaml: {path.relative_to(root)} has no curve {name}")
    found = delta_of_points(*rates_and_psnrs(curves[known["other"]]),
                            *rates_and_psnrs(curves[known["this"]]))
    if found is None:
        raise UserError(f"claims.yaml: {known['this']} and {known['other']} do not overlap")
    return found.rate, f"{known['this']} against {known['other']}"


def measured(root: Path, claim: Mapping[str, Any]) -> Measured | None:
    """The difference that our results show; None if a results file does not exist yet."""
    ours, names = claim["ours"], _files(claim)
    if not all((root / name).exists() for name in names):
        return None
    if "file" in ours:
        return _of_runs(claim, *(_run(root / names[0], ours[side]) for side in ("this", "other")))
    this, other = (load_results(root / name) for name in names)
    if digest_of(this) != digest_of(other):
        raise UserError(f"claims.yaml: {names[0]} and {names[1]} are not of the same images")
    first = _repetitions(this)
    second = first and _repetitions(other, _lmbda(this, 0))
    if first and second:
        return _of_runs(claim, first, second)
    return _of_curves(ours, this, other)


def _files(claim: Mapping[str, Any]) -> list[str]:
    """The results files that a claim compares."""
    ours = claim["ours"]
    return [ours["file"]] if "file" in ours else [ours["this"], ours["other"]]


def _of_runs(claim: Mapping[str, Any], this: Run, other: Run) -> Measured:
    """The mean difference of cost, in percent of the unit of the claim."""
    scale = 1 / (other.rate if claim.get("unit") != "cost" else statistics.mean(other.costs))
    difference = statistics.mean(this.costs) - statistics.mean(other.costs)
    error = math.hypot(_error(this.costs), _error(other.costs))
    return Measured(100 * scale * difference, 100 * scale * error,
                    min(len(this.costs), len(other.costs)))


def _of_curves(ours: Mapping[str, Any], this: Results, other: Results) -> Measured:
    """The BD-rate between two curves."""
    found = delta_of_points(*rates_and_psnrs(other), *rates_and_psnrs(this))
    if found is None:
        raise UserError(f"claims.yaml: {ours['this']} and {ours['other']} do not overlap")
    ratios = [cost(rate, psnr, _lmbda(other, i)) / rate for i, (rate, psnr)
              in enumerate(zip(*rates_and_psnrs(other), strict=True))]
    return Measured(found.rate, 100 * math.sqrt(2) * SPREAD * statistics.mean(ratios), 1)


def _repetitions(curve: Results, lmbda: float | None = None) -> Run | None:
    """The costs of a results JSON, if its points are one point or its repetitions; else None.

    lmbda: of its points, only those with this lmbda count.
    """
    rates, psnrs = rates_and_psnrs(curve)
    kept = [i for i in range(len(rates)) if lmbda in (None, _lmbda(curve, i))]
    if len(kept) != 1 and not (kept and repeated(curve)):
        return None
    return Run([cost(rates[i], psnrs[i], _lmbda(curve, i)) for i in kept],
               statistics.mean(rates[i] for i in kept))


def _lmbda(curve: Results, i: int) -> float:
    """lmbda of a point of a results JSON; UserError if the file does not state it."""
    value = entry(curve.get("meta", {}), "lmbda", i)
    if value is None:
        raise UserError(f"claims.yaml: the results {curve['name']} do not state their lmbda")
    return float(value)


def _run(path: Path, name: str) -> Run:
    try:
        content = json.loads(read_file(path))
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from None
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, dict):
        raise UserError(f'{path}: has no "rows" to compare')
    if name not in rows:
        raise UserError(f"claims.yaml: {path.name} has no row {name}; it has {', '.join(rows)}")
    row = rows[name] if isinstance(rows[name], dict) else {}
    key = next((key for key in COSTS if key in row), None)
    if key is None or "bpp" not in row:
        raise UserError(f"{path}: row {name} needs bpp and one of {', '.join(COSTS)}")
    values = {}
    for column in (key, "bpp"):
        values[column] = row[column] if isinstance(row[column], list) else [row[column]]
        if not values[column] or not all(is_number(v) and v > 0 for v in values[column]):
            raise UserError(f"{path}: row {name}: {column} must be a positive number, or a list of "
                            "them")
    return Run(values[key], statistics.mean(values["bpp"]))


def _error(costs: list[float]) -> float:
    """Standard error of the mean of the costs; two do not tell their spread."""
    spread = statistics.stdev(costs) if len(costs) > 2 else SPREAD * statistics.mean(costs)
    return spread / math.sqrt(len(costs))


def verdict(claim: Mapping[str, Any], published: float, ours: Measured) -> str:
    """Whether our trainings show what is claimed, in a few words."""
    percent, decided = ours.percent, 2 * ours.error
    if "within" in claim:
        limit = float(claim["within"])
        words = ("as claimed" if percent + decided <= limit else
                 "not seen" if percent - decided > limit else "open")
        return f"{words} (at most {limit:+g} %)"
    if abs(percent) <= decided:
        return "open: within the noise"
    if percent * published < 0:
        return "the opposite, at this budget"
    share = percent / published
    if claim.get("unit") == "cost" and "percent" not in claim["published"]:
        share = 1  # a cost and a BD-rate have different sizes
    return "as claimed" + (", less" if share < 0.5 else ", more" if share > 2 else "")


def table(root: Path) -> str:
    """The claims as a Markdown table; those without results of ours are named below it."""
    rows, missing = [["claim", "paper", "published", "ours", "trained", "verdict"]], []
    for claim in read_claims(root / "claims.yaml"):
        percent, _ = published_percent(root, claim)
        ours = measured(root, claim)
        if ours is None:
            missing.append(f"{claim['claim']} ({', '.join(_files(claim))})")
            continue
        runs = f"{ours.runs} seeds" if ours.runs > 1 else "one run each"
        unit = " of the cost" if claim.get("unit") == "cost" else ""
        theirs = unit if "percent" in claim["published"] else ""
        rows.append([claim["claim"], claim["paper"], f"{percent:+.1f} %{theirs}", f"{ours}{unit}",
                     f"{claim['ours']['budget']}; {runs}", verdict(claim, percent, ours)])
    return "\n\n".join([markdown(rows), *(f"Not tested yet: {text}" for text in missing)])


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    parser = cli.Parser(description="Compare what papers claim with equal trainings of ours.")
    parser.add_argument("--publish", action="store_true", help="also write it to RESULTS.md")
    args = parser.parse_args(argv)
    text = table(root)
    print(text)
    if args.publish:
        write_table(root / "RESULTS.md", NAME, text)


if __name__ == "__main__":
    cli.run(main)
