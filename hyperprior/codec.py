"""Code one image file.

    python codec.py encode IN.png [-o OUT.bin] [--checkpoint P]
    python codec.py decode OUT.bin [-o OUT.png] [--checkpoint P]

Without --checkpoint, the bundled small weights are used: encoding takes those of --weights, and
decoding finds them by the fingerprint in the file.
"""

from __future__ import annotations

from pathlib import Path

from common import cli
from common.coding import codec_cli, zoo

from hyperprior.model import ZOO, Hyperprior, load


def main(argv: list[str] | None = None) -> None:
    parser, *commands = codec_cli.flags("Code one image file.")
    for command in commands:
        zoo.add_flag(command)
    args = parser.parse_args(argv)
    zoo.use(args, ZOO, Hyperprior)
    codec_cli.run(args, Hyperprior, load, Path(__file__).parent / "weights")


if __name__ == "__main__":
    cli.run(main)
