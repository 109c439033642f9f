"""Where a stage of the training starts: the weights of the stage before, or another checkpoint."""

from __future__ import annotations

import argparse
import filecmp
from pathlib import Path
from typing import Any

from common import UserError, processes
from common.coding.model_file import load_checkpoint, load_error
from common.files import write_atomic

import torch

from qvrf.model import QVRF, initial_gain

NEWEST, BEST = "checkpoint.pth.tar", "checkpoint_best_loss.pth.tar"


def starting_point(args: argparse.Namespace, out: Path) -> tuple[Path | None, Path | None]:
    """(weights to start from, run to continue), of which at most one is not None.

    --checkpoint alone continues that run, as in the source. Without it, a stage starts from the
    best weights of the previous stage in --out.
    """
    if args.checkpoint:
        path = Path(args.checkpoint)
        if not (args.refresh or args.loadFromPretrainedSinglemodel):
            return None, path
        return path, None
    if not (out / NEWEST).exists():
        return None, None
    before = config_of(out / NEWEST).get("stage", 0)
    if args.stage <= before:
        raise UserError(f"{out / NEWEST} is of a run of stage {before}: continue it with --resume, "
                        "name weights with --checkpoint FILE --refresh 1, or give another --out")
    # a killed run may have replaced BEST by that of the next stage, and set this one aside
    for best in (out / BEST, aside(out / BEST, before)):
        if best.exists() and config_of(best).get("stage") == before:
            return best, None
    return out / NEWEST, None


def config_of(path: Path) -> dict[str, Any]:
    return load_checkpoint(path).get("config", {})


def load_weights(model: QVRF, path: Path, single: bool) -> tuple[int, int]:
    """Load weights strictly; if `single`, those of a fixed-rate base, which has no Gain.

    Returns their number of training steps and their stage (0: not trained here).
    """
    state = load_checkpoint(path)
    weights, config = dict(state["model"]), state.get("config") or {}
    if config.get("gdn_variant") not in (None, "paper"):  # the same shapes, another network
        raise UserError(f"{path}: was trained with --gdn_variant {config['gdn_variant']}; the "
                        "transforms of --model minnen are those of paper")
    if not single and "Gain" not in weights:
        raise UserError(f"{path}: has no Gain: if it is a fixed-rate codec, add "
                        "--loadFromPretrainedSinglemodel 1")
    if single:
        if "Gain" in weights:
            raise UserError(f"{path}: has a Gain already, it is no fixed-rate model: leave "
                            "--loadFromPretrainedSinglemodel out")
        weights["Gain"] = initial_gain(model.levels)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, KeyError) as e:
        raise UserError(f"{path}: not weights of --model {model.model} --levels {model.levels} "
                        f"--N {model.N} --M {model.M}: {load_error(e)}") from None
    return config.get("steps_before", 0) + state.get("step", 0), config.get("stage", 0)


@torch.no_grad()
def spread_gains(model: QVRF, last: float, level: int | None = None) -> None:
    """Turn a fixed-rate codec (regulator 1) into a level of `model`: the last one, or `level`.

    The gains rise from 1 to `last` in equal ratios. Latents, means and scales are divided by the
    gain of that level in the layers that compute them, and multiplied by it in those that read
    them.
    """
    gains = (last ** torch.linspace(0, 1, model.levels, dtype=torch.float64)).float()
    step = float(gains[-1 if level is None else level])
    made = [model.g_a[-1],
            model.h_s[-2] if model.model == "balle" else model.entropy_parameters[-1]]
    read = [model.g_s[0], model.h_a[0]]
    if model.model != "balle":
        read.append(model.context_prediction)
    for layer in made:
        layer.weight /= step
        layer.bias /= step
    for layer in read:
        layer.weight *= step
    model.Gain.copy_(gains)


def set_aside(out: Path) -> None:
    """Copy the checkpoints in `out` to other names, before they are overwritten."""
    for path in filter(Path.exists, (out / NEWEST, out / BEST) if processes.rank() == 0 else ()):
        stage, number = config_of(path).get("stage", 0), 1
        while (kept := aside(path, stage, number)).exists() and not filecmp.cmp(kept, path, False):
            number += 1
        if not kept.exists():
            write_atomic(kept, path.read_bytes())
    processes.broadcast_flag(True)  # the other processes wait


def aside(path: Path, stage: int, number: int = 1) -> Path:
    """Path at which a checkpoint of a stage is kept: <stem>_stage<n>.pth.tar."""
    count = "" if number == 1 else f"_{number}"
    return path.with_name(f"{path.name.removesuffix('.pth.tar')}_stage{stage}{count}.pth.tar")
