"""From an image to its compressed file and back: padding, coding, and finding the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from common import UserError
from common.coding import bitstream
from common.coding.contract import Codec, Coded

import torch
import torch.nn.functional as F
from torch import Tensor


def pad(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of x (B, C, H, W) until both sides are multiples."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Undo `pad`: the first (height, width) of (B, C, H, W)."""
    return x[..., : size[0], : size[1]]


@torch.no_grad()
def encode_images(model: Codec, x: Tensor, fingerprint: bytes | None = None, **rate: Any
                  ) -> list[bytes]:
    """x (B, 3, H, W) in [0, 1], any H and W -> B files.

    fingerprint: that of the model, if known; rate: arguments of a variable-rate `compress`.
    """
    fingerprint = fingerprint or bitstream.fingerprint(model)
    try:
        coded = model.compress(pad(x, model.downsampling_factor), **rate)
    except ValueError as e:
        raise UserError(f"the model cannot code this image: {e}") from None
    return pack_images(model, coded, x.shape[-2:], fingerprint)


def pack_images(model: Codec, coded: Coded, size: Sequence[int], fingerprint: bytes
                ) -> list[bytes]:
    """Make files of the result of `model.compress` for images of size (height, width)."""
    height, width = size
    return [bitstream.pack(model.tag, fingerprint, height, width, list(sections),
                           coded.get("parameters", b""))
            for sections in zip(*coded["strings"], strict=True)]


def encode_image(model: Codec, x: Tensor, fingerprint: bytes | None = None, **rate: Any) -> bytes:
    """x (3, H, W) or (1, 3, H, W) in [0, 1] -> the file's bytes."""
    return encode_images(model, x.reshape(1, *x.shape[-3:]), fingerprint, **rate)[0]


@torch.no_grad()
def decode_images(model: Codec, files: list[bytes], fingerprint: bytes | None = None) -> Tensor:
    """Files of images of one size and rate -> x_hat (B, 3, H, W) in [0, 1].

    Raises UserError for anything but complete files of this model.
    """
    fingerprint = fingerprint or bitstream.fingerprint(model)
    parts = [bitstream.unpack(file, model.tag, fingerprint) for file in files]
    if len({(part.height, part.width, part.parameters) for part in parts}) > 1:
        raise UserError("files of several sizes or rates: decode them one by one")
    rate = model.read_parameters(parts[0].parameters)
    size, factor = (parts[0].height, parts[0].width), model.downsampling_factor
    shape = (-(-size[0] // factor), -(-size[1] // factor))  # of the last latent; not in the file
    try:
        strings = [list(s) for s in zip(*(part.sections for part in parts), strict=True)]
        x_hat = model.decompress(strings, shape, **rate)["x_hat"]
    except ValueError as e:
        raise UserError(f"the file's content does not decode ({e}): encode the image again") \
            from None
    return crop(x_hat, size)


def decode_image(model: Codec, file: bytes, fingerprint: bytes | None = None) -> Tensor:
    """A file's bytes -> x_hat (3, H, W) in [0, 1]."""
    return decode_images(model, [file], fingerprint)[0]


def find_model(file: bytes, kind: type[Codec], checkpoints: Iterable[Path],
               load: Callable[[Path, torch.device], Codec], device: torch.device) -> Codec:
    """Load the model, out of `checkpoints`, whose fingerprint is in the header of the file."""
    wanted = bitstream.unpack(file, kind.tag).fingerprint
    seen = []
    for path in checkpoints:
        model = load(path, device)
        seen.append(bitstream.fingerprint(model))
        if seen[-1] == wanted:
            return model
    have = ", ".join(s.hex() for s in seen) or "none"
    raise UserError(f"the file was encoded with the weights {wanted.hex()}, available are {have}: "
                    "pass the right --checkpoint")
