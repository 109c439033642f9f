"""Mutations of compressed files and of checkpoints, for tests/fuzz.py; a generator decides."""

from __future__ import annotations

import copy
import io
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from common.coding import bitstream

import torch
from torch import Tensor

NUMBERS = [0, 1, 2, 3, 63, 64, 65, 127, 128, 255, 256, 1000, 1024, 2048, 4096, 8192, 16383, 16384,
           16385, 32768, 65535, 65536, 2**20, 2**24, 2**28, 2**31 - 1, 2**31, 2**32 - 1]
FLOATS = [0.0, -0.0, -1.0, 1.0, 1e-38, 1e-45, 3e38, 1e5, float("nan"), float("inf"), float("-inf")]
WHOLE = [0, 1, -1, 2, 255, 2**16, -(2**16), 2**26, 2**31 - 1]
RIGHT = 0.9  # of the mutated files have a right checksum


# ------------------------------------------------------------------------------------------- bytes
def number(generator: random.Random, old: int) -> int:
    """A number that may be wrong: near the old one, a special one, or any."""
    return max(0, generator.choice([
        old + generator.choice([-64, -16, -1, 0, 1, 16, 64]), generator.choice(NUMBERS),
        generator.randrange(2 ** generator.randrange(1, 17)), old * generator.randrange(1, 200)]))


def noise(content: bytes, generator: random.Random) -> bytes:
    """`content` with a few bits or bytes changed, or a part cut out, repeated or replaced."""
    values, size = bytearray(content), len(content)
    if not size:
        return generator.randbytes(generator.randrange(20))
    start, length = generator.randrange(size), min(size, 2 ** generator.randrange(10))
    part = slice(start, start + length)
    match generator.randrange(7):
        case 0 | 1:
            for _ in range(generator.choice([1, 1, 2, 8, 64])):
                values[generator.randrange(size)] ^= 1 << generator.randrange(8)
        case 2:
            values[part] = generator.randbytes(len(values[part]))
        case 3:
            values[part] = generator.choice([b"\0", b"\xff", b"\x80"]) * len(values[part])
        case 4:
            del values[part]
        case 5:
            values[start:start] = generator.choice([bytes(values[part]), bytes(length),
                                                    generator.randbytes(length)])
        case 6:
            del values[start:]
    return bytes(values)


def sealed(file: bytes) -> bytes:
    """A file in our format with a right checksum."""
    return file[:-4] + struct.pack("<I", zlib.crc32(file[:-4]))


# ---------------------------------------------------------------------------------- our file format
def varint(value: int) -> bytes:
    low = []
    while value >= 128:
        low.append(value & 127 | 128)
        value >>= 7
    return bytes([*low, value])


def file(content: bytes, others: Sequence[bytes], generator: random.Random) -> bytes:
    """Mutate one to three things of a file: payload, header, lengths, or any byte.

    others: files of the same paper, of which payloads may be taken.
    """
    parts = bitstream.unpack(content, content[4:8])
    sides, parameters = [parts.height, parts.width], parts.parameters
    sections, wrong = list(parts.sections), {}  # wrong: index of a section -> the length stated
    count, anywhere = len(sections), False
    for _ in range(generator.choice([1, 1, 1, 2, 3])):
        i = generator.randrange(len(sections))
        match generator.randrange(12):
            case 0 | 1 | 2:
                sections[i] = noise(sections[i], generator)
            case 3:  # a string whose length is possible
                whole = noise(sections[i], generator)
                sections[i] = whole[: len(whole) // 4 * 4]
            case 4 | 5:
                for j in generator.choice([[0], [1], [0, 1]]):
                    sides[j] = number(generator, sides[j])
            case 6:
                parameters = generator.choice([
                    noise(parameters, generator), struct.pack("<f", generator.choice(FLOATS)),
                    struct.pack("<2I", *(number(generator, 64) % 2**32 for _ in range(2)))
                    + parameters[8:], generator.randbytes(len(parameters))])
            case 7:
                wrong[i] = number(generator, len(sections[i]))
            case 8:
                count = number(generator, count)
            case 9:
                other = bitstream.unpack(generator.choice(others), content[4:8]).sections
                sections[i] = generator.choice(other)
            case 10:
                sections[i] = generator.choice([
                    b"", bytes(8), bytes(len(sections[i])), b"\xff" * len(sections[i]),
                    generator.randbytes(4 * generator.randrange(3000)), sections[i] * 20,
                    sections[i] + bytes(4 * generator.randrange(500))])
            case _:
                anywhere = True
    lengths = [wrong.get(j, len(section)) for j, section in enumerate(sections)]
    result = joined(content, sides, parameters, [count, *lengths[:-1]], sections)
    if anywhere:
        result = content[:4] + noise(result[4:], generator)
    if generator.random() < RIGHT:
        return sealed(result)
    return noise(result, generator)


def joined(content: bytes, sides: Sequence[int], parameters: bytes, sizes: Sequence[int],
           sections: Sequence[bytes]) -> bytes:
    """A file with the first bytes of `content`; sizes: number of sections, and lengths."""
    head = [*map(varint, sides), varint(len(parameters)), parameters, *map(varint, sizes)]
    return sealed(b"".join([content[: bitstream.FIXED], *head, *sections, bytes(4)]))


def source_file(content: bytes, others: Sequence[bytes], generator: random.Random) -> bytes:
    """Mutate a file of convnextic's other format, which has no checksum: its 32-bit fields, too."""
    values = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 3])):
        match generator.randrange(3):
            case 0:
                start = 2 + 4 * generator.randrange(12)
                old, = struct.unpack_from(">I", values, start)
                struct.pack_into(">I", values, start, number(generator, old) % 2**32)
            case 1:
                values[generator.randrange(60)] = generator.randrange(256)
            case _:
                values = bytearray(values[:50] + noise(bytes(values[50:]), generator))
        if len(values) < 60:
            break
    return bytes(values)


# -------------------------------------------------------------------------------------- checkpoints
@cache
def content_of(weights: Path) -> dict[str, Any]:
    return torch.load(weights, weights_only=True)


def checkpoint(weights: Path, generator: random.Random) -> bytes:
    """A checkpoint file with one to three malformed entries, or with damaged bytes."""
    if generator.random() < 0.15:
        return noise(weights.read_bytes(), generator)
    state = shallow(content_of(weights))
    state |= {"config": dict(state.get("config") or {}), "step": 5, "epoch": 1, "hardware": "a CPU"}
    if generator.random() < 0.2:
        state["averaged"] = shallow({key: state[key] for key in ("model", "exact") if key in state})
    for _ in range(generator.choice([1, 1, 2, 3])):
        mutate_entry(state, generator)
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=generator.random() < 0.9)
    return buffer.getvalue()


def shallow(value: Any) -> Any:
    """A copy of nested dicts and lists, with the same tensors."""
    if isinstance(value, dict):
        return {key: shallow(part) for key, part in value.items()}
    return [shallow(part) for part in value] if isinstance(value, (list, tuple)) else value


def mutate_entry(state: dict[str, Any], generator: random.Random) -> None:
    """Replace, delete or rename one value somewhere in the entries."""
    holder: Any = state
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = generator.choice(keys)
        if holder is state and "model" in state and generator.random() < 0.5:
            key = "model"  # has most of the values
        inner = holder[key]
        if not (isinstance(inner, (dict, list)) and inner) or generator.random() < 0.1:
            break
        holder = inner
    match generator.randrange(10):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[generator.choice(["", "x", 3, f"module.{key}", f"{key}."])] = holder.pop(key)
        case 2 | 3:
            holder[key] = generator.choice(VALUES)()
        case _ if isinstance(inner, Tensor) and inner.layout == torch.strided:
            holder[key] = mutate_tensor(inner, generator)
        case _ if isinstance(inner, int):
            holder[key] = generator.choice([-inner, inner + 1, number(generator, inner), 10**30])
        case _:
            holder[key] = generator.choice([[inner], {"x": inner}, copy.copy(inner), inner])


VALUES: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: -1, lambda: 10**6, lambda: 2**70, lambda: 0.5,
    lambda: float("nan"), lambda: "text", lambda: "", lambda: [], lambda: {}, lambda: b"bytes",
    lambda: {"h_s": None}, lambda: {3: 4}, lambda: [[]], lambda: torch.tensor(1.0),
    lambda: torch.zeros(0), lambda: torch.zeros(2, 0, 5, 5), lambda: torch.zeros(1, 2, 3, 4, 5),
    lambda: torch.ones(3, dtype=torch.int64), lambda: torch.zeros(3, 3).to_sparse(),
    lambda: torch.zeros(3, dtype=torch.complex64), lambda: torch.zeros(4, dtype=torch.bool),
    lambda: torch.zeros(1).expand(2**31), lambda: torch.zeros(1).expand(5000, 1, 5, 5)]


def mutate_tensor(tensor: Tensor, generator: random.Random) -> Tensor:
    """A tensor of another shape or type, or with other values."""
    copied = tensor.clone()
    flat = copied.view(-1) if copied.is_contiguous() else copied.reshape(-1)
    match generator.randrange(9):
        case 0:
            return copied[: generator.randrange(len(copied))] if copied.dim() else copied[None]
        case 1:
            return torch.cat([copied, copied]) if copied.dim() else copied.expand(7)
        case 2:
            return copied.mT if copied.dim() > 1 else copied[None]
        case 3:
            return copied.to(generator.choice([torch.float64, torch.float16, torch.bfloat16,
                                               torch.int8, torch.int64, torch.uint8, torch.bool]))
        case 4:
            return copied * generator.choice([0, -1, 2, 1000, 2**20])
        case 5:
            return copied.flip(generator.randrange(copied.dim())) if copied.dim() else -copied
        case _:
            if not len(flat):
                return torch.zeros(3)
            for _ in range(generator.choice([1, 1, 4, len(flat)])):
                value = generator.choice(FLOATS if copied.is_floating_point() else WHOLE)
                flat[generator.randrange(len(flat))] = torch.tensor(value).to(copied.dtype)
            return flat.view(tensor.shape)
