"""Evaluate classical codecs in the same way as the learned ones; at present JPEG.

    python -m common.evaluation.classical jpeg [--dataset DIR] [-o FILE]

To add a codec, add a function like `_jpeg` to CODECS, with the qualities at which it is measured.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import cli, data, processes
from common.evaluation.image_sets import image_digest
from common.evaluation.results import image_record, merge_points, operating_point, save_results

import PIL
import torch
from PIL import Image
from torch import Tensor

Coder = Callable[[Tensor, int], tuple[bytes, Tensor, float, float]]


def _jpeg(x: Tensor, quality: int) -> tuple[bytes, Tensor, float, float]:
    """x: uint8 (3, H, W). Returns file, decoded image, and seconds to encode and to decode."""
    image = Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())
    start = time.perf_counter()
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)  # Pillow's defaults: 4:2:0, not optimised
    middle = time.perf_counter()
    decoded = data.read_image(io.BytesIO(buffer.getvalue()))
    return buffer.getvalue(), decoded, middle - start, time.perf_counter() - middle


CODECS: dict[str, tuple[str, Coder, Sequence[int]]] = {
    "jpeg": ("JPEG", _jpeg, range(5, 100, 5)),
}


def measure(codec: str, paths: list[Path], qualities: Sequence[int] | None = None,
            ms_ssim: bool = True) -> dict[str, Any]:
    """Results (see `common.evaluation.results`) of a codec in CODECS at several qualities.

    MS-SSIM takes most of the time; without it, 24 images at 19 qualities take about ten seconds.
    """
    name, coder, default = CODECS[codec]
    rows: dict[int, list[dict[str, Any]]] = {q: [] for q in qualities or default}
    for path in paths:
        x = data.read_image(path)
        digest = image_digest(x)
        for quality, point in rows.items():
            file, decoded, encoding, decoding = coder(x, quality)
            point.append(image_record(path.stem, x, decoded, len(file), ms_ssim, digest)
                         | {"encoding_time": encoding, "decoding_time": decoding})
    meta = {"device": "cpu", "hardware": processes.describe_hardware(torch.device("cpu"))}
    return merge_points([
        operating_point(name, f"{name} by Pillow {PIL.__version__}, default settings", r,
                       {"quality": q, **meta})
        for q, r in rows.items()])


def jpeg(paths: list[Path], qualities: Sequence[int] | None = None,
         ms_ssim: bool = True) -> dict[str, Any]:
    """JPEG with Pillow's default settings, at qualities 5, 10, ... 95."""
    return measure("jpeg", paths, qualities, ms_ssim)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("codec", choices=sorted(CODECS))
    parser.add_argument("--dataset", type=Path, default=data.KODAK, help="folder of test images")
    parser.add_argument("-o", "--output", type=Path, default=argparse.SUPPRESS,
                        help="results JSON to write; <codec>.json if not given")
    args = parser.parse_args(argv)
    results = measure(args.codec, data.list_images(args.dataset))
    output = getattr(args, "output", Path(f"{args.codec}.json"))
    save_results(output, results)
    rates = results["results"]["bpp"]
    print(f"{output}: {len(rates)} points, {rates[0]:.3f} to {rates[-1]:.3f} bpp")


if __name__ == "__main__":
    cli.run(main)
