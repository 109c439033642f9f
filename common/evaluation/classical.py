"""Evaluate classical codecs in the same way as the learned ones.

    python -m common.evaluation.classical jpeg [--dataset DIR] [-o FILE]

Pillow codes JPEG, WebP, JPEG 2000 and AVIF. JPEG XL, HEVC and VVC need optional packages, which
`Classical.missing` names. To add a codec, add an entry to CODECS, with the settings at which it is
measured.
"""

from __future__ import annotations

import argparse
import importlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import UserError, cli, data, processes
from common.evaluation import further_metrics, intra_video
from common.evaluation.image_sets import image_digest
from common.evaluation.results import image_record, merge_points, operating_point, save_results
from common.image_io import to_pillow

import PIL
import torch
from PIL import features
from torch import Tensor

Coded = tuple[bytes, Tensor, float, float]  # file, decoded image (3, H, W), seconds of both ways


@dataclass(frozen=True)
class Classical:
    """A classical codec with its settings, and the values of its rate parameter.

    code: (image (3, H, W) uint8, value) -> file, decoded image, seconds to encode and to decode.
    package: name on the package index and name to import, if Pillow alone is not enough.
    encoder: what the ffmpeg of imageio-ffmpeg must have, as in "libvvenc".
    feature: what Pillow must have been built with.
    """

    name: str
    settings: str
    parameter: str
    values: Sequence[int]
    code: Callable[[Tensor, int], Coded]
    package: tuple[str, str] | None = None
    encoder: str | None = None
    feature: str | None = None
    suffix: str = ""  # of its files, where browsers show them
    version: Callable[[], str] = field(default=lambda: f"Pillow {PIL.__version__}")

    def missing(self) -> str:
        """What must be installed before this codec can be measured, in words; "" if nothing."""
        if self.package:
            distribution, module = self.package
            try:
                importlib.import_module(module)
            except ImportError:
                return f"pip install {distribution}"
        if self.encoder and not intra_video.has_encoder(self.encoder):
            return f"{self.encoder} in ffmpeg: pip install 'imageio-ffmpeg>=0.8'"
        if self.feature and not features.check(self.feature):
            return f"a Pillow that is built with {self.feature}"
        return ""

    @property
    def description(self) -> str:
        return f"{self.name} by {self.version()}, {self.settings}"


def pillow(kind: str, **options: Any) -> Callable[[Tensor, int], Coded]:
    """A coder by Pillow: `kind` is its name of the format, `options` those of Image.save."""
    return pillow_by(kind, lambda value: {"quality": value, **options})


def pillow_by(kind: str, options: Callable[[int], dict[str, Any]]
              ) -> Callable[[Tensor, int], Coded]:
    """A coder by Pillow; options(value): those of Image.save for a value of the rate parameter."""
    def code(x: Tensor, value: int) -> Coded:
        image = to_pillow(x)
        start = time.perf_counter()
        buffer = io.BytesIO()
        image.save(buffer, kind, **options(value))
        middle = time.perf_counter()
        decoded = data.read_image(io.BytesIO(buffer.getvalue()))
        return buffer.getvalue(), decoded, middle - start, time.perf_counter() - middle

    return code


CODECS: dict[str, Classical] = {
    "jpeg": Classical(
        "JPEG", "default settings: 4:2:0, not optimised", "quality", range(5, 100, 5),
        pillow("JPEG"), suffix=".jpg"),
    "jpeg-444": Classical(
        "JPEG 4:4:4", "without chroma subsampling", "quality", (5, 10, 20, 30, 40, 55, 70, 85, 95),
        pillow("JPEG", subsampling=0), suffix=".jpg"),
    "webp": Classical(
        "WebP", "method 4", "quality", (0, 5, 15, 30, 45, 60, 75, 85, 95),
        pillow("WEBP"), feature="webp", suffix=".webp"),
    "jpeg2000": Classical(
        "JPEG 2000", "irreversible wavelet and colour transform", "compression ratio",
        (320, 200, 130, 85, 55, 36, 24, 16, 10),
        pillow_by("JPEG2000", lambda ratio: {"quality_layers": [ratio], "irreversible": True,
                                             "mct": 1}), feature="jpg_2000"),
    "avif": Classical(
        # the encoder's default tuning, which is to the eye; advanced={"tune": "psnr"} gains PSNR
        "AVIF", "4:4:4, speed 6", "quality", (5, 15, 25, 35, 45, 55, 65, 80),
        pillow("AVIF", subsampling="4:4:4", speed=6), feature="avif", suffix=".avif"),
    "jpegxl": Classical(
        "JPEG XL", "effort 7", "quality", (5, 15, 30, 50, 65, 75, 85, 93),
        pillow("JXL", effort=7), package=("pillow-jxl-plugin", "pillow_jxl")),
    "hevc": Classical(
        "HEVC intra", "x265, 4:4:4, 8 bit, BT.709, preset slow", "QP",
        (47, 42, 37, 33, 29, 25, 21, 17), intra_video.hevc,
        package=("imageio-ffmpeg", "imageio_ffmpeg"), version=intra_video.version),
    "vvc": Classical(
        "VVC intra", "VVenC, 4:2:0 (it has no 4:4:4), 10 bit, BT.709, preset fast", "QP",
        (49, 43, 37, 32, 27, 22), intra_video.vvc, encoder="libvvenc",
        package=("imageio-ffmpeg", "imageio_ffmpeg"), version=intra_video.version),
}


def code_image(codec: str, path: Path, values: Sequence[int] | None = None, ms_ssim: bool = True,
               further: Sequence[str] = ()) -> dict[int, dict[str, Any]]:
    """Code one image with a codec in CODECS; rows of results by the values of its parameter.

    further: keys of `further_metrics` to measure, too.
    """
    classical, x = CODECS[codec], data.read_image(path)
    if need := classical.missing():  # it also registers the plug-in of Pillow
        raise UserError(f"{classical.name} is not installed; it needs: {need}")
    digest, rows = image_digest(x), {}
    for value in values or classical.values:
        file, decoded, encoding, decoding = classical.code(x, value)
        rows[value] = (image_record(path.stem, x, decoded, len(file), ms_ssim, digest)
                       | {"encoding_time": encoding, "decoding_time": decoding}
                       | further_metrics.measure(further, x, decoded))
    return rows


def results_of(codec: str, rows: Sequence[dict[int, dict[str, Any]]], hardware: str
               ) -> dict[str, Any]:
    """Results (see `common.evaluation.results`) of a codec, given those of each image."""
    classical = CODECS[codec]
    meta = {"device": "cpu", "hardware": hardware}
    return merge_points([
        operating_point(classical.name, classical.description, [row[value] for row in rows],
                        {classical.parameter: value, **meta})
        for value in rows[0]])


def measure(codec: str, paths: list[Path], qualities: Sequence[int] | None = None,
            ms_ssim: bool = True) -> dict[str, Any]:
    """Results (see `common.evaluation.results`) of a codec in CODECS at several qualities.

    MS-SSIM takes most of the time; without it, 24 images at 19 qualities take about ten seconds.
    Raises UserError if the codec is not installed, or if there are no images.
    """
    if not paths:
        raise UserError("there are no images to evaluate: name a folder that holds some")
    return results_of(codec, [code_image(codec, path, qualities, ms_ssim) for path in paths],
                      processes.describe_hardware(torch.device("cpu")))


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
