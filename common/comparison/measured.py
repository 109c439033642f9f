"""Classical codecs measured on a set of images, in several processes, with a cache.

The cache holds a JSON for each codec and image, so an interrupted measurement goes on where it was,
and an image that is added to a folder is the only one that is coded.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import UserError, processes
from common.evaluation import classical
from common.evaluation.classical import CODECS
from common.evaluation.further_metrics import METRICS
from common.files import write_atomic

import torch
from tqdm import tqdm

VERSION = 1  # of the rows in the cache
Task = tuple[str, Path, Path, Sequence[str]]  # codec, image, file of the cache, further metrics


def measure_all(images: dict[Path, str], cache: Path, codecs: list[str], problems: list[str],
                jobs: int, further: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Results of each codec (names in CODECS) on the images, whose digests are the values.

    further: keys of `further_metrics`. Images whose rows lack one are coded again for it.
    A codec that is not installed, or that fails, is left out; `problems` gets a line that names it.
    """
    installed = []
    for codec in codecs:
        if need := CODECS[codec].missing():
            problems.append(f"{CODECS[codec].name} is left out: it needs {need}")
        else:
            installed.append(codec)
    known = {codec: {path: _cache_file(cache, codec, digest) for path, digest in images.items()}
             for codec in installed}
    failed = _fill(known, jobs, further)
    for codec, why in failed.items():
        problems.append(f"{CODECS[codec].name} is left out: {why}")
    found = {}
    for codec, files in known.items():
        if codec not in failed:
            content = [json.loads(file.read_text()) for file in files.values()]
            rows = [{int(value): row for value, row in c["rows"].items()} for c in content]
            for row, path in zip(rows, images, strict=True):
                for point in row.values():
                    point["image"] = path.stem
                    for key in set(METRICS) - set(further):
                        point.pop(key, None)
            found[codec] = classical.results_of(codec, rows, content[0]["hardware"])
    return found


def _cache_file(cache: Path, codec: str, digest: str) -> Path:
    settings = [VERSION, CODECS[codec].description, list(CODECS[codec].values)]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    return cache / "classical" / f"{codec}-{key}" / f"{digest}.json"


def _fill(known: dict[str, dict[Path, Path]], jobs: int, further: Sequence[str]
          ) -> dict[str, str]:
    """Measure what the cache lacks; returns the codecs that failed, and why."""
    todo = [(codec, path, file, further) for codec, files in known.items()
            for path, file in files.items() if not _is_whole(_rows(file), further)]
    failed: dict[str, str] = {}
    if not todo:
        return failed
    with tqdm(total=len(todo), desc="classical codecs", unit="image", disable=None) as bar:
        for codec, why in _work(todo, min(jobs, len(todo))):
            bar.set_postfix_str(CODECS[codec].name)
            bar.update()
            if why and codec not in failed:
                failed[codec] = why
    return failed


def _work(todo: list[Task], jobs: int) -> Iterator[tuple[str, str]]:
    """Measure images in `jobs` processes; yields for each its codec, and why it failed or ""."""
    if jobs == 1:
        yield from ((task[0], _measure(*task)) for task in todo)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with concurrent.futures.ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        waiting = {pool.submit(_measure, *task): task[0] for task in todo}
        for future in concurrent.futures.as_completed(waiting):
            yield waiting[future], future.result()


def _rows(file: Path) -> dict[str, dict[str, Any]]:
    """The rows in a file of the cache; {} if there is none, or if it is damaged."""
    try:
        return dict(json.loads(file.read_text())["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_whole(rows: dict[str, dict[str, Any]], further: Sequence[str]) -> bool:
    return bool(rows) and all(key in row for row in rows.values() for key in further)


def _measure(codec: str, path: Path, file: Path, further: Sequence[str]) -> str:
    """Code one image and write its rows; returns why that is impossible, or ""."""
    try:
        rows = classical.code_image(codec, path, further=further)
    except (UserError, OSError, ValueError) as e:
        return f"{path.name}: {e}"
    old = _rows(file)  # whose times and further metrics stay
    merged = {value: row | old.get(str(value), {}) for value, row in rows.items()}
    hardware = processes.describe_hardware(torch.device("cpu"))
    text = json.dumps({"rows": merged, "hardware": hardware})
    write_atomic(file, text.replace("NaN", "null").replace("Infinity", "null").encode())
    return ""
