"""Optimisers, learning-rate schedules, and the check that losses and weights are finite."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from common import UserError, processes
from common.training.network import default_precision

import torch
from torch import Tensor, nn


def main_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, except the quantiles of the entropy bottlenecks."""
    return {n: p for n, p in model.named_parameters() if not n.endswith("quantiles")}


def make_optimizers(model: nn.Module, name: str, lr: float,
                    aux_lr: float = 1e-3) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """(main, aux): optimisers of the main parameters, and of the entropy bottlenecks' quantiles.

    All sources use "adam". "muon" (timm) orthogonalises the updates of the convolution kernels and
    uses AdamW at lr / 2 for the rest; it needs fewer steps to reach the same loss.
    """
    main = main_parameters(model)
    aux = [p for n, p in model.named_parameters() if n.endswith("quantiles")]
    device = next(iter(main.values())).device
    capturable = device.type == "cuda" and processes.world() == 1
    graph: dict[str, Any] = {"capturable": True} if capturable else {}
    rate = torch.tensor(lr, device=device) if graph else lr  # as a tensor, schedules can change it
    if name == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(main.values(), lr=rate, **graph)
    elif name == "muon":
        from timm.optim import Muon, muon

        if device.type == "cuda":
            muon._single_tensor_muon = grouped_muon
        if device.type == "cpu" and default_precision(device) == "fp32":
            # timm orthogonalises in bf16, which takes four times as long where that is emulated
            function = muon.zeropower_via_newtonschulz
            if not isinstance(function, functools.partial):
                muon.zeropower_via_newtonschulz = functools.partial(function, dtype=torch.float32)
        kernels = [p for n, p in main.items() if "entropy_bottleneck" not in n]
        density = [p for n, p in main.items() if "entropy_bottleneck" in n]
        groups: list[dict[str, Any]] = [{"params": kernels},
                                        {"params": density, "use_fallback": True}]
        # its annotations do not know a learning rate in a tensor
        optimizer = Muon(groups, lr=cast(float, rate), nesterov=True, fallback_lr_scale=0.5,
                         betas=(0.9, 0.999), **graph)
    else:
        raise UserError(f"--optimizer {name}: choose adam or muon")
    aux_rate = torch.tensor(aux_lr, device=device) if graph else aux_lr
    return optimizer, torch.optim.Adam(aux, lr=aux_rate, **graph)


def grouped_muon(params: list[Tensor], grads: list[Tensor], momentum_bufs: list[Tensor], *,
                 lr: float | Tensor, momentum: float, ns_steps: int, ns_coefficients: Any,
                 eps: float, safety_factor: float, adjust_lr_fn: Any, **_: Any) -> None:
    """timm's `_single_tensor_muon` for the settings of `make_optimizers`, with all kernels of equal
    shape orthogonalised in one batch: on a GPU, a small network otherwise spends a third of a step
    on launching these products.
    """
    from timm.optim import muon

    coefficients = muon.resolve_ns_coefficients(ns_coefficients, muon._COEFFICIENTS)
    torch._foreach_lerp_(momentum_bufs, grads, 1.0 - momentum)
    updates = torch._foreach_lerp(grads, momentum_bufs, momentum)  # Nesterov
    groups: dict[torch.Size, list[int]] = {}
    for i, update in enumerate(updates):
        groups.setdefault(update.flatten(1).shape, []).append(i)
    for members in groups.values():
        batch = torch.stack([updates[i].flatten(1) for i in members])
        batch = muon.zeropower_via_newtonschulz(batch, ns_steps, coefficients, eps=eps,
                                                safety_factor=safety_factor)
        scale = muon.get_lr_scale(batch.shape[1:], adjust_lr_fn)
        for i, update in zip(members, (batch * (-lr * scale)).unbind(), strict=True):
            params[i].add_(update.reshape(params[i].shape))


def learning_rate(optimizer: torch.optim.Optimizer) -> float | Tensor:
    """The current learning rate of the first group; a copy if it is a tensor on the GPU."""
    rate = optimizer.param_groups[0]["lr"]
    return rate.clone() if isinstance(rate, Tensor) else rate


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimiser on its device; its state may come from another device."""
    own = [{key: group[key] for key in ("lr", "capturable") if key in group}
           for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, own, strict=True):
        rate = float(group["lr"])
        tensor = isinstance(before["lr"], Tensor)
        group["lr"] = torch.full_like(before["lr"], rate) if tensor else rate
        if "initial_lr" in group and not tensor:
            group["initial_lr"] = float(group["initial_lr"])
        if "capturable" in before:
            group["capturable"] = before["capturable"]
        for p in group["params"]:  # capturable optimisers count steps on the GPU
            if isinstance(count := optimizer.state.get(p, {}).get("step"), Tensor):
                device = p.device if group.get("capturable") else "cpu"
                optimizer.state[p]["step"] = count.to(device)


def make_scheduler(optimizer: torch.optim.Optimizer, name: str, epochs: int,
                   milestones: Iterable[int], patience: int = 10) -> Any:
    """Learning-rate schedule, stepped once per epoch, for plateau with the loss to watch.

    plateau halves the rate after `patience` epochs without progress, multistep at each milestone;
    cosine lowers it to zero over the run.
    """
    if name == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", factor=0.5,
                                                          patience=patience)
    if name == "multistep":
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), gamma=0.5)
    if name == "constant":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    if name == "cosine":
        cosine = lambda epoch: 0.5 * (1 + math.cos(math.pi * min(1.0, epoch / epochs)))  # noqa: E731
        return torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    raise UserError(f"--lr_schedule {name}: choose plateau, multistep, cosine or constant")


def check_finite(values: dict[str, Tensor], step: int, last_good: Path | None) -> None:
    """Raise UserError if a loss term, a gradient or a weight is NaN or infinite.

    Does nothing while a CUDA graph is being recorded. Of replayed steps, `Log.step` checks one in
    50, and weights that are not finite are never saved.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    finite = torch.stack([value.isfinite() for value in values.values()])
    if not finite.all():  # read once per step: each read synchronises CPU and GPU
        bad = [name for name, good in zip(values, finite.tolist(), strict=True) if not good]
        kept = f"the last good checkpoint is {last_good}" if last_good else "nothing was saved yet"
        raise UserError(f"{', '.join(bad[:5])} not finite in the batch of step {step}; {kept}; "
                        "try a smaller learning rate or --precision fp32")
