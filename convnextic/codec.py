"""Code one image file, optionally in patches or in the file format of the source.

    python codec.py encode --model nic -m mse -q 3 -o compressed.bin test.png
    python codec.py decode -o out.png compressed.bin
    python codec.py --command=encode --image test.png -q 3        the source's last revision
    python codec.py encode test.png --checkpoint VR.pt -lb 130 -ph 1088 -pw 1408    lmbda 0.013
    python codec.py encode test.png --format source               the source's header

Without --checkpoint, the bundled small weights are used, which have a variable rate: -q 1 to 4 (3
if not given) or -lb 5 to 160. Decoding finds the weights by the fingerprint in the file. The format
of the source has no fingerprint, so decoding needs the same --checkpoint as encoding.
"""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common import UserError, cli, data, processes
from common.coding import bitstream, codec_cli, image_file
from common.files import read_file

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from convnextic.model import LMBDAS, ConvNeXTIC, load

WEIGHTS = Path(__file__).parent / "weights"
MODELS = ("cnexTIC", "nic")  # the source's files store the index; only 0 is used
METRICS = ("mse", "ms-ssim")
PATCH = (1088, 1408)  # height, width in the source
MULTIPLE = 256  # to which the source pads
LMBDA_UNIT = 10_000  # -lb 130 is lmbda 0.013
QUALITY = 3
BUNDLED = "vr"


def main(argv: list[str] | None = None) -> None:
    args = arguments(sys.argv[1:] if argv is None else argv)
    if args.command == "decode" and not read_file(args.input).startswith(bitstream.MAGIC):
        decode_source(args)
    else:
        codec_cli.run(args, ConvNeXTIC, load, WEIGHTS, partial(encode, args=args), decode)
    if args.command == "decode" and args.show:
        Image.open(args.output or args.input.with_suffix(codec_cli.DECODED)).show()


def arguments(argv: list[str]) -> argparse.Namespace:
    """Parse both forms of the source's command line: `encode X`, `--command=encode --image X`."""
    words = [word for part in argv for word in (
        part.split("=", 1) if part.startswith(("--command=", "--image=", "--input=")) else [part])]
    words = [w for w in words if w not in ("--command", "--image", "--input")]
    for i, word in enumerate(words):  # the command may follow flags
        if word in ("encode", "decode"):
            words.insert(0, words.pop(i))
            break
    parser, encoder, decoder = codec_cli.flags("Code one image file.", BUNDLED, "kind")
    for command in (encoder, decoder):
        command.add_argument("--model", choices=MODELS, default=MODELS[0],
                             help="name of the model")
        command.add_argument("-m", "--metric", choices=METRICS, default="mse",
                             help="distortion measure that the weights were trained for")
        command.add_argument("-q", "--quality", type=int, choices=range(1, 9),
                             help="quality in the source's header; without -lb, also the rate of a "
                             "variable-rate model")
        command.add_argument("-c", "--coder", choices=["ans"], default="ans",
                             help="entropy coder")
    decoder.add_argument("--show", action="store_true", help="open the decoded image")
    add = encoder.add_argument
    add("--format", choices=["ours", "source"], default="ours", help="file format")
    add("-lb", "--lamb", type=int, help=f"lmbda * {LMBDA_UNIT}, for a variable-rate model")
    add("-ph", type=side, help=f"height of the patches in pixels (the source: {PATCH[0]})")
    add("-pw", type=side, help=f"width of the patches in pixels (the source: {PATCH[1]})")
    args = parser.parse_args(words)
    if args.metric != "mse" and not args.checkpoint:
        raise UserError(f"-m {args.metric}: the bundled weights are for mse; give --checkpoint")
    return args


def side(text: str) -> int:
    value = cli.positive_int(text)
    if value % 64 or value > bitstream.MAX_SIDE:
        raise argparse.ArgumentTypeError(
            f"{text} is not a multiple of 64 up to {bitstream.MAX_SIDE}")
    return value


# ------------------------------------------------------------------------------------ our format
def encode(model: ConvNeXTIC, x: Tensor, args: argparse.Namespace) -> tuple[bytes, str]:
    """Encode x (3, H, W) in [0, 1]; return the file and a text about it."""
    quality = args.quality or QUALITY
    if model.variable_rate and args.lamb is None:
        args.lamb = round(LMBDAS[quality - 1] * LMBDA_UNIT)
    rate = lmbda_of(model, args.lamb)
    patch = None if args.ph is args.pw is None else (args.ph or PATCH[0], args.pw or PATCH[1])
    if patch and any(s % model.downsampling_factor for s in patch):
        raise UserError(f"-ph {patch[0]} -pw {patch[1]}: this model needs multiples of "
                        f"{model.downsampling_factor}")
    note = f", lmbda {rate['lmbda']:g}" if rate else ""
    if args.format == "source":
        return pack_source(model, x, rate, args.lamb, patch, quality, args.metric), note
    if not patch:
        return image_file.encode_image(model, x, **rate), note
    check_area(x, patch)
    patches, _ = cut(x, patch, "replicate")
    coded = [model.compress(p[None], **rate) for p in patches]
    sections = [string for c in coded for string, in c["strings"]]
    parameters = struct.pack("<2I", *patch) + coded[0].get("parameters", b"")
    fingerprint = bitstream.fingerprint(model)
    return bitstream.pack(model.tag, fingerprint, *x.shape[1:], sections, parameters), (
        f"{note}, {len(patches)} patches")


def decode(model: ConvNeXTIC, file: bytes) -> Tensor:
    """Decode a file in our format, with or without patches, to x_hat (3, H, W)."""
    parts = bitstream.unpack(file, model.tag)
    if len(parts.parameters) < 8:
        return image_file.decode_image(model, file)
    patch = struct.unpack("<2I", parts.parameters[:8])
    rate = model.read_parameters(parts.parameters[8:])
    return decode_patches(model, parts.sections, (parts.height, parts.width), patch, rate, 0)


def lmbda_of(model: ConvNeXTIC, lamb: int | None) -> dict[str, float]:
    """The rate that -lb requests, as arguments of `compress`."""
    if not model.variable_rate:
        if lamb is not None:
            raise UserError(f"-lb {lamb}: this model has one rate; leave -lb out, or give a "
                            "--checkpoint of v5_vr")
        return {}
    config = model.provenance.config
    low, high = (round(config.get(key, lamb / LMBDA_UNIT) * LMBDA_UNIT)
                 for key in ("lambda_min", "lambda_max"))
    if not low <= lamb <= high:
        raise UserError(f"lmbda {lamb / LMBDA_UNIT:g}: these weights are trained for {low} to "
                        f"{high} (-lb), 1/{LMBDA_UNIT} each")
    return {"lmbda": struct.unpack("<f", struct.pack("<f", lamb / LMBDA_UNIT))[0]}


# --------------------------------------------------------------------------------------- patches
def cut(x: Tensor, patch: tuple[int, int], mode: str) -> tuple[list[Tensor], tuple[int, int]]:
    """Patches of x (3, H, W) in raster order, and the position of x in their grid.

    mode: padding of the grid: "replicate", with x in the upper left corner; or "zeros", with x in
    the centre, as in the source.
    """
    height, width = x.shape[1:]
    missing = [-height % patch[0], -width % patch[1]]
    top, left = (m // 2 if mode == "zeros" else 0 for m in missing)
    pads = (left, missing[1] - left, top, missing[0] - top)
    x = (F.pad(x, pads) if mode == "zeros" else F.pad(x[None], pads, mode="replicate")[0])
    return [x[:, i : i + patch[0], j : j + patch[1]]
            for i, j in corners(x.shape[1:], patch)], (top, left)


def check_area(x: Tensor, patch: tuple[int, int]) -> None:
    """Raise UserError if x, padded to whole patches, would be too large to be decoded."""
    rows, columns = (-(-s // p) for s, p in zip(x.shape[1:], patch, strict=True))
    if rows * patch[0] * columns * patch[1] > bitstream.MAX_PIXELS:
        raise UserError(f"{rows * columns} patches of {patch[0]}x{patch[1]} are more than "
                        f"{bitstream.MAX_PIXELS} pixels: give smaller -ph and -pw")


def corners(size: tuple[int, int], patch: tuple[int, int]) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(0, size[0], patch[0]) for j in range(0, size[1], patch[1]))


def decode_patches(model: ConvNeXTIC, strings: list[bytes], size: tuple[int, int],
                   patch: tuple[int, int], rate: dict[str, float], centred: int) -> Tensor:
    """x_hat (3, H, W) from the strings of all patches; centred: 1 in the source's format."""
    factor = model.downsampling_factor
    if not all(s > 0 and s % factor == 0 for s in patch):
        raise UserError(f"the file states patches of {patch[0]}x{patch[1]}: encode the image again")
    rows, columns = (-(-s // p) for s, p in zip(size, patch, strict=True))
    full = rows * patch[0], columns * patch[1]
    if full[0] * full[1] > bitstream.MAX_PIXELS:
        raise UserError(f"the file states {rows * columns} patches of {patch[0]}x{patch[1]}, more "
                        f"than the {bitstream.MAX_PIXELS} pixels that can be decoded: encode the "
                        "image again")
    count = strings_of(model)
    if len(strings) != count * rows * columns:
        raise UserError(f"the file holds {len(strings)} strings, {count * rows * columns} are "
                        "needed: it is damaged or of another model")
    grid = None  # allocated after a first patch: damaged files can state any size
    shape = tuple(s // factor for s in patch)
    for k, (i, j) in enumerate(corners(full, patch)):
        mine = [[s] for s in strings[k * count : (k + 1) * count]]
        try:
            x_hat = model.decompress(mine, shape, **rate)["x_hat"]
        except ValueError as e:
            raise UserError(f"the file's content does not decode ({e}): encode the image "
                            "again") from None
        grid = torch.zeros(3, *full) if grid is None else grid
        grid[:, i : i + patch[0], j : j + patch[1]] = x_hat[0].cpu()
    top, left = ((g - s) // 2 * centred for g, s in zip(full, size, strict=True))
    return grid[:, top : top + size[0], left : left + size[1]]


def grown(size: tuple[int, int]) -> tuple[int, int]:
    """The padded size in the source: multiples of 256, which suits every variant."""
    return tuple(-(-s // MULTIPLE) * MULTIPLE for s in size)


def strings_of(model: ConvNeXTIC) -> int:
    return 5 if model.context == "mcm" else 2


# ----------------------------------------------------------------------------- the source's format
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
    """Big-endian: model, metric and quality, sizes, counts, then each string with its length."""
    variable = model.variable_rate
    if patch and not variable:
        raise UserError("-ph, -pw: the source's fixed-rate format has no patches; leave --format "
                        "source out")
    area = (patch or PATCH) if variable else grown(x.shape[1:])
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


def decode_source(args: argparse.Namespace) -> None:
    """Decode a file in the source's format, which identifies neither weights nor variant."""
    device = processes.start(args.device, threads=args.threads)
    file = read_file(args.input)
    if not file:
        raise UserError(f"{args.input}: is empty: encode the image again")
    path = args.checkpoint or WEIGHTS / f"small-{BUNDLED}.pth"
    model = load(path, device)
    parts = unpack_source(file, model.variable_rate)
    area = parts.patch or grown(parts.size)
    if tuple(s // model.downsampling_factor for s in area) != parts.shape:
        raise UserError(f"{args.input}: z of {parts.shape[0]}x{parts.shape[1]} does not fit an "
                        f"image of {parts.size[1]}x{parts.size[0]} and {path}")
    output = args.output or args.input.with_suffix(codec_cli.DECODED)
    codec_cli.refuse_same(args.input, output)
    rate = lmbda_of(model, parts.lamb)
    data.write_image(decode_patches(model, parts.strings, parts.size, area, rate, 1), output)
    print(f"{output}: decoded from {args.input}, quality {parts.quality}, {parts.metric}")


if __name__ == "__main__":
    cli.run(main)
