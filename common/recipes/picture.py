"""One crop of a Kodak image three times: original, JPEG and ours, at equal numbers of bytes.

`make report-<paper>` and `make weights-<paper>` write it to results/<curve>-picture.webp.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from common import UserError, metrics
from common.evaluation import classical
from common.evaluation.results import folders_of_points
from common.files import write_atomic
from common.image_io import read_image, to_pillow

import torch
from PIL import Image, ImageDraw, ImageFont

IMAGE, TOP, LEFT = "kodim15", 40, 250  # a face: errors in it are easy to see
SIDE = 320
RATE = 0.25  # bits per pixel that the operating point is chosen for
HEAD, GAP = 40, 8  # pixels above the crops and between them


def write(path: Path, results: dict[str, Any], decoded: Path, images: list[Path]) -> None:
    """Write the picture of the operating point that is nearest to RATE.

    results: of eval.py on `images`; decoded: the folder of its files and decoded images. Nothing is
    written if IMAGE is not among the images.
    """
    source = next((image for image in images if image.stem == IMAGE), None)
    if source is None:
        return
    rates = results["results"]["bpp"]
    best = min(range(len(rates)), key=lambda i: abs(rates[i] - RATE))
    row = next(row for row in results["per_image"][best] if row["image"] == IMAGE)
    x = read_image(source)
    ours = read_image(folders_of_points(results, decoded)[best] / f"{IMAGE}.png")
    quality, rival, size = _jpeg(x, row["bytes"])
    parts = [("original", f"{x.shape[2]}x{x.shape[1]} pixels", x),
             (f"JPEG, quality {quality}", _numbers(x, rival, size), rival),
             ("this codec", _numbers(x, ours, row["bytes"]), ours)]
    picture = Image.new("RGB", (3 * SIDE + 2 * GAP, HEAD + SIDE), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    for i, (name, numbers, pixels) in enumerate(parts):
        left = i * (SIDE + GAP)
        draw.text((left, 0), name, "black", font)
        draw.text((left, 18), numbers, "black", font)
        crop = pixels[:, TOP:TOP + SIDE, LEFT:LEFT + SIDE]
        picture.paste(to_pillow(crop), (left, HEAD))
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=92, method=6)
    write_atomic(path, buffer.getvalue())


def _jpeg(x: torch.Tensor, size: int) -> tuple[int, torch.Tensor, int]:
    """The smallest JPEG of x that has `size` bytes or more: quality, decoded image, bytes."""
    for quality in range(1, 101):
        file, decoded, _, _ = classical.CODECS["jpeg"].code(x, quality)
        if len(file) >= size:
            return quality, decoded, len(file)
    raise UserError(f"{IMAGE}: no JPEG has {size} bytes")


def _numbers(x: torch.Tensor, decoded: torch.Tensor, size: int) -> str:
    rate = metrics.bpp(size, *x.shape[1:])
    return f"{size:,} bytes ({rate:.3f} bpp), {metrics.psnr(x, decoded):.2f} dB"
