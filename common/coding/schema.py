"""The entries of a checkpoint that are read to code, and what each must be.

    model         names -> dense tensors without NaN and infinity; scale tables rise from above 0,
                  CDF tables are whole numbers
    int8_steps    the name of each int8 tensor of model -> a step for each output channel
    exact         each exact part -> version, weight_bits, and for each of its layers the grid_bits,
                  clamp_bits and shifts (one for each output channel)
    config        names of flags -> values, a number for lmbda
    step, epoch   whole numbers; hardware: a text
    averaged      entries model and exact, which replace those above

All but model may be missing. A file can come from anywhere: `check` is called before anything else
uses these entries, and says in a UserError which is wrong. `exact.restore` calls `check_exact`, for
the version of the arithmetic that it knows.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from common import UserError
from common.coding.exact_layers import MAX_SHIFT

import torch
from torch import Tensor

EXACT = ("version", "weight_bits", "grid_bits", "clamp_bits", "shifts")
TABLES = {"_quantized_cdf": 2, "_offset": 1, "_cdf_length": 1}  # of entropy models: dimensions
SUM_BITS = 52  # of grid and clamp: a float64 holds the products
MIN_SHIFT = -128  # float32 weights are below 2^128
WIDEST = 4096  # channels of a kernel; layers have matrices of this side
TEXT = 1_000  # characters


def check(state: dict[str, Any]) -> None:
    """Raise UserError if an entry is not as described above; a Namespace becomes a dict."""
    for name in ("step", "epoch"):
        value = state.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < 2**53):
            _wrong(name, "is not a number of steps or epochs")
    hardware = state.get("hardware")
    if hardware is not None and not (isinstance(hardware, str) and len(hardware) <= TEXT):
        _wrong("hardware", "is not a text")
    if isinstance(state.get("config"), argparse.Namespace):
        state["config"] = vars(state["config"])
    _check_config(state.get("config"))
    _check_coding(state, "")
    if "averaged" in state and isinstance(state["averaged"], dict):
        _check_coding(state["averaged"], "averaged.")


def _check_coding(state: dict[str, Any], where: str) -> None:
    if "model" in state:
        _check_weights(state["model"], f"{where}model")
        steps = state.get("int8_steps", {})
        _check_steps(state["model"], steps, f"{where}int8_steps")
    if "exact" in state:
        if not isinstance(state["exact"], dict) or not all(
                isinstance(name, str) for name in state["exact"]):
            _wrong(f"{where}exact", "is not a dict of exact parts")


def _check_config(config: Any) -> None:
    if config is None:
        return
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        _wrong("config", "is not a dict of flags")
    lmbda = config.get("lmbda")
    if lmbda is not None and (not isinstance(lmbda, (int, float)) or isinstance(lmbda, bool)):
        _wrong("config.lmbda", "is not a number")


def _check_weights(weights: Any, where: str) -> None:
    if not isinstance(weights, Mapping):
        _wrong(where, "is no state dict")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            _wrong(f"{where}.{name}", f"is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or (
                value.device.type != "cpu"):
            _wrong(f"{where}.{name}", "is not a dense tensor of numbers")
        if name.endswith("weight") and value.dim() > 1 and max(value.shape) > WIDEST:
            _wrong(f"{where}.{name}", f"has {max(value.shape)} channels, more than {WIDEST}")
        if value.is_floating_point() and not torch.isfinite(value.float()).all():
            _wrong(f"{where}.{name}", "holds NaN or infinity")
        sides = next((n for table, n in TABLES.items() if name.endswith(table)), None)
        if sides and value.numel() and (value.dim() != sides or value.is_floating_point()):
            _wrong(f"{where}.{name}", "is no table of whole numbers")
        if name.endswith("scale_table") and value.numel() and not (
                value.dim() == 1 and value[0] > 0 and (value.double().diff() > 0).all()):
            _wrong(f"{where}.{name}", "does not rise from a scale above 0")


def _check_steps(weights: Mapping[str, Tensor], steps: Any, where: str) -> None:
    if not isinstance(steps, dict):
        _wrong(where, "is not a dict of steps")
    kernels = {name: value for name, value in weights.items() if value.dtype == torch.int8}
    if kernels.keys() != steps.keys():
        raise UserError("the steps of its 8-bit kernels are missing: export it again")
    for name, kernel in kernels.items():
        step = steps[name]
        if not (isinstance(step, Tensor) and step.is_floating_point()
                and step.layout == torch.strided and step.dim() == kernel.dim()
                and all(s in (1, k) for s, k in zip(step.shape, kernel.shape, strict=True))
                and torch.isfinite(step.float()).all()):
            _wrong(f"{where}.{name}", "does not hold a step for each channel of the kernel")


def check_exact(spec: Any, where: str = "exact") -> None:
    """Check the fixed-point settings of one part, as `exact.spec` makes them."""
    if not isinstance(spec, dict) or not all(key in spec for key in EXACT):
        _wrong(where, f"is not a dict of {', '.join(EXACT)}")
    if type(spec["version"]) is not int or type(spec["weight_bits"]) is not int:
        _wrong(f"{where}.version", "and weight_bits are not whole numbers")
    layers = [spec[key] for key in EXACT[2:]]
    if not all(isinstance(values, (list, tuple)) for values in layers) or (
            len({len(values) for values in layers}) != 1):
        _wrong(where, "does not have one grid, clamp and shifts for each layer")
    for grid, clamp, shifts in zip(*layers, strict=True):
        if not (type(grid) is type(clamp) is int and min(grid, clamp) >= 0
                and grid + clamp <= SUM_BITS):
            _wrong(f"{where}.grid_bits", f"and clamp_bits: {str(grid)[:20]} and {str(clamp)[:20]} "
                   "cannot be computed with")
        if not (isinstance(shifts, Tensor) and shifts.dtype in (torch.int32, torch.int64)
                and shifts.dim() == 1 and shifts.numel() > 0
                and MIN_SHIFT <= int(shifts.min()) <= int(shifts.max()) <= MAX_SHIFT):
            _wrong(f"{where}.shifts", f"are not whole numbers from {MIN_SHIFT} to {MAX_SHIFT}")


def _wrong(entry: str, what: str) -> NoReturn:
    raise UserError(f"its entry {entry[:200]} {what}: use an intact checkpoint")
