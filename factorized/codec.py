"""Code one image file.

    python codec.py encode IN.png [-o OUT.bin] [--checkpoint P]
    python codec.py decode OUT.bin [-o OUT.png] [--checkpoint P]

Without --checkpoint, the bundled small weights: encoding takes --weights, decoding recognises them
by the fingerprint in the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import bitstream, data, evaluate, runs

from factorized.model import TAG, load

WEIGHTS = Path(__file__).parent / "weights"


def flags() -> argparse.ArgumentParser:
    parser = runs.Parser(description="Code one image file.")
    commands = parser.add_subparsers(dest="command", required=True)
    encode = commands.add_parser("encode", help="image -> .bin")
    encode.add_argument("input", type=Path, help="any image that Pillow reads")
    encode.add_argument("--weights", default="0.013", help="lmbda of the bundled small weights")
    decode = commands.add_parser("decode", help=".bin -> image")
    decode.add_argument("input", type=Path, help="a file made by encode")
    for command, suffix in ((encode, ".bin"), (decode, ".png")):
        command.add_argument("-o", "--output", type=Path, help=f"default: INPUT with {suffix}")
        command.add_argument("--checkpoint", type=Path, help="weights other than the bundled ones")
        command.add_argument("--device", default="auto", help="auto, cpu or cuda")
        command.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    device = runs.start(args.device, threads=args.threads)
    if args.command == "encode":
        model = load(args.checkpoint or WEIGHTS / f"small-{args.weights}.pth", device)
        image = data.read_image(args.input)
        height, width = image.shape[-2:]
        file = evaluate.encode_image(model, data.to_float(image.to(device)), TAG)
        output = args.output or args.input.with_suffix(".bin")
        runs.write_atomic(output, file)
        print(f"{output}: {len(file)} bytes, {8 * len(file) / (height * width):.4f} bpp")
    else:
        file = bitstream.read(args.input)
        checkpoints = [args.checkpoint] if args.checkpoint else sorted(WEIGHTS.glob("*.pth"))
        model = evaluate.model_of(file, TAG, checkpoints, load, device)
        output = args.output or args.input.with_suffix(".png")
        data.write_image(evaluate.decode_image(model, file, TAG), output)
        print(f"{output}: decoded from {args.input}")


if __name__ == "__main__":
    runs.cli(main)
