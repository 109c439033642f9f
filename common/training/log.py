"""The log of a training run: log.txt, TensorBoard and the progress bar."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from common import UserError, processes

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


class Log:
    """log.txt, TensorBoard and the progress bar of one run; only the first process writes."""

    def __init__(self, folder: Path, steps: int, quiet: bool = False):
        self.folder, self.steps, self.quiet = folder, steps, quiet
        self.active = processes.rank() == 0
        self.sums: dict[str, float] = {}
        self.on_gpu: dict[tuple[str, ...], Tensor] = {}  # sums not fetched yet, by names
        self.count = 0
        self.lines = 0  # number of lines in log.txt that belong to the steps done
        self.after: list[str] = []  # lines that an interrupted run wrote after its checkpoint

    def begin(self, first: int = 0) -> None:
        """Open the files and the progress bar; `first` steps have been done before."""
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        self.board = SummaryWriter(str(self.folder))
        self.file = open(self.folder / "log.txt", "a+")
        self.file.seek(0)
        lines = self.file.read().splitlines()
        self.after = lines[self.lines:]
        self.lines = len(lines) - len(self.after)
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=self.steps, initial=first, unit="step", dynamic_ncols=True,
                        mininterval=1 if terminal else 60, disable=self.quiet)

    def step(self, step: int, values: dict[str, Any], every: int = 50) -> None:
        """Count one step; every `every` steps, write the scalars to TensorBoard."""
        there = {k: v.detach() for k, v in values.items() if isinstance(v, Tensor) and v.is_cuda}
        if there:  # reading them now would synchronise with the GPU
            new = torch.stack(list(there.values())).double()
            before = self.on_gpu.get(tuple(there))
            self.on_gpu[tuple(there)] = new if before is None else before + new
        self._add({k: v.item() if isinstance(v, Tensor) else v for k, v in values.items()
                   if k not in there})
        self.count += 1
        if self.active:
            self.bar.update()
            if step % every == 0:
                values = {k: v.item() if isinstance(v, Tensor) else v for k, v in values.items()}
                bad = [k for k, v in values.items() if not math.isfinite(v)]
                if bad:
                    raise UserError(f"{', '.join(bad)} not finite at step {step}; the newest "
                                    "checkpoint is older; try a smaller learning rate or "
                                    "--precision fp32")
                self.scalars("train", values, step)
                self.bar.set_postfix(loss=f"{values['loss']:.3f}", bpp=f"{values['bpp']:.3f}")

    def _add(self, values: dict[str, float]) -> None:
        for k, v in values.items():
            self.sums[k] = self.sums.get(k, 0.0) + v

    def _fetch(self) -> None:
        """Fetch the sums from the GPU."""
        for names, sums in self.on_gpu.items():
            self._add(dict(zip(names, sums.tolist(), strict=True)))
        self.on_gpu = {}

    def state_dict(self) -> dict[str, Any]:
        """The sums of an unfinished epoch and the number of lines in log.txt, so that a resumed run
        reports the same means, and each line once.
        """
        self._fetch()
        return {"sums": self.sums, "count": self.count, "lines": self.lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]
        self.lines = state.get("lines", sys.maxsize)  # older checkpoints do not count them

    def means(self) -> dict[str, float]:
        """Means over all steps since the last call, the same on every process."""
        if not self.count:
            return {}
        self._fetch()
        result = {k: v / self.count for k, v in self.sums.items()}
        if processes.world() > 1:
            values = torch.tensor(list(result.values()), dtype=torch.float64)
            if dist.get_backend() == "nccl":
                values = values.cuda()
            dist.all_reduce(values)
            result = dict(zip(result, (values / processes.world()).tolist(), strict=True))
        self.sums, self.count = {}, 0
        return result

    def scalars(self, tag: str, values: dict[str, float], step: int) -> None:
        if self.active:
            for key, value in values.items():
                self.board.add_scalar(f"{tag}/{key}", value, step)

    def images(self, x: Tensor, x_hat: Tensor, step: int) -> None:
        """Original and reconstruction side by side, (3, H, W) each."""
        if self.active:
            pair = torch.cat([x.float().cpu(), x_hat.float().cpu().clamp(0, 1)], dim=-1)
            self.board.add_image("reconstruction", pair, step)

    def histograms(self, tag: str, tensors: dict[str, Tensor], step: int) -> None:
        if self.active:
            for name, values in tensors.items():
                self.board.add_histogram(f"{tag}/{name}", values.detach().float().cpu(), step)

    def line(self, text: str) -> None:
        """Write a line to log.txt and above the progress bar.

        A run that was interrupted between a line and its checkpoint finds the line in the file.
        """
        if self.active:
            if not self.quiet:
                self.bar.write(text, file=sys.stdout)
            if self.after[:1] == [text]:
                del self.after[0]
            else:
                self.lines, self.after = self.lines + len(self.after), []
                self.file.write(text + "\n")
                self.file.flush()
            self.lines += 1

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.board.close()
            self.file.close()
