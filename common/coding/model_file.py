"""Read and write checkpoint files, and build codecs from them that are ready to code."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, TypeVar

from common import UserError
from common.coding import exact
from common.coding.contract import Codec, Provenance
from common.files import write_atomic

import torch
from torch import Tensor

AnyCodec = TypeVar("AnyCodec", bound=Codec)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write atomically, so that a full disk or a killed process leaves the old file unchanged."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours, or a bare state dict, which is returned under "model".

    The prefixes `module.` and `_orig_mod.` of keys are removed. UserError if it is unreadable.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:  # torch.load does not check the checksums
                if (part := parts.testzip()) is not None:
                    raise UserError(f"{path}: damaged ({part} has another checksum): copy it again")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a checkpoint that can be read: give one of train.py, or a "
                        "state dict (torch.save of tensors, no other objects)") from None
    except Exception as e:
        text = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"{path}: not a checkpoint that can be read, it is damaged or cut short "
                        f"({text[:100]})") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: holds no state dict")
    if "model" not in state:
        names = ("state_dict", "network", "model_state_dict")
        other = {key: value for key, value in state.items() if key not in names}
        weights = next((state[key] for key in names if key in state), None)
        state = {"model": state} if weights is None else {"model": weights} | other
    weights = state["model"]
    if not isinstance(weights, dict) or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        raise UserError(f"{path}: holds no state dict")
    for prefix in ("module.", "_orig_mod."):
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    steps = state.pop("int8_steps", {})  # in files of common/recipes/export.py
    if {k for k, v in weights.items() if v.dtype == torch.int8} != set(steps):
        raise UserError(f"{path}: the steps of its 8-bit kernels are missing: export it again")
    state["model"] = {k: v * steps[k] if k in steps else v.float() if v.is_floating_point() else v
                      for k, v in weights.items()}
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
        model = kind.from_state_dict(state["model"], **options)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except KeyError as e:
        raise UserError(f"{path}: not the weights of a {kind.__name__}: {e} is missing") from None
    except RuntimeError as e:
        raise UserError(f"{path}: not the weights of a {kind.__name__}: {load_error(e)}") from None
    if any(name.endswith("_quantized_cdf") and b.numel() == 0 for name, b in model.named_buffers()):
        try:
            model.update(force=True)
        except ValueError:
            raise UserError(f"{path}: its densities are broken (NaN?), no CDF tables fit") from None
    for name, spec in state.get("exact", {}).items():
        exact.restore(model.get_submodule(name), spec)
    model.provenance = Provenance(config, *(state.get(k) for k in ("step", "epoch", "hardware")))
    return model.eval().to(  # type: ignore[call-overload]  # torch does not declare memory_format
        device, memory_format=torch.channels_last)


def load_error(e: Exception) -> str:
    """The keys in an error of load_state_dict, on one line and without its heading."""
    lines = [line.strip() for line in str(e).splitlines()]
    return " ".join(lines[1:] or lines)[:300]


def coding_state(model: Codec) -> dict[str, Any]:
    """The part of a checkpoint that is needed to decode files written with it."""
    return {"model": model.state_dict(),
            "exact": {name: exact.spec(model.get_submodule(name)) for name in model.exact_parts}}
