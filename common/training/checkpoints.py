"""Checkpoints of a training run, from which it resumes with bit-identical results."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import UserError, locks, processes
from common.coding.contract import Codec
from common.coding.model_file import coding_state, load_checkpoint, load_error, save_checkpoint
from common.files import write_atomic
from common.training.optimizers import check_finite, learning_rate, load_optimizer

import torch
import torch.distributed as dist
import yaml
from torch import nn


def load_weights(model: Codec, path: str | Path) -> int:
    """Load the weights of a checkpoint into `model`, strictly (--init_ckpt).

    Returns the number of steps that led to them.
    """
    state = load_checkpoint(path)
    check_options(model, state, path, model.options)
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError) as e:  # KeyError: CompressAI, on CDF tables
        raise UserError(f"{path}: not weights of this model: {load_error(e)}") from None
    return steps_of(state)


def check_options(model: Codec, state: dict[str, Any], path: str | Path, names: Iterable[str]
                  ) -> None:
    """Raise UserError if the weights were trained with other values of these options of `model`."""
    for name in names:
        trained = (state.get("config") or {}).get(name)
        if trained is not None and trained != getattr(model, name):
            raise UserError(f"{path}: was trained with --{name} {trained}, not "
                            f"{getattr(model, name)}")


def steps_of(state: dict[str, Any]) -> int:
    """All steps that led to the weights of a checkpoint, those of earlier runs included."""
    return (state.get("step") or 0) + ((state.get("config") or {}).get("steps_before") or 0)


def load_transforms(model: Codec, path: str | Path) -> int:
    """Load g_a and g_s from a checkpoint of any paper with the same transforms
    (--init_transforms); all other weights of `model` stay as they are.

    If the latent of the checkpoint is wider than M channels, the M are kept whose kernels in the
    last layer of g_a are the largest: a loss with a rate term switches channels off, and the
    kernels of those are small. Returns the number of steps that led to the checkpoint.
    """
    whole = load_checkpoint(path)
    state = whole["model"]
    own = {key: v for key, v in model.state_dict().items() if key.startswith(("g_a.", "g_s."))}
    missing = [key for key in own if key not in state or state[key].dim() != own[key].dim()]
    last = [key for key in own if key.startswith("g_a.") and own[key].dim() == 4][-1:]
    if missing or not last:
        raise UserError(f"{path}: has other transforms than this model: {', '.join(missing[:3])}")
    width = len(state[last[0]])
    if width < model.M:
        raise UserError(f"{path}: its latent has {width} channels, fewer than --M {model.M}")
    kept = state[last[0]].flatten(1).norm(dim=1).topk(model.M).indices.sort().values
    first = next(key for key in own if key.startswith("g_s.") and own[key].dim() == 4)
    synthesis = model.get_submodule(first.removesuffix(".weight"))
    latent = {last[0]: 0, last[0].removesuffix("weight") + "bias": 0,  # dimension of the channels
              first: 0 if isinstance(synthesis, nn.ConvTranspose2d) else 1}
    new = {key: state[key].index_select(latent[key], kept) if key in latent else state[key]
           for key in own}
    for key, value in own.items():
        if new[key].shape != value.shape:
            raise UserError(f"{path}: {key} has the shape {tuple(state[key].shape)}, this model's "
                            f"has {tuple(value.shape)}")
    for key, value in own.items():
        value.copy_(new[key])
    return steps_of(whole)


def load_start(model: Codec, checkpoint: str, transforms: str) -> int:
    """Load what a new run starts from, --init_ckpt or --init_transforms; "" for neither.

    Returns the number of steps that led to it.
    """
    if checkpoint and transforms:
        raise UserError("--init_transforms beside a checkpoint of the whole model (--init_ckpt, "
                        "--pretrained): give one of them")
    if checkpoint:
        return load_weights(model, checkpoint)
    return load_transforms(model, transforms) if transforms else 0


RECORD = "unusable_images.jsonl"  # in the folder of a run: number and key of each image
SAME_RUN = ("metric", "lmbda", "optimizer", "lr", "aux_lr", "lr_schedule", "milestones",
            "batch_size", "patch_size", "flip", "images", "steps_per_epoch", "seed",
            "clip_max_norm")  # flags that --resume must not change


class Checkpoints:
    """The checkpoints of one run: epoch_<n>.pth after an epoch, latest.pth within one.

    parts: all objects with a state: {"model": ..., "optimizer": ..., "scheduler": ...}. The config
    in a checkpoint has "steps_before": the steps that led to the weights which the run started
    from. `begin` and `resume` lock the folder for this process until `release`.
    """

    own = ("log",)  # parts with a state per process, saved with its random generators

    def __init__(self, folder: Path, parts: dict[str, Any], config: dict[str, Any],
                 same: tuple[str, ...] = SAME_RUN,
                 anew: str = "--init_ckpt and another --exp_version"):
        """same: flags that --resume must not change; anew: flags that start another run."""
        self.folder, self.parts, self.config, self.same = folder, parts, config, same
        self.anew = anew
        self.last: Path | None = None
        self.branch = 0  # increases each time the run goes back to an earlier epoch

    def begin(self, resume: str | None, epoch: int | None) -> dict[str, Any]:
        """Restore the newest checkpoint (`resume`) or that of `epoch`; {} for a new run.

        resume: "newest", or "auto", which begins a new run if there is none. A new run in a folder
        that holds another one is refused, so that nothing is overwritten. All flags are written to
        config.yaml.
        """
        state = self._begin(resume, epoch)
        if processes.rank() == 0:
            text = yaml.safe_dump(self.config, sort_keys=False)
            write_atomic(self.folder / "config.yaml", text.encode())
        return state

    def _begin(self, resume: str | None, epoch: int | None) -> dict[str, Any]:
        found = self.found()
        if epoch is not None:
            state = self.resume(self.folder / f"epoch_{epoch}.pth")
            self.branch = max([branch_of(path) for path in found], default=0) + 1
            return state
        if found and not resume:
            raise UserError(f"{self.folder} holds the checkpoints of a run: continue it with "
                            f"--resume, or start another: {self.anew}")
        if path := newest(found):
            return self.resume(path)
        check_resume(resume, self.folder)
        self.lock()
        return {}

    def found(self) -> list[Path]:
        """The checkpoints in the folder from which a run can continue."""
        return [*self.folder.glob("latest.pth"), *epoch_checkpoints(self.folder)]

    def lock(self) -> None:
        """Keep the folder for this process; UserError if another process trains there."""
        locks.lock(self.folder, f"start another run: {self.anew}")

    def release(self) -> None:
        locks.release(self.folder)

    def save(self, name: str, epoch: int, step: int, **extra: Any) -> None:
        """Save after `step` steps, within `epoch` or at its end; all processes must call it."""
        self.update_tables(step)
        generators: list[Any] = [None] * processes.world()
        mine = {"cpu": torch.get_rng_state()}
        mine |= {key: self.parts[key].state_dict() for key in self.own if key in self.parts}
        if torch.cuda.is_available():
            mine["cuda"] = torch.cuda.get_rng_state()
        if processes.world() > 1:
            dist.all_gather_object(generators, mine)
        else:
            generators = [mine]
        if processes.rank() == 0:
            state = {key: part.state_dict() for key, part in self.parts.items() if key != "model"}
            save_checkpoint(self.folder / name, {
                **coding_state(self.parts["model"]), **state, **extra, "epoch": epoch, "step": step,
                "branch": self.branch, "rng": generators, "config": self.config,
                "hardware": processes.describe_hardware(
                    next(self.parts["model"].parameters()).device)})
        self.last = self.folder / name

    def update_tables(self, step: int, settle: bool = False) -> None:
        """Compute the CDF tables of the weights after `step` steps.

        settle: also solve for the quantiles. Raises UserError if the weights are not finite, or so
        large that they have no CDF tables.
        """
        model = self.parts["model"]
        peaks = {name: p.detach().abs().max() for name, p in model.named_parameters()}
        check_finite(peaks, step - 1, self.last)
        try:
            model.update(force=True, update_quantiles=settle)
        except ValueError:  # the densities overflow
            check_finite({"CDF tables": torch.tensor(math.nan)}, step - 1, self.last)

    def resume(self, path: Path) -> dict[str, Any]:
        """Restore all parts and the random generators of this process; return the checkpoint."""
        state = load_checkpoint(path)
        self.lock()
        missing = [key for key in (*self.parts, "step", "rng") if key not in state]
        if missing:
            raise UserError(f"{path}: cannot be resumed, it has no {', '.join(missing)} "
                            f"(start another run from its weights: {self.anew})")
        mine = state["rng"][min(processes.rank(), len(state["rng"]) - 1)]
        same = [*self.same, *self.parts["model"].options]
        if self.config.get("lr_schedule") == "cosine":
            same += ["epoch", "epochs"]  # which determine the whole schedule
        for key in same:
            before, now = state["config"].get(key), self.config.get(key)
            if before != now:
                flag = "dataset" if key == "images" else key
                place = self.folder if self.folder.name else path  # the current folder stays
                here = f"; to begin one here without them: rename {place}"
                here = here if path.parent == self.folder else ""
                raise UserError(f"{path}: was trained with --{flag} {before}, not {now} (to start "
                                f"another run from its weights: {self.anew}{here})")
        try:
            for key, part in self.parts.items():
                saved = mine[key] if key in mine else state[key]
                if isinstance(part, torch.optim.Optimizer):
                    load_optimizer(part, saved)
                else:
                    part.load_state_dict(saved)
                if hasattr(part, "base_lrs") and isinstance(learning_rate(part.optimizer), float):
                    part.base_lrs = [float(rate) for rate in part.base_lrs]  # tensors on a GPU
        except (RuntimeError, ValueError, KeyError) as e:
            raise UserError(f"{path}: not a checkpoint of this configuration "
                            f"({load_error(e)})") from None
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda"])
        self.last = path
        self.branch = state.get("branch", 0)
        self.config["steps_before"] = steps_of(state) - state["step"]
        if processes.rank() == 0:
            copy_record(path.parent, self.folder)
        return state


def copy_record(source: Path, folder: Path) -> None:
    """Add the unusable images of the run in `source` to those of the run in `folder`."""
    old, own = ((path / RECORD).read_text().splitlines() if (path / RECORD).is_file() else []
                for path in (source, folder))
    if new := [line for line in old if line not in own]:
        write_atomic(folder / RECORD, "".join(f"{line}\n" for line in [*own, *new]).encode())


def newest(paths: Iterable[Path]) -> Path | None:
    """The checkpoint that the training has reached last, as the checkpoints themselves say.

    That is the one of most steps on the last branch: --load_model_epoch goes back and leaves the
    checkpoints of later epochs in the folder, but begins a new branch. Times of files would
    mislead, because a copy has others. A checkpoint that cannot be read is passed over with a note.
    """
    return max(paths, key=lambda path: (*progress(path), path.name), default=None)


def branch_of(path: Path) -> int:
    return max(0, progress(path)[0])


def progress(path: Path) -> tuple[int, int]:
    """(branch, step) of a checkpoint; (-1, 0), and a note, if it is unreadable."""
    state = contents(path)
    if not state and processes.rank() == 0:
        print(f"{path}: cannot be read, and is passed over")
    return (state.get("branch", 0), state.get("step", 0)) if state else (-1, 0)


def contents(path: Path) -> dict[str, Any]:
    """A checkpoint whose tensors are not read before they are used; {} if it is unreadable."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever torch.load raises on a damaged file
        return {}
    return state if isinstance(state, dict) else {}


def check_resume(resume: str | None, folder: Path) -> None:
    """Refuse --resume without `auto` where `folder` holds no run that could be continued."""
    if resume and resume != "auto":
        raise UserError(f"--resume: {folder} holds no checkpoint to continue; leave --resume out, "
                        "or give `--resume auto` to begin the run if there is none")


def epoch_checkpoints(folder: Path) -> list[Path]:
    """The files epoch_<n>.pth of a run, sorted by n; copies with other names are ignored."""
    found = [p for p in folder.glob("epoch_*.pth") if re.fullmatch(r"epoch_\d+", p.stem)]
    return sorted(found, key=lambda p: int(p.stem.split("_")[1]))
