"""Stages and curves of a weights.yaml.

A stage is one run of train.py; a curve is a set of weights that are exported and evaluated
together. `common.recipes.weights` runs them. The folder of a stage holds a record of the definition
that it was trained with.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from common import UserError, cli
from common.files import write_atomic
from common.recipes.jobs import Job, Settings, before, digest, file_digest, holds_files, say, show
from common.recipes.publishing import evaluate_and_publish
from common.recipes.recipe_file import as_list, words

STEP = re.compile(r"^epoch \d+ +step (\d+).*", re.M)  # a line of log.txt


class Stage(Job):
    """A stage: one run of train.py."""

    kind, file = "training", "stage.json"

    def __init__(self, settings: Settings, paper: str, name: str, content: dict[str, Any],
                 parent: Stage | None):
        stage = content["stages"][name]
        short = content.get("short") if settings.short else {}
        if short is None:
            raise UserError(f"{paper}/weights.yaml: has no short form")
        folders = [self.fill(folder, settings) for folder in stage["folders"]]
        super().__init__(settings, paper, name, folders[0], [parent] if parent else [])
        self.folders, self.parent = [self.home / folder for folder in folders], parent
        self.checkpoint = stage["checkpoint"]
        self.steps, self.hours = short.get("steps", stage["steps"]), 0 if short else stage["hours"]
        self.flags = stage["flags"] | short.get("flags", {})
        self.train = content["train"] | stage.get("train", {})

    @staticmethod
    def fill(value: Any, settings: Settings) -> Any:
        """Replace {run} and {images} in a text, or in the texts of a list."""
        if isinstance(value, list):
            return [Stage.fill(v, settings) for v in value]
        if not isinstance(value, str):
            return value
        return value.replace("{run}", settings.run).replace("{images}", str(settings.images))

    @functools.cache  # noqa: B019  (a stage lives as long as the program)
    def definition(self) -> dict[str, Any]:
        """Everything that the result depends on, including the stage that it starts from."""
        flags = {k: v for k, v in self.flags.items() if k not in ("threads", "device")}
        config = cli.read_yaml(self.home / flags["config"]) if "config" in flags else None
        parent = None
        if self.parent:
            parent = {"stage": f"{self.parent.paper}/{self.parent.name}",
                      "definition": digest(self.parent.definition()),
                      "start": as_list(self.train["start"])}
        images = self.settings.digest
        if self.settings.dataset is None:  # a missing --dataset is not a change
            if record := self.record():
                images = record["definition"]["images"]
            elif self.parent:
                images = self.parent.definition()["images"]
        return json.loads(json.dumps({"flags": flags, "config": config and digest(config),
                                      "images": images, "from": parent}, default=str))

    def trained(self) -> int:
        """Total number of steps, including those of the stages that it starts from."""
        return self.steps + (self.parent.trained() if self.parent else 0)

    def logged(self) -> list[str]:
        """The last epoch line of each log.txt; one run may log several phases."""
        logs = sorted({log for folder in self.folders for log in folder.rglob("log.txt")})
        matches = [list(STEP.finditer(log.read_text(errors="replace"))) for log in logs]
        return [found[-1][0] for found in matches if found]

    def step(self) -> int:
        """Number of steps done according to the logs, which count whole epochs."""
        return sum(int(found[1]) for line in self.logged() if (found := STEP.match(line)))

    def found(self) -> list[Path]:
        def natural(path: Path) -> list[Any]:
            return [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", str(path))]
        return sorted(self.folder.glob(self.checkpoint), key=natural)

    def result(self, needed: str) -> Path:
        """The final checkpoint; UserError, which says `needed`, if it is gone or has changed."""
        record = self.record()
        path = self.folder / record["checkpoint"]
        changed = "is gone" if not path.exists() else (
            "has changed" if file_digest(path) != record["sha256"] else "")
        if changed:
            raise UserError(f"{show(path, self)} {changed}, and {needed}: put it back, or remove "
                            f"{show(self.folder, self)} to train it again")
        return path

    def settle(self) -> None:
        """Rename the folders of a run with another definition, and print the reason."""
        if not (why := self.changes()):
            return
        self.ask_for_images()
        kept, n = [f for f in reversed(self.folders) if holds_files(f)], 1  # the record's last
        while any(before(f, n).exists() for f in self.folders):
            n += 1
        for folder in kept:
            folder.rename(before(folder, n))
        say(f"{self.label}: {why}: its run is kept as {show(before(kept[-1], n), self)} and "
            "trained again")
        descriptor, self.descriptor = self.descriptor, None
        assert descriptor is not None  # a job is locked before it is settled
        os.close(descriptor)  # the lock file was renamed with the folder
        self.descriptor = self.lock()

    def ask_for_images(self) -> None:
        """Raise UserError if this call does not name the images of the interrupted run."""
        if (images := self.definition()["images"]) != self.settings.digest:
            raise UserError(f"was begun on {images}, and --dataset is missing: name them again "
                            "(make: DATASET=...)")

    def changes(self) -> str:
        """Differences between the run in the folders and the definition; "" if there are none."""
        record = self.record()
        if not record:
            filled = any(map(holds_files, self.folders))
            return f"there is no {show(self.folder / self.file, self)}" if filled else ""
        old, now = record["definition"], self.definition()
        parts = []
        for key in sorted({*old["flags"], *now["flags"]}):
            was, new = (d["flags"].get(key, "not set") for d in (old, now))
            parts += [f"{key} was {was}, is {new}"] if was != new else []
        names = [d["flags"].get("config") for d in (old, now)]
        if old["config"] != now["config"] and names[0] == names[1]:
            parts.append(f"{names[1]} was changed")
        if old["images"] != now["images"]:
            parts.append(f"the images were {old['images']}, are {now['images']}")
        was, new = old["from"] or {}, now["from"] or {}
        if was.get("stage") != new.get("stage"):
            parts.append(f"it started from {was.get('stage', 'nothing')}, now from "
                         f"{new.get('stage', 'nothing')}")
        elif was != new and not parts:
            parts.append(f"{new['stage']}, from which it starts, was changed")
        return ", ".join(parts)

    def steps_of_work(self) -> Iterator[list[Any]]:
        self.settle()
        start, resume = [], as_list(self.train["resume"])
        if self.parent:
            begun = as_list(self.train["start"])
            start = [*begun, self.parent.result(f"{self.label} starts from it")]
            if set(begun) & set(resume):  # the same flag for both
                start, resume = ([], resume) if self.found() else (start, [])
        dataset = self.settings.dataset
        self.ask_for_images()
        config = self.flags.get("config")
        if config and digest(cli.read_yaml(self.home / config)) != self.definition()["config"]:
            raise UserError(f"{config} was changed while this call runs: call again")
        flags = {key: self.fill(value, self.settings) for key, value in self.flags.items()}
        self.seconds = self.seconds_written = self.record().get("seconds", 0)
        self.write(definition=self.definition(), done=False, seconds=self.seconds)
        say(self.opening())
        yield ["train.py", *words(flags), *start, *resume,
               *([*as_list(self.train["dataset"]), dataset] if dataset else []),
               "--threads", self.settings.threads, "--device", self.settings.device]
        found = self.found()
        if not found:
            raise UserError(f"there is no {self.checkpoint} in {show(self.folder, self)}")
        lines = self.logged()
        self.write(done=True, checkpoint=str(found[-1].relative_to(self.folder)),
                   sha256=file_digest(found[-1]), seconds=self.spent(),
                   ended=datetime.now().isoformat(timespec="seconds"))
        took = f"{self.spent() / 3600:.1f} h" if self.spent() > 3600 else f"{self.spent():.0f} s"
        say(f"{self.label}: done in {took}" + (f": {lines[-1]}" if lines else ""))
        if self.step() != self.steps:
            say(f"note: the log of {self.label} ends at step {self.step():,}, weights.yaml says "
                f"{self.steps:,}")

    def tick(self) -> None:
        if self.spent() > self.seconds_written + 60:
            self.seconds_written = self.spent()
            self.write(seconds=self.seconds_written)

    def spent(self) -> float:
        """Training time in seconds, summed over all calls."""
        return round(self.seconds + time.monotonic() - self.clock, 1)

    def remaining(self) -> float:
        """Expected number of remaining hours."""
        return 0.0 if self.done() else self.hours * max(0, 1 - self.step() / self.steps)

    def opening(self) -> str:
        hours = f", about {self.hours:g} h" if self.hours else ""
        at = f"; continues at step {self.step():,}" if self.step() else ""
        return f"{self.label}: {self.steps:,} steps{hours}{at}"

    def state(self) -> str:
        if self.done():
            return "done"
        if why := self.changes():
            return f"to do: {why}"
        return f"under way, at step {self.step():,}" if self.record() else "to do"


class Curve(Job):
    """Weights files that are evaluated together: points of one rate-distortion curve."""

    kind, file = "publishing", "curve.json"

    def __init__(self, settings: Settings, paper: str, name: str, content: dict[str, Any],
                 files: dict[str, Stage]):
        curve = content["curves"][name]
        super().__init__(settings, paper, name, f"ckpts/{settings.run}/{name}",
                         list(files.values()))
        self.files, self.evaluate = files, curve.get("evaluate", [])
        self.dataset = as_list(content["eval"]["dataset"])
        self.bundle = curve.get("bundle", True) and not settings.short

    def definition(self) -> dict[str, Any]:
        return {"files": {file: [stage.record().get("sha256"), stage.trained()]
                          for file, stage in self.files.items()},
                "evaluate": self.evaluate, "bundle": self.bundle}

    def outputs(self) -> list[Path]:
        """The files that exist when the curve is done."""
        weights = self.home / "weights" if self.bundle else self.folder
        results = self.folder if self.settings.short else self.home / "results"
        return [*(weights / file for file in self.files),
                *(results / f"{self.name}{suffix}" for suffix in (".json", ".png"))]

    def done(self) -> bool:
        return (all(stage.done() for stage in self.needs) and super().done()
                and all(path.exists() for path in self.outputs()))

    def steps_of_work(self) -> Iterator[list[Any]]:
        say(f"{self.label}: export and evaluate {', '.join(self.files)}")
        for file, stage in self.files.items():
            checkpoint = stage.result(f"the curve {self.label} needs it")
            yield ["-m", "common.recipes.export", self.paper, checkpoint, "-o", self.folder / file,
                   "--steps", stage.trained()]
        images = self.settings.images
        yield from evaluate_and_publish(
            self.paper, self.name, [self.folder / file for file in self.files], self.folder,
            dataset=[*self.dataset, images] if images else [], threads=self.settings.threads,
            device=self.settings.device, flags=self.evaluate, into=self.outputs()[-1].parent,
            evaluated=self.copy_weights)
        logs = {stage.name: log.parent for stage in self.files.values()
                for folder in stage.folders for log in sorted(folder.rglob("log.txt"))[-1:]}
        if logs:
            yield ["-m", "common.evaluation.curves", *logs.values(), "--names", *logs,
                   "--plot", self.outputs()[-1].with_name(f"{self.name}-training.png")]
        print(self.output(), end="", flush=True)
        for file in self.files if self.bundle else ():
            (self.folder / file).unlink()
        self.write(definition=self.definition(), done=True,
                   ended=datetime.now().isoformat(timespec="seconds"))
        say(f"{self.label}: done: {', '.join(show(p, self) for p in self.outputs())}")

    def copy_weights(self) -> None:
        """Copy the exported files to the paper's weights/, if they are bundled."""
        for file in self.files if self.bundle else ():
            write_atomic(self.home / "weights" / file, (self.folder / file).read_bytes())

    def state(self) -> str:
        return "done" if self.done() else "to do"
