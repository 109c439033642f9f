"""The parts of a train.py around its loop: the shared flags, and `Run`."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from common import UserError, cli, data, processes
from common.training.checkpoints import Checkpoints
from common.training.log import Log
from common.training.optimizers import check_finite

import torch
from torch import Tensor


def add_training_flags(parser: argparse.ArgumentParser, lr_schedule: str,
                       without: tuple[str, ...] = ()) -> None:
    """Add the flags that all training scripts have in addition to those of their sources.

    without: flags that the source itself defines.
    """
    group = parser.add_argument_group("flags of this repository")

    def add(flag: str, **settings: Any) -> None:
        if flag not in without:
            group.add_argument(flag, **settings)

    add("--config", help="YAML file of flags; the command line overrides it")
    add("--resume", nargs="?", const="newest", choices=["newest", "auto"],
        help="continue this run from its newest checkpoint; auto begins it if there is none")
    add("--metric", default="mse", choices=["mse", "ms-ssim"],
        help="distortion measure of the loss")
    add("--optimizer", default="adam", choices=["adam", "muon"],
        help="optimiser of the main parameters; muon needs fewer steps than adam")
    add("--aux-lr", type=cli.positive_float, default=1e-3, help="learning rate of the quantiles")
    add("--lr-schedule", default=lr_schedule,
        choices=["plateau", "multistep", "cosine", "constant"],
        help="learning-rate schedule, stepped once per epoch")
    add("--milestones", type=int, nargs="*", default=[40, 90, 140],
        help="epochs at which multistep lowers the learning rate")
    add("--clip-max-norm", type=cli.positive_float, default=1.0, help="maximum gradient norm")
    add("--patch-size", type=cli.positive_int, default=256,
        help="side of the square crops in pixels")
    add("--flip", action=argparse.BooleanOptionalAction, default=False,
        help="flip half of the crops left to right")
    add("--steps-per-epoch", type=cli.count, default=0,
        help="training steps per epoch; 0 makes one pass over --dataset")
    add("--test-every", type=cli.positive_int, default=1, help="epochs between validations")
    add("--save-every", type=cli.positive_int, default=1, help="epochs between kept checkpoints")
    add("--seed", type=cli.seed_number, default=0, help="seed of weights, noise and crops")
    add("--device", default="auto", help="device to train on: auto, cpu or cuda")
    add("--precision", default="auto", choices=["auto", *processes.PRECISIONS],
        help="training precision; auto chooses bf16 where the hardware supports it")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile the network with torch.compile; pays off after about five minutes")
    add("--graph", action=argparse.BooleanOptionalAction, default=True,
        help="on one GPU, record a training step as a CUDA graph and replay it")
    add("--threads", type=cli.threads, default=0, help="number of CPU threads; 0 uses all")


@dataclass
class Run:
    """What a training loop needs around it: batches in order, log, checkpoints within an epoch.

        for epoch in run.remaining_epochs():
            model.train()
            for x in run.batches():
                values = train_step(x)
                run.end_step({**values, "lr": ...}, best=best)
            line, means = run.end_epoch()
            ...
            log.line(line)  # before the checkpoint, which holds how many lines there are
            run.save(f"epoch_{epoch}.pth", best=best)

    batch_size: images of this process in a step; check_time: minutes between the checkpoints
    within an epoch, which are called `latest`.
    """

    checkpoints: Checkpoints
    log: Log
    crops: data.Crops
    device: torch.device
    epochs: int
    steps_per_epoch: int
    batch_size: int
    num_workers: int
    check_time: float
    latest: str = "latest.pth"
    step: int = 0  # steps done
    epoch: int = field(default=0, init=False)
    saved: float = field(default=0.0, init=False)
    loader: Iterator[Tensor] | None = field(default=None, init=False)

    @property
    def is_last_epoch(self) -> bool:
        return self.epoch + 1 == self.epochs

    def announce(self, flags: str, whole: Path, bundled: bool, flag: str = "--epochs") -> None:
        """Print flags, images and hardware.

        flags: those that differ from the defaults (`cli.summary`); whole: the file of all flags;
        flag: the one that sets the epochs.
        """
        if processes.rank() > 0:
            return
        print(f"{flags}  (all flags: {whole})")
        if self.num_workers > self.loaders:
            cli.note(f"{self.loaders} data loader processes, one for each core, instead of "
                     f"{self.num_workers}; the training is the same")
        print(self.describe(bundled), flush=True)
        if self.is_done():
            print(f"nothing to do: this run has its {self.epochs} epochs already ({flag} for more)")

    @property
    def loaders(self) -> int:
        """The number of loader processes; more than there are cores would only wait."""
        return min(self.num_workers, processes.cores())

    def describe(self, bundled: bool) -> str:
        """The number of training images, steps per epoch and the hardware in words."""
        images = f"{len(self.crops.items)} training images"
        return (f"{images}{' (bundled photographs)' if bundled else ''}, {self.steps_per_epoch} "
                f"steps an epoch, on {processes.describe_hardware(self.device)}")

    def is_done(self) -> bool:
        return self.step >= self.epochs * self.steps_per_epoch

    def remaining_epochs(self) -> Iterator[int]:
        """The epochs from the one in which the run was stopped to the last one."""
        self.log.begin(self.step)
        self.saved = time.monotonic()
        try:
            for epoch in range(self.step // self.steps_per_epoch, self.epochs):
                self.epoch = epoch
                yield epoch
        finally:
            self.loader = None  # which ends its processes
            self.checkpoints.release()

    def batches(self) -> Iterator[Tensor]:
        """The remaining batches of this epoch: x (B, 3, H, W) in [0, 1], channels last.

        One loader, with the same processes and their caches, serves all epochs.
        """
        last_step = (self.epoch + 1) * self.steps_per_epoch
        if self.loader is None:
            self.loader = iter(data.loader(
                self.crops, self.step, self.epochs * self.steps_per_epoch, self.batch_size,
                processes.rank(), processes.world(), self.loaders))
        for images in islice(self.loader, last_step - self.step):
            x = data.to_float(images.to(self.device, non_blocking=True))
            yield x.contiguous(memory_format=torch.channels_last)

    def check(self, values: dict[str, Tensor]) -> None:
        """Raise UserError if a loss or the gradient norm of this step is not finite."""
        check_finite(values, self.step, self.checkpoints.last)

    def test(self, validate: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
        """Call a function that validates; errors also name the step and the last checkpoint.

        A loss that is not finite is an error, too.
        """
        try:
            losses = validate(*args)
            if not math.isfinite(losses["loss"]):
                raise UserError("the loss is NaN or infinite")
        except UserError as e:
            last = self.checkpoints.last
            kept = f"the last good checkpoint is {last}" if last else "nothing was saved yet"
            raise UserError(f"{e} (in the validation after step {self.step}; {kept}; if the "
                            "training has diverged, try a smaller learning rate)") from None
        return losses

    def end_step(self, values: dict[str, Any], every: int = 50, **state: Any) -> None:
        """Count a step, log it (in TensorBoard every `every` steps) and save `latest` if it is due.

        state: what the checkpoint holds besides the parts of the run.
        """
        self.step += 1
        self.log.step(self.step, values, every)
        due = self.step % 20 == 0 and time.monotonic() - self.saved > 60 * self.check_time
        within = self.step < (self.epoch + 1) * self.steps_per_epoch
        if within and processes.broadcast_flag(due):
            self.save(self.latest, **state)

    def end_epoch(self) -> tuple[str, dict[str, float]]:
        """Return the line for the log, and the mean losses over the epoch."""
        means = self.log.means()
        return (f"epoch {self.epoch}  step {self.step}  train loss {means['loss']:.4f} "
                f"bpp {means['bpp']:.4f}"), means

    def settle(self) -> None:
        """At the end of the run, solve for the quantiles of the entropy bottlenecks."""
        if self.is_last_epoch:
            self.checkpoints.update_tables(self.step, settle=True)

    def save(self, name: str, **state: Any) -> None:
        self.checkpoints.save(name, self.epoch, self.step, **state)
        self.saved = time.monotonic()
