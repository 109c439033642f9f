"""Read and write files: atomic writes, and errors that name the file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from common import UserError


def read_file(path: str | Path) -> bytes:
    """Return the bytes of a file; UserError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write to a temporary file next to `path` and rename it; UserError if that fails."""
    refuse_folder(path)
    name, path = path, Path(os.path.realpath(path))  # a symbolic link stays a link
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, a pipe
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kept = "; the file that was there is kept" if path.exists() else ""
        raise UserError(f"cannot write {name}: {e.strerror or e}{kept}") from None


def refuse_folder(path: str | Path) -> None:
    """Raise UserError if `path`, which is to become a file, is a folder."""
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a folder")
