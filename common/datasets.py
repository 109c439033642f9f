"""Data sets: the images of a folder, of Vimeo-90k or of tar shards, and what they are in words."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from common import UserError
from common.files import shown
from common.image_io import BUNDLED, NOT_BUNDLED, read_image

from torch import Tensor

KODAK = BUNDLED / "kodak"  # 24 test photographs, 768x512; never trained on
TRAIN = BUNDLED / "train"  # CC0 training tiles
SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".ppm",
            ".pgm", ".pnm", ".gif", ".avif", ".jp2", ".j2k", ".jpx"}
FRAME = re.compile(r"im\d+\.png")  # of a Vimeo septuplet


@dataclass(frozen=True)
class Item:
    """One image: a file, or a member of a tar shard (its bytes at `offset`).

    limit: (height, width) of the central part that is read at most. removed: the image is no longer
    there; `member` is its key.
    """

    path: Path
    member: str = ""
    offset: int = 0
    size: int = 0
    limit: tuple[int, int] | None = None
    removed: bool = False

    @property
    def name(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    @property
    def key(self) -> str:
        """Name of the image within its data set, wherever that is stored."""
        return self.member or "/".join(self.path.parts[-2:])

    def open(self) -> Path | io.BytesIO:
        """What Pillow can open: the path, or the bytes of the member."""
        if not self.member:
            return self.path
        try:
            with open(self.path, "rb") as f:
                f.seek(self.offset)
                return io.BytesIO(f.read(self.size))
        except OSError as e:
            raise UserError(f"{self.name}: cannot be read ({e.strerror or e})") from None

    def read(self) -> Tensor:
        x = read_image(self.open(), notice=lambda _: None, name=self.name)
        if self.limit:
            height, width = (min(pair) for pair in zip(x.shape[1:], self.limit, strict=True))
            x = centre(x, height, width).contiguous()
        return x


@dataclass
class Found:
    """The images of a data set, its layout in words, and how many entries were skipped and why."""

    items: list[Item]
    layout: str
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        skipped = ", ".join(f"{count} {_plural(what) if count > 1 else what}"
                            for what, count in self.skipped.items())
        return (f"{len(self.items)} image{'s' * (len(self.items) != 1)}, {self.layout}"
                + (f"; skipped: {skipped}" if skipped else ""))


def _plural(what: str) -> str:
    """Of a kind of entry that is skipped: "files without an extension"."""
    return re.sub(r"\b(archive|file|folder|shard)\b", r"\1s", what, count=1)


def centre(x: Tensor, height: int, width: int) -> Tensor:
    """The central height x width of x (3, H, W), which must not be smaller."""
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]


def digest(items: Iterable[Item]) -> str:
    """Identify a training set, wherever it is stored, by number and hash of its image names."""
    names = [item.key for item in items]
    text = "\n".join(names).encode("utf-8", "surrogateescape")
    return f"{len(names)} images {hashlib.sha256(text).hexdigest()[:8]}"


# --------------------------------------------------------------------------------------- finding
def list_images(path: str | Path, notice: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Image files in a folder (sorted by name, not recursive), or the single file given.

    Hidden files, folders and other files are no images; `notice` receives a text if some were left
    out.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir() and BUNDLED in path.parents:
        raise UserError(NOT_BUNDLED)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder of images")
    skipped: Counter[str] = Counter()
    found = [p for p in sorted(path.iterdir()) if _is_image(p, skipped)]
    if not found:
        raise UserError(f"{path}: holds no images ({' '.join(sorted(SUFFIXES))})")
    if skipped:
        notice(f"{shown(path)}: {Found([Item(p) for p in found], 'in one folder', skipped)}")
    return found


def find_items(root: str | Path | None, split: str = "train") -> list[Item]:
    """All images of a data set: the items of `find`."""
    return find(root, split).items


def find(root: str | Path | None, split: str = "train") -> Found:
    """All images of a data set, whose layout is detected.

    root: None for the bundled photographs, or a glob such as "/data/train_*/*_free.tar" for all
    data sets that match it, in the order of their names. Otherwise, the first layout that fits: a
    tar shard; Vimeo-90k as published (`sequences/`, `sep_<split>list.txt`); images at any depth in
    `<split>/`; shards `*.tar`, `<split>/*.tar` or `<split>_*/*.tar`; images at any depth in the
    folder itself. If all images of a folder are <sequence>/im<n>.png, as in Vimeo-90k, only the
    first frame of each sequence counts. Links to folders are followed.
    """
    if root is None:
        return Found([Item(p) for p in list_images(TRAIN)], "the bundled photographs")
    root = Path(root)
    if glob.has_magic(str(root)) and not root.exists():
        matches = sorted(glob.glob(str(root), recursive=True))
        if not matches:
            raise UserError(f"--dataset {root}: no folder or .tar shard has such a name")
        parts = [find(match, split) for match in matches]
        return Found([item for part in parts for item in part.items],
                     f"in {len(parts)} data sets", sum((p.skipped for p in parts), Counter()))
    if root.is_file() and root.suffix == ".tar":
        return _shards([root])
    if not root.is_dir():
        raise UserError(f"--dataset {root}: no such folder or .tar shard")
    listing = root / f"sep_{split}list.txt"
    if listing.is_file():
        names = listing.read_text().split()
        if not names:
            raise UserError(f"--dataset {listing}: lists no sequences")
        return Found([Item(root / "sequences" / name / "im1.png") for name in names],
                     f"first frames of the sequences in {listing.name}")
    part = root / split
    if part.is_dir() and (found := _folder(part)).items:
        beside = len([p for p in root.glob("*.tar") if not p.name.startswith(".")])
        return _with(found, f"archive beside {split}/", beside)
    shards = _tars(root) or _tars(part) or [
        shard for folder in sorted(root.glob(f"{split}_*")) for shard in _tars(folder)]
    found = _folder(root)
    if shards and found.items and not all(
            any(folder in item.path.parents for folder in {s.parent for s in shards} - {root})
            for item in found.items):
        raise UserError(f"--dataset {root}: holds images ({shown(found.items[0].path.name)}, "
                        f"{len(found.items)} in all) and shards ({shown(shards[0].name)}, "
                        f"{len(shards)} in all): move the images into {split}/, or name the shards "
                        f"alone, as '{root}/*.tar'")
    if shards:
        return _shards(shards)
    if not found.items:
        raise UserError(f"--dataset {part if part.is_dir() else root}: holds no images; leave "
                        "--dataset out to train on the bundled photographs")
    return found


def _with(found: Found, what: str, count: int) -> Found:
    if count:
        found.skipped[what] += count
    return found


def _is_image(path: Path, skipped: Counter[str]) -> bool:
    """Whether a file is named like an image; otherwise it is counted, folders aside."""
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        skipped["hidden"] += 1
    elif path.is_dir():
        if suffix in SUFFIXES:
            skipped["folder named like an image"] += 1
    elif suffix not in SUFFIXES:
        skipped[f"{shown(suffix)} file" if suffix else "file without an extension"] += 1
    elif path.exists() and not path.is_file():
        skipped["special file"] += 1
    else:
        return True  # a broken link, too, so that it is reported
    return False


def _folder(root: Path) -> Found:
    """Images at any depth, or the first frames if all are frames of sequences."""
    found = images_below(root)
    paths = [item.path for item in found.items]
    frames = [p for p in paths if p.name == "im1.png"]
    if frames and all(FRAME.fullmatch(p.name) and p.parent.parent == root for p in paths):
        return Found([Item(p) for p in frames], f"first frames of the sequences in {shown(root)}",
                     found.skipped)
    return found


def images_below(root: Path) -> Found:
    """Images at any depth; folders first, then links to folders that are not among these."""
    skipped: Counter[str] = Counter()
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    folders: list[Path] = [root]
    links: list[Path] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as e:
            raise UserError(f"--dataset {folder}: {e.strerror or e}") from None
        if (status.st_dev, status.st_ino) in seen:
            skipped["folder linked again"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                (links if entry.is_symlink() else folders).append(folder / entry.name)
            elif _is_image(path := folder / entry.name, skipped):
                files.append(path)
    return Found([Item(p) for p in sorted(files)], f"files in {shown(root)}", skipped)


def _tars(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))


def _shards(paths: list[Path]) -> Found:
    items: list[Item] = []
    skipped: Counter[str] = Counter()
    for path in paths:
        found = _members(path, skipped)
        items += found
        if not found:
            skipped["shard without images"] += 1
    if not items:
        names = ", ".join(str(path) for path in paths[:3])
        raise UserError(f"{names}: {'this shard holds' if len(paths) == 1 else 'these hold'} no "
                        "images")
    return Found(items, f"in {len(paths)} tar shard{'s' * (len(paths) > 1)}", skipped)


def _members(path: Path, skipped: Counter[str]) -> list[Item]:
    items = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if any(part.startswith(".") for part in name.parts):
                    skipped["hidden"] += member.isfile()
                elif member.isfile() and name.suffix.lower() in SUFFIXES:
                    items.append(Item(path, member.name, member.offset_data, member.size))
    except (tarfile.TarError, OSError) as e:
        raise UserError(f"{path}: not a readable uncompressed tar shard ({e})") from None
    return sorted(items, key=lambda item: item.member)
