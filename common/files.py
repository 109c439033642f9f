"""Read and write files: atomic writes, and errors that name the file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import UserError

TEMPORARY = re.compile(r"\..+\.lic-[a-z0-9_]{8}\.tmp")  # names of `write_atomic`
# those of checkpoints, in older versions; other programs may use such names, too
OLD_TEMPORARY = re.compile(r"\..+\.(pth|pt|tar|ckpt)\.(\d+|[a-z0-9_]{8})\.tmp")
UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it
_cleaned: set[Path] = set()  # folders without temporary files of killed processes


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
    temporary = None
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, a pipe
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in _cleaned:
            remove_temporaries(path.parent, 60)
        descriptor, temporary = tempfile.mkstemp(".tmp", f".{path.name[:40]}.lic-",
                                                   path.parent)
        with open(descriptor, "wb") as f:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(f, fcntl.LOCK_EX)
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            os.fchmod(f.fileno(), 0o666 & ~UMASK)
            os.replace(temporary, path)
    except OSError as e:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        kept = "; the file that was there is kept" if path.exists() else ""
        raise UserError(f"cannot write {name}: {e.strerror or e}{kept}") from None


def remove_temporaries(folder: Path, seconds: float = 0,
                       names: Sequence[re.Pattern[str]] = (TEMPORARY,)) -> None:
    """Remove the temporary files that killed processes have left in `folder`.

    seconds: the age from which a file counts as left. A file that is being written is locked.
    """
    with contextlib.suppress(OSError):
        for path in [p for p in folder.iterdir()
                     if any(name.fullmatch(p.name) for name in names)]:
            with contextlib.suppress(OSError), open(path, "rb") as f:
                if time.time() - os.fstat(f.fileno()).st_mtime >= seconds:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
        _cleaned.add(folder)


def refuse_folder(path: str | Path) -> None:
    """Raise UserError if `path`, which is to become a file, is a folder."""
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a folder")


def shown(path: str | Path) -> str:
    """A path that can be printed: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
