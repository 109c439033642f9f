"""Names of weights: without the parts that wrappers add, and in today's spelling of CompressAI."""

from __future__ import annotations

import re
from collections.abc import Mapping

from common import UserError

from torch import Tensor

# Parts that DataParallel, torch.compile, FSDP and activation checkpoints put anywhere in a name,
INSIDE = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
BEFORE = ("net", "model")  # and those that stand in front where a model is part of another.
COUNTERS = ("n_averaged",)  # what torch.optim.swa_utils adds to the weights
# entropy_bottleneck._matrix0 (2020), ._matrices.0 (the files of its zoo), .matrices.0 (today)
_DENSITY = re.compile(r"\._(?:(matri)(?:x|ces\.)|(bias|factor)(?:e?s\.)?)(\d+)$")


def plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under their plain names; UserError if two would share one."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        plain = plain_name(name)
        if plain in COUNTERS:
            continue
        if plain in found:
            raise UserError(f"it holds {plain} twice, once as {name}: save one of the models alone")
        found[plain] = value
    return found


def plain_name(name: str) -> str:
    """`_orig_mod.module.g_a.0.weight` -> `g_a.0.weight`, `x._matrices.0` -> `x.matrices.0`."""
    parts = [part for part in name.split(".") if part not in INSIDE]
    while len(parts) > 1 and parts[0] in BEFORE:
        parts = parts[1:]
    return _DENSITY.sub(_today, ".".join(parts))


def _today(found: re.Match[str]) -> str:
    plural = {"matri": "matrices", "bias": "biases", "factor": "factors"}
    return f".{plural[found[1] or found[2]]}.{found[3]}"
