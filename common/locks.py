"""Locks of folders: a run, or an evaluation, has its folder for itself."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from common import UserError, processes
from common.files import OLD_TEMPORARY, TEMPORARY, remove_temporaries

NAME = ".lock"
BEAT, SILENT = 30, 600  # seconds between signs of life; after which those of another host are over
_held: dict[Path, int] = {}  # descriptors of the locks of this process
_beating = threading.Thread()  # touches the files of these locks; not alive in a forked process


def lock(folder: str | Path, remedy: str) -> None:
    """Lock a folder until `release` or the end of this process, and remove temporary files in it.

    The lock is the file `.lock`, which names process and host. The kernel frees it when its process
    ends, so that the next one takes it over. A lock of another host, where a network file system
    may not tell, is taken over when its file has not been touched for ten minutes. Only the first
    of several processes locks. Raises UserError with `remedy` if another process has the folder.
    """
    folder = Path(folder).resolve()
    if processes.rank() > 0 or folder in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    descriptor = _open(path, folder, remedy)
    owner = {"process": os.getpid(), "host": socket.gethostname()}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(owner).encode())
    _held[folder] = descriptor
    _begin_to_beat()
    remove_temporaries(folder, names=(TEMPORARY, OLD_TEMPORARY))


def release(folder: str | Path) -> None:
    """Give a folder back; does nothing if this process has not locked it."""
    folder = Path(folder).resolve()
    if (descriptor := _held.pop(folder, None)) is not None:
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: str | Path, remedy: str) -> Iterator[None]:
    """Hold the lock of a folder within a `with` block."""
    mine = Path(folder).resolve() not in _held
    lock(folder, remedy)
    try:
        yield
    finally:
        if mine:
            release(folder)


def _open(path: Path, folder: Path, remedy: str) -> int:
    """Open and lock the file `path`; UserError if a living process has locked it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise UserError(f"cannot write {path}: {e.strerror or e}") from None
        # not flock, whose locks a forked data loader process would keep; but a lock of this kind
        # is lost if its process opens and closes the file a second time, so nothing does
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = False
        except (BlockingIOError, PermissionError):
            busy = True
        except OSError:  # a file system without locks
            busy = _is_alive(_owner(descriptor))
        owner = _owner(descriptor)
        silent = time.time() - os.fstat(descriptor).st_mtime
        elsewhere = owner.get("host") not in (None, socket.gethostname()) and silent < SILENT
        if busy or elsewhere:
            os.close(descriptor)
            who = (f"process {owner['process']} on {owner['host']}" if owner else "another process")
            sign = f" (last sign of life {silent:.0f} s ago)" if elsewhere and not busy else ""
            gone = f"or, if that process no longer runs, remove {path}, " if sign else ""
            raise UserError(f"{folder} is in use by {who}{sign}: wait for its end, {gone}or "
                            f"{remedy}")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # the owner has just ended and removed its file


def _owner(descriptor: int) -> dict[str, str | int]:
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        return {"process": int(owner["process"]), "host": str(owner["host"])}
    except (ValueError, KeyError, TypeError):
        return {}


def _is_alive(owner: dict[str, str | int]) -> bool:
    """Whether the process of a lock exists, as far as this host can tell."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(owner["process"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return owner["process"] != os.getpid()


def _begin_to_beat() -> None:
    """Start the thread of this process; once."""
    global _beating
    if not _beating.is_alive():
        atexit.register(_release_all)
        _beating = threading.Thread(target=_beat, daemon=True)
        _beating.start()


def _beat() -> None:
    while True:
        time.sleep(BEAT)
        for descriptor in list(_held.values()):
            with contextlib.suppress(OSError):
                os.utime(descriptor)


def _release_all() -> None:
    for folder in list(_held):
        release(folder)
