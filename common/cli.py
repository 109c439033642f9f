"""Command lines: flags with defaults from a YAML file, and errors as one line with status 2."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common import UserError, processes

import torch.distributed as dist
import yaml
from tqdm import tqdm

WITHOUT_EFFECT = "without effect"  # begins the help of a flag that is only accepted
SWITCHES = (argparse._StoreTrueAction, argparse.BooleanOptionalAction)  # flags without a value


def run(main: Callable[[], None]) -> None:
    """Run the main() of a script; a UserError becomes one line on stderr and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as e:
        # a data loader process sends its whole traceback, whose last line is the message
        _fail(str(e).strip().splitlines()[-1].removeprefix("common.UserError: "), 2)
    except OSError as e:
        _fail(f"{e.filename}: {e.strerror or e}" if e.filename else str(e.strerror or e), 2)
    except (MemoryError, RuntimeError) as e:
        if not processes.out_of_memory(e):
            raise
        _fail("out of memory: train with a smaller batch or smaller patches and fewer loader "
              "processes (--num_workers 0); code smaller images, or cut them into parts; or close "
              "other programs", 2)
    except KeyboardInterrupt:
        _fail("interrupted (continue a training with --resume)", 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _fail(message: str, status: int) -> None:
    """Print one line on stderr, once for all processes of `launch`, and exit with `status`."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the message starts a new line
    first = True
    if told := os.environ.get(processes.TOLD):
        try:
            os.close(os.open(told, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            first = False
    if first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    if told:
        sys.stdout.flush()
        os._exit(status)  # `launch` ends the others, which may wait for this process
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints errors on one line and shows defaults in --help.

    A flag may be spelled with `-` or `_`. Flags whose help begins with "without effect" are
    accepted, and a line says so when they are given.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False, **kwargs)
        self.defaults: dict[str, Any] = {}  # before --config replaced some of them

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args: Sequence[str] | None = None,  # type: ignore[override]  # Any
                         namespace: Any = None) -> tuple[Any, list[str]]:
        words = self._own_spelling(sys.argv[1:] if args is None else args)
        self.note_without_effect(word.partition("=")[0] for word in words)
        return super().parse_known_args(words, namespace)

    def _own_spelling(self, words: Iterable[str]) -> list[str]:
        """Each word that is a flag, as this parser spells it: --lr_schedule as --lr-schedule."""
        known = {name.replace("_", "-"): name for name in self._option_string_actions}
        result = []
        for word in words:
            name, equals, value = word.partition("=")
            if name.startswith("--") and name not in self._option_string_actions:
                name = known.get(name.replace("_", "-"), name)
            result.append(name + equals + value)
        return result

    def note_without_effect(self, given: Iterable[str]) -> None:
        """Print a line for the flags among `given` that are accepted but do nothing."""
        for name in dict.fromkeys(given):
            action = self._option_string_actions.get(name)
            if action and (action.help or "").startswith(WITHOUT_EFFECT):
                note(f"{name}: {action.help}")


def note(text: str) -> None:
    """Print a line about a flag, once for all processes."""
    if os.environ.get("RANK", "0") == "0" and processes.TOLD not in os.environ:
        print(f"note: {text}", flush=True)


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Make a type for argparse: any spelling of a model's `names` is the first of them.

    Upper and lower case, `-` and `_` are alike.
    """
    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    def parse(text: str) -> str:
        return names[0] if plain(text) in map(plain, names) else text

    return parse


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags; their priority is: defaults < YAML file of --config < command line.

    The keys of the YAML file are the flags' names; an unknown key or a wrong value is an error.
    """
    first = Parser(add_help=False)
    first.add_argument("--config", default=parser.get_default("config"))
    path = first.parse_known_args(argv)[0].config
    if isinstance(parser, Parser):
        parser.defaults = {action.dest: action.default for action in parser._actions}
    if path:
        parser.set_defaults(**_read_config(Path(path), parser))
    return parser.parse_args(argv)


def summary(parser: Parser, args: argparse.Namespace) -> str:
    """The flags of `args` that differ from the defaults, as they would be typed."""
    words: list[str] = []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if value is None or value == parser.defaults.get(action.dest, action.default):
            continue
        name = next((n for n in action.option_strings if n.startswith("--")), "")
        if isinstance(action, argparse.BooleanOptionalAction):
            words.append(name if value else name.replace("--", "--no-", 1))
        elif isinstance(action, SWITCHES):
            words.append(name)
        else:
            words += [name, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return shlex.join(words) or "all flags have their defaults"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the 'flag: value' lines of a configuration file."""
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except OSError as e:
        raise UserError(f"--config {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"--config {path}: not YAML ({' '.join(str(e).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: must hold 'flag: value' lines")
    return values


def _read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    values = read_yaml(path)
    actions = {a.dest: a for a in parser._actions} | {  # and all other names of a flag
        name.lstrip("-").replace("-", "_"): a for a in parser._actions for name in a.option_strings}
    result = {}
    for key, value in values.items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None or action.dest in ("help", "config"):
            raise UserError(f"--config {path}: there is no flag --{key}")
        result[action.dest] = _convert(action, value, f"--config {path}: {key}")
        if isinstance(parser, Parser) and value not in (None, parser.defaults.get(action.dest)):
            parser.note_without_effect(action.option_strings[:1])
    return result


def _convert(action: argparse.Action, value: Any, where: str) -> Any:
    if value is None or isinstance(action, SWITCHES):
        ok = isinstance(value, bool) if value is not None else action.default is None
        converted = value
    else:
        items = value if isinstance(value, list) else [value]
        kind = action.type if callable(action.type) else str
        try:
            converted = [kind(str(v)) for v in items]
            ok = all(action.choices is None or v in action.choices for v in converted)
        except ValueError:
            ok = False
        if ok and action.nargs in (None, "?"):
            ok, converted = len(converted) == 1, converted[0]
    if not ok:
        choices = f" (choose from {', '.join(map(str, action.choices))})" if action.choices else ""
        raise UserError(f"{where}: {value!r} is not a value for this flag{choices}")
    return converted


def _number(name: str, kind: type, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Make a type for argparse: a number for which `holds` is true; NaN is never accepted.

    name: what argparse calls the type in error messages.
    """
    def parse(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise ValueError(text)
        return value

    parse.__name__ = name
    return parse


positive_float = _number("positive_float", float, lambda v: 0 < v <= 1e30)  # fits float32
number = _number("number", float, lambda v: 0 <= v <= 1e30)  # 0 or more
positive_int = _number("positive_int", int, lambda v: v > 0)
count = _number("count", int, lambda v: v >= 0)
minutes = _number("minutes", float, lambda v: v >= 0)
threads = _number("threads", int, lambda v: 0 <= v <= 1024)  # 0: torch chooses
seed_number = _number("seed_number", int, lambda v: -(2**63) <= v < 2**63)  # as manual_seed
