"""The images of a run: crops to train on, images to validate with, and what a resume may change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from common import UserError, image_check, processes
from common.data import Crops, digest, list_images
from common.datasets import KODAK, Found, Item, find
from common.files import shown
from common.training.checkpoints import contents, newest

RECORD = "unusable_images.jsonl"  # in the folder of a run: number and key of each image
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
                folder: Path, test: str | Path | None = None, quiet: bool = False
                ) -> TrainingImages:
    """Find and check the images of a run.

    root: the data set, None for the bundled photographs; crop: its side or (height, width); folder:
    that of the run's checkpoints; test: folder of validation images. Without it, one training image
    in 15 is held out, at most 16, the same ones for every seed, and never trained on.

    Raises UserError, which names all images that are unreadable or smaller than the crop. A run in
    `folder` goes on without images that an error named and that were removed since then: the next
    image takes the place of each, so that all other samples stay as they were. A run of an older
    version, which held nothing out, goes on with all its images, and is validated on Kodak as
    before.
    """
    size = (crop, crop) if isinstance(crop, int) else crop
    older = test is None and _is_older(folder)
    test = KODAK if older else test
    found = find(root)
    items = _without_removed(found.items, folder)
    held = set() if test else _held_out(items)
    numbers = [i for i in range(len(items)) if i not in held] or list(range(len(items)))
    record = Record(folder / RECORD, digest(items), items, numbers)
    if processes.rank() == 0:
        if not quiet:
            print(f"{shown(root or 'images')}: {replace_items(found, items)}", flush=True)
        _check(items, size, record)
    training = [items[i] for i in numbers]
    crops = Crops(training, size, seed, flip, record)
    if test:
        paths = list_images(test)
        if processes.rank() == 0:
            image_check.check_readable(paths, "validation images")
        name = shown(Path(test).resolve().name)
        validation = [Item(path) for path in paths]
        return TrainingImages(crops, digest(training), validation,
                              f"{len(paths)} image{'s' * (len(paths) > 1)} of {name}"
                              f"{OLDER * older}")
    kept = [replace(items[i], limit=HELD_OUT) for i in sorted(held) if not items[i].removed]
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

    digest: of all images, those held out included; numbers: of the training images in `items`.
    """

    path: Path
    digest: str
    items: list[Item]
    numbers: list[int]

    def __call__(self, index: int) -> None:
        self.add([self.numbers[index]])

    def add(self, numbers: Iterable[int]) -> None:
        lines = [json.dumps([self.digest, i, self.items[i].key]) + "\n" for i in numbers]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as f:
            f.write("".join(lines))


def _check(items: list[Item], size: tuple[int, int], record: Record) -> None:
    """Raise UserError if images cannot be used; those of a run that has begun are recorded."""
    there = [i for i, item in enumerate(items) if not item.removed]
    unusable = image_check.find_unusable([items[i] for i in there], size)
    if unusable:
        if _checkpoints(record.path.parent):
            record.add(there[i] for i in unusable)
        raise UserError(image_check.report(list(unusable.values()), len(items), "training images"))


def _checkpoints(folder: Path) -> list[Path]:
    return [path for pattern in CHECKPOINTS for path in folder.glob(pattern)]


def _is_older(folder: Path) -> bool:
    """Whether the run in `folder` began when Kodak was the default validation set."""
    path = newest(_checkpoints(folder))
    config = (contents(path).get("config") if path else None) or {}
    return bool(config) and str(config.get("validation", OLDER)).endswith(OLDER)


def _without_removed(items: list[Item], folder: Path) -> list[Item]:
    """The images of the run in `folder`: those that were named and are gone keep their places."""
    try:
        lines = (folder / RECORD).read_text().splitlines() if _checkpoints(folder) else []
        entries = sorted({tuple(json.loads(line)) for line in lines}, key=lambda e: e[1])
    except (OSError, ValueError, TypeError, IndexError):
        return items
    for wanted in {entry[0] for entry in entries}:
        whole = list(items)
        for _, i, key in (entry for entry in entries if entry[0] == wanted):
            if i < len(whole) and whole[i].key == key:
                if not whole[i].path.exists():  # still in a list of sequences
                    whole[i] = replace(whole[i], removed=True)
            else:
                whole.insert(i, Item(Path(), member=key, removed=True))
        if digest(whole) == wanted and not all(item.removed for item in whole):
            return whole
    return items


def _held_out(items: list[Item]) -> set[int]:
    """Numbers of the images to hold out: those whose names have the smallest hashes."""
    count = min(MOST, -(-len(items) // SHARE)) if len(items) > 1 else 0
    order = sorted(range(len(items)), key=lambda i: hashlib.sha256(
        items[i].key.encode("utf-8", "surrogateescape")).digest())
    return set(order[:count])
