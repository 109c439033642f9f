"""Code one image file at any rate.

    python codec.py encode IN.png [-o OUT.bin] [--level 3 | --factor 1.5 | --bpp 0.5 | --psnr 34]
    python codec.py decode OUT.bin [-o OUT.png]

--bpp gives the largest file that is not larger, --psnr the smallest that is not worse: the factor
is searched for this image. The file tells its rate, and with --checkpoint P left out, which of the
bundled weights decode it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import UserError, cli, data, metrics
from common.coding import bitstream, codec_cli, image_file

from torch import Tensor

from qvrf.eval import factor
from qvrf.model import QVRF, SMALLEST_GAIN, check_factor, load

LEVEL = 2  # the source's
SPREAD = 8  # a search goes so far beyond the first and the last gain
CLOSE = {"bpp": 1e-3, "psnr": 1e-4}  # of the target: good enough to stop
STEPS = 20


def main(argv: list[str] | None = None) -> None:
    parser, encode, _ = codec_cli.flags("Code one image file at any rate.", "balle", "base codec")
    add = encode.add_mutually_exclusive_group().add_argument
    add("--level", type=int, help=f"discrete rate, 0 the lowest; {LEVEL} if none is given")
    add("--factor", type=factor, help="regulator, as 1.5 or 1/2.5: larger is better and costs more")
    add("--bpp", type=cli.positive_float, help="bits per pixel of the whole file to reach")
    add("--psnr", type=cli.positive_float, help="PSNR of the decoded image to reach, dB")
    args = parser.parse_args(argv)
    weights = Path(__file__).parent / "weights"
    codec_cli.run(args, QVRF, load, weights, partial(encode_at, args=args))


def encode_at(model: QVRF, x: Tensor, args: argparse.Namespace) -> tuple[bytes, str]:
    """x (3, H, W) in [0, 1] -> the file, and what to print of its rate."""
    if args.bpp is None and args.psnr is None:
        rate = ({"factor": check_factor(args.factor)} if args.factor is not None
                else {"s": LEVEL if args.level is None else args.level})
        return image_file.encode_image(model, x, **rate), ", " + describe(model, rate)
    kind, target = ("bpp", args.bpp) if args.psnr is None else ("psnr", args.psnr)
    file, value, reached = search(model, x, kind, target)
    return file, f", {describe(model, {'factor': value})}, {reached}"


def describe(model: QVRF, rate: dict[str, float]) -> str:
    name = f"level {rate['s']}, " if "s" in rate else ""
    return f"{name}factor {model.gain(**rate).item():.5g}"


def search(model: QVRF, x: Tensor, kind: str, target: float) -> tuple[bytes, float, str]:
    """The file of x (3, H, W) that comes closest to `target` bpp from below or PSNR from above.

    Returns the file, its factor and a text with what was reached. The image is analysed once. Both
    measures rise with the factor, so it is found by halving intervals of its logarithm.
    """
    size = x.shape[-2:]
    latents = model.analyse(image_file.pad(x[None], model.downsampling_factor))
    fingerprint = bitstream.fingerprint(model)
    original = data.to_uint8(x).cpu()

    def file(value: float) -> bytes:
        coded = model.encode(latents, factor=value)
        return image_file.pack_images(model, coded, size, fingerprint)[0]

    def bpp(value: float) -> float:
        return metrics.bpp(len(file(value)), *size)

    def psnr(value: float) -> float:
        x_hat = image_file.crop(model.reconstruct(latents, factor=value), size)[0]
        return metrics.psnr(original, data.to_uint8(x_hat).cpu())

    gains = [model.gain(s).item() for s in range(model.levels)]
    low, high = (min(max(gain, SMALLEST_GAIN), 1 / SMALLEST_GAIN)
                 for gain in (min(gains) / SPREAD, max(gains) * SPREAD))
    value = bisect(bpp if kind == "bpp" else psnr, kind, target, low, high)
    result = file(value)
    return result, value, f"PSNR {psnr(value):.2f} dB"


def bisect(measure: Callable[[float], float], kind: str, target: float, low: float, high: float
           ) -> float:
    """The factor in [low, high] where `measure` passes `target`, on the side that keeps to it."""
    reach = measure(low), measure(high)
    if not reach[0] <= target <= reach[1]:
        unit = "bpp" if kind == "bpp" else "dB"
        raise UserError(f"--{kind} {target:g}: this model reaches {reach[0]:.4g} to {reach[1]:.4g} "
                        f"{unit} on this image")
    for _ in range(STEPS):
        middle = check_factor(math.sqrt(low * high))
        value = measure(middle)
        if value <= target:
            low = middle
        if value >= target:
            high = middle
        kept = value <= target if kind == "bpp" else value >= target
        if kept and abs(value / target - 1) <= CLOSE[kind]:
            break
    return low if kind == "bpp" else high


if __name__ == "__main__":
    cli.run(main)
