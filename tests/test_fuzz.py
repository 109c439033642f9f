"""The short form of `make fuzz`, and that it finds and names faults."""

import json
import mmap
import os
import random
import signal
import struct
import sys
import time

from common import UserError
from common.coding import bitstream

import forks
import fuzz
import mutations
import pytest
import torch
import watched

FILES = ["factorized-file", "hyperprior-file", "qvrf-balle-factor1.7", "convnextic-v5-source"]
CHECKPOINTS = [f"checkpoint/{name}" for name in (
    "advdnic-base-file", "checkerboard-file", "hyperprior-file", "qvrf-balle-level0")]


def run(*arguments):
    """The function `_main` below, in a process without threads, which can be forked safely."""
    output, _ = forks.run(__file__, *arguments, cwd=forks.ROOT)
    lines = output.splitlines()
    return *json.loads(lines[-1]), lines[:-1]


@pytest.mark.parametrize("kind, count", [("files", 320), ("checkpoints", 40)])
def test_mutations_end_in_an_error_or_an_image(kind, count):
    ran, faults, _ = run(kind, count)
    assert ran >= count and not faults


def test_mutated_files_reach_the_decoder():
    """Many have a right checksum; some decode; two calls with one seed do the same."""
    case, results = fuzz.case_of("hyperprior-file"), []
    for number in range(60):
        mutated = case.mutate(random.Random(number))
        assert mutated == case.mutate(random.Random(number))
        try:
            case.check(mutated)
            results.append("")
        except UserError as e:
            results.append(str(e))
    assert len(set(results)) > 4 and "" in results
    assert sum("checksum" in text for text in results) < 20
    assert any("does not decode" in text for text in results)


@pytest.mark.parametrize("fault, text", [
    ("crash", "a crash: SIGKILL"), ("error", "IndexError"), ("memory", "takes"),
    ("time", "takes more than 1 s")])
def test_faults_are_found_and_named(fault, text):
    """Of three cases the second has the fault; all three run."""
    ran, faults, said = run(fault, 3)
    assert ran == 3 and len(faults) == 1
    assert text in faults[0] and "x, seed 5, case 1: " in faults[0]
    assert any("python tests/fuzz.py --seed 5 --repeat x:1" in line for line in said)


def test_an_image_of_another_size_is_a_fault():
    with pytest.raises(AssertionError, match="stated size"):
        fuzz.check_image(torch.zeros(3, 4, 5), (4, 6))
    with pytest.raises(AssertionError, match="NaN"):
        fuzz.check_image(torch.full((3, 1, 1), float("nan")), (1, 1))


def test_without_a_mutation_the_file_is_the_same():
    """The mutations write the format that `bitstream.pack` writes."""
    for _, _, content in fuzz.records().values():
        if content.startswith(bitstream.MAGIC):
            parts = bitstream.unpack(content, content[4:8])
            sizes = [len(parts.sections), *map(len, parts.sections[:-1])]
            assert mutations.joined(content, [parts.height, parts.width], parts.parameters, sizes,
                                    parts.sections) == content
    assert mutations.varint(300) == struct.pack("2B", 172, 2)


# --------------------------------------------------------------- what runs in a process of its own
FAULTS = {
    "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "error": lambda: [][1],
    "memory": lambda: mmap.mmap(-1, 2**28).write(bytes(2**28)),  # never reuses freed memory
    "time": lambda: time.sleep(60),
}


def _main(job, count):
    if job in FAULTS:
        watched.Case.run = lambda self, number, seed: FAULTS[job]() if number == 1 else None
        fuzz.case_of = lambda name: watched.Case(name, None, None, 0.0)
        watched.HANGS, watched.MEMORY = 1.0, 2**27
        result = fuzz.fuzz(["x"], int(count), seed=5)
    else:
        names = {"files": FILES, "checkpoints": CHECKPOINTS}[job]
        result = fuzz.fuzz(names, int(count), seed=1, slower=watched.HANGS)
    print(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
