"""Run g_a and g_s in bfloat16, for hardware with bfloat16 products.

    model = load(path)
    use_precision(model, "bf16")      # "fp32" restores float32

The transforms need not be exact: files decode to the same symbols in either precision, and only the
picture made from the symbols, or the symbols chosen for a picture, differ slightly. Everything that
a decoder must reproduce bit for bit stays in exact arithmetic (exact.py), and h_a and likelihoods
in float32. The last layer of each transform and all GDN stay in float32, too. What bf16 costs is in
common/results/precision.json, from `python -m common.evaluation.precision_cost`.
"""

from __future__ import annotations

import argparse
from typing import Any

from common.coding.contract import Codec

import torch
from compressai.layers import GDN
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PRECISIONS = ("fp32", "bf16")
HOOKS = "precision_hooks"  # attribute of a model that holds its hooks


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add --precision."""
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS,
                        help="precision of g_a and g_s; bf16 is faster on GPUs and CPUs with "
                        "bfloat16 products, and encodes with up to 0.3 percent more bits")


def of(model: Codec) -> str:
    """The precision that `use_precision` has set."""
    return "bf16" if getattr(model, HOOKS, []) else "fp32"


def use_precision(model: Codec, precision: str) -> None:
    """Run the transforms of a codec in "fp32" or "bf16" from now on, when coding and in `forward`.

    Raises ValueError for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision}: choose from {', '.join(PRECISIONS)}")
    for hook in getattr(model, HOOKS, []):
        hook.remove()
    hooks: list[RemovableHandle] = []
    if precision == "bf16":
        for transform in (model.g_a, model.g_s):
            *_, last = (m for m in transform.modules()
                        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)))
            precise = [last, *(m for m in transform.modules() if isinstance(m, GDN))]
            # children one by one, as a model may call them with gains in between
            chain = isinstance(transform, (nn.Sequential, nn.ModuleList))
            stages = list(transform.children()) if chain else [transform]
            for stage in stages:
                if stage not in precise:
                    hooks += run_in(stage, torch.bfloat16)
            for layer in precise:
                hooks += run_in(layer, torch.float32)
            hooks.append(stages[-1].register_forward_hook(lambda _, args, output: output.float()))
    setattr(model, HOOKS, hooks)


def run_in(module: nn.Module, dtype: torch.dtype) -> list[RemovableHandle]:
    """Let a module compute its products in `dtype`, bfloat16 or float16, by autocast; in float32
    its inputs are converted, and an outer autocast is switched off. Returns the hooks, which can
    `remove` it.
    """
    contexts: list[torch.autocast] = []
    half = dtype != torch.float32

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        contexts.append(torch.autocast(args[0].device.type, dtype if half else torch.bfloat16,
                                       enabled=half))
        contexts[-1].__enter__()
        return None if half else tuple(a.float() if isinstance(a, Tensor) else a for a in args)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        contexts.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True)]
