"""Where the time of coding goes: seconds in g_a, h_a, g_s, the entropy parameters and the coder.

    with measure(model) as seconds:
        file = image_file.encode_image(model, x)
    seconds     # {"g_a": 0.21, "entropy parameters": 0.04, "entropy coding": 0.02, "h_a": 0.01}

A stage that runs inside another one counts for itself only, so the sum never exceeds the whole.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from torch import nn

TRANSFORMS = ("g_a", "h_a", "g_s")  # run in floats; h_s is a part of the entropy parameters
PARAMETERS, CODING = "entropy parameters", "entropy coding"
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class _Clock:
    """Seconds of each stage; the stage begun last is the one that runs."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.running: list[str] = []
        self.since = 0.0

    def begin(self, name: str) -> None:
        self._count()
        self.running.append(name)

    def end(self) -> None:
        self._count()
        self.running.pop()

    def _count(self) -> None:
        """Add the time since the last change to the stage that runs."""
        now = time.perf_counter()
        if self.running:
            name = self.running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now


_clock: ContextVar[_Clock | None] = ContextVar("clock", default=None)


def stage(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a function, whose time counts as that of the stage `name` within `measure`."""
    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def timed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            clock = _clock.get()
            if clock is None:
                return function(*args, **kwargs)
            clock.begin(name)
            try:
                return function(*args, **kwargs)
            finally:
                clock.end()

        return timed

    return decorate


@contextlib.contextmanager
def measure(model: nn.Module) -> Iterator[dict[str, float]]:
    """Measure the stages of what `model` codes on the CPU, in this thread, within a `with` block.

    Yields the seconds by the names of the stages, which are complete at the end of the block. What
    belongs to none of them (padding, rounding, the file's header) is not included.
    """
    clock = _Clock()
    token = _clock.set(clock)
    hooks = []
    for name in TRANSFORMS:
        transform = getattr(model, name, None)
        for part in parts(transform) if transform is not None else []:
            hooks.append(part.register_forward_pre_hook(functools.partial(_begin, clock, name)))
            hooks.append(part.register_forward_hook(functools.partial(_end, clock),
                                                    always_call=True))
    try:
        yield clock.seconds
    finally:
        for hook in hooks:
            hook.remove()
        _clock.reset(token)


def parts(transform: nn.Module) -> list[nn.Module]:
    """The stages of a transform, in order: a model may call them with gains in between."""
    chain = isinstance(transform, (nn.Sequential, nn.ModuleList))
    return list(transform.children()) if chain else [transform]


def _begin(clock: _Clock, name: str, module: nn.Module, args: Any) -> None:
    clock.begin(name)


def _end(clock: _Clock, module: nn.Module, args: Any, output: Any) -> None:
    clock.end()
