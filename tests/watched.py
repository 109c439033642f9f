"""Cases of tests/fuzz.py in forked processes: one that kills its process can be named."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import UserError

import torch

MEMORY = 2**30  # bytes that a case may take beyond what its process has
NET = 4 * 2**30  # at which the system refuses more, so that the machine survives
HANGS = 60.0  # seconds after which a case is ended


@dataclass(frozen=True)
class Case:
    """What is mutated, and what is done with a mutation; seconds: that which is valid takes."""

    name: str
    mutate: Callable[[random.Random], Any]
    check: Callable[[Any], None]
    seconds: float

    def run(self, number: int, seed: int) -> None:
        """Mutation `number`; AssertionError or any other exception for a fault."""
        try:
            self.check(self.mutate(random.Random(f"{self.name} {seed} {number}")))
        except UserError as e:
            assert str(e) and "\n" not in str(e), f"not one line: {e}"


def peak() -> int:
    """The most bytes that this process had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024)


class Process:
    """A fork of this process that runs the cases `numbers`; faults are (number, text)."""

    def __init__(self, case: Case, numbers: Sequence[int], seed: int, slower: float):
        self.case, self.numbers = case, numbers
        self.progress = mmap.mmap(-1, 8)  # shared: the number of cases that have ended
        self.output = tempfile.TemporaryFile("w+")
        self.pid = os.fork()
        if not self.pid:
            with contextlib.suppress(BaseException):
                self._work(seed, slower)
                os._exit(0)
            os._exit(1)

    def _work(self, seed: int, slower: float) -> None:
        torch.set_num_threads(1)  # other threads of the parent do not exist here
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, in code of C, too
        if Path("/proc/self/statm").exists():
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + NET, size + NET))
        for done, number in enumerate(self.numbers, 1):
            signal.setitimer(signal.ITIMER_REAL, HANGS)
            before, begun, text = peak(), time.process_time(), ""
            try:
                self.case.run(number, seed)
            except BaseException as e:
                text = "".join(traceback.format_exception(e))
            seconds, size = time.process_time() - begun, peak() - before
            if not text and size > MEMORY:
                text = f"takes {size / 2**20:.0f} MB"
            if not text and seconds > self.case.seconds + slower:
                text = f"takes {seconds:.1f} s, a valid one {self.case.seconds:.2f} s"
            if text:
                print(json.dumps([number, text]), file=self.output, flush=True)
            self.progress[:] = struct.pack("<q", done)
            if size > MEMORY:  # peaks of the next ones would be below that
                break

    def wait(self) -> tuple[list[tuple[int, str]], Sequence[int]]:
        """The faults, and the cases that are left after one that ended the process."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        done, = struct.unpack("<q", self.progress[:])
        self.output.seek(0)
        faults = [(number, text) for number, text in map(json.loads, self.output)]
        self.output.close()
        if status and done < len(self.numbers):
            name = signal.Signals(-status).name if status < 0 else f"status {status}"
            text = f"takes more than {HANGS:.0f} s" if name == "SIGALRM" else f"a crash: {name}"
            faults.append((self.numbers[done], text))
            done += 1
        return faults, self.numbers[done:]
