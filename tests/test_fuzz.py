"""The short form of `make fuzz`, and that it finds and names faults."""

import mmap
import os
import random
import signal
import struct
import time

from common import UserError
from common.coding import bitstream

import fuzz
import mutations
import pytest
import torch
import watched

FILES = ["factorized-file", "hyperprior-file", "qvrf-balle-factor1.7", "convnextic-v5-source"]
CHECKPOINTS = [f"checkpoint/{name}" for name in (
    "advdnic-base-file", "checkerboard-file", "hyperprior-file", "qvrf-balle-level0")]


@pytest.mark.parametrize("names, count", [(FILES, 320), (CHECKPOINTS, 40)])
def test_mutations_end_in_an_error_or_an_image(names, count):
    ran, faults = fuzz.fuzz(names, count, seed=1, slower=watched.HANGS)
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
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "a crash: SIGKILL"),
    (lambda: [][1], "IndexError"),
    (lambda: mmap.mmap(-1, 2**28).write(bytes(2**28)), "takes"),  # never reuses freed memory
    (lambda: time.sleep(60), "takes more than 1 s")])
def test_faults_are_found_and_named(fault, text, monkeypatch, capsys):
    """Of three cases the second has the fault; all three run."""
    def check(number):
        if number == 1:
            fault()

    case = watched.Case("x", None, None, 0.0)
    monkeypatch.setattr(watched.Case, "run", lambda self, number, seed: check(number))
    monkeypatch.setattr(fuzz, "case_of", lambda name: case)
    monkeypatch.setattr(watched, "HANGS", 1.0)
    monkeypatch.setattr(watched, "MEMORY", 2**27)
    ran, faults = fuzz.fuzz(["x"], 3, seed=5)
    assert ran == 3 and len(faults) == 1
    assert text in faults[0] and "x, seed 5, case 1: " in faults[0]
    assert "python tests/fuzz.py --seed 5 --repeat x:1" in capsys.readouterr().out


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
