"""Prepare a network for training: mixed precision, compilation, distributed data parallel."""

from __future__ import annotations

import inspect
import platform
from typing import Any, cast

from common import processes

import torch
from torch import nn


def default_precision(device: torch.device | None = None) -> str:
    """Return "bf16" if the hardware supports its products, otherwise "fp32"."""
    if device is None or device.type == "cuda":
        if torch.cuda.is_available():
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if not torch.backends.mkldnn.is_available():
        return "fp32"
    if platform.machine().lower() in ("x86_64", "amd64"):
        # with AVX-512 alone, oneDNN emulates bf16, which is slower than fp32
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast for one forward pass; `precision` is "bf16", "fp32" or "auto"."""
    if precision == "auto":
        precision = default_precision(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works; on a CPU it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception:
        return False
    return True


def prepare_network(model: nn.Module, compile: bool = False) -> nn.Module:
    """Return the module to call in training: `model`, compiled, and with DDP if there are several
    processes.

    The gradients of the quantiles are not averaged: their loss does not depend on data, so they are
    the same in all processes.
    """
    if compile and not processes.broadcast_flag(can_compile(next(model.parameters()).device)):
        compile = False
        if processes.rank() == 0:
            print("torch.compile finds no working compiler; training without --compile")
    net = cast(nn.Module, torch.compile(model)) if compile else model
    if processes.world() == 1:
        return net
    names = [name for name, _ in model.named_parameters() if name.endswith("quantiles")]
    prefix = "_orig_mod." if compile else ""
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(net, [prefix + n for n in names])
    known = inspect.signature(ddp).parameters  # torch 2.13 has renamed it
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    settings: dict[str, Any] = {name: False}
    return ddp(net, **settings)
