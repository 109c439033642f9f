"""A training step recorded once as a CUDA graph and replayed.

On a GPU a step of a small network is a thousand kernels of a few microseconds each: launching them
from Python takes several times longer than running them. A graph launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # ordinary steps before recording: lazy initialisation, torch.compile
Step = Callable[..., dict[str, Tensor]]


class Recorded:
    """Call `step` as it is, or replay its CUDA graph.

    step: forward, backward and optimiser steps; returns scalars by name. Its tensor arguments may
    have other values in each call; for other shapes, or other values of arguments that are no
    tensors, another graph is recorded. Scalars of a replayed step are overwritten by the next one.

    optimizers: those that `step` uses. All must be capturable, as `make_optimizers` makes them on a
    GPU; otherwise, and with `enabled` false, every call is an ordinary one. So it is when recording
    fails because the network asks the GPU for a value in the middle of a step; one line says so.
    """

    def __init__(self, step: Step, *optimizers: torch.optim.Optimizer, enabled: bool = True):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.step = step
        self.enabled = enabled and all(group.get("capturable") for group in groups)
        self.graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], dict[str, Tensor]]] = {}
        self.calls: dict[Any, int] = {}
        self.pool: Any = None

    def __call__(self, *args: Any) -> dict[str, Tensor]:
        if not self.enabled:
            return self.step(*args)
        tensors = [a for a in args if isinstance(a, Tensor)]
        key = tuple((tuple(a.shape), a.dtype, a.stride()) if isinstance(a, Tensor) else a
                    for a in args)
        if key not in self.graphs:
            self.calls[key] = self.calls.get(key, 0) + 1
            if self.calls[key] <= WARM_UP:
                return self._ordinary(args)
            noise = torch.cuda.get_rng_state()
            try:
                self._record(key, args)
            except RuntimeError as e:
                self.enabled = False
                restore_generator(noise)
                reason = str(e).strip().splitlines()[0][:120]
                print(f"training without a CUDA graph: the step cannot be recorded ({reason})")
                return self.step(*args)
        graph, inputs, outputs = self.graphs[key]
        for static, new in zip(inputs, tensors, strict=True):
            static.copy_(new)
        graph.replay()
        return outputs

    def _ordinary(self, args: tuple[Any, ...]) -> dict[str, Tensor]:
        """A step on a stream of its own, as recording asks of the steps before it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = {name: value.detach() for name, value in self.step(*args).items()}
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _record(self, key: Any, args: tuple[Any, ...]) -> None:
        static = [a.clone() if isinstance(a, Tensor) else a for a in args]
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # thread_local: a loader's thread may pin memory meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = {name: value.detach() for name, value in self.step(*static).items()}
        self.graphs[key] = graph, [a for a in static if isinstance(a, Tensor)], outputs


def restore_generator(state: Tensor) -> None:
    """Give the current GPU's default generator a new state: a failed recording leaves the old one
    waiting for its end.
    """
    index = torch.cuda.current_device()
    fresh = torch.Generator(device=f"cuda:{index}")
    fresh.set_state(state)
    torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())
