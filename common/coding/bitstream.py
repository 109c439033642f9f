"""The format of compressed files: a header of about 25 bytes, the payload, and a checksum.

    magic          3   not valid text, so that no text file starts with it
    version        1
    tag            4   identifies the paper: the `tag` of its codec
    fingerprint    8   of the weights and CDF tables that can decode the file
    height, width      varints, of the image before padding
    parameters         varint length, then bytes that the decoder needs (a rate index, ...)
    sections           varint count, then the lengths of all but the last section as varints
    payload            the sections, one after the other
    checksum       4   CRC-32 of everything before it

Varints hold 7 bits per byte, low bits first. With two sections below 2 MiB and sides of up to 16383
pixels, header and checksum take 25 + 4 bytes, which count in bpp. Magic, version and checksum have
the same place in all versions, so that an old program can tell a newer file from a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass

from common import UserError
from common.coding import exact
from common.coding.contract import Codec
from common.image_io import MAX_PIXELS, MAX_SIDE  # so that a tiny file cannot request all memory

import numpy as np
from torch import Tensor

MAGIC = b"\xb5LC"
VERSION = 1
FIXED = 16  # bytes of magic, version, tag and fingerprint


@dataclass(frozen=True)
class File:
    """The parts of a compressed file; height and width are those of the image in pixels."""

    tag: bytes
    fingerprint: bytes
    height: int
    width: int
    parameters: bytes
    sections: list[bytes]


def fingerprint(model: Codec) -> bytes:
    """8 bytes of SHA-256 over weights, CDF tables, fixed-point settings (`exact_parts`), `options`.

    It does not depend on the device, the memory layout or the precision in which weights are
    stored.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        kind = np.dtype("<f4") if tensor.is_floating_point() else np.dtype("<i8")
        values = (tensor.float() if kind.kind == "f" else tensor).cpu().contiguous().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(values.astype(kind, copy=False).tobytes())
    for name in model.exact_parts:
        spec = exact.spec(model.get_submodule(name))
        digest.update(json.dumps([name, spec], sort_keys=True, default=Tensor.tolist).encode())
    for name in model.options:
        digest.update(f"{name}={getattr(model, name)}\n".encode())
    return digest.digest()[:8]


def pack(tag: bytes, fingerprint: bytes, height: int, width: int, sections: list[bytes],
         parameters: bytes = b"") -> bytes:
    """Make a file of coded sections; UserError for images larger than the limits above."""
    check_size(height, width, "the image")
    if len(tag) != 4 or len(fingerprint) != 8 or not sections:
        raise ValueError("tag of 4 bytes, fingerprint of 8 bytes, at least one section expected")
    numbers = [height, width, len(parameters)], [len(sections), *map(len, sections[:-1])]
    head, lengths = (b"".join(map(_varint, n)) for n in numbers)
    body = b"".join([MAGIC, bytes([VERSION]), tag, fingerprint, head, parameters, lengths,
                     *sections])
    return body + struct.pack("<I", zlib.crc32(body))


def unpack(data: bytes, tag: bytes, fingerprint: bytes | None = None) -> File:
    """Split a file into its parts; its tag and, if given, its fingerprint must match.

    Raises UserError for a file that is empty, damaged, truncated, of another format, of a newer
    version, of another paper or of other weights, or that states impossible sizes.
    """
    _check_intact(data)
    if data[4:8] != tag:
        raise UserError(f"the file was written by the codec {_text(data[4:8])}, this one is "
                        f"{_text(tag)}: decode it with the other folder's codec.py")
    if fingerprint is not None and data[8:16] != fingerprint:
        raise UserError(f"the file was encoded with the weights {data[8:16].hex()}, these are "
                        f"{fingerprint.hex()}: pass the right --checkpoint")
    reader = _Reader(data[:-4], FIXED)
    height, width = reader.varint(), reader.varint()
    check_size(height, width, "the file's header")
    parameters = reader.take(reader.varint())
    count = reader.varint()
    if not 1 <= count <= reader.left() + 1:
        raise _lengths_error()
    lengths = [reader.varint() for _ in range(count - 1)]
    sections = [reader.take(n) for n in lengths]
    return File(data[4:8], data[8:16], height, width, parameters,
                [*sections, reader.take(reader.left())])


def tag_of(data: bytes) -> bytes:
    """The tag of the codec that wrote a file; UserError as in `unpack` if it is not intact."""
    _check_intact(data)
    return data[4:8]


def _check_intact(data: bytes) -> None:
    if not data:
        raise UserError("the file is empty: encode the image again")
    if data[:3] != MAGIC:
        raise UserError("not one of our compressed files: give one that codec.py encode has made")
    if len(data) < FIXED + 4 or zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise UserError("the file is damaged or cut short (checksum): copy it again")
    if data[3] > VERSION:
        raise UserError(f"the file has format version {data[3]}, this program reads up to "
                        f"{VERSION}: update the program")


class _Reader:
    """Reads the fields of a header from `position` on, and never past the end."""

    def __init__(self, data: bytes, position: int):
        self.data, self.position = data, position

    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, count: int) -> bytes:
        if count > self.left():
            raise _lengths_error()
        self.position += count
        return self.data[self.position - count : self.position]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 35, 7):  # five bytes suffice for the length of any file
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise _lengths_error()


def _varint(value: int) -> bytes:
    low = []
    while value >= 128:
        low.append(value & 127 | 128)
        value >>= 7
    return bytes([*low, value])


def check_size(height: int, width: int, what: str) -> None:
    """Raise UserError for an image of a size that files cannot have."""
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and height * width <= MAX_PIXELS):
        raise UserError(f"{what} states {width}x{height} pixels; 1x1 to {MAX_SIDE} a side and "
                        f"{MAX_PIXELS} in all can be coded")


def _lengths_error() -> UserError:
    return UserError("the file's section lengths do not add up: encode the image again")


def _text(tag: bytes) -> str:
    return repr(tag.decode("ascii", "backslashreplace"))
