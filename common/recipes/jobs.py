"""Base class of stages and curves: a job with a folder, a record and a lock."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import UserError
from common.files import write_atomic

from tqdm import tqdm

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass
class Settings:
    """Settings of all stages and curves of one call."""

    root: Path
    run: str  # name of the runs in a paper's folders, such as "weights"
    dataset: str | None
    digest: str  # of the training images
    threads: int
    device: str
    images: str | None  # folder of test and validation images of the short form
    short: bool = False  # the short form: a few steps of each stage, nothing is published


class Job:
    """A stage or a curve; its folder holds its record, its lock and the output of its commands."""

    kind, file = "", ""  # name of the work in error messages; file name of the record

    def __init__(self, settings: Settings, paper: str, name: str, folder: str, needs: list[Any]):
        self.settings, self.paper, self.name, self.needs = settings, paper, name, needs
        self.home = settings.root / paper
        self.folder, self.label = self.home / folder, f"{paper} {name}"
        self.process: subprocess.Popen[bytes] | None = None
        self.descriptor: int | None = None  # of the lock

    def definition(self) -> dict[str, Any]:
        raise NotImplementedError

    def steps_of_work(self) -> Iterator[list[Any]]:
        """Yield command lines, which are run one after the other in the paper's folder."""
        raise NotImplementedError

    def state(self) -> str:
        """What is done and what is left, in words."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        path = self.folder / self.file
        try:
            record = json.loads(path.read_text()) if path.exists() else {}
            if record != {} and not isinstance(record["definition"], dict):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a record of {self.label}: remove it") from None
        return record

    def write(self, **values: Any) -> None:
        text = json.dumps(self.record() | values, indent=1, ensure_ascii=False)
        write_atomic(self.folder / self.file, f"{text}\n".encode())

    def done(self) -> bool:
        record = self.record()
        return bool(record.get("done")) and record["definition"] == self.definition()

    def lock(self, wait: float = 5.0) -> int:
        """Lock the job and return the file descriptor, which its processes inherit.

        It waits up to `wait` seconds, as the training of a killed runner may take a moment to end.
        """
        path, deadline = self.folder / "lock", time.monotonic() + wait
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # not renamed
                    return descriptor
            except (BlockingIOError, FileNotFoundError):
                pass
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise UserError(f"another process is {self.kind} {self.label}")
            time.sleep(0.1)

    def begin(self) -> bool:
        """Start the work; False if another process has done it in the meantime."""
        self.descriptor = self.lock()
        if self.done():
            return self.end()
        self.clock = time.monotonic()
        self.work = self.steps_of_work()
        return not self.poll()

    def poll(self) -> bool:
        """Start the next command when one ends; True after the last. UserError if one fails."""
        if self.process:
            code = self.process.poll()
            if code is None:
                self.tick()
                return False
            if code:
                raise UserError(self.reason(code))
        command = next(self.work, None)
        if command is None:
            self.end()
            return True
        log = self.folder / "output.txt"
        self.offset = log.stat().st_size if log.exists() else 0
        parent, descriptor = os.getpid(), self.descriptor
        assert descriptor is not None  # `begin` has locked the job
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=self.home, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, pass_fds=[descriptor],
                env=environment(self.settings.root) | {"PYTHONUNBUFFERED": "1"},
                preexec_fn=lambda: end_with(parent))
        return False

    def tick(self) -> None:
        """Called repeatedly while a command runs."""

    def output(self) -> str:
        """The output of the latest command."""
        return (self.folder / "output.txt").read_bytes()[self.offset:].decode(errors="replace")

    def reason(self, code: int) -> str:
        """The last error line of a command that failed, or its exit status or signal."""
        lines = [line for line in re.split(r"[\r\n]+", self.output()) if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        if errors:
            return errors[-1].removeprefix("error: ")
        if shutil.disk_usage(self.folder).free < 2**20:  # the reason could not be written either
            return f"the disk of {self.folder} is full"
        how = f"was ended by signal {-code}" if code < 0 else f"exit status {code}"
        return f"{how}, see {self.folder / 'output.txt'}" + (f": {lines[-1]}" if lines else "")

    def end(self) -> bool:
        """Stop the process, if there is one, and release the lock."""
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None
        return False


def say(text: str) -> None:
    tqdm.write(text, file=sys.stdout)  # above the progress bar, if there is one
    sys.stdout.flush()


def show(path: Path, job: Job) -> str:
    """The path relative to the root of the repository."""
    return str(path.relative_to(job.settings.root))


def before(folder: Path, n: int) -> Path:
    return folder.with_name(f"{folder.name}.before-{n}")


def holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(
        path.name != "lock" and not path.name.startswith(".") for path in folder.iterdir())


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def environment(root: Path) -> dict[str, str]:
    """The environment of a command whose packages are those of the tree `root`."""
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def end_with(parent: int) -> None:
    """In a new process: ask Linux to kill it when the runner ends for any reason."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)
