"""Speed beside CompressAI: the same weights, symbols and images, printed as ratios.

    python -m common.bench hyperprior factorized        or  make bench

Times on a shared machine drift, so the two sides take turns and the median of the ratios is what
counts. CompressAI runs as it comes: float32, contiguous tensors, its own coder calls. Coding and
training are also timed in processes of their own, because the allocator setting of `common` works
on a whole process and CompressAI's users do not have it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import data, entropy, runs
from common.loss import RateDistortionLoss

import torch
from compressai.layers import GDN
from torch import nn

ROOT = Path(__file__).parents[1]
Step = Callable[[], object]


@torch.no_grad()
def widen(model: nn.Module) -> nn.Module:
    """A network of twice the width that computes the same: each channel stands twice.

    It turns the bundled half-width weights into a paper-size network with trained statistics; a
    random one codes almost nothing.
    """
    wide = type(model)(2 * model.N, 2 * model.M)
    for narrow, target in zip(model.parameters(), wide.parameters(), strict=True):
        for dim in range(narrow.dim()):
            if target.size(dim) == 2 * narrow.size(dim):
                narrow = torch.cat([narrow, narrow], dim)
        target.copy_(narrow)
    for module in wide.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.in_channels != 3:
            module.weight /= 2  # twice as many inputs
        elif isinstance(module, GDN):
            module.gamma /= 2**0.5  # stored as a square root
    wide.update(force=True)
    return wide.eval()


def pair(paper: str) -> tuple[nn.Module, nn.Module]:
    """(ours, CompressAI's) with the same weights, 128/192 channels."""
    module = importlib.import_module(f"{paper}.model")
    ours = widen(module.load(sorted((ROOT / paper / "weights").glob("*.pth"))[-1]))
    baseline = module.BASELINE(ours.N, ours.M).eval()
    baseline.load_state_dict(ours.state_dict())
    return ours.to(memory_format=torch.channels_last), baseline


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(name: str, ours: Step, baseline: Step, rounds: int) -> None:
    """Time both in turns, after one warm-up each, and print medians and the median ratio."""
    ours(), baseline()
    times = [(seconds(baseline), seconds(ours)) for _ in range(rounds)]
    show(name, times)


def show(name: str, times: list[tuple[float, float]]) -> None:
    theirs, mine = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(f"{name:58s} {1e3 * theirs:9.1f} ms {1e3 * mine:9.1f} ms   {ratio:5.2f}x", flush=True)


# -------------------------------------------------------------------------------------- coding
def coding(paper: str, rounds: int) -> None:
    """Entropy coder alone, then compress + decompress, 512x768, in this process."""
    ours, baseline = pair(paper)
    x = data.to_float(data.read_image(data.KODAK / "kodim01.png"))[None]
    calls_ours, calls_theirs = entropy_calls(ours, x), entropy_calls(baseline, x, theirs=True)
    for (name, mine), (_, theirs) in zip(calls_ours, calls_theirs, strict=True):
        compare(f"{paper}: {name}, 512x768", mine, theirs, 3 * rounds)
    compare(f"{paper}: compress + decompress, same process", code(ours, x), code(baseline, x),
            rounds)


@torch.no_grad()
def entropy_calls(model: nn.Module, x: torch.Tensor, theirs: bool = False) -> list:
    """[(name, function)]: entropy encoding and decoding of the model's own symbols for x."""
    y = model.g_a(x)
    bottleneck, latent = model.entropy_bottleneck, y
    jobs = []
    if hasattr(model, "h_a"):
        latent = model.h_a(y.abs())
        z_hat = bottleneck.dequantize(bottleneck.quantize(latent, "symbols", _medians(bottleneck)),
                                      _medians(bottleneck))
        gaussian = model.gaussian_conditional
        indexes = gaussian.build_indexes(model.h_s(z_hat))
        if theirs:
            strings = gaussian.compress(y, indexes)
            jobs.append((lambda: gaussian.compress(y, indexes),
                         lambda: gaussian.decompress(strings, indexes)))
        else:
            tables = entropy.Tables.of(gaussian)
            strings = entropy.encode(y.round(), indexes, tables)
            jobs.append((lambda: entropy.encode(y.round(), indexes, tables),
                         lambda: entropy.decode(strings, indexes, tables)))
    shape = latent.shape[-2:]
    if theirs:
        z_strings = bottleneck.compress(latent)
        jobs.append((lambda: bottleneck.compress(latent),
                     lambda: bottleneck.decompress(z_strings, shape)))
    else:
        z_strings = entropy.encode_bottleneck(bottleneck, latent)
        jobs.append((lambda: entropy.encode_bottleneck(bottleneck, latent),
                     lambda: entropy.decode_bottleneck(bottleneck, z_strings, shape)))
    encoders, decoders = zip(*jobs, strict=True)
    return [("entropy encoding", lambda: [f() for f in encoders]),
            ("entropy decoding", lambda: [f() for f in decoders]),
            ("entropy coding, both ways", lambda: [f() for f in encoders + decoders])]


def _medians(bottleneck: nn.Module) -> torch.Tensor:
    return bottleneck.quantiles[:, :, 1:2].detach().reshape(1, -1, 1, 1)


def code(model: nn.Module, x: torch.Tensor) -> Step:
    def run() -> None:
        with torch.no_grad():
            result = model.compress(x)
            model.decompress(result["strings"], result["shape"])
    return run


# ------------------------------------------------------------------------ processes of their own
def worker(job: str, paper: str, side: str) -> None:
    """Run one side of one job in this process and print its median seconds."""
    if job == "codec":
        model = pair(paper)[side == "baseline"]
        x = data.to_float(data.read_image(data.KODAK / "kodim01.png"))[None]
        step, rounds = code(model, x), 5
    else:
        step, rounds = training_step(paper, side), 5
        step()
    step()
    print(statistics.median(seconds(step) for _ in range(rounds)))


def training_step(paper: str, side: str) -> Step:
    """One step, 128/192 channels, 8 crops of 256x256; side: baseline, bf16 or compiled."""
    module = importlib.import_module(f"{paper}.model")
    ours = side != "baseline"
    model = (module.build if ours else module.BASELINE)(N=128, M=192).train()
    layout = torch.channels_last if ours else torch.contiguous_format
    model = model.to(memory_format=layout)
    net = runs.parallel(model, compile=side == "compiled")
    optimizer, aux_optimizer = runs.optimizers(model, "adam", 1e-4)
    criterion = RateDistortionLoss(0.013)
    tiles = data.Crops(data.find_items(None), 256)
    x = torch.stack([data.to_float(tiles[k]) for k in range(8)]).contiguous(memory_format=layout)

    def step() -> None:
        with runs.autocast(x.device, "auto" if ours else "fp32"):
            output = net(x)
        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        criterion(output, x)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.aux_loss().backward()
        aux_optimizer.step()

    return step


def processes(job: str, paper: str, side: str, rounds: int) -> None:
    """Both sides of a job in turns, each time in a new process, the baseline without mallopt."""

    def once(which: str) -> float:
        env = dict(os.environ, **({"LIC_DEFAULT_MALLOC": "1"} if which == "baseline" else {}))
        command = [sys.executable, "-m", "common.bench", "--worker", job, paper, which]
        out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
        return float(out.stdout.split()[-1])

    name = {"codec": "compress + decompress, own processes",
            "train": f"training step 8x256x256, {side}"}[job]
    show(f"{paper}: {name}", [(once("baseline"), once(side)) for _ in range(rounds)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("papers", nargs="*", help="paper folders")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each comparison")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    print(f"{runs.describe(torch.device('cpu'))}, torch {torch.__version__}; N=128, M=192")
    print(f"{'':58s} {'CompressAI':>12s} {'ours':>12s}   ratio")
    for paper in args.papers:
        coding(paper, 3 * args.rounds)
        processes("codec", paper, "ours", args.rounds)
        for side in ("bf16", "compiled"):
            processes("train", paper, side, args.rounds)


if __name__ == "__main__":
    main()
