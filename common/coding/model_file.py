"""Read and write checkpoint files, and build codecs from them that are ready to code."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from common import UserError
from common.coding import checkpoint_file, exact, schema
from common.coding.contract import Codec, Provenance
from common.coding.entropy import Tables
from common.coding.names import plain_names
from common.files import write_atomic

import torch
from compressai.entropy_models import EntropyModel
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

AnyCodec = TypeVar("AnyCodec", bound=Codec)
BROKEN = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError,
          OverflowError, ZeroDivisionError)  # what weights of impossible shapes may lead to
WEIGHTS = ("state_dict", "network", "model_state_dict", "net")  # names of "model" elsewhere


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write atomically, so that a full disk or a killed process leaves the old file unchanged."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours, or a bare state dict, which is returned under "model".

    Weights get their plain names, without what wrappers add (`names.plain_name`). UserError if the
    file is unreadable, or an entry is not as `schema` describes it.
    """
    state = checkpoint_file.read(path)
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path}: holds no state dict")
    state = dict(state)
    if "model" not in state:
        other = {key: value for key, value in state.items() if key not in WEIGHTS}
        weights = next((state[key] for key in WEIGHTS if key in state), None)
        state = {"model": state} if weights is None else {"model": weights} | other
    weights = state["model"]
    if not isinstance(weights, Mapping) or not any(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise UserError(f"{path}: holds no state dict")
    try:
        schema.check(state)
        steps = state.pop("int8_steps", {})  # in files of common/recipes/export.py
        state["model"] = plain_names({
            k: v * steps[k] if k in steps else v.float() if v.is_floating_point() else v
            for k, v in state["model"].items()})
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    return state


def load_model(path: str | Path, kind: type[AnyCodec], device: torch.device | str = "cpu",
               state: dict[str, Any] | None = None) -> AnyCodec:
    """Build a codec of class `kind` from a checkpoint: eval mode, channels_last, ready to code.

    state: the result of `load_checkpoint(path)`, if already read. If the checkpoint has weights
    "averaged" over the training, these replace the last ones.

    CDF tables and fixed-point exponents come from the file; only a bare state dict without them
    gets new ones. `kind.options` names the entries of the training configuration that weights do
    not reveal; they are passed to `kind.from_state_dict`. The configuration, step, epoch and
    hardware are left in `model.provenance`.
    """
    state = load_checkpoint(path) if state is None else state
    averaged = state.get("averaged")
    state = {**state, **(averaged if isinstance(averaged, dict) else {})}
    config = state["config"] = state.get("config") or {}
    options = {name: config[name] for name in kind.options if name in config}
    try:
        with no_larger_than(state["model"]):
            model = kind.from_state_dict(state["model"], **options)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except KeyError as e:
        raise UserError(f"{path}: not the weights of a {kind.__name__}: {e} is missing") from None
    except BROKEN as e:
        raise UserError(f"{path}: not the weights of a {kind.__name__}: {load_error(e)}") from None
    try:
        model.update(scale_table_of(model))  # only tables that are missing
        for part in model.modules():
            if isinstance(part, EntropyModel):
                Tables.of(part)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except BROKEN:
        raise UserError(f"{path}: its densities are broken, no CDF tables fit") from None
    if (saved := state.get("exact")) is not None:
        if saved.keys() != set(model.exact_parts):
            raise UserError(f"{path}: its entry exact is of {', '.join(saved) or 'no part'}, this "
                            f"model needs {', '.join(model.exact_parts) or 'none'}")
        for name, spec in saved.items():
            try:
                part = model.get_submodule(name)
                exact.restore(part, {} if spec is None else spec, f"exact.{name}")
            except UserError as e:
                raise UserError(f"{path}: {e}") from None
    model.provenance = Provenance(config, *(state.get(k) for k in ("step", "epoch", "hardware")))
    return model.eval().to(  # type: ignore[call-overload]  # torch does not declare memory_format
        device, memory_format=torch.channels_last)


@contextlib.contextmanager
def no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise RuntimeError as soon as a model that is built here has far more parameters.

    A model gets the widths of some of its weights; if the others are smaller, it could be of any
    size.
    """
    left = 4 * sum(value.numel() for value in weights.values()) + 2**20

    def count(_: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal left
        left -= parameter.numel()
        if left < 0:
            raise RuntimeError(f"sizes differ, at the latest at {name} {tuple(parameter.shape)}")

    hook = register_module_parameter_registration_hook(count)  # before its values are drawn
    try:
        yield
    finally:
        hook.remove()


def scale_table_of(model: Codec) -> Tensor | None:
    """The scale table that came with the weights; None for the model's own."""
    part = getattr(model, "gaussian_conditional", None)
    return part.scale_table if part is not None and part.scale_table.numel() else None


def load_error(e: Exception) -> str:
    """The keys in an error of load_state_dict, on one line and without its heading."""
    lines = [line.strip() for line in str(e).splitlines()]
    return " ".join(lines[1:] or lines)[:300]


def coding_state(model: Codec) -> dict[str, Any]:
    """The part of a checkpoint that is needed to decode files written with it."""
    return {"model": model.state_dict(),
            "exact": {name: exact.spec(model.get_submodule(name)) for name in model.exact_parts}}
