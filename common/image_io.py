"""Single images: read a file of any kind as 8-bit RGB, write one, 8 bits <-> floats."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from common import UserError
from common.files import refuse_folder, write_atomic

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms
from torch import Tensor

BUNDLED = Path(__file__).parent / "images"
NOT_BUNDLED = ("the Kodak images and the training photographs are only in a checkout of the "
               "repository, not in an installed package: name a folder of images, or clone it")
MAX_SIDE, MAX_PIXELS = 65535, 2**28  # of an image that can be coded
UPRIGHT: dict[int | None, Image.Transpose] = {  # by the value of the EXIF tag
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
OVERSHOOT = 0.25  # of the range: what resampling adds to a float image beyond black and white
SAME_COLOURS = 2  # levels by which profiles that describe sRGB differ from each other

Image.MAX_IMAGE_PIXELS = None  # our own limits hold instead; large images are coded in tiles
warnings.filterwarnings("ignore", module=r"PIL\.")  # on malformed tags that nobody needs


def read_image(path: str | Path | io.BytesIO, notice: Callable[[str], None] = print,
               name: str | None = None) -> Tensor:
    """Read an image as a uint8 tensor (3, H, W).

    Every image that Pillow opens is converted to 8-bit RGB: gray is repeated, transparent images
    are composited on white, 16 bits are reduced to 8, CMYK and palettes are converted, colours are
    converted to sRGB if the file has a profile of others, and the EXIF orientation is applied. Of
    several frames the first is read. `notice` receives a text if any of this changes or loses
    something. Raises UserError, which names the file; the size is checked before pixels are read.
    """
    name = name or str(path)
    try:
        with Image.open(path) as image:
            check_size(*image.size, name)
            sixteen_bit = (";16" in f"{image.mode} {image.tile}"  # load() empties the tiles
                           or (image.format, image.mode) == ("PNG", "I"))
            image.load()
            rgb, lost = _to_rgb(image, sixteen_bit)
            rgb = _upright(rgb, image.info)
            if (frames := _frames(image)) > 1:  # last, because it may move to another frame
                lost.insert(0, f"first of {frames} frames")
    except FileNotFoundError:
        if not isinstance(path, io.BytesIO) and BUNDLED in Path(path).parents:
            raise UserError(NOT_BUNDLED) from None
        raise UserError(f"{name}: no such image file") from None
    except MemoryError:
        raise UserError(f"{name}: needs more memory than there is; close other programs, scale the "
                        "image down or cut it into parts") from None
    except UserError:
        raise
    except Exception as e:  # on damaged files, Pillow raises errors of nearly any type
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{name}: not a readable image ({reason}); replace or remove it") from None
    if lost:
        notice(f"{name}: {', '.join(lost)}, coded as 8-bit RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def check_size(width: int, height: int, name: str) -> None:
    """Raise UserError if an image of this size cannot be coded."""
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and height * width <= MAX_PIXELS):
        raise UserError(f"{name}: states {width}x{height} pixels; 1x1 to {MAX_SIDE} a side and "
                        f"{MAX_PIXELS} in all can be coded: scale it down or cut it into parts")


def _upright(pixels: Image.Image, info: dict[str | tuple[int, int], Any]) -> Image.Image:
    """Turn pixels as the EXIF data of the file say, or else its XMP data.

    Pillow itself turns TIFF images, and keeps their EXIF data elsewhere.
    """
    exif = info.get("exif") or b""
    if text := info.get("Raw profile type exif"):  # in PNG: three lines, then hexadecimal digits
        with contextlib.suppress(ValueError):
            exif = exif or bytes.fromhex("".join(text.split("\n")[3:]))
    orientation = _orientation(exif)
    xmp = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    if orientation is None and (found := re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)):
        orientation = int(found[1])
    turn = UPRIGHT.get(orientation)
    return pixels if turn is None else pixels.transpose(turn)


def _orientation(exif: bytes) -> int | None:
    """Value of the EXIF tag 0x0112, which is read alone: many files have other tags that are
    malformed, and Pillow stops reading at the first of them.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        start, = struct.unpack_from(f"{order}I", tiff, 4)
        count, = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, short = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == 0x0112 and kind == 3:
                return short
    except struct.error:  # ends too early
        pass
    return None


def _frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a damaged frame, which is not needed
        return 1


# -------------------------------------------------------------------------------- colours, 8 bits
def _to_rgb(image: Image.Image, sixteen_bit: bool) -> tuple[Image.Image, list[str]]:
    """Convert to mode RGB; returns the image and texts on what was changed or lost."""
    mode, profile, clear = image.mode, image.info.get("icc_profile"), image.info.get("transparency")
    names = {"RGB": "", "L": "grayscale", "1": "black and white", "P": "palette"}
    lost = ["16 bits a sample" if sixteen_bit else "", names.get(mode, f"mode {mode}")]
    alpha = None  # opacity, mode L
    if mode[0] == "I" or mode == "F":
        a = np.asarray(image, dtype=np.float64)
        image, text = _eight_bits(a, mode, sixteen_bit)
        lost = [text]
        if isinstance(clear, int):  # a level of the file's own depth
            alpha = Image.fromarray(np.where(a == clear, 0, 255).astype(np.uint8))
    elif mode == "RGB" and sixteen_bit and clear is not None:
        lost.append("its transparent colour kept")  # the lower bits, which identify it, are lost
    elif "A" in mode or clear is not None:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if profile:
        image, text = _to_srgb(image, profile, mode[0] in "IF1" or mode in ("L", "LA"))
        lost.append(text)
    image = image.convert("RGB")
    if alpha is not None and np.asarray(alpha).min() < 255:
        lost.append("transparency laid on white")
        image.putalpha(alpha)
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    return image, [text for text in lost if text]


def _eight_bits(a: NDArray[np.float64], mode: str, sixteen_bit: bool) -> tuple[Image.Image, str]:
    """Gray values a (H, W) of 16 bits or more -> an image of mode L, and a text on it."""
    peak = 65535 if sixteen_bit else _peak(a, mode)
    kind = "float" if mode == "F" else "16-bit" if peak == 65535 else "32-bit"
    beyond = ", values beyond clipped" if a.min() < 0 or a.max() > peak else ""
    levels = np.clip(np.rint(a * (255 / peak)), 0, 255).astype(np.uint8)
    return (Image.fromarray(levels),
            f"{kind} grayscale, 0 to {peak:g} taken as black to white{beyond}")


def _peak(a: NDArray[np.float64], mode: str) -> int:
    """Value of white if the file does not state it: the least of 1 (float), 255 and 65535 that is
    not below any pixel. A float image may exceed the range by OVERSHOOT on either side.
    """
    margin = OVERSHOOT if mode == "F" else 0
    for peak in (1, 255, 65535) if mode == "F" else (255, 65535):
        if a.min() >= -margin * peak and a.max() <= (1 + margin) * peak:
            return peak
    raise ValueError("grayscale values outside 0 to 65535, or NaN")


def _to_srgb(image: Image.Image, profile: bytes, gray: bool) -> tuple[Image.Image, str]:
    """Convert colours by the ICC profile of the file; returns a text on it ("": no change).

    gray: the file holds gray values, whatever the mode of `image` is now.
    """
    try:
        mode, name, transform = _transform(profile)
        if transform is None:
            return image, ""
        if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not gray):
            return image, f"colour profile '{name}' not used, as it is for mode {mode}"
        image = ImageCms.applyTransform(image.convert(mode), transform) or image
    except Exception:  # on damaged profiles, LittleCMS and Pillow raise errors of several types
        return image, "colour profile not used, as it cannot be read"
    return image, f"colour profile '{name}' converted to sRGB"


@lru_cache(maxsize=4)  # the images of a data set often have the same profile
def _transform(profile: bytes) -> tuple[str, str, ImageCms.ImageCmsTransform | None]:
    """Mode of the images that an ICC profile is for, its name, and its transform to sRGB.

    The transform is None if it changes no colour by more than SAME_COLOURS levels: so files with
    one of the many profiles that describe sRGB itself keep their pixels.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
    described = ImageCms.getProfileDescription(source).encode("ascii", "replace").decode()
    name = "".join(c for c in described if c.isprintable()).strip()
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "CMYK":
        levels = np.arange(0, 256, 15 if mode == "RGB" else 1, dtype=np.uint8)
        grid = np.stack(np.meshgrid(*[levels] * len(mode), indexing="ij"), axis=-1)
        colours = Image.fromarray(grid.reshape(1, -1, 3) if mode == "RGB" else grid.reshape(1, -1))
        found = ImageCms.applyTransform(colours, transform)
        change = np.asarray(found, dtype=int) - np.asarray(colours.convert("RGB"), dtype=int)
        if np.abs(change).max() <= SAME_COLOURS:
            return mode, name, None
    return mode, name, transform


# ---------------------------------------------------------------------------------- writing, floats
def to_pillow(x: Tensor) -> Image.Image:
    """x (3, H, W), uint8, as an image of Pillow."""
    return Image.fromarray(x.permute(1, 2, 0).cpu().contiguous().numpy())


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
        to_pillow(x).save(buffer, kind)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write {path}: {e}") from None
    write_atomic(path, buffer.getvalue())


def to_uint8(x: Tensor) -> Tensor:
    """Round a float image in [0, 1] to 8 bits; values outside the range are clamped."""
    return (x.detach() * 255).round_().clamp_(0, 255).to(torch.uint8)


def to_float(x: Tensor) -> Tensor:
    """uint8 image -> float32 in [0, 1]."""
    return x.float().div_(255)
