"""Single images: read a file of any kind as 8-bit RGB, write one, 8 bits <-> floats."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

from common import UserError
from common.files import refuse_folder, write_atomic

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

Image.MAX_IMAGE_PIXELS = None  # no limit: the codec processes large images in tiles


def read_image(path: str | Path | io.BytesIO, notice: Callable[[str], None] = print,
               name: str | None = None) -> Tensor:
    """Read an image as a uint8 tensor (3, H, W).

    Every image that Pillow opens is converted to 8-bit RGB: gray is repeated, transparent images
    are composited on white, 16 bits are reduced to 8, CMYK and palettes are converted, and the EXIF
    orientation is applied. `notice` receives a text for each lossy conversion. Raises UserError,
    which names the file.
    """
    name = name or str(path)
    try:
        with Image.open(path) as image:
            sixteen_bit = (";16" in f"{image.mode} {image.tile}"  # load() empties the tiles
                           or (image.format, image.mode) == ("PNG", "I"))
            image.load()
            rgb, lost = _to_rgb(ImageOps.exif_transpose(image), sixteen_bit)
    except FileNotFoundError:
        raise UserError(f"{name}: no such image file") from None
    except (OSError, SyntaxError, ValueError, OverflowError, MemoryError, EOFError, struct.error,
            Image.DecompressionBombError) as e:
        raise UserError(f"{name}: not a readable image ({e}); replace or remove it") from None
    if lost:
        notice(f"{name}: {lost}, coded as 8-bit RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image, sixteen_bit: bool) -> tuple[Image.Image, str]:
    """Convert to mode RGB; returns the image and a text on what was lost ("" if nothing)."""
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image, "16 bits a sample" if sixteen_bit else ""
    if mode.startswith("I") or mode == "F":
        a = np.asarray(image, dtype=np.float64)
        peak = 65535 if sixteen_bit else _peak(a, mode)
        gray = Image.fromarray(np.clip(np.rint(a * (255 / peak)), 0, 255).astype(np.uint8))
        kind = "float" if mode == "F" else "16-bit" if peak == 65535 else "32-bit"
        return gray.convert("RGB"), f"{kind} grayscale, 0 to {peak:g} taken as black to white"
    if "A" in mode or mode == "PA" or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        transparent = np.asarray(rgba)[..., 3].min() < 255
        lost = "transparency laid on white" if transparent else f"mode {mode}"
        return Image.alpha_composite(white, rgba).convert("RGB"), lost
    names = {"L": "grayscale", "1": "black and white", "P": "palette"}
    return image.convert("RGB"), names.get(mode, f"mode {mode}")


def _peak(a: NDArray[np.float64], mode: str) -> int:
    """Value of white if the file does not state it: the least of 1 (float), 255 and 65535 that is
    not below any pixel.
    """
    for peak in (1, 255, 65535) if mode == "F" else (255, 65535):
        if a.size == 0 or (a.min() >= 0 and a.max() <= peak):
            return peak
    raise ValueError("grayscale values outside 0 to 65535, or NaN")


def write_image(x: Tensor, path: str | Path) -> None:
    """Write x (3, H, W), uint8 or float in [0, 1], as an 8-bit image file."""
    if x.dtype != torch.uint8:
        x = to_uint8(x)
    refuse_folder(path)
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"cannot write {path}: name an image file, as {Path(path).stem}.png")
    buffer = io.BytesIO()
    try:
        Image.fromarray(x.permute(1, 2, 0).cpu().contiguous().numpy()).save(buffer, kind)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write {path}: {e}") from None
    write_atomic(path, buffer.getvalue())


def to_uint8(x: Tensor) -> Tensor:
    """Round a float image in [0, 1] to 8 bits; values outside the range are clamped."""
    return (x.detach() * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_float(x: Tensor) -> Tensor:
    """uint8 image -> float32 in [0, 1]."""
    return x.float().div_(255)
