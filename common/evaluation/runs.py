"""What a training run has left on disk: its log, TensorBoard events, flags and checkpoints.

A run is given as its log folder, the one that holds log.txt. What a run lacks (events, if they were
deleted; the hardware, without a checkpoint) is left out.
"""

from __future__ import annotations

import argparse
import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import UserError, cli
from common.files import read_file
from common.papers import papers
from common.training.checkpoints import contents

NUMBER = r"(\d+(?:\.\d+)?)(?![\d.])"
LINE = re.compile(rf"epoch (\d+)  step (\d+)  train loss {NUMBER} bpp {NUMBER}"
                  rf"(?:  (?:test|valid|eval) loss {NUMBER}(?: \(sum\))? bpp {NUMBER} "
                  rf"psnr {NUMBER})?")
KINDS = {"train": "train", "test": "validation", "valid": "validation", "eval": "validation"}
# names that papers give to the same flag
BATCH, PATCH = (("batch_size", "batchsize", "train_batch_size"),
                ("patch_size", "patchsize", "train_patch_size"))
Points = dict[int, tuple[float | None, float]]  # step -> hours of training (if known), value


@dataclass
class TrainingRun:
    """A run: its folder, flags, and every quantity that was logged.

    epochs: rows of log.txt, see `read_epochs`. series: points of a quantity such as "loss", by its
    name and "train" or "validation". flags: those that differ from the defaults, as typed.
    """

    folder: Path
    paper: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    flags: str = ""
    hardware: str = ""
    epochs: list[dict[str, float]] = field(default_factory=list)
    series: dict[tuple[str, str], Points] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return max(step for points in self.series.values() for step in points)

    @property
    def hours(self) -> float | None:
        """Hours of training, without interruptions; None without TensorBoard events."""
        known = [hours for points in self.series.values() for hours, _ in points.values()
                 if hours is not None]
        return max(known, default=None)

    @property
    def pixels(self) -> int | None:
        """Pixels of all training crops so far."""
        batch, side = (next((self.config[key] for key in keys if self.config.get(key)), None)
                       for keys in (BATCH, PATCH))
        if not batch or not side:
            return None
        sides = side if isinstance(side, list) else [side]
        return int(self.steps * batch * sides[0] * sides[-1])

    def last(self, quantity: str, kind: str = "validation") -> float | None:
        """The newest value of a quantity."""
        points = self.series.get((quantity, kind))
        return points[max(points)][1] if points else None


def read_epochs(folder: Path) -> list[dict[str, float]]:
    """A row per epoch: step, loss, bpp and, if validated, test_loss, test_bpp and test_psnr."""
    text = read_file(folder / "log.txt").decode(errors="replace")
    keys = ("step", "loss", "bpp", "test_loss", "test_bpp", "test_psnr")
    epochs = {}  # a run that resumed earlier repeats epochs; the last line counts
    for match in LINE.finditer(text):
        values = zip(keys, match.groups()[1:], strict=True)
        epochs[int(match[1])] = {key: float(v) for key, v in values if v is not None}
    if not epochs:
        raise UserError(f"{folder}/log.txt: holds no finished epoch")
    return [epochs[epoch] for epoch in sorted(epochs)]


def read_run(folder: Path) -> TrainingRun:
    """Everything that is known of the run with this log folder."""
    run = TrainingRun(folder, epochs=read_epochs(folder), series=read_events(folder))
    for key in ("loss", "bpp", "test_loss", "test_bpp", "test_psnr"):  # what no event holds
        name, kind = key.removeprefix("test_"), "validation" if "test_" in key else "train"
        points: Points = {int(row["step"]): (None, row[key]) for row in run.epochs if key in row}
        if points:
            run.series.setdefault((name, kind), points)
    place = _config_file(folder)
    run.config = cli.read_yaml(place) if place else {}
    run.paper = paper_of(folder, run.config)
    run.flags = _flags(run.paper, run.config)
    run.hardware = _hardware([folder, *([place.parent] if place else []),
                              *([folder.parents[1]] if folder.parent.name == "logs" else [])])
    return run


def read_events(folder: Path) -> dict[tuple[str, str], Points]:
    """The scalars in TensorBoard's event files, of which each start of a run writes another.

    The clock stands still between an interruption and the continuation, and goes back to the
    checkpoint: steps that had to be repeated count once.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    sessions = []
    for path in folder.glob("events.out.tfevents.*"):
        events = list(LegacyEventFileLoader(str(path)).Load())
        scalars = [(event.wall_time, event.step, value.tag.partition("/"), value.simple_value)
                   for event in events for value in event.summary.value
                   if value.WhichOneof("value") == "simple_value"]
        scalars = [row for row in scalars if row[2][0] in KINDS]
        if scalars:
            sessions.append((events[0].wall_time, scalars))
    series: dict[tuple[str, str], Points] = {}
    for begin, scalars in sorted(sessions, key=lambda session: session[0]):
        first = min(step for _, step, _, _ in scalars)
        for key, points in series.items():
            series[key] = {step: point for step, point in points.items() if step < first}
        before = max((hours or 0 for points in series.values() for hours, _ in points.values()),
                     default=0)
        for wall, step, (kind, _, name), value in scalars:
            hours = before + (wall - begin) / 3600
            series.setdefault((name, KINDS[kind]), {})[step] = (hours, value)
    return {key: points for key, points in series.items() if points}


def _config_file(folder: Path) -> Path | None:
    """The file with all flags of a run, which is in its log folder or beside the checkpoints."""
    parts = folder.resolve().parts
    places = [folder / "config.yaml", folder / "hparams.yaml"]
    if "logs" in parts:
        at = len(parts) - 1 - parts[::-1].index("logs")
        places.append(Path(*parts[:at], "ckpts", *parts[at + 1:], "config.yaml"))
        if at == len(parts) - 1:
            places.append(Path(*parts[:at], "config.yaml"))
    return next((place for place in places if place.is_file()), None)


def paper_of(folder: Path, config: dict[str, Any]) -> str:
    """The paper of a run: its folder is in that of the paper, or the configuration is."""
    known = papers()
    parts = [*Path(str(config.get("config") or "")).parts, *folder.resolve().parts]
    return next((part for part in reversed(parts) if part in known), "")


def _flags(paper: str, config: dict[str, Any]) -> str:
    """The flags of a run that differ from the defaults of the paper's train.py."""
    if not paper or not config:
        return ""
    parser = importlib.import_module(f"{paper}.train").flags()
    values = {}
    for action in parser._actions:
        value = config.get(action.dest)
        if action.dest == "resume":  # it belongs to a call, not to the run
            continue
        if value is not None and str(value) != str(action.default):  # a Path is a text in YAML
            values[action.dest] = value
    return cli.summary(parser, argparse.Namespace(**values))


def _hardware(folders: list[Path]) -> str:
    """The hardware that the newest checkpoint of a run names."""
    found = {path for folder in folders for pattern in ("*.pth", "*/*.pt", "*/*.ckpt")
             for path in folder.glob(pattern)}
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)[:1]:
        return str(contents(path).get("hardware") or "")
    return ""
