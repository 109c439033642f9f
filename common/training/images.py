"""The images of a run: crops to train on, images to validate with, and what a resume may change."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import UserError, image_check, processes
from common.data import Crops, digest, list_images
from common.datasets import KODAK, Found, Item, find
from common.files import shown
from common.training.checkpoints import RECORD, contents, newest

CHECKPOINTS = ("*.pth", "*.pt", "*.pth.tar", "*.ckpt")  # names of all papers
SHARE, MOST = 15, 16  # of so many images one is held out for validation, but at most 16
OLDER = ", the default when the run began"  # of runs that held nothing out
HELD_OUT = (512, 768)  # central part of a held-out image that is used, the size of Kodak's


@dataclass
class TrainingImages:
    """Crops to train on and images to validate with.

    digest: identifies the training images, see --resume. validation: what the images to validate
    with are, in words; it goes into checkpoints and results.
    """

    crops: Crops
    digest: str
    test: list[Item]
    validation: str

    def __len__(self) -> int:
        return len(self.crops.items)


def find_images(root: str | Path | None, crop: int | tuple[int, int], seed: int, flip: bool,
                history: Path | None, test: str | Path | None = None, quiet: bool = False,
                folder: Path | None = None) -> TrainingImages:
    """Find and check the images of a run.

    root: the data set, None for the bundled photographs; crop: its side or (height, width);
    history: folder, or one checkpoint, of the run that is continued; None for a new run, whatever
    its folder holds. folder: that of this run's checkpoints, if it is another one. test: folder of
    validation images. Without it, one training image in 15 is held out, at most 16, the same ones
    for every seed, and never trained on.

    Raises UserError, which names all images that are unreadable or smaller than the crop. A run is
    continued without images that an error named and that were removed since then: the next image
    takes the place of each, so that all other samples stay as they were. A run of an older version,
    which held nothing out, goes on with all its images, and is validated on Kodak as before.
    """
    size = (crop, crop) if isinstance(crop, int) else crop
    config = _config(history)
    older = test is None and _is_older(config)
    test = KODAK if older else test
    found = find(root)
    before = history.parent if history and history.is_file() else history
    begun = [before] if before and (before != history or _checkpoints(before)) else []
    items, numbers = _as_before(found.items, begun, config, bool(test))
    folders = [path for path in (before, folder) if path]
    record = Record(folders, digest(items), items, numbers)
    paths = list_images(test) if test else []

    def check() -> None:
        if not quiet:
            print(f"{shown(root or 'images')}: {replace_items(found, items)}", flush=True)
        _check(items, size, replace(record, folders=begun))
        if paths:
            image_check.check_readable(paths, "validation images")

    processes.first_does(check)
    training = [items[i] for i in numbers]
    crops = Crops(training, size, seed, flip, record)
    if test:
        name = shown(Path(test).resolve().name)
        validation = [Item(path) for path in paths]
        return TrainingImages(crops, digest(training), validation,
                              f"{len(paths)} image{'s' * (len(paths) > 1)} of {name}"
                              f"{OLDER * older}")
    held = sorted({*range(len(items))} - {*numbers})
    kept = [replace(items[i], limit=HELD_OUT) for i in held if not items[i].removed]
    words = f"{len(kept)} image{'s' * (len(kept) > 1)} held out of the training data"
    if not kept:  # a single image, or all that were held out are gone
        kept = [replace(next(i for i in training if not i.removed), limit=HELD_OUT)]
        words = "a training image, for want of others"
    return TrainingImages(crops, digest(training), kept, words)


def replace_items(found: Found, items: list[Item]) -> Found:
    """The same data set in words, where removed images are counted."""
    gone = sum(item.removed for item in items)
    if gone:
        found.skipped["removed since the run began"] += gone
    return found


@dataclass
class Record:
    """Writes down which images of a run turned out to be unusable, so that they may be removed.

    folders: of the run, and of the one that it continues; digest: of all images, those held out
    included; numbers: of the training images in `items`.
    """

    folders: list[Path]
    digest: str
    items: list[Item]
    numbers: list[int]

    def __call__(self, index: int) -> None:
        self.add([self.numbers[index]])

    def add(self, numbers: Iterable[int]) -> None:
        lines = [json.dumps([self.digest, i, self.items[i].key]) + "\n" for i in numbers]
        for folder in self.folders:
            with contextlib.suppress(OSError):  # the error that names the images follows
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / RECORD, "a") as f:
                    f.write("".join(lines))


def _check(items: list[Item], size: tuple[int, int], record: Record) -> None:
    """Record images that cannot be used, and raise UserError if there are any."""
    there = [i for i, item in enumerate(items) if not item.removed]
    unusable = image_check.find_unusable([items[i] for i in there], size)
    if unusable:
        record.add([there[i] for i in unusable])
        raise UserError(image_check.report(list(unusable.values()), len(items), "training images"))


def _checkpoints(folder: Path) -> list[Path]:
    return [path for pattern in CHECKPOINTS for path in folder.glob(pattern)]


def _config(history: Path | None) -> dict[str, Any]:
    """The flags of the run in a folder, or of one checkpoint; {} if there is none."""
    path = history
    if history and not history.is_file():
        path = newest(_checkpoints(history))
    return (contents(path).get("config") if path else None) or {}


def _is_older(config: dict[str, Any]) -> bool:
    """Whether a run began when Kodak was the default validation set."""
    return bool(config) and str(config.get("validation", OLDER)).endswith(OLDER)


def _as_before(items: list[Item], begun: list[Path], config: dict[str, Any], tested: bool
               ) -> tuple[list[Item], list[int]]:
    """All images, and the numbers of those to train on, as in the run that is continued.

    begun: its folder; [] for a new run. tested: whether there are validation images, so that none
    are held out.
    """
    ways = []
    for way in [*(way for folder in begun for way in _with_removed(items, folder)), items]:
        held = set() if tested else _held_out(way)
        numbers = [i for i in range(len(way)) if i not in held] or list(range(len(way)))
        if digest(way[i] for i in numbers) == config.get("images"):
            return way, numbers
        ways.append((way, numbers))
    return ways[0]


def _with_removed(items: list[Item], folder: Path) -> Iterator[list[Item]]:
    """The images that a run may have had: those that were named and are gone keep their places."""
    try:
        lines = (folder / RECORD).read_text().splitlines()
        entries = sorted({tuple(json.loads(line)) for line in lines}, key=lambda e: e[1])
    except (OSError, ValueError, TypeError, IndexError):
        return
    for wanted in {entry[0] for entry in entries}:
        whole = list(items)
        for _, i, key in (entry for entry in entries if entry[0] == wanted):
            if i < len(whole) and whole[i].key == key:
                if not whole[i].path.exists():  # still in a list of sequences
                    whole[i] = replace(whole[i], removed=True)
            else:
                whole.insert(i, Item(Path(), member=key, removed=True))
        if digest(whole) == wanted and not all(item.removed for item in whole):
            yield whole


def _held_out(items: list[Item]) -> set[int]:
    """Numbers of the images to hold out: those whose names have the smallest hashes."""
    count = min(MOST, -(-len(items) // SHARE)) if len(items) > 1 else 0
    order = sorted(range(len(items)), key=lambda i: hashlib.sha256(
        items[i].key.encode("utf-8", "surrogateescape")).digest())
    return set(order[:count])
