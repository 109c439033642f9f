"""Code one image file, optionally in patches or in the file format of the source.

    python codec.py encode --model nic -m mse -q 3 -o compressed.bin test.png
    python codec.py decode -o out.png compressed.bin
    python codec.py --command=encode --image test.png -q 3        the source's last revision
    python codec.py encode test.png --checkpoint VR.pt -lb 130 -ph 1088 -pw 1408    lmbda 0.013
    python codec.py encode test.png --format source               the source's header, see README.md

Without --checkpoint, the bundled small weights are used, which have a variable rate: -q 1 to 4 (3
if not given) or -lb 5 to 160. Decoding finds the weights by the fingerprint in the file. The format
of the source has no fingerprint, so decoding needs the same --checkpoint as encoding.
"""

from __future__ import annotations

import argparse
import math
import struct
import sys
from functools import partial
from pathlib import Path

from common import UserError, cli, data, processes
from common.coding import bitstream, codec_cli, image_file
from common.files import read_file

from PIL import Image
from torch import Tensor

from convnextic.model import LMBDAS, ConvNeXTIC, load
from convnextic.patches import PATCH, check_area, clamped, cut, decode_patches
from convnextic.source_format import METRICS, SourceFile, grown, pack_source, unpack_source

WEIGHTS = Path(__file__).parent / "weights"
MODELS = ("cnexTIC", "nic")  # the source's files store the index; only 0 is used
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
        known = "without effect; the file states it" if command is decoder else ""
        command.add_argument("--model", choices=MODELS, default=MODELS[0],
                             help="name of the model")
        command.add_argument("-m", "--metric", choices=METRICS, help=known or
                             "distortion measure that the weights must be trained for")
        command.add_argument("-q", "--quality", type=int, choices=range(1, 9), help=known or
                             "rate of a variable-rate model, without -lb; other weights must be "
                             "trained for it")
        command.add_argument("-c", "--coder", choices=["ans"], default="ans",
                             help="entropy coder")
    decoder.add_argument("--show", action="store_true", help="open the decoded image")
    add = encoder.add_argument
    add("--format", choices=["ours", "source"], default="ours",
        help="file format; source has the source's header, but a payload that only we read")
    add("-lb", "--lamb", type=int, help=f"lmbda * {LMBDA_UNIT}, for a variable-rate model")
    for name, sides in (("-ph", "height"), ("-pw", "width")):
        add(name, type=side, help=f"{sides} of the patches in pixels (the source: "
            f"{PATCH[name == '-pw']}); that of the image if not given or larger")
    args = parser.parse_args(words)
    if args.command == "encode" and args.lmbda is not None:  # of other papers: names weights
        if args.lamb is not None:
            raise UserError("--lmbda, -lb: give one of them")
        args.lamb, args.lmbda = round(args.lmbda * LMBDA_UNIT), None
    if args.command == "encode" and args.metric == "ms-ssim" and not args.checkpoint:
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
    metric, quality = trained_for(model, args.metric, args.quality)
    if model.variable_rate and args.lamb is None:
        args.lamb = round(LMBDAS[quality - 1] * LMBDA_UNIT)
    rate = lmbda_of(model, args.lamb)
    given, factor = (args.ph, args.pw), model.downsampling_factor
    if any(s and s % factor for s in given):
        raise UserError(f"-ph, -pw: this model needs multiples of {factor}")
    patch = None if given == (None, None) else clamped(given, x.shape[1:], factor)
    note = f", lmbda {rate['lmbda']:g}" if rate else ""
    if args.format == "source":
        return pack_source(model, x, rate, args.lamb, patch, quality, metric), note
    if not patch or patch == clamped((None, None), x.shape[1:], factor):
        return image_file.encode_image(model, x, **rate), note
    check_area(x, patch)
    patches, _ = cut(x, patch, "continued")
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


def trained_for(model: ConvNeXTIC, metric: str | None, quality: int | None) -> tuple[str, int]:
    """Metric and quality of the weights, which -m and -q must not contradict."""
    config = model.provenance.config
    trained, lmbda = config.get("metric"), config.get("lmbda")
    if metric and trained and metric != trained:
        raise UserError(f"-m {metric}: these weights were trained for {trained}; name others with "
                        "--checkpoint")
    own = next((q for q, value in enumerate(LMBDAS, 1)
                if lmbda and math.isclose(value, lmbda, rel_tol=1e-3)), None)
    if quality and lmbda and not model.variable_rate and quality != own:
        raise UserError(f"-q {quality}: means lmbda {LMBDAS[quality - 1]:g}, and these weights "
                        f"were trained with {lmbda:g}{f' (-q {own})' if own else ''}; name others "
                        "with --checkpoint, or leave -q out")
    own = QUALITY if model.variable_rate else own
    return metric or trained or METRICS[0], quality or own or QUALITY


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
        quality = next((q for q, v in enumerate(LMBDAS, 1) if lamb <= round(v * LMBDA_UNIT)), 8)
        raise UserError(f"lmbda {lamb / LMBDA_UNIT:g}: these weights are trained for {low} to "
                        f"{high} (-lb), 1/{LMBDA_UNIT} each; train others with `train.py --variant "
                        f"v5_vr --quality_level {quality}` and name them with --checkpoint")
    return {"lmbda": struct.unpack("<f", struct.pack("<f", lamb / LMBDA_UNIT))[0]}


def decode_source(args: argparse.Namespace) -> None:
    """Decode a file in the source's format, which identifies neither weights nor variant."""
    device = processes.start(args.device, threads=args.threads)
    file = read_file(args.input)
    if not file:
        raise UserError(f"{args.input}: is empty: encode the image again")
    path = args.checkpoint or WEIGHTS / f"small-{BUNDLED}.pth"
    model = load(path, device)
    output = args.output or args.input.with_suffix(codec_cli.DECODED)
    codec_cli.refuse_same(args.input, output)
    try:
        parts, x_hat = decode_source_file(model, file)
    except UserError as e:
        raise UserError(f"{args.input}, with {path}: {e}") from None
    data.write_image(x_hat, output)
    print(f"{output}: decoded from {args.input}, quality {parts.quality}, {parts.metric}")


def decode_source_file(model: ConvNeXTIC, file: bytes) -> tuple[SourceFile, Tensor]:
    """The header of a file in the source's format, and its image x_hat (3, H, W)."""
    parts = unpack_source(file, model.variable_rate)
    area = parts.patch or grown(parts.size)
    if tuple(s // model.downsampling_factor for s in area) != parts.shape:
        raise UserError(f"z of {parts.shape[0]}x{parts.shape[1]} does not fit an image of "
                        f"{parts.size[1]}x{parts.size[0]} and these weights")
    rate = lmbda_of(model, parts.lamb)
    return parts, decode_patches(model, parts.strings, parts.size, area, rate, 1)


if __name__ == "__main__":
    cli.run(main)
