"""Code one image file at any rate.

    python codec.py encode IN.png [-o OUT.bin] [--level 3 | --factor 1.5 | --bpp 0.5 | --psnr 34]
    python codec.py decode OUT.bin [-o OUT.png]

--bpp gives the largest file within this rate, --psnr the smallest file with at least this quality;
the factor is searched for each image. The file states its rate and, by its fingerprint, which of
the bundled weights decode it if there is no --checkpoint.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import UserError, cli, data, metrics
from common.coding import bitstream, codec_cli, image_file, zoo

from torch import Tensor

from qvrf.eval import add_pretrained, factor
from qvrf.model import QVRF, SMALLEST_GAIN, ZOO, check_factor, load, with_gain

BUNDLED = "balle"
LEVEL = 2  # the source's
SPREAD = 8  # factor by which the search range exceeds the gains
CLOSE = {"bpp": 1e-3, "psnr": 1e-4}  # relative tolerance of the search
STEPS = 20


def main(argv: list[str] | None = None) -> None:
    parser, encode, decode = codec_cli.flags("Code one image file at any rate.", BUNDLED,
                                             "base codec")
    for command in (encode, decode):
        add_pretrained(command)
    add = encode.add_mutually_exclusive_group().add_argument
    add("--level", type=int, help=f"discrete rate, 0 is the lowest; {LEVEL} if no rate is given")
    add("--factor", type=factor,
        help="regulator, e.g. 1.5 or 1/2.5; a larger one gives better quality and a larger file")
    add("--bpp", type=cli.positive_float, help="target rate of the whole file in bits per pixel")
    add("--psnr", type=cli.positive_float, help="target PSNR of the decoded image in dB")
    args = parser.parse_args(argv)
    zoo.use(args, ZOO[args.model], QVRF, with_gain)
    weights = Path(__file__).parent / "weights"
    codec_cli.run(args, QVRF, load, weights, partial(encode_at, args=args))


def encode_at(model: QVRF, x: Tensor, args: argparse.Namespace) -> tuple[bytes, str]:
    """Encode x (3, H, W) in [0, 1]; return the file and a text about its rate."""
    if args.bpp is None and args.psnr is None:
        rate = ({"factor": check_factor(args.factor)} if args.factor is not None
                else {"s": default_level(model) if args.level is None else args.level})
        return image_file.encode_image(model, x, **rate), ", " + describe(model, rate)
    kind, target = ("bpp", args.bpp) if args.psnr is None else ("psnr", args.psnr)
    file, value, reached = search(model, x, kind, target)
    return file, f", {describe(model, {'factor': value})}, {reached}"


def default_level(model: QVRF) -> int:
    return 0 if model.provenance.config.get("lmbda") else LEVEL  # 0: the one of a fixed-rate base


def describe(model: QVRF, rate: dict[str, float]) -> str:
    name = f"level {rate['s']}, " if "s" in rate else ""
    return f"{name}factor {model.gain(**rate).item():.5g}"


def search(model: QVRF, x: Tensor, kind: str, target: float) -> tuple[bytes, float, str]:
    """Find the file of x (3, H, W) closest to `target`, in bpp from below or in PSNR from above.

    Returns the file, its factor and a text with the result. The image is analysed once. As both
    measures increase with the factor, it is found by bisection of its logarithm.
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
    """The factor in [low, high] at which `measure` reaches `target`, on the side that meets it."""
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
