"""Evaluate the weights of one curve with a paper's eval.py, then publish the results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common import UserError


def evaluate_and_publish(paper: str, curve: str, files: Iterable[Path], folder: Path, *,
                         dataset: list[Any], threads: int, device: str, flags: list[Any],
                         into: Path | None, evaluated: Callable[[], None] = lambda: None
                         ) -> Iterator[list[Any]]:
    """Yield two command lines, to be run one after the other in the paper's folder.

    folder: of the results and the decoded images; dataset: [] for Kodak, or the flags of eval.py
    and the folder of images; flags: more flags of eval.py; into: as of `pages`. `evaluated` is
    called between the two.
    """
    results = folder / "results"
    shutil.rmtree(results, ignore_errors=True)  # left by an interrupted evaluation
    yield ["eval.py", *dataset, "--checkpoint", *files, "--resultdir", results,
           "--outdir", folder / "output", "--threads", threads, "--device", device, *flags]
    found = sorted(results.glob("*.json"))
    if len(found) != 1:
        raise UserError(f"eval.py wrote {len(found)} results files to {results}, one is expected")
    evaluated()
    yield ["-m", "common.recipes.pages", paper, curve, found[0],
           *(["--into", into] if into else []), *(["--dataset", dataset[-1]] if dataset else []),
           "--output", folder / "output"]
