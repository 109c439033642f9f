"""Decode mutated files and load malformed checkpoints; each must end in an error or an image.

    python tests/fuzz.py                                100,000 files, 500 checkpoints (`make fuzz`)
    python tests/fuzz.py --seconds 60 --seed 3          others, as many as a minute allows
    python tests/fuzz.py --repeat factorized-file:17    one of them again, with its traceback

The networks and files are those of tests/golden. A file's payload, header and lengths are mutated,
and its checksum is mostly right again, which would otherwise hide all that follows it. A checkpoint
gets another value at some place of its entries (common/coding/schema.py). Each case must end in a
UserError of one line, or with an image of the size that the file states, take less than 1 GB more
than the process had before it, and at most SLOWER seconds more than a valid file.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from common import UserError, cli, data
from common.coding import bitstream, image_file

import mutations
import torch
from test_golden import CASES, GOLDEN
from torch import Tensor
from watched import Case, Process, peak

SLOWER = 2.0  # seconds of a processor beyond those of a valid file
CHUNK = 250  # cases of one process at most
LEAST = 200  # mutations of a slow case


# ------------------------------------------------------------------------------- compressed files
@cache
def records() -> dict[str, tuple[str, Path, bytes]]:
    """name of a coded file of tests/golden -> paper, weights, content."""
    return {name: (paper, weights, (GOLDEN / entry["coded"]).read_bytes())
            for name, (paper, weights, entry) in CASES.items()}


@cache
def load(paper: str, weights: Path) -> Any:
    return importlib.import_module(f"{paper}.model").load(weights)


def decode(paper: str, model: Any, file: bytes, ours: bool) -> tuple[Tensor, tuple[int, int]]:
    """The image and the size that the file states."""
    if paper == "convnextic":
        codec = importlib.import_module("convnextic.codec")
        if not ours:
            parts, x_hat = codec.decode_source_file(model, file)
            return x_hat, parts.size
        x_hat = codec.decode(model, file)
    else:
        x_hat = image_file.decode_image(model, file)
    parts = bitstream.unpack(file, model.tag)
    return x_hat, (parts.height, parts.width)


def check_image(x_hat: Tensor, size: tuple[int, int]) -> None:
    assert tuple(x_hat.shape) == (3, *size), f"{tuple(x_hat.shape)} for a stated size of {size}"
    assert math.isfinite(float(x_hat.sum())), "NaN in the image"


def file_case(name: str) -> Case:
    paper, weights, file = records()[name]
    model, ours = load(paper, weights), file.startswith(bitstream.MAGIC)
    others = [other for kind, _, other in records().values()
              if kind == paper and other.startswith(bitstream.MAGIC) == ours]
    mutate = mutations.file if ours else mutations.source_file

    def check(mutated: bytes) -> None:
        check_image(*decode(paper, model, mutated, ours))

    check(file)  # what is done once
    begun = time.process_time()
    check(file)
    return Case(name, lambda generator: mutate(file, others, generator), check,
                time.process_time() - begun)


# ------------------------------------------------------------------------------------ checkpoints
def checkpoint_case(name: str) -> Case:
    """name: checkpoint/ and the name of a coded file of ours, which is decoded with what loads."""
    paper, weights, file = records()[name.removeprefix("checkpoint/")]
    read = importlib.import_module(f"{paper}.model").load
    image = data.to_float(data.read_image(GOLDEN / "image.png"))

    def check(content: bytes) -> None:
        """Load it; code with it an image, and decode a file which states that it belongs to it."""
        with tempfile.NamedTemporaryFile(suffix=".pth") as checkpoint:
            checkpoint.write(content)
            checkpoint.flush()
            try:
                model = read(checkpoint.name)
            except UserError as e:
                assert str(e).startswith(f"{checkpoint.name}: "), f"names no file: {e}"
                raise
        own = bitstream.fingerprint(model)
        for coded in (lambda: mutations.sealed(file[:8] + own + file[16:]),
                      lambda: image_file.encode_image(model, image, own, **rate)):
            with contextlib.suppress(UserError):
                check_image(*decode(paper, model, coded(), True))

    parts = bitstream.unpack(file, load(paper, weights).tag)
    rate = load(paper, weights).read_parameters(parts.parameters)
    begun = time.process_time()
    check(weights.read_bytes())
    seconds = time.process_time() - begun
    return Case(name, lambda generator: mutations.checkpoint(weights, generator), check, seconds)


def case_of(name: str) -> Case:
    """UserError if there is no such case."""
    if name.removeprefix("checkpoint/") not in records():
        raise UserError(f"--repeat {name}: no such case; choose from {', '.join(records())}, or "
                        "checkpoint/ and one of these")
    return checkpoint_case(name) if name.startswith("checkpoint/") else file_case(name)


# ------------------------------------------------------------------------------------ all of them
def chunks(cases: Sequence[Case], files: int) -> Iterator[tuple[Case, range]]:
    """Parts of `files` mutations of all cases; as many as take the same time, LEAST at least."""
    speed = [1 / max(case.seconds, 0.01) for case in cases]
    shares = [math.ceil(max(files * v / sum(speed), min(LEAST, files / len(cases))))
              for v in speed]
    parts = math.ceil(max(shares, default=0) / CHUNK)
    for part in range(parts):  # so that all cases advance alike
        for case, share in zip(cases, shares, strict=True):
            numbers = range(share * part // parts, share * (part + 1) // parts)
            if numbers:
                yield case, numbers


def fuzz(names: Sequence[str], files: int, seed: int, seconds: float = math.inf, jobs: int = 1,
         slower: float = SLOWER) -> tuple[int, list[str]]:
    """Run `files` mutations of the cases `names` together; return how many ran, and the faults.

    seconds: after which no more are begun; jobs: processes at a time; slower: seconds that a
    mutation may take longer than what is valid.
    """
    cases = [case_of(name) for name in names if files]
    todo: list[tuple[Case, Sequence[int]]] = list(chunks(cases, files))[::-1]
    running: list[Process] = []
    faults, count, end = [], 0, time.monotonic() + seconds
    while todo or running:
        while todo and len(running) < jobs and time.monotonic() < end:
            running.append(Process(*todo.pop(), seed, slower))
        if not running:
            break
        process = running.pop(0)
        found, left = process.wait()
        name = process.case.name
        count += len(process.numbers) - len(left)
        if left:
            todo.append((process.case, left))
        for number, text in found:
            faults.append(f"{name}, seed {seed}, case {number}: {text.strip().splitlines()[-1]}\n"
                          f"    python tests/fuzz.py --seed {seed} --repeat {name}:{number}")
            print(faults[-1], flush=True)
    return count, faults


def checkpoint_names() -> list[str]:
    """One case for each network, with its first coded file in our format."""
    first = {weights: f"checkpoint/{name}" for name, (_, weights, file) in
             reversed(records().items()) if file.startswith(bitstream.MAGIC)}
    return sorted(first.values())


def repeat(name: str, number: int, seed: int) -> None:
    """Run one case in this process; say what it takes, or fail as it fails."""
    case, before = case_of(name), peak()
    begun = time.process_time()
    case.run(number, seed)
    print(f"{name}:{number}: an error or an image, {time.process_time() - begun:.2f} s (valid: "
          f"{case.seconds:.2f} s), {(peak() - before) / 2**20:.0f} MB")


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--files", type=cli.count, default=100_000,
        help="number of mutated compressed files, over all networks")
    add("--checkpoints", type=cli.count, default=500,
        help="number of malformed checkpoints, over all networks")
    add("--seconds", type=cli.positive_float, default=math.inf,
        help="time after which no more files are begun")
    add("--seed", type=cli.count, default=0, help="seed of the mutations")
    add("--jobs", type=cli.positive_int, default=2, help="number of processes")
    add("--repeat", metavar="NAME:NUMBER", help="run this case alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.repeat:
        name, _, number = args.repeat.rpartition(":")
        if not number.isdecimal():
            raise UserError(f"--repeat {args.repeat}: give a case as NAME:NUMBER")
        repeat(name, int(number), args.seed)
        return
    bad = 0
    for what, names, files, seconds in (
            ("malformed checkpoints", checkpoint_names(), args.checkpoints, math.inf),
            ("mutated files", list(records()), args.files, args.seconds)):
        begun = time.monotonic()
        count, faults = fuzz(names, files, args.seed, seconds, args.jobs)
        print(f"{count} {what} of {len(names)} cases in {time.monotonic() - begun:.0f} s: "
              f"{len(faults)} faults", flush=True)
        bad += len(faults)
    if bad:
        raise UserError(f"{bad} faults: the commands above repeat them")


if __name__ == "__main__":
    cli.run(main)
