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

from joint_ar.model import ZOO, JointAutoregressive, load


def main(argv: list[str] | None = None) -> None:
    codec_cli.main(argv, JointAutoregressive, load, Path(__file__).parent / "weights", ZOO)


if __name__ == "__main__":
    cli.run(main)
