"""Train a paper at several values of lmbda, and evaluate the results together as one curve.

    python -m common.recipes.sweep hyperprior 0.0035 0.0067 0.013
    python -m common.recipes.sweep tbtc 0.0035 0.013 --stage swint-charm-0.013 --jobs 2
    python -m common.recipes.sweep hyperprior 0.0035 0.013 --short      the same in a minute
    python -m common.recipes.sweep hyperprior 0.0067 --seeds 0 1 2 --steps 4000 --from-scratch \
        --set N=48 M=64 --name equal         one budget, several seeds, as claims.yaml compares them

Each point is a stage of the paper's weights.yaml, the first one or --stage, with another lmbda: the
same widths, steps and start, unless flags change them. Results and plot are written to
<paper>/results/sweep.json and .png (with --stage: sweep-STAGE; with --name: NAME). To continue an
interrupted call, run it again; points that are done are not trained again, and points can be added.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import UserError, cli
from common.papers import ROOT
from common.recipes.jobs import Job, Settings
from common.recipes.stages import Curve, Stage
from common.recipes.weights import Plan, add_flags, chain, settings_of, work

import yaml


@dataclass(frozen=True)
class Changes:
    """What differs from the stage of weights.yaml, apart from lmbda.

    seeds: a point for each; steps: its length; scratch: without the stage that it starts from;
    flags: further flags of train.py; name: of the curve.
    """

    seeds: Sequence[int] = ()
    steps: int | None = None
    scratch: bool = False
    flags: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None

    def apply(self, recipe: dict[str, Any], where: str) -> dict[str, Any]:
        """The changed stage; UserError if it is not known which flag sets its length."""
        flags = dict(recipe["flags"])
        if self.steps:
            epochs = [key for key, value in flags.items() if isinstance(value, int)
                      and value * flags.get("steps-per-epoch", 0) == recipe["steps"]]
            if not epochs:
                raise UserError(f"{where} has no number of epochs for --steps to change")
            if self.steps % flags["steps-per-epoch"]:
                raise UserError(f"--steps: give a multiple of {flags['steps-per-epoch']}, the "
                                "steps of an epoch")
            flags[epochs[0]] = self.steps // flags["steps-per-epoch"]
        changed = recipe | {"flags": flags | dict(self.flags)}
        return changed | ({"hours": recipe["hours"] * self.steps / recipe["steps"],
                           "steps": self.steps} if self.steps else {})


def jobs_of(settings: Settings, paper: str, lmbdas: list[float], name: str | None,
            changes: Changes = Changes()) -> list[Job]:  # noqa: B008  (it is frozen)
    """The stages of a sweep, those that they start from, and the curve as the last.

    name: of the stage that is varied; None for the first one of weights.yaml. UserError if there is
    no such stage, if it has no lmbda, or if the name of the curve is that of other results.
    """
    made = settings if settings.short else dataclasses.replace(settings, run="weights")
    plan = Plan(made, [paper])  # what the stage starts from is shared with `make weights`
    content = plan.content(paper)
    stage = name or next(iter(content["stages"]))
    if stage not in content["stages"]:
        raise UserError(f"{paper}/weights.yaml: there is no stage {stage}; choose from "
                        f"{', '.join(content['stages'])}")
    recipe = content["stages"][stage]
    if "lmbda" not in recipe["flags"]:
        raise UserError(f"{paper}/weights.yaml: stage {stage} has no lmbda to vary: it trains one "
                        "model for all rates, or needs another --stage")
    recipe = changes.apply(recipe, f"{paper}/weights.yaml: stage {stage}")
    parent = None if changes.scratch else plan.stage(paper, stage).parent
    curve = changes.name or (f"sweep-{stage}" if name else "sweep")
    if curve in {"published", "quick", *content["curves"]}:
        raise UserError(f"--name {curve}: this would replace other results of {paper}; give "
                        "another name")
    points: dict[str, Stage] = {}
    for lmbda in sorted(set(lmbdas)):
        for seed in dict.fromkeys(changes.seeds) or [None]:
            point = f"{lmbda:g}" if seed is None else f"{lmbda:g}-seed-{seed}"
            varied = {"lmbda": lmbda}
            if seed is not None:
                varied[content["train"].get("seed", "seed")] = seed
            own: dict[str, Any] = {"stages": {point: recipe | {
                "flags": recipe["flags"] | varied}}}
            run = settings.run if settings.short else changes.name or settings.run
            runs = dataclasses.replace(settings, run=f"{run}-{point}")
            points[f"{point}.pth"] = Stage(runs, paper, point, content | own, parent)
    own = {"curves": {curve: {"files": {}, "bundle": False}}}
    before = chain(parent) if parent else []
    return [*before, *points.values(), Curve(settings, paper, curve, content | own, points)]


def flag(text: str) -> tuple[str, Any]:
    """KEY=VALUE as a flag of train.py; numbers, true and false as YAML reads them."""
    key, found, value = text.partition("=")
    if not (found and key and value):
        raise ValueError(text)
    try:
        return key.lstrip("-"), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(text) from None


def file_name(text: str) -> str:
    """A name of results, which are one file of a folder."""
    if not text or text != Path(text).name:
        raise ValueError(text)
    return text


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    parser = cli.Parser(description="Train a paper at several values of lmbda, and evaluate the "
                        "results together as one curve.")
    add = parser.add_argument
    add("paper", help="folder of the paper")
    add("lmbdas", nargs="+", type=cli.positive_float, metavar="LMBDA",
        help="weights of the distortion, one for each point of the curve")
    add("--stage", help="stage of weights.yaml to vary; the first one if not given")
    add("--seeds", nargs="+", type=cli.seed_number, default=[],
        help="train every point with each of these seeds")
    add("--steps", type=cli.positive_int, help="steps of a point, instead of those of the stage")
    add("--from-scratch", action="store_true",
        help="start from random weights where the stage starts from another one")
    add("--set", nargs="+", type=flag, default=[], metavar="FLAG=VALUE",
        help="other flags of train.py")
    add("--name", type=file_name, help="name of the results instead of sweep")
    add_flags(parser)
    args = parser.parse_args(argv)
    changes = Changes(args.seeds, args.steps, args.from_scratch, dict(args.set), args.name)
    work(jobs_of(settings_of(args, root, "sweep"), args.paper.strip("/"), args.lmbdas, args.stage,
                 changes), args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cli.run(main)
