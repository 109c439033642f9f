"""What every train.py has besides its loop: the shared flags."""

from __future__ import annotations

import argparse
from typing import Any

from common import cli, processes


def add_training_flags(parser: argparse.ArgumentParser, lr_schedule: str,
                       without: tuple[str, ...] = ()) -> None:
    """The flags that all our training scripts have beside those of their sources.

    without: those that the source has too, in a form of its own.
    """
    group = parser.add_argument_group("ours, beside the source's flags")

    def add(flag: str, **settings: Any) -> None:
        if flag not in without:
            group.add_argument(flag, **settings)

    add("--config", help="YAML file of flags; the command line wins over it")
    add("--resume", action="store_true", help="continue this run from its newest checkpoint")
    add("--metric", default="mse", choices=["mse", "ms-ssim"], help="distortion")
    add("--optimizer", default="adam", choices=["adam", "muon"], help="muon: fewer steps")
    add("--aux-lr", type=cli.positive_float, default=1e-3, help="learning rate of the quantiles")
    add("--lr-schedule", default=lr_schedule,
        choices=["plateau", "multistep", "cosine", "constant"], help="stepped once an epoch")
    add("--milestones", type=int, nargs="*", default=[40, 90, 140], help="epochs, for multistep")
    add("--clip-max-norm", type=cli.positive_float, default=1.0, help="gradient norm limit")
    add("--patch-size", type=cli.positive_int, default=256, help="side of the square crops, pixels")
    add("--flip", action=argparse.BooleanOptionalAction, default=False,
        help="flip half of the crops left to right")
    add("--steps-per-epoch", type=cli.count, default=0, help="0: one pass over the data")
    add("--test-every", type=cli.positive_int, default=1, help="epochs between validations")
    add("--save-every", type=cli.positive_int, default=1, help="epochs between kept checkpoints")
    add("--seed", type=cli.seed_number, default=0, help="of weights, noise, crops")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--precision", default="auto", choices=["auto", *processes.PRECISIONS],
        help="of training; auto: bf16 where the hardware has it")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile: pays after about five minutes")
    add("--graph", action=argparse.BooleanOptionalAction, default=True,
        help="on one GPU, record a training step as a CUDA graph and replay it")
    add("--threads", type=cli.threads, default=0, help="CPU threads; 0: all")
