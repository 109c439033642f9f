"""Make the bundled weights of a paper: train, export and evaluate the stages of its weights.yaml.

    python -m common.recipes.weights                     all papers, the least work first
    python -m common.recipes.weights hyperprior --list   print what is done and what is left
    python -m common.recipes.weights hyperprior/small joint_ar --jobs 2 --dataset '/data/*.tar'
    python -m common.recipes.weights hyperprior --short  the same chain in a minute (ckpts/short/)

To continue an interrupted call, run the same command again; the result is the same. Finished work
is not repeated. A stage whose definition has changed is trained again, and the folders of its old
run are renamed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from common import UserError, cli, data, processes
from common.files import write_atomic
from common.papers import ROOT
from common.recipes.jobs import Job, Settings, say
from common.recipes.recipe_file import read_recipe
from common.recipes.stages import Curve, Stage

from tqdm import tqdm


# ------------------------------------------------------------------------------------------- plan
class Plan:
    """The requested stages and curves, each after those that it needs."""

    def __init__(self, settings: Settings, targets: list[str]):
        self.settings = settings
        self.files: dict[str, dict[str, Any]] = {}
        self.stages: dict[tuple[str, str], Stage] = {}
        self.made: dict[tuple[str, str], Curve] = {}
        self.jobs: list[Job] = []
        have = sorted(path.parent.name for path in settings.root.glob("*/weights.yaml"))
        if not (targets or have):
            raise UserError(f"{settings.root}: no folder has a weights.yaml")
        papers = [self.curves(target) for target in targets or have]
        if not targets:
            papers.sort(key=lambda jobs: sum(
                job.remaining() for job in jobs if isinstance(job, Stage)))
        for job in (job for jobs in papers for job in jobs):
            self.jobs += [job] if job not in self.jobs else []

    def content(self, paper: str) -> dict[str, Any]:
        if paper not in self.files:
            self.files[paper] = read_recipe(self.settings.root / paper / "weights.yaml")
        return self.files[paper]

    def curves(self, target: str) -> list[Job]:
        """Jobs of PAPER or PAPER/CURVE."""
        paper, _, name = target.strip("/").partition("/")
        content = self.content(paper)
        if name and name not in content["curves"]:
            raise UserError(f"{paper}/weights.yaml: there is no curve {name}; choose from "
                            f"{', '.join(content['curves'])}")
        jobs: list[Job] = []
        for curve in [name] if name else content["curves"]:
            files = {file: self.stage(paper, stage)
                     for file, stage in content["curves"][curve]["files"].items()}
            order = list(content["stages"])
            for stage in sorted(files.values(), key=lambda stage: order.index(stage.name)):
                jobs += [job for job in chain(stage) if job not in jobs]
            if (paper, curve) not in self.made:
                self.made[paper, curve] = Curve(self.settings, paper, curve, content, files)
            jobs.append(self.made[paper, curve])
        return jobs

    def stage(self, paper: str, name: str, below: tuple[tuple[str, str], ...] = ()) -> Stage:
        key = (paper, name)
        if key in self.stages:
            return self.stages[key]
        where = f"{self.settings.root / paper / 'weights.yaml'}: stages: {name}: from"
        content, parent = self.content(paper), None
        if key in below:
            raise UserError(f"{where}: the stage starts from itself")
        if before := content["stages"][name].get("from"):
            other, _, stage = before.rpartition("/")
            other = other or paper
            if stage not in self.content(other)["stages"]:
                raise UserError(f"{where}: there is no stage {before}")
            parent = self.stage(other, stage, (*below, key))
        self.stages[key] = Stage(self.settings, paper, name, content, parent)
        return self.stages[key]

    def list(self) -> None:
        """Print what is done and what is left."""
        paper = ""
        for job in self.jobs:
            if job.paper != paper:
                paper = job.paper
                say(f"{paper}: {self.content(paper)['images']}")
            if isinstance(job, Stage):
                amount, hours = f"{job.steps:,} steps", f"{job.hours:g} h"
            else:
                amount, hours = f"{len(job.needs)} point{'s' * (len(job.needs) > 1)}", ""
            say(f"  {job.name:24s}{amount:>14s}{hours:>8s}  {job.state()}")

    def strangers(self) -> None:
        """Print the files in weights/ that do not belong to any curve."""
        for paper in dict.fromkeys(job.paper for job in self.jobs):
            known = {file for curve in self.content(paper)["curves"].values()
                     for file in curve["files"]}
            found = sorted(p.name for p in (self.settings.root / paper / "weights").glob("*.pth"))
            if others := [name for name in found if name not in known]:
                say(f"note: {paper}/weights has {', '.join(others)}, of no curve in weights.yaml; "
                    "eval.py evaluates it unless it is removed")


def chain(stage: Stage) -> list[Stage]:
    """The stages that this one starts from, and itself as the last."""
    return [*(chain(stage.parent) if stage.parent else []), stage]


# -------------------------------------------------------------------------------------------- run
def run(jobs: list[Job], slots: int) -> None:
    """Run jobs, `slots` at a time and each after those that it needs.

    Raises UserError if one fails; those that need it are skipped, and the others are done.
    """
    failed: dict[Job, str] = {}

    def fail(job: Job, why: Exception) -> None:
        job.end()
        failed[job] = str(why)
        say(f"{job.label} failed: {why}")

    for job in jobs:
        if isinstance(job, Stage):
            job.definition()  # read the files now, so that later changes are detected
        if isinstance(job, Stage) and job.changes():
            try:
                job.descriptor = job.lock()
                job.settle()
                job.end()
            except (UserError, OSError) as e:
                fail(job, e)
    waiting = [job for job in jobs if job not in failed and not job.done()]
    if not waiting and not failed:
        say("nothing to do: " + ", ".join(
            f"{job.paper}/{job.name} is done" for job in jobs if isinstance(job, Curve)))
    running: list[Job] = []
    bar = Bar() if slots == 1 and sys.stderr.isatty() else None
    try:
        while waiting or running:
            before = len(waiting), len(running)
            for job in list(waiting):
                if missing := [need for need in job.needs if need in failed]:
                    waiting.remove(job)
                    failed[job] = f"needs {missing[0].label}"
                elif len(running) < slots and all(need.done() for need in job.needs):
                    waiting.remove(job)
                    try:
                        running += [job] if job.begin() else []
                    except (UserError, OSError) as e:
                        fail(job, e)
            for job in list(running):
                try:
                    if job.poll():
                        running.remove(job)
                except (UserError, OSError) as e:
                    running.remove(job)
                    fail(job, e)
            if waiting and before == (len(waiting), 0) and not running:  # a requirement is gone
                for job in list(waiting):
                    need = next((n for n in job.needs if not n.done()), job.needs[0])
                    waiting.remove(job)
                    fail(job, UserError(f"{need.label}, which it needs, was changed or removed "
                                        "meanwhile: call again"))
            if bar:
                bar.update(running)
            time.sleep(0.1)
    finally:
        for job in running:
            job.end()
    if failed:
        raise UserError(f"not done: {', '.join(job.label for job in failed)} (see above)")


class Bar:
    """Progress bar of the stage that is being trained."""

    def __init__(self) -> None:
        tqdm.monitor_interval = 0  # no thread, as the runner forks
        self.bar: tqdm[NoReturn] | None = None
        self.job: Stage | None = None
        self.looked = 0.0

    def update(self, running: list[Job]) -> None:
        job = next((job for job in running if isinstance(job, Stage)), None)
        if self.bar and job is not self.job:
            self.bar.close()
            self.bar = None
        if job and time.monotonic() > self.looked + 2:
            self.looked, self.job = time.monotonic(), job
            self.bar = self.bar or tqdm(total=job.steps, initial=job.step(), desc=job.label,
                                        unit="step", dynamic_ncols=True, leave=False)
            self.bar.update(job.step() - self.bar.n)


def settings_of(args: argparse.Namespace, root: Path, run: str) -> Settings:
    dataset = os.path.abspath(os.path.expanduser(args.dataset)) if args.dataset else None
    if args.images and not args.short:
        raise UserError("--images: goes with --short")
    images = args.images
    if args.short and not images:
        images = root / "ckpts" / "short" / "images"
        for path in data.list_images(data.KODAK)[:2]:
            if not (images / path.name).exists():
                write_atomic(images / path.name, path.read_bytes())
    if images:
        data.list_images(images)
    return Settings(root, "short" if args.short else run, dataset,
                    data.digest(data.find_items(dataset)), args.threads or max(
                        1, processes.cores() // args.jobs), args.device,
                    os.path.abspath(images) if images else None, args.short)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `settings_of` reads."""
    add = parser.add_argument
    add("--dataset",
        help="training images: a folder, a .tar shard or a quoted glob of them; bundled "
        "photographs if not given")
    add("--jobs", type=cli.positive_int, default=1, help="number of stages trained at once")
    add("--threads", type=cli.threads, default=0,
        help="number of CPU threads per stage; 0 divides all threads by --jobs")
    add("--device", default="auto", help="device to train on: auto, cpu or cuda")
    add("--short", action="store_true", help="train a few steps of each stage, under ckpts/short/")
    add("--images", type=Path,
        help="folder of test images for --short; two Kodak images if not given")


def work(jobs: list[Job], args: argparse.Namespace) -> None:
    """Run jobs at the lowest priority, as they may take days; in the short form at the usual one.

    An interruption by the user ends the program with status 130.
    """
    if not args.short:
        os.nice(19)
    try:
        run(jobs, args.jobs)
    except KeyboardInterrupt:
        print("error: interrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("targets", nargs="*", metavar="PAPER[/CURVE]",
        help="papers or curves to make; if none is given, all papers, the least work first")
    add("--list", action="store_true", help="print what is done and what is left, then stop")
    add_flags(parser)
    args = parser.parse_args(argv)
    plan = Plan(settings_of(args, root, "weights"), args.targets)
    if args.list:
        plan.list()
        return
    work(plan.jobs, args)
    if not args.short:
        plan.strangers()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cli.run(main)
