"""Export a checkpoint of train.py for coding: only the weights, with matching CDF tables.

    python update.py checkpoint_best_loss.pth.tar -n Cheng2020VR

writes ./Cheng2020VR-1a2b3c4d.pth.tar, a bare state dict, whose name contains a hash of its bytes.
(train.py saves tables, too; this is for checkpoints of other programs, and for smaller files.)
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path

from common import UserError, cli
from common.coding.model_file import load_checkpoint, load_error
from common.files import write_atomic

import torch

from qvrf.model import QVRF


def flags() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Export a checkpoint as a bare state dict with CDF tables.")
    parser.add_argument("filepath", type=Path, help="checkpoint or state dict")
    parser.add_argument("-n", "--name",
                        help="name of the exported model; the checkpoint's if not given")
    parser.add_argument("-d", "--dir", type=Path,
                        help="folder to write to; the current one if not given")
    parser.add_argument("--no-update", action="store_true", help="keep the CDF tables as they are")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    if args.name and Path(args.name).name != args.name:
        raise UserError(f"--name {args.name}: give a name, and the folder with --dir")
    weights = load_checkpoint(args.filepath)["model"]
    try:
        model = QVRF.from_state_dict(weights)
        if not args.no_update:
            model.update(force=True)
    except KeyError as e:
        raise UserError(f"{args.filepath}: not the weights of a QVRF: {e} is missing") from None
    except (RuntimeError, ValueError) as e:
        raise UserError(f"{args.filepath}: not the weights of a QVRF: {load_error(e)}") from None
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    stem, dot, suffixes = args.filepath.name.partition(".")
    output = (args.dir or Path()) / f"{args.name or stem}-{digest}{dot}{suffixes}"
    write_atomic(output, buffer.getvalue())
    print(output)


if __name__ == "__main__":
    cli.run(main)
