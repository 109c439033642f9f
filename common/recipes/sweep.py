"""Train a paper at several values of lmbda, and evaluate the results together as one curve.

    python -m common.recipes.sweep hyperprior 0.0035 0.0067 0.013
    python -m common.recipes.sweep tbtc 0.0035 0.013 --stage swint-charm-0.013 --jobs 2
    python -m common.recipes.sweep hyperprior 0.0035 0.013 --short      the same in a minute

Each point is a stage of the paper's weights.yaml, the first one or --stage, with another lmbda: the
same widths, steps and start. Results and plot are written to <paper>/results/sweep.json and .png
(with --stage: sweep-STAGE). To continue an interrupted call, run it again; points that are done are
not trained again, and points can be added.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

from common import UserError, cli
from common.papers import ROOT
from common.recipes.jobs import Job, Settings
from common.recipes.stages import Curve, Stage
from common.recipes.weights import Plan, add_flags, chain, settings_of, work


def jobs_of(settings: Settings, paper: str, lmbdas: list[float], name: str | None) -> list[Job]:
    """The stages of a sweep, those that they start from, and the curve as the last.

    name: of the stage that is varied; None for the first one of weights.yaml. UserError if there is
    no such stage, or if it has no lmbda.
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
    parent = plan.stage(paper, stage).parent
    points: dict[str, Stage] = {}
    for lmbda in sorted(set(lmbdas)):
        own: dict[str, Any] = {"stages": {f"{lmbda:g}": recipe | {
            "flags": recipe["flags"] | {"lmbda": lmbda}}}}
        runs = dataclasses.replace(settings, run=f"{settings.run}-{lmbda:g}")
        points[f"{lmbda:g}.pth"] = Stage(runs, paper, f"{lmbda:g}", content | own, parent)
    curve = f"sweep-{stage}" if name else "sweep"
    own = {"curves": {curve: {"files": {}, "bundle": False}}}
    before = chain(parent) if parent else []
    return [*before, *points.values(), Curve(settings, paper, curve, content | own, points)]


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    parser = cli.Parser(description="Train a paper at several values of lmbda, and evaluate the "
                        "results together as one curve.")
    add = parser.add_argument
    add("paper", help="folder of the paper")
    add("lmbdas", nargs="+", type=cli.positive_float, metavar="LMBDA",
        help="weights of the distortion, one for each point of the curve")
    add("--stage", help="stage of weights.yaml to vary; the first one if not given")
    add_flags(parser)
    args = parser.parse_args(argv)
    work(jobs_of(settings_of(args, root, "sweep"), args.paper.strip("/"), args.lmbdas, args.stage),
         args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cli.run(main)
