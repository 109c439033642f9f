"""params.json in the folder of a model: the parameters of the experiment, as in the source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import UserError
from common.files import write_atomic

from advdnic.model import EXPERIMENTS

NAME = "params.json"
OPTIMIZERS = ("adam", "adam_w", "adamwd", "radam", "sgd", "momentum", "rmsprop", "adafactor",
              "lamb", "muon")  # the source's names, as far as in PyTorch or timm; muon is ours
DECAYS = ("constant", "exponential", "cosine", "cosine_restarts")
DEFAULTS: dict[str, Any] = {
    "experiment": "base", "num_filters": 128, "patchsize": 256, "lmbda": 0.01,
    "base_learning_rate": 1e-4, "aux_learning_rate": 1e-3, "main_optimizer": "adam",
    "aux_optimizer": "adam", "main_opt_lr_decay_type": "constant",
    "aux_opt_lr_decay_type": "constant", "clip_norm": 2.0, "weight_decay": 0.0, "flip": False,
    "scales_min": 0.11, "scales_max": 256.0, "scales_levels": 64, "use_adversarial_loss": False,
    "variant1": "base", "ep_compat": False, "mod2_down_inverse": True, "resnets": 1, "stages": 0}
CHOICES = {"experiment": EXPERIMENTS, "main_optimizer": OPTIMIZERS, "aux_optimizer": OPTIMIZERS,
           "main_opt_lr_decay_type": DECAYS, "aux_opt_lr_decay_type": DECAYS,
           "variant1": ("base", "mod3"), "stages": (0, 1, 2)}
NOT_NEGATIVE = ("clip_norm", "weight_decay")
POSITIVE = ("num_filters", "patchsize", "lmbda", "base_learning_rate", "aux_learning_rate",
            "scales_min", "scales_max", "scales_levels", "resnets")


def boolean(text: str | bool) -> bool:
    """Parse true, yes, 1 or false, no, 0. The source takes every word, even False, as true."""
    value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
        str(text).lower())
    if value is None:
        raise ValueError(text)
    return value


def read(folder: Path) -> dict[str, Any]:
    """The parameters in the folder of a model, over the defaults; UserError if there are none."""
    path = folder / NAME
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is none; train here first (`train --experiment NAME` writes"
                        " it)") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not JSON ({e})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold one object of names and values")
    return checked(values, str(path))


def write(folder: Path, values: dict[str, Any]) -> None:
    write_atomic(folder / NAME, (json.dumps(values, indent=1) + "\n").encode())


def checked(values: dict[str, Any], where: str) -> dict[str, Any]:
    """DEFAULTS updated with `values`; UserError for unknown names and wrong values."""
    result = dict(DEFAULTS)
    for key, value in values.items():
        if key not in DEFAULTS:
            raise UserError(f"{where}: there is no parameter {key}; there are "
                            f"{', '.join(DEFAULTS)}")
        kind = type(DEFAULTS[key])
        number = kind in (int, float) and isinstance(value, (int, float)) and not isinstance(
            value, bool)
        try:
            fits = (kind(value) == value if number else isinstance(value, kind)
                    and isinstance(value, bool) == (kind is bool))
        except (OverflowError, ValueError):  # Infinity, NaN, huge integers
            fits = False
        if not fits:
            raise UserError(f"{where}: {key} {str(value)[:40]} is not {kind.__name__}")
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{where}: {key} {value!r}: choose from "
                            f"{', '.join(map(str, CHOICES[key]))}")
        if (key in POSITIVE and not 0 < value < 1e30) or (key in NOT_NEGATIVE
                                                          and not 0 <= value < 1e30):
            raise UserError(f"{where}: {key} {value!r}: give a "
                            f"{'positive number' if key in POSITIVE else 'number of 0 or more'}")
        result[key] = kind(value)
    if result["scales_min"] >= result["scales_max"] or result["scales_levels"] < 2:
        raise UserError(f"{where}: scales_min must lie below scales_max, scales_levels above 1")
    if result["main_optimizer"] == "muon" and (result["weight_decay"]
                                               or result["aux_optimizer"] != "adam"):
        raise UserError(f"{where}: main_optimizer muon needs weight_decay 0 and "
                        "aux_optimizer adam")
    if result["aux_optimizer"] == "muon":
        raise UserError(f"{where}: muon is for the main parameters only")
    if result["use_adversarial_loss"]:
        raise UserError(f"{where}: use_adversarial_loss: there is no discriminator, here as in the "
                        "source")
    return result
