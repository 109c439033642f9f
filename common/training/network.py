"""The network as the training loop calls it: mixed precision, compiled, spread over processes."""

from __future__ import annotations

import inspect

from common import processes

import torch
from torch import nn


def default_precision(device: torch.device | None = None) -> str:
    """bf16 where the hardware multiplies it, fp32 elsewhere."""
    if device is None or device.type == "cuda":
        if torch.cuda.is_available():
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    onednn = torch.backends.mkldnn.is_available()
    return "bf16" if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast for one forward pass; `precision` is "bf16", "fp32" or "auto"."""
    if precision == "auto":
        precision = default_precision(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works: on a CPU it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception:
        return False
    return True


def prepare_network(model: nn.Module, compile: bool = False) -> nn.Module:
    """The module to call for training: `model`, compiled and/or averaged over the processes.

    Quantiles stay out of the gradient average: their loss sees no data, so it is equal everywhere.
    """
    if compile and not processes.broadcast_flag(can_compile(next(model.parameters()).device)):
        compile = False
        if processes.rank() == 0:
            print("torch.compile finds no working compiler here: training without --compile")
    net = torch.compile(model) if compile else model
    if processes.world() == 1:
        return net
    names = [name for name, _ in model.named_parameters() if name.endswith("quantiles")]
    prefix = "_orig_mod." if compile else ""
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(net, [prefix + n for n in names])
    known = inspect.signature(ddp).parameters  # the name changed with torch 2.13
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return ddp(net, **{name: False})
