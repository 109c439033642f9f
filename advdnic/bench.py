"""Measure the speed of the ten experiments at N = 128: part of `make bench`.

    python -m common.evaluation.bench advdnic

It times coding of a 512x768 image, with the part of the entropy model; the wavefronts of
variant3_old against CompressAI's joint model, which decodes position by position; and a training
step in bf16 against float32. Weights are random, scaled so that latents take about half a bit per
pixel.
"""

from __future__ import annotations

import statistics

from common.coding import entropy
from common.evaluation import bench

import torch
from compressai.models import JointAutoregressiveHierarchicalPriors
from torch import nn

from advdnic.model import EXPERIMENTS, Experiment, build

LMBDA = 0.01


def run(rounds: int) -> None:
    coding(rounds)
    waves(rounds)
    training(rounds)


@torch.no_grad()
def lively(experiment: str) -> Experiment:
    """A model with random weights whose latents have a standard deviation of 1.5."""
    torch.manual_seed(0)
    model = build(experiment).to(memory_format=torch.channels_last).eval()
    last = [m for m in model.g_a.modules() if isinstance(m, nn.Conv2d)][-1]
    spread = model.g_a(bench.photograph()[:, :, :256, :256]).std() / 1.5
    last.weight /= spread
    last.bias /= spread
    model.update(force=True)
    return model


def coding(rounds: int) -> None:
    """Print the time of compress, of decompress, and of decompress without g_s."""
    x = bench.photograph()
    for experiment in EXPERIMENTS:
        model = lively(experiment)
        coded = model.compress(x)
        z_hat = entropy.dequantize(model.entropy_bottleneck, coded["z"])
        strings = coded["strings"]
        steps = (lambda m=model: m.compress(x),
                 lambda m=model, s=strings, c=coded: m.decompress(s, c["shape"]),
                 lambda m=model, s=strings, z=z_hat: m._decode(s[0], z))
        times = [[bench.timed(step) for step in steps] for _ in range(rounds)]
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        print(f"advdnic {experiment:14s} compress {medians[0]:6.2f} s, decompress "
              f"{medians[1]:6.2f} s, of it h_s, context, entropy decoding {medians[2]:6.2f} s",
              flush=True)


def waves(rounds: int) -> None:
    ours = lively("variant3_old")
    theirs = JointAutoregressiveHierarchicalPriors(128, 128).eval()
    theirs.update(force=True)
    x = bench.photograph()
    files = ours.compress(x), theirs.compress(x)
    bench.compare("advdnic variant3_old: decompress, and CompressAI's joint model",
                  lambda: ours.decompress(files[0]["strings"], files[0]["shape"]),
                  lambda: theirs.decompress(files[1]["strings"], files[1]["shape"]), rounds)


def training(rounds: int) -> None:
    """Time a training step on 8 crops of 256x256."""
    x = bench.tiles()
    for experiment in ("base", "variant3"):
        torch.manual_seed(0)
        ours, theirs = build(experiment), build(experiment)
        ours = ours.to(memory_format=torch.channels_last)
        bench.compare(f"advdnic {experiment}: training step, 8x256x256, bf16",
                      bench.descent(ours, ours, x.contiguous(memory_format=torch.channels_last),
                                    LMBDA, "auto"),
                      bench.descent(theirs, theirs, x.contiguous(), LMBDA, "fp32"), rounds)
