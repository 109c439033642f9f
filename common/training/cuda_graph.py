"""Record a training step once as a CUDA graph and replay it.

On a GPU, a step of a small network consists of a thousand kernels of a few microseconds each.
Launching them from Python takes several times longer than running them; a graph launches all of
them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # steps before recording, for lazy initialisation and torch.compile
Step = Callable[..., dict[str, Tensor]]


class Recorded:
    """A training step that is replayed from a CUDA graph, or called as it is without one.

    step: forward, backward and optimiser steps; returns scalars by name. The values of its tensor
    arguments may change between calls; for new shapes, or new values of other arguments, another
    graph is recorded. The next replayed step overwrites the scalars of the previous one.

    optimizers: the optimisers that `step` uses. All must be capturable, as `make_optimizers` makes
    them on a GPU; otherwise, or if `enabled` is false, every call is an ordinary one. The same
    holds, and is reported on one line, if recording fails because the network reads a value from
    the GPU within a step.
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
        """Run a step on a separate stream, as required for the steps before a recording."""
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
        # thread_local: a data loader thread may pin memory meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = {name: value.detach() for name, value in self.step(*static).items()}
        self.graphs[key] = graph, [a for a in static if isinstance(a, Tensor)], outputs


def restore_generator(state: Tensor) -> None:
    """Reset the default generator of the current GPU to `state`, with a new state object: after a
    failed recording, the old one still waits for the end of the recording.
    """
    index = torch.cuda.current_device()
    fresh = torch.Generator(device=f"cuda:{index}")
    fresh.set_state(state)
    torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())
