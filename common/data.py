"""Images and data sets: the bundled photographs, image folders, Vimeo-90k and tar shards.

A training set is a list of `Item`s (files, or members of a tar shard). `Crops` turns sample number
k of a run into one random crop of it. Image and crop of sample k depend only on (seed, k), so a run
that is resumed, or that uses more loader processes, sees the same data.
"""

from __future__ import annotations

import glob
import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common import UserError
from common.image_io import read_image as read_image
from common.image_io import to_float as to_float
from common.image_io import to_uint8 as to_uint8
from common.image_io import write_image as write_image

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

IMAGES = Path(__file__).parent / "images"
KODAK = IMAGES / "kodak"  # 24 test photographs, 768x512; never trained on
TRAIN = IMAGES / "train"  # CC0 training tiles
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
CACHE_PIXELS = 400_000_000  # limit of the cache of decoded images (1.2 GB)


@dataclass(frozen=True)
class Item:
    """One image: a file, or a member of a tar shard (its bytes at `offset`)."""

    path: Path
    member: str = ""
    offset: int = 0
    size: int = 0

    @property
    def name(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)

    def read(self) -> Tensor:
        source: Path | io.BytesIO = self.path
        if self.member:
            try:
                with open(self.path, "rb") as f:
                    f.seek(self.offset)
                    source = io.BytesIO(f.read(self.size))
            except OSError as e:
                raise UserError(f"{self.name}: cannot be read ({e.strerror or e})") from None
        return read_image(source, notice=lambda _: None, name=self.name)


def list_images(path: str | Path) -> list[Path]:
    """Image files in a folder (sorted by name, not recursive), or the single file given."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder of images")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{path}: holds no images ({' '.join(sorted(SUFFIXES))})")
    return found


def find_items(root: str | Path | None, split: str = "train") -> list[Item]:
    """All images of a data set, whose layout is detected.

    root: None for the bundled photographs, or a glob such as "/data/train_*/*_free.tar" for all
    data sets that match it, in the order of their names. Otherwise, the first layout that fits: a
    tar shard; shards `*.tar` or `<split>_*/*.tar`; Vimeo-90k as published (`sequences/`,
    `sep_<split>list.txt`) or as `<split>/<sequence>/im1.png`, with the first frame of each
    septuplet; images at any depth in `<split>/` or in the folder itself.
    """
    if root is None:
        return [Item(p) for p in list_images(TRAIN)]
    root = Path(root)
    if glob.has_magic(str(root)) and not root.exists():
        matches = sorted(glob.glob(str(root), recursive=True))
        if not matches:
            raise UserError(f"--dataset {root}: no folder or .tar shard has such a name")
        return [item for match in matches for item in find_items(match, split)]
    if root.is_file() and root.suffix == ".tar":
        return _tar_items(root)
    if not root.is_dir():
        raise UserError(f"--dataset {root}: no such folder or .tar shard")
    shards = sorted(root.glob("*.tar")) or sorted(root.glob(f"{split}_*/*.tar"))
    if shards:
        return [item for shard in shards for item in _tar_items(shard)]
    listing = root / f"sep_{split}list.txt"
    if listing.is_file():
        names = listing.read_text().split()
        if not names:
            raise UserError(f"--dataset {listing}: lists no sequences")
        return [Item(root / "sequences" / name / "im1.png") for name in names]
    folder = root / split if (root / split).is_dir() else root
    files = sorted(folder.glob("*/im1.png"))
    files = files or sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"--dataset {folder}: holds no images; leave --dataset out to train on "
                        "the bundled photographs")
    return [Item(p) for p in files]


def centre(x: Tensor, height: int, width: int) -> Tensor:
    """The central height x width of x (3, H, W), which must not be smaller."""
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return x[:, top : top + height, left : left + width]


def digest(items: list[Item]) -> str:
    """Identify a training set, wherever it is stored, by number and hash of its image names."""
    names = "\n".join(item.member or "/".join(item.path.parts[-2:]) for item in items)
    return f"{len(items)} images {hashlib.sha256(names.encode()).hexdigest()[:8]}"


def _tar_items(path: Path) -> list[Item]:
    try:
        with tarfile.open(path, "r:") as tar:
            items = [Item(path, m.name, m.offset_data, m.size) for m in tar
                     if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES]
    except (tarfile.TarError, OSError) as e:
        raise UserError(f"{path}: not a readable uncompressed tar shard ({e})") from None
    if not items:
        raise UserError(f"{path}: this shard holds no images")
    return sorted(items, key=lambda item: item.member)


class Crops(Dataset[Tensor]):
    """Random crops of a list of images, indexed by the sample number k = 0, 1, 2, ... of a run.

    Pass p = k // len(items) visits every image once, in an order drawn from (seed, p); the position
    of the crop and the flip are drawn from (seed, k). `self[k]` is a uint8 tensor (3, *crop).
    crop: (height, width), or the side of a square.
    """

    def __init__(self, items: list[Item], crop: int | tuple[int, int], seed: int = 0,
                 flip: bool = False):
        self.items, self.flip = items, flip
        self.crop = (crop, crop) if isinstance(crop, int) else crop
        self.seed = seed % 2**32  # a Philox key is >= 0; keys from 2**32 on are for the order
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._cache: dict[int, Tensor] = {}
        self._cached_pixels = 0

    def __getitem__(self, k: int) -> Tensor:
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=k))
        image = self._image(self._index(k))
        height, width = image.shape[-2:]
        rows, columns = self.crop
        top = int(rng.integers(height - rows + 1))
        left = int(rng.integers(width - columns + 1))
        patch = image[:, top : top + rows, left : left + columns]
        return patch.flip(-1) if self.flip and rng.random() < 0.5 else patch

    def _index(self, k: int) -> int:
        p, position = divmod(k, len(self.items))
        if self._order[0] != p:
            rng = np.random.Generator(np.random.Philox(key=self.seed + 2**32, counter=p))
            self._order = (p, torch.from_numpy(rng.permutation(len(self.items))))
        return int(self._order[1][position])

    def _image(self, index: int) -> Tensor:
        if index in self._cache:
            return self._cache[index]
        item = self.items[index]
        image = item.read()
        height, width = image.shape[-2:]
        rows, columns = self.crop
        if height < rows or width < columns:
            raise UserError(f"{item.name}: {width}x{height} is smaller than the {columns}x{rows} "
                            "crop; remove it or take smaller crops")
        if self._cached_pixels + height * width <= CACHE_PIXELS:
            self._cache[index] = image
            self._cached_pixels += height * width
        return image


class _Steps:
    """Batch sampler: sample numbers of steps first, ..., last - 1 on one of `world` processes."""

    def __init__(self, first: int, last: int, batch: int, rank: int, world: int):
        self.steps = range(first, last)
        self.batch, self.rank, self.world = batch, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            start = (step * self.world + self.rank) * self.batch
            yield list(range(start, start + self.batch))


def loader(crops: Crops, first: int, last: int, batch: int, rank: int = 0, world: int = 1,
           num_workers: int = 0) -> DataLoader[Tensor]:
    """Batches (batch, 3, *crop), uint8, of the steps first, ..., last - 1; batch: per process."""
    return DataLoader(
        crops,
        batch_sampler=_Steps(first, last, batch, rank, world),
        num_workers=num_workers,
        generator=torch.Generator(),  # so that the global generator is the same in resumed runs
        pin_memory=torch.cuda.is_available(),
    )


def batches(paths: Iterable[Path], batch_size: int) -> Iterator[tuple[list[Path], Tensor]]:
    """Whole images in batches (B, 3, H, W), uint8: neighbours of equal size, B <= batch_size."""
    group: list[tuple[Path, Tensor]] = []
    for path in paths:
        image = read_image(path)
        if group and (len(group) == batch_size or image.shape != group[0][1].shape):
            yield [p for p, _ in group], torch.stack([x for _, x in group])
            group = []
        group.append((path, image))
    if group:
        yield [p for p, _ in group], torch.stack([x for _, x in group])
