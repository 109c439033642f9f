"""Training samples: random crops of the images of a data set, and the loader of their batches.

`Crops` turns sample number k of a run into one random crop of one of its `Item`s
(`common.datasets`). Image and crop of sample k depend only on (seed, k), so a run that is resumed,
or that uses more loader processes, sees the same data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from common import UserError
from common.datasets import BUNDLED as IMAGES
from common.datasets import (
    KODAK,
    SUFFIXES,
    TRAIN,
    Found,
    Item,
    centre,
    digest,
    find,
    find_items,
    list_images,
)
from common.image_io import read_image, to_float, to_uint8, write_image

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

__all__ = [
    "IMAGES", "KODAK", "SUFFIXES", "TRAIN", "Crops", "Found", "Item", "batches", "centre", "digest",
    "find", "find_items", "list_images", "loader", "read_image", "to_float", "to_uint8",
    "write_image"]
Source = TypeVar("Source", Path, Item)
CACHE_PIXELS = 400_000_000  # limit of the decoded images that all processes cache (1.2 GB)


class Crops(Dataset[Tensor]):
    """Random crops of a list of images, indexed by the sample number k = 0, 1, 2, ... of a run.

    Pass p = k // len(items) visits every image once, in an order drawn from (seed, p); the position
    of the crop and the flip are drawn from (seed, k). `self[k]` is a uint8 tensor (3, *crop).
    crop: (height, width), or the side of a square. An image that was removed is replaced by the
    next one. record: is called with the index of an image that turns out to be unusable.
    """

    def __init__(self, items: list[Item], crop: int | tuple[int, int], seed: int = 0,
                 flip: bool = False, record: Callable[[int], None] | None = None):
        self.items, self.flip, self.record = items, flip, record
        self.crop = (crop, crop) if isinstance(crop, int) else crop
        self.seed = seed % 2**32  # a Philox key is >= 0; keys from 2**32 on are for the order
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self.sharers = 1  # number of processes that divide CACHE_PIXELS
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
        index = int(self._order[1][position])
        while self.items[index].removed:
            index = (index + 1) % len(self.items)
        return index

    def _image(self, index: int) -> Tensor:
        if index in self._cache:
            return self._cache[index]
        item = self.items[index]
        try:
            image = item.read()
            check_crop(item.name, image.shape[-2:], self.crop)
        except UserError:
            if self.record:
                self.record(index)
            raise
        pixels = image.shape[-2] * image.shape[-1]
        if self._cached_pixels + pixels <= CACHE_PIXELS // self.sharers:
            self._cache[index] = image
            self._cached_pixels += pixels
        return image


def check_crop(name: str, size: Sequence[int], crop: tuple[int, int]) -> None:
    """Raise UserError if an image of `size` = (height, width) is smaller than the crop."""
    if size[0] < crop[0] or size[1] < crop[1]:
        raise UserError(f"{name}: {size[1]}x{size[0]} is smaller than the {crop[1]}x{crop[0]} "
                        "crop; remove it or take smaller crops")


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
    """Batches (batch, 3, *crop), uint8, of the steps first, ..., last - 1; batch: per process.

    The loader processes of all training processes of this machine share CACHE_PIXELS.
    """
    crops.sharers = max(1, num_workers) * int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return DataLoader(
        crops,
        batch_sampler=_Steps(first, last, batch, rank, world),
        num_workers=num_workers,
        generator=torch.Generator(),  # so that the global generator is the same in resumed runs
        pin_memory=torch.cuda.is_available(),
    )


def batches(sources: Iterable[Source], batch_size: int
            ) -> Iterator[tuple[list[Source], Tensor]]:
    """Whole images in batches (B, 3, H, W), uint8: neighbours of equal size, B <= batch_size."""
    group: list[tuple[Source, Tensor]] = []
    for source in sources:
        image = source.read() if isinstance(source, Item) else read_image(source)
        if group and (len(group) == batch_size or image.shape != group[0][1].shape):
            yield [p for p, _ in group], torch.stack([x for _, x in group])
            group = []
        group.append((source, image))
    if group:
        yield [p for p, _ in group], torch.stack([x for _, x in group])
