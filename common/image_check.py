"""Find unreadable and too small images before a long work begins, by headers and ends of files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import UserError
from common.datasets import Item
from common.files import shown, write_atomic
from common.image_io import check_size

from PIL import Image
from tqdm import tqdm

MANY = 1000  # images from which on a cache is worth its file
NAMED = 10  # unusable images that a message names; of more, the rest is in a file
LIST = "unusable_images.txt"
DECODED = 60_000_000  # pixels of all images that are decoded at the same time, about 1 GB


class Limit:
    """Lets threads work on `total` pixels at the same time, or on one image with more."""

    def __init__(self, total: int):
        self.total = self.free = total
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until so many pixels are free, and keep them within a `with` block."""
        pixels = min(pixels, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= pixels)
            self.free -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.free += pixels
                self.changed.notify_all()


_decoded = Limit(DECODED)


def find_unusable(items: Sequence[Item], least: tuple[int, int] = (1, 1), whole: bool = False
                  ) -> dict[int, str]:
    """Images that cannot be read or are smaller than `least` = (height, width), with the reason.

    Headers and ends of all files are read, in parallel; a file whose end is not that of its format
    is decoded. What was checked is kept in the user's cache folder, by size and time of the files.
    whole: decode all images.
    """
    cache = {} if whole else _read_cache(items)
    known: dict[str, list[int]] = {}

    def check(item: Item) -> str:
        stamp = _stamp(item)
        entry = cache.get(item.name)
        size = entry[2:] if stamp and entry and entry[:2] == stamp else None
        try:
            size = size or _size(item, least, whole)
        except UserError as e:
            return str(e)
        if stamp:
            known[item.name] = [*stamp, *size]
        return _too_small(item, size, least)

    with (ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool,
          tqdm(total=len(items), desc="checking images", unit="image", leave=False, delay=2,
               disable=None) as bar):
        found = {}
        for i, why in enumerate(pool.map(check, items)):
            bar.update()
            if why:
                found[i] = why
    if not whole:
        _write_cache(items, known)
    return found


def report(unusable: Sequence[str], count: int, what: str) -> str:
    """One line on the images, of `count`, that cannot be used; many are also listed in a file."""
    if len(unusable) == 1:
        return unusable[0]
    more = ""
    if len(unusable) > NAMED:
        text = "".join(f"{line}\n" for line in unusable)
        write_atomic(LIST, text.encode("utf-8", "surrogateescape"))
        more = f"; and {len(unusable) - NAMED} more, all listed in {LIST}"
    return (f"{len(unusable)} of {count} {what} cannot be used: {'; '.join(unusable[:NAMED])}"
            f"{more}")


def check_readable(paths: Sequence[Path], what: str = "images") -> None:
    """Raise UserError, which names all files that cannot be decoded."""
    if found := find_unusable([Item(path) for path in paths], whole=True):
        raise UserError(report(list(found.values()), len(paths), what))


def _size(item: Item, least: tuple[int, int], whole: bool) -> list[int]:
    """(height, width) of an image; UserError if it cannot be read."""
    pixels = 0
    try:
        source = item.open()
        with Image.open(source) as image:
            width, height = image.size
            check_size(width, height, item.name)
            pixels = width * height
            sizes = [[height, width], [width, height]]  # EXIF may turn the image
            fits = {not _too_small(item, size, least) for size in sizes}
            if not whole and len(fits) == 1 and _has_its_end(source, image.format):
                return sizes[0]
    except UserError:
        raise
    except Exception:  # whatever Pillow raises: reading tells
        pass
    with _decoded.hold(pixels):
        return list(item.read().shape[-2:])


def _too_small(item: Item, size: Sequence[int], least: tuple[int, int]) -> str:
    if size[0] >= least[0] and size[1] >= least[1]:
        return ""
    return (f"{item.name}: {size[1]}x{size[0]} is smaller than the {least[1]}x{least[0]} crop; "
            "remove it or take smaller crops")


def _has_its_end(source: Path | io.BytesIO, kind: str | None) -> bool:
    """Whether a file ends as its format does; True for formats without an end."""
    if isinstance(source, io.BytesIO):
        data = source.getvalue()
        start, end, size = data[:16], data[-16:], len(data)
    else:
        with open(source, "rb") as f:
            start, size = f.read(16), f.seek(0, os.SEEK_END)
            f.seek(max(0, size - 16))
            end = f.read()
    if kind == "PNG":
        return end.endswith(b"IEND\xaeB`\x82")
    if kind in ("JPEG", "MPO"):
        return end.rstrip(b"\0").endswith(b"\xff\xd9")
    if kind == "GIF":
        return end.endswith(b"\x3b")
    if kind == "WEBP":
        return struct.unpack("<I", start[4:8])[0] + 8 <= size
    if kind == "BMP":
        return struct.unpack("<I", start[2:6])[0] <= size
    return kind not in ("PPM", "TIFF")


# ----------------------------------------------------------------------------------------- cache
def _stamp(item: Item) -> list[int] | None:
    """Size and time of a file, which change with its content."""
    try:
        status = os.stat(item.path)
    except OSError:
        return None
    return [item.size or status.st_size, status.st_mtime_ns]


def _cache_path(items: Sequence[Item]) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(os.fsencode(os.path.abspath(items[0].path.parent))).hexdigest()[:16]
    return Path(root, "learned-image-compression", f"checked-{name}.json")


def _read_cache(items: Sequence[Item]) -> dict[str, list[int]]:
    if len(items) < MANY:
        return {}
    try:
        cache = json.loads(_cache_path(items).read_text())
        good = all(len(v) == 4 and all(isinstance(n, int) for n in v) for v in cache.values())
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError):
        return {}
    return cache if good else {}


def _write_cache(items: Sequence[Item], known: dict[str, list[int]]) -> None:
    if len(items) >= MANY:
        try:
            write_atomic(_cache_path(items), json.dumps(known).encode())
        except (UserError, RuntimeError) as e:  # no home, or a full disk
            print(f"the check of the images is not kept: {shown(str(e))}")
