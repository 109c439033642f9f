"""Small networks and flags that the tests of QVRF share."""

from pathlib import Path

import torch
from compressai.models import (
    Cheng2020Attention,
    JointAutoregressiveHierarchicalPriors,
    ScaleHyperprior,
)

from qvrf.model import build

ROOT = Path(__file__).parents[3]
BASES = ("balle", "minnen", "cheng")
FIXED = {"balle": ScaleHyperprior, "minnen": JointAutoregressiveHierarchicalPriors,
         "cheng": Cheng2020Attention}
TINY = ("--model minnen --N 4 --M 6 --patch-size 64 64 --batch-size 2 --steps-per-epoch 4 -e 1 "
        "-n 0 --precision fp32 --seed 3 -lr 0.001").split()


def tiny(base, levels=8, seed=0):
    """A small network whose latents and scales are not all zero, tables ready."""
    torch.manual_seed(seed)
    model = build(base, levels, 8, 12)
    with torch.no_grad():
        last = model.g_a[-1].conv_b[-1] if base == "cheng" else model.g_a[-1]
        last.weight.mul_(60 if base != "cheng" else 1)
        if base == "cheng":
            model.g_a[-2].weight.mul_(60)
        model.h_a[-1].weight.mul_(40)
        if base == "balle":
            model.h_s[4].bias.uniform_(0, 3)
        else:
            model.entropy_parameters[4].bias[: model.M].uniform_(0.3, 3)
            model.entropy_parameters[4].weight.mul_(4)
    model.update(force=True)
    return model.eval()


def read(path):
    return torch.load(path, weights_only=True)
