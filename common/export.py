"""Make a small weights file for coding from a training checkpoint.

    python -m common.export hyperprior hyperprior/ckpts/small/67/epoch_15.pth \\
        -o hyperprior/weights/small-0.0067.pth --steps 28000

Kernels are kept in 8 bits, with CDF tables and fixed-point exponents; no optimizer state.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from common import UserError, runs

import torch

ROOT = Path(__file__).parents[1]


def main(argv: list[str] | None = None) -> None:
    parser = runs.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("paper", choices=sorted(p.parent.name for p in ROOT.glob("*/model.py")))
    parser.add_argument("checkpoint", type=Path, help="epoch_<n>.pth of train.py")
    parser.add_argument("-o", "--output", type=Path, required=True, help="weights file to write")
    parser.add_argument("--steps", type=runs.count,
                        help="trained in all, where runs started from others; none: the last run's")
    args = parser.parse_args(argv)
    state = runs.load_checkpoint(args.checkpoint)
    if "config" not in state:
        raise UserError(f"{args.checkpoint}: not a checkpoint of train.py, it has no config")
    model = importlib.import_module(f"{args.paper}.model").load(args.checkpoint)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "mask"):  # what no forward uses takes no room
                module.weight.mul_(module.mask)
    model.update(force=True, update_quantiles=True)
    config = {key: value for key, value in state["config"].items()
              if not str(value).startswith("/") and key not in ("dataset", "test_dataset")}
    step = args.steps if args.steps is not None else state["step"]
    runs.export(args.output, model, config=config, step=step,
                hardware=runs.describe(torch.device("cpu")))
    print(f"{args.output}: {args.output.stat().st_size:,} bytes, {step:,} steps")


if __name__ == "__main__":
    runs.cli(main)
