"""Kill trainings at random moments and check that they end as if nothing had happened.

    python tests/torture.py                    every paper, 20 kills each (`make torture`)
    python tests/torture.py qvrf --kills 5 --seed 2

For each paper, a stage of the short form of its weights.yaml, the first that starts from random
weights if there is one, is trained twice: once without interruption, and once killed with SIGKILL
and continued with --resume auto again and again. The weights and the lines of the logs of both must
be equal, and no temporary file may be left.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from common import UserError, cli
from common.coding.model_file import load_checkpoint
from common.papers import ROOT, papers
from common.recipes.jobs import Settings
from common.recipes.recipe_file import as_list, words
from common.recipes.stages import Stage
from common.recipes.weights import Plan

import torch


def command(paper: str, epochs: int) -> tuple[Stage, list[str]]:
    """A stage of a paper's short form, and its command line, with more epochs.

    Each of these has three steps or so and ends with a checkpoint.
    """
    images = str(ROOT / "common" / "images" / "kodak")
    plan = Plan(Settings(ROOT, "short", None, "", 1, "cpu", images, short=True), [paper])
    stages = plan.content(paper)["stages"]
    name = next((name for name in stages if "from" not in stages[name]), next(iter(stages)))
    stage = plan.stage(paper, name)
    flags = {key: Stage.fill(value, plan.settings) for key, value in stage.flags.items()}
    phases = len(flags["stage"]) if isinstance(flags.get("stage"), list) else 1  # of one run
    length = next(key for key in ("epoch", "epochs", "num_epochs") if key in flags)
    flags[length] = epochs // phases
    if "config" in flags:
        flags["config"] = str(ROOT / paper / flags["config"])
    resume = as_list(stage.train["resume"])
    return stage, [*words(flags), *resume, "--device", "cpu", "--threads", "1"]


def start(paper: str, argv: list[str], folder: Path) -> int:
    """Train in a process of its own, forked from this one, in `folder`; returns its id."""
    if child := os.fork():
        return child
    with contextlib.suppress(BaseException):
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = open("output.txt", "a")
        try:
            importlib.import_module(f"{paper}.train").main(argv)
        except UserError as e:
            print("error:", e, flush=True)
            os._exit(2)
        os._exit(0)
    os._exit(1)


def final(stage: Stage, folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights and the lines of the logs of a run in `folder`."""
    where = stage.folders[0].relative_to(stage.home)
    checkpoints = sorted((folder / where).rglob(stage.checkpoint), key=lambda p: p.stat().st_mtime)
    if not checkpoints:
        raise UserError(f"{folder}: the training left no checkpoint: {tail(folder)}")
    lines = [line for path in sorted(folder.rglob("log.txt")) if not is_abandoned(path.parent)
             for line in path.read_text().splitlines()]
    return load_checkpoint(checkpoints[-1])["model"], lines


def is_abandoned(run: Path) -> bool:
    """Whether a version of tbtc was killed before its first checkpoint, perhaps after the first
    line of its log: --resume auto then begins another version and leaves this one as it is.
    """
    return run.name.startswith("version_") and not any(run.rglob("*.ckpt"))


def tail(folder: Path) -> str:
    return (folder / "output.txt").read_text(errors="replace")[-500:]


def torture(paper: str, kills: int, seed: int, epochs: int) -> int:
    """Number of kills that met a running training; UserError if the two runs differ."""
    stage, argv = command(paper, epochs)
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary, "whole"), Path(temporary, "killed")
        whole.mkdir()
        killed.mkdir()
        begun = time.monotonic()
        if os.waitpid(start(paper, argv, whole), 0)[1]:
            raise UserError(f"{paper}: the training failed: {tail(whole)}")
        seconds, met = time.monotonic() - begun, 0
        for _ in range(kills):
            child = start(paper, argv, killed)
            time.sleep(generator.uniform(0.2, 1) * seconds / 3)
            os.kill(child, signal.SIGKILL)
            met += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if os.waitpid(start(paper, argv, killed), 0)[1]:
            raise UserError(f"{paper}: does not go on after {met} kills: {tail(killed)}")
        if not met:
            raise UserError(f"{paper}: every training ended before it was killed")
        (weights, lines), (others, other_lines) = final(stage, whole), final(stage, killed)
        if weights.keys() != others.keys() or not all(
                torch.equal(weights[key], others[key]) for key in weights):
            raise UserError(f"{paper}: other weights after {met} kills")
        if lines != other_lines:
            raise UserError(f"{paper}: other lines in the log after {met} kills")
        left = [path.name for path in killed.rglob("*.tmp")]
        if left:
            raise UserError(f"{paper}: files were left: {', '.join(left)}")
    return met


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("papers", nargs="*", metavar="PAPER", help="folders; all if not given")
    parser.add_argument("--kills", type=cli.positive_int, default=20,
                        help="number of kills of each training")
    parser.add_argument("--seed", type=cli.count, default=0, help="seed of the moments")
    parser.add_argument("--epochs", type=cli.positive_int, default=12,
                        help="epochs of each training, of about three steps")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for paper in args.papers or papers():
        met = torture(paper, args.kills, args.seed, args.epochs)
        print(f"{paper}: {args.kills} kills, {met} of them of a running training: weights and "
              "logs are those of an uninterrupted run", flush=True)


if __name__ == "__main__":
    cli.run(main)
