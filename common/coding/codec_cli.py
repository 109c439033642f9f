"""The command line of every paper's codec.py: one image file to one .bin and back.

Papers with further options (a rate, another file format) add flags to the two commands.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import UserError, cli, data, processes
from common.coding import codecs, image_file, precision, zoo
from common.coding.contract import Codec
from common.files import read_file, write_atomic

from torch import Tensor

DECODED = ".decoded.png"  # not .png, as the original may be in the same folder


def flags(description: str, weights: str = "", which: str = "lmbda"
          ) -> tuple[cli.Parser, argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the parser, and those of its commands `encode` and `decode`.

    weights: beginning of the names of the bundled weights that encode by default; the last of these
    has the highest rate. which: meaning of the names, for --help.
    """
    parser = cli.Parser(description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="code an image as a .bin file")
    encode.add_argument("input", type=Path, help="image file in any format that Pillow reads")
    encode.add_argument("--weights", help=f"{which} of the bundled small weights; those of the "
                        "highest rate if not given")
    encode.add_argument("--lmbda", type=cli.positive_float,
                        help="lmbda that the bundled weights were trained with")
    encode.set_defaults(default_weights=weights)
    decode = commands.add_parser("decode", help="decode a .bin file to an image")
    decode.add_argument("input", type=Path, help=".bin file written by encode")
    for command, suffix in ((encode, ".bin"), (decode, DECODED)):
        command.add_argument("-o", "--output", type=Path,
                             help=f"file to write; INPUT with {suffix} if not given")
        command.add_argument("--checkpoint", type=Path,
                             help="weights file; the bundled weights if not given")
        command.add_argument("--device", default="auto",
                             help="device that runs the codec: auto, cpu or cuda")
        command.add_argument("--threads", type=cli.threads, default=0,
                             help="number of CPU threads; 0 uses all")
        precision.add_flag(command)
    return parser, encode, decode


def main(argv: list[str] | None, kind: type[Codec], load: Callable[..., Codec], weights: Path,
         architecture: str = "") -> None:
    """The codec.py of a paper without further options; kind, load and weights: as in `run`.

    architecture: the name of the paper's model in CompressAI's zoo, for --pretrained.
    """
    parser, *commands = flags("Code one image file.")
    for command in commands if architecture else []:
        zoo.add_flag(command)
    args = parser.parse_args(argv)
    if architecture:
        zoo.use(args, architecture, kind)
    run(args, kind, load, weights)


def run(args: argparse.Namespace, kind: type[Codec], load: Callable[..., Codec], weights: Path,
        encode: Callable[[Any, Tensor], tuple[bytes, str]] | None = None,
        decode: Callable[[Any, bytes], Tensor] | None = None) -> None:
    """Execute the command line of a paper's codec.py.

    kind, load: the class of the paper's model and its function `load`; weights: the folder of the
    bundled weights. Without --checkpoint, encoding uses the bundled weights that --weights names,
    and decoding those whose fingerprint is in the file. encode(model, x) replaces `encode_image`
    and returns the file and a note to print; decode(model, file) replaces `decode_image`.
    """
    device = processes.start(args.device, threads=args.threads)
    if args.command == "decode":
        file = read_file(args.input)
        checkpoints = ([args.checkpoint] if args.checkpoint
                       else codecs.bundled(weights).values())
        model = image_file.find_model(file, kind, checkpoints, load, device)
        output = args.output or default_output(args.input, DECODED)
        refuse_same(args.input, output)
        precision.use_precision(model, args.precision)
        x_hat = decode(model, file) if decode else image_file.decode_image(model, file)
        data.write_image(x_hat, output)
        print(f"{output}: decoded from {args.input}")
        return
    given = [f"--{name}" for name in ("weights", "lmbda", "checkpoint")
             if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"{', '.join(given)}: give one of them")
    checkpoint = args.checkpoint or codecs.choose(weights, args.weights, args.lmbda,
                                                  args.default_weights)
    output = args.output or default_output(args.input, ".bin")
    refuse_same(args.input, output)
    image = data.read_image(args.input)
    height, width = image.shape[-2:]
    model, x = load(checkpoint, device), data.to_float(image.to(device))
    precision.use_precision(model, args.precision)
    file, note = encode(model, x) if encode else (image_file.encode_image(model, x), "")
    write_atomic(output, file)
    print(f"{output}: {len(file)} bytes, {8 * len(file) / (height * width):.4f} bpp{note}")


def default_output(source: Path, suffix: str) -> Path:
    """The file beside `source` with another suffix; UserError if `source` is `.` or `/`."""
    if not source.name:
        raise UserError(f"cannot read {source}: it is a folder")
    return source.with_suffix(suffix)


def refuse_same(source: Path, output: Path) -> None:
    if source.exists() and output.exists() and source.samefile(output):
        raise UserError(f"{output}: would replace the input; name another file with -o")
