"""From an image to its compressed file and back: padding, coding, and finding the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from common import UserError
from common.coding import bitstream
from common.coding.contract import Codec, Coded

import torch
from torch import Tensor

FADE = 0.5  # of the continuation of an image, in neper per pixel and radian per pixel
RANGE_SLACK = 1e-3  # of values, for rounding


def pad(x: Tensor, multiple: int) -> Tensor:
    """Continue x (B, C, H, W) to the right and downwards until both sides are multiples.

    The continuation is free, as the decoder cuts it off; `continued` makes it cheap.
    """
    height, width = x.shape[-2:]
    return continued(x, -height % multiple, -width % multiple)


def continued(x: Tensor, rows: int, columns: int) -> Tensor:
    """Add rows below and columns to the right of x (B, C, H, W), which cost few bits.

    The line n pixels behind the border is the last one without its detail: its component of the
    frequency w (radians per pixel) is weakened by exp(-FADE * w * n), so that the mean remains, and
    the fewer frequencies the farther away. Repeated lines would be stripes up to the next multiple
    of 64, which cost more than the image where that is thin. `common/evaluation/padding.py` has the
    measurements.
    """
    return _fade(_fade(x, columns).mT, rows).mT.contiguous() if rows or columns else x


def _fade(x: Tensor, columns: int) -> Tensor:
    """Add columns to x (B, C, H, W)."""
    if not columns:
        return x
    last, height = x[..., -1].float(), x.shape[-2]
    spectrum = torch.fft.rfft(torch.cat([last, last.flip(-1)], -1))  # (B, C, H + 1): the cosine
    w = torch.arange(height + 1, device=x.device) * (torch.pi / height)
    n = torch.arange(1, columns + 1, device=x.device)
    faded = spectrum[..., None] * torch.exp(-FADE * w[:, None] * n)
    more = torch.fft.irfft(faded, n=2 * height, dim=-2)[..., :height, :]
    return torch.cat([x, more.to(x.dtype)], -1)


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Undo `pad`: the first (height, width) of (B, C, H, W)."""
    return x[..., : size[0], : size[1]]


@torch.no_grad()
def encode_images(model: Codec, x: Tensor, fingerprint: bytes | None = None, **rate: Any
                  ) -> list[bytes]:
    """x (B, 3, H, W) in [0, 1], any H and W -> B files.

    fingerprint: that of the model, if known; rate: arguments of a variable-rate `compress`.
    """
    check_images(x)
    fingerprint = fingerprint or bitstream.fingerprint(model)
    try:
        with torch.autocast(x.device.type, enabled=False):  # which the caller may be in
            coded = model.compress(pad(x, model.downsampling_factor), **rate)
    except ValueError as e:
        raise UserError(f"the model cannot code this image: {e}") from None
    return pack_images(model, coded, x.shape[-2:], fingerprint)


def check_images(x: Tensor) -> None:
    """Raise UserError unless x is (B, 3, H, W), float32, in [0, 1] and of a size that files have.

    Rounding may leave values 0.001 outside of [0, 1].
    """
    if not isinstance(x, Tensor):
        raise UserError(f"an image is a tensor, not a {type(x).__name__}: convert it with "
                        "common.data.to_float")
    if x.dim() != 4 or x.shape[1] != 3 or x.numel() == 0:
        raise UserError(f"an image has the shape (3, height, width), not {tuple(x.shape)}: permute "
                        "its axes, repeat a grey channel or remove a fourth one")
    if x.dtype != torch.float32:
        raise UserError(f"an image has values of type float32, not {str(x.dtype)[6:]}: convert it "
                        "with common.data.to_float")
    low, high = (float(v) for v in x.aminmax())
    if not -RANGE_SLACK <= low <= high <= 1 + RANGE_SLACK:  # false for NaN
        raise UserError(f"an image has values from 0 to 1, not {low:g} to {high:g}: divide it by "
                        "255, or clamp it")
    height, width = x.shape[-2:]
    bitstream.check_size(height, width, "the image")


def pack_images(model: Codec, coded: Coded, size: Sequence[int], fingerprint: bytes
                ) -> list[bytes]:
    """Make files of the result of `model.compress` for images of size (height, width)."""
    height, width = size
    return [bitstream.pack(model.tag, fingerprint, height, width, list(sections),
                           coded.get("parameters", b""))
            for sections in zip(*coded["strings"], strict=True)]


def encode_image(model: Codec, x: Tensor, fingerprint: bytes | None = None, **rate: Any) -> bytes:
    """x (3, H, W) or (1, 3, H, W) in [0, 1] -> the file's bytes."""
    if isinstance(x, Tensor) and x.dim() == 4 and len(x) > 1:
        raise UserError(f"one image is expected, not {len(x)}: give encode_images a batch")
    x = x[None] if isinstance(x, Tensor) and x.dim() == 3 else x
    return encode_images(model, x, fingerprint, **rate)[0]


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
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            x_hat = model.decompress(strings, shape, **rate)["x_hat"]
    except ValueError as e:
        raise UserError(f"the file's content does not decode ({e}): encode the image again") \
            from None
    return check_decoded(crop(x_hat, size))


def check_decoded(x_hat: Tensor) -> Tensor:
    """Return x_hat; UserError if it holds NaN, which no image has."""
    if not math.isfinite(float(x_hat.sum(dtype=torch.float64))):
        raise UserError("the decoded image holds NaN: the file's rate or the weights are broken; "
                        "encode the image again with intact ones")
    return x_hat


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
