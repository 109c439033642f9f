"""Code one image file.

    python codec.py encode IN.png [-o OUT.bin] [--checkpoint P]
    python codec.py decode OUT.bin [-o OUT.png] [--checkpoint P]

Without --checkpoint, the bundled small weights are used: encoding takes those of --weights, and
decoding finds them by the fingerprint in the file.
"""

from __future__ import annotations

from pathlib import Path

from common import cli
from common.coding import codec_cli

from tbtc.model import SliceCoder, load

BUNDLED = "swint-charm-"


def main(argv: list[str] | None = None) -> None:
    parser, _, _ = codec_cli.flags("Code one image file.", BUNDLED, "model and lmbda")
    codec_cli.run(parser.parse_args(argv), SliceCoder, load, Path(__file__).parent / "weights")


if __name__ == "__main__":
    cli.run(main)
