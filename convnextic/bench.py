"""Measure the speed with 128, 192 channels: part of `make bench`.

    python -m common.evaluation.bench convnextic

CompressAI has no such codec, so a training step is compared with the same step with PyTorch's
defaults (float32, contiguous tensors, its gradient of depthwise weights). For coding, the share of
time that the transforms take is printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from common.evaluation import bench

import torch
from torch import nn

from convnextic.blocks import Depthwise
from convnextic.model import ConvNeXTIC, build

LMBDA = 0.013


def run(rounds: int) -> None:
    for variant in ("v2_stride2", "v3_scctx"):
        coding(variant, rounds)
    training("v2_stride2", rounds)


# -------------------------------------------------------------------------------------- coding
def coding(variant: str, rounds: int) -> None:
    """Print the time of compress and decompress of 512x768, and the share of g_a, h_a, g_s."""
    model = lively(variant)
    x = bench.photograph()
    file = model.compress(x)
    decode = partial(model.decompress, file["strings"], file["shape"])
    decode()
    found = []
    for _ in range(rounds):
        with stopwatch(model) as spent:
            times = bench.seconds(partial(model.compress, x)), bench.seconds(decode)
        found.append((*times, sum(spent) / sum(times)))
    encoding, decoding, share = (statistics.median(c) for c in zip(*found, strict=True))
    size = sum(len(s) for strings in file["strings"] for s in strings)
    print(f"convnextic {variant}: 512x768 at {8 * size / x[0, 0].numel():.2f} bpp: compress "
          f"{encoding:.2f} s, decompress {decoding:.2f} s; transforms {100 * share:.0f} %",
          flush=True)


@contextmanager
def stopwatch(model: ConvNeXTIC) -> Iterator[list[float]]:
    """The seconds of each call of g_a, h_a and g_s."""
    spent: list[float] = []

    def watched(call: bench.Step) -> bench.Step:
        def timed(*args: object) -> object:
            start = time.perf_counter()
            result = call(*args)
            spent.append(time.perf_counter() - start)
            return result
        return timed

    places = [(model, "analyse"), (model.h_a, "forward"), (model, "synthesize")]
    originals = [getattr(*place) for place in places]
    for place, call in zip(places, originals, strict=True):
        setattr(*place, watched(call))
    yield spent
    for place, call in zip(places, originals, strict=True):
        setattr(*place, call)


@torch.no_grad()
def lively(variant: str) -> ConvNeXTIC:
    """A model with random weights whose latents take about one bit per pixel."""
    torch.manual_seed(0)
    model = build(variant).to(memory_format=torch.channels_last)
    x = bench.photograph()[..., :256, :256]
    model.g_a[3].down[-1].weight *= 0.6 / model.eval().analyse(x).std()
    context = model.context_model
    networks = [context.parameters_network] if model.context == "mcm" else (
        context.parameters_networks)
    for network, channels in zip(networks, context.sizes, strict=True):
        network[-1].bias[:channels] = 0.6  # the scales
    model.update(force=True)
    return model


# ------------------------------------------------------------------------------------- training
def training(variant: str, rounds: int) -> None:
    """Time a step on 8 crops of 256x256: ours in bf16, channels last, and PyTorch's defaults."""
    x = bench.tiles()
    torch.manual_seed(0)
    ours = build(variant).to(memory_format=torch.channels_last)
    theirs = build(variant)
    for module in theirs.modules():
        if isinstance(module, Depthwise):
            module.__class__ = nn.Conv2d
    bench.compare(f"convnextic {variant}: training step, 8x256x256, bf16",
                  bench.descent(ours, ours, x.contiguous(memory_format=torch.channels_last), LMBDA,
                                "auto"),
                  bench.descent(theirs, theirs, x.contiguous(), LMBDA, "fp32"), rounds)
