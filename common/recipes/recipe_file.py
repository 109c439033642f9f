"""Read the stages and curves of a weights.yaml, and check every key and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import UserError
from common.evaluation.results import is_number

import yaml

NUMBER, WORDS = (int, float), (str, list)
FILE = {"images": str, "train": dict, "eval": dict, "stages": dict, "curves": dict}, {"short": dict}
TRAIN = {"dataset": WORDS, "start": WORDS, "resume": WORDS}
STAGE = ({"steps": int, "hours": NUMBER, "folders": list, "checkpoint": str, "flags": dict},
         {"from": str, "train": dict})
CURVE = {"files": dict}, {"bundle": bool, "evaluate": list, "label": str}
SHORT = {"steps": int, "flags": dict}


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the checked content of a weights.yaml; UserError names the file and the key."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not YAML ({' '.join(str(e).split())})") from None
    check(content, path, *FILE)
    check(content["train"], f"{path}: train", TRAIN, {"seed": str})
    check(content["eval"], f"{path}: eval", {"dataset": WORDS})
    if "short" in content:
        check(content["short"], f"{path}: short", SHORT)
    for name, stage in content["stages"].items():
        check(stage, where := f"{path}: stages: {name}", *STAGE)
        check(stage.get("train", {}), f"{where}: train", {}, TRAIN)
        if not isinstance(name, str) or "/" in name:
            raise UserError(f'{where}: a name is a text without "/": write it in quotes')
        paths = [*stage["folders"], stage["checkpoint"]]
        if not stage["folders"] or not all(isinstance(f, str) for f in paths):
            raise UserError(f"{where}: folders: name at least one folder")
        if any(Path(path).is_absolute() or ".." in Path(path).parts for path in paths):
            raise UserError(f"{where}: folders and checkpoint lie below the paper's folder")
        if stage["steps"] < 1:
            raise UserError(f"{where}: steps: give 1 or more")
    for name, curve in content["curves"].items():
        check(curve, where := f"{path}: curves: {name}", *CURVE)
        if not curve["files"]:
            raise UserError(f"{where}: files: name at least one")
        for file, stage in curve["files"].items():
            if not isinstance(stage, str) or stage not in content["stages"]:
                raise UserError(f"{where}: files: {file}: there is no stage {stage}")
            if Path(file).name != file:
                raise UserError(f"{where}: files: {file}: give the name of a file in weights/")
    return content


def check(values: Any, where: Any, required: dict[str, Any], optional: dict[str, Any] | None = None
          ) -> None:
    """Raise UserError unless `values` is a mapping with these keys and types of values."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold 'key: value' lines")
    known = required | (optional or {})
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: there is no key {key} (known: {', '.join(known)})")
        number = isinstance(value, (int, float)) and known[key] is not bool
        if not isinstance(value, known[key]) or (number and not is_number(value)):
            raise UserError(f"{where}: {key}: {value!r} is not a value for this key")
    for key in required:
        if key not in values:
            raise UserError(f"{where}: {key} is missing")


def words(flags: dict[str, Any]) -> list[str]:
    """Flags as a command line: lists become several words, true is --flag, false is --no-flag."""
    result: list[str] = []
    for key, value in flags.items():
        if isinstance(value, bool):
            result.append(f"--{key}" if value else f"--no-{key}")
        else:
            result += [f"--{key}", *map(str, as_list(value))]
    return result


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
