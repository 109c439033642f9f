"""The file format of the source: a header of its own, no fingerprint, no checksum."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from common import UserError
from common.coding import bitstream

from torch import Tensor

from convnextic.model import ConvNeXTIC
from convnextic.patches import PATCH, check_area, clamped, cut, strings_of

METRICS = ("mse", "ms-ssim")
MULTIPLE = 256  # the source pads to multiples of it


def grown(size: tuple[int, int]) -> tuple[int, int]:
    """The padded size in the source: multiples of 256, which suits every variant."""
    return tuple(-(-s // MULTIPLE) * MULTIPLE for s in size)


@dataclass(frozen=True)
class SourceFile:
    """Contents of a file in the source's format; patch and lamb for a variable rate only."""

    metric: str
    quality: int
    size: tuple[int, int]
    shape: tuple[int, int]
    strings: list[bytes]
    patch: tuple[int, int] | None = None
    lamb: int | None = None


def pack_source(model: ConvNeXTIC, x: Tensor, rate: dict[str, float], lamb: int | None,
                patch: tuple[int, int] | None, quality: int, metric: str) -> bytes:
    """Encode x in the source's format, big-endian: metric and quality, sizes, counts, strings."""
    variable = model.variable_rate
    if patch and not variable:
        raise UserError("-ph, -pw: the source's fixed-rate format has no patches; leave --format "
                        "source out")
    area = (clamped(patch or PATCH, x.shape[1:], model.downsampling_factor) if variable
            else grown(x.shape[1:]))
    check_area(x, area)
    patches, _ = cut(x, area, "zeros")
    coded = [model.compress(p[None], **rate) for p in patches]
    head = struct.pack(">BB2I", 0, METRICS.index(metric) << 4 | (quality - 1), *x.shape[1:])
    if variable:
        head += struct.pack(">4I", *area, int(lamb >= 0), abs(lamb))
    head += struct.pack(">2I", *coded[0]["shape"])
    head += struct.pack(">2I", len(coded), strings_of(model)) if variable else (
        struct.pack(">I", strings_of(model)))
    return head + b"".join(struct.pack(">I", len(s)) + s for c in coded for s, in c["strings"])


def unpack_source(file: bytes, variable: bool) -> SourceFile:
    """Parse a file; UserError if it is foreign, truncated, too long, or states impossible sizes."""
    position = 0

    def take(form: str) -> tuple[int, ...]:
        nonlocal position
        form = f">{form}"
        if position + struct.calcsize(form) > len(file):
            raise UserError("the file is cut short, or not of the source's format: copy it again")
        values = struct.unpack_from(form, file, position)
        position += struct.calcsize(form)
        return values

    number, code, height, width = take("BB2I")
    if number != 0 or code >> 4 >= len(METRICS) or code & 15 > 7:
        raise UserError(f"not a file of this codec: model {number}, code {code} are not known")
    if not (0 < height <= bitstream.MAX_SIDE and 0 < width <= bitstream.MAX_SIDE
            and height * width <= bitstream.MAX_PIXELS):
        raise UserError(f"the file states an image of {width}x{height}: it is damaged, or of "
                        "another format")
    patch = lamb = None
    if variable:
        *patch, positive, size = take("4I")
        patch, lamb = tuple(patch), size if positive else -size
    shape = take("2I")
    count = take("2I") if variable else (1, *take("I"))
    if count[0] * count[1] > len(file) // 4:
        raise UserError("the file is cut short, or not of the source's format: copy it again")
    strings = []
    for _ in range(count[0] * count[1]):
        length, = take("I")
        strings.append(b"".join(take(f"{length}s")))
    if position != len(file):
        raise UserError("the file is longer than its header says: copy it again")
    return SourceFile(METRICS[code >> 4], (code & 15) + 1, (height, width), tuple(shape), strings,
                      patch, lamb)
