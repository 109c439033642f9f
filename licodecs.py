"""All codecs of this repository behind one name, which collides with nothing.

    import licodecs

    codec = licodecs.load("hyperprior", lmbda=0.013)   # bundled weights, ready to code
    file = licodecs.encode(codec, "photo.png")         # bytes, the content of a .bin file
    x_hat = licodecs.decode(file)                      # (3, H, W) in [0, 1], for any paper

The code itself lies in the packages `common` and one per paper. If modules of yours have one of
these names, both work in one process: ours are in `sys.modules` only while a function of this
module runs.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.coding.contract import Codec

    from torch import Tensor

__all__ = ["decode", "encode", "load", "main", "papers"]
ROOT = Path(__file__).resolve().parent
_ours: dict[str, ModuleType] = {}  # modules of this repository, while those of others are in place
_lock = threading.RLock()
_depth = 0


class _Finder:
    """Finds the packages of this repository before anything else on sys.path."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
                  ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if path is None and _is_ours(name) else None


def _is_ours(name: str) -> bool:
    package = ROOT / name.partition(".")[0]
    return name.partition(".")[0] == "common" or (
        (package / "model.py").exists() and (package / "train.py").exists())


def _collides() -> bool:
    """Whether `import common`, or that of a paper, is something else in this process."""
    for path in [ROOT / "common", *ROOT.glob("*/train.py")]:
        name = path.name if path.name == "common" else path.parent.name
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded else PathFinder.find_spec(name)
        if _is_ours(name) and spec and Path(spec.origin or "").resolve().parent != ROOT / name:
            return True
    return False


@contextlib.contextmanager
def _own_modules() -> Iterator[None]:
    """Let `common` and the papers' names mean those of this repository, and undo it afterwards."""
    global _depth
    with _lock:
        if _depth == 0 and not _ours and not _collides():
            yield
            return
        theirs = {}
        if _depth == 0:
            theirs = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
            sys.modules.update(_ours)
            sys.meta_path.insert(0, _Finder)
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
            if _depth == 0:
                sys.meta_path.remove(_Finder)
                _ours.update({n: sys.modules.pop(n) for n in list(sys.modules) if _is_ours(n)})
                sys.modules.update(theirs)


def papers() -> list[str]:
    """Names of the codecs."""
    with _own_modules():
        return _zoo().papers()


def load(paper: str, lmbda: float | None = None, *, weights: str | None = None,
         checkpoint: str | Path | None = None, device: str = "cpu") -> Codec:
    """Return a codec that is ready to code.

    lmbda: that of the bundled weights; weights: their name instead, where one file serves all rates
    ("vr", "balle"); checkpoint: a file of your own. With none of them: the bundled weights of the
    highest rate. Raises common.UserError, in one line, for a choice that does not exist.
    """
    with _own_modules():
        return _zoo().load(paper, lmbda, weights, checkpoint, device)


def encode(codec: Codec, image: str | Path | Tensor, **rate: Any) -> bytes:
    """Code an image: a file, or a tensor (3, H, W) in [0, 1]. Return the content of a .bin file.

    rate: the operating point of a variable-rate codec, such as lmbda=0.008 (convnextic) or s=3 and
    factor=1.5 (qvrf).
    """
    with _own_modules():
        return _zoo().encode(codec, image, **rate)


def decode(file: bytes | str | Path, codec: Codec | None = None, *, device: str = "cpu") -> Tensor:
    """Decode the content of a .bin file, or the file of this name, to (3, H, W) in [0, 1].

    Without a codec, paper and bundled weights are found by the file's header.
    """
    with _own_modules():
        return _zoo().decode(file, codec, device)


def main() -> None:
    """The command `licodecs`."""
    with _own_modules():
        try:
            cli, commands = map(importlib.import_module, ("common.cli", "common.commands"))
        except ImportError as e:
            if type(e).__name__ != "NotInstalled":  # common/installed.py
                raise
            print(f"error: {e}", file=sys.stderr)
            sys.exit(2)
        cli.run(commands.main)


def _zoo() -> Any:
    return importlib.import_module("common.coding.codecs")


if __name__ == "__main__":
    main()
