"""Read checkpoint files that others have made: no code is run, and no size is taken on trust.

A checkpoint is a pickle beside the bytes of its tensors. It is read twice. The first time every
class is replaced by a stand-in, which shows what the file holds, where, and how large it is; the
second time torch.load reads it with `weights_only`, which also accepts the classes of `ALLOWED`.
"""

from __future__ import annotations

import argparse
import errno
import math
import pickle
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from common import UserError, processes

import numpy as np
import torch

INFLATED = 2**28  # bytes that any file may take in memory ...
RATIO = 20  # ... and the multiple of its size that a larger one may
UNTYPED = "torch.storage.UntypedStorage"
STORAGES = {"Byte": "uint8", "Char": "int8", "ComplexDouble": "complex128",
            "ComplexFloat": "complex64"}  # and others, whose names are those of types
_ZIP = b"PK\x03\x04"
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # before the zip files of torch 1.6


def read(path: str | Path) -> Any:
    """Return the content of a file of torch.save; UserError if it is unreadable or too large."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LEGACY))
            file.seek(0)
            if start.startswith(_ZIP):
                outline = _outline_of_zip(file)
            elif start == _LEGACY:
                outline = _outline_of_legacy(file)
            else:
                raise UserError(f"{path}: not a checkpoint that can be read: give one of train.py, "
                                "or a state dict (torch.save of tensors)" if start else
                                f"{path}: not a checkpoint that can be read, it is damaged (empty)")
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Damaged as e:
        raise UserError(f"{path}: {e}") from None
    except UserError:
        raise
    except pickle.UnpicklingError as e:
        raise UserError(f"{path}: {_foreign(str(e), outline)}") from None
    except Exception as e:
        if processes.out_of_memory(e):
            raise UserError(f"{path}: there is not enough memory to read it: close other programs, "
                            "or copy it again if it is a small file") from None
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):  # EINVAL: a wild offset
            raise UserError(f"{path}: {e.strerror or e}") from None
        text = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"{path}: not a checkpoint that can be read, it is damaged or cut short "
                        f"({text[:100]})") from None


class Damaged(Exception):
    """What is wrong with a file, without its name."""


# -------------------------------------------------------------------------------- the first reading
class _StandIn:
    """An object of the class `label`, which keeps what the pickle says of it and does nothing."""

    label = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        made = super().__new__(cls)
        made.parts = {f"[{i}]": part for i, part in enumerate(args)}
        return made

    def __init__(self, *args: Any, **kwargs: Any):
        self.parts: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.parts |= state if isinstance(state, dict) else {f"[{len(self.parts)}]": state}

    def append(self, part: Any) -> None:
        self.parts[f"[{len(self.parts)}]"] = part

    def extend(self, parts: Any) -> None:
        for part in parts:
            self.append(part)

    def __setitem__(self, key: Any, part: Any) -> None:
        self.append(part)


@dataclass(eq=False)
class _Storage:
    key: str
    count: int  # elements
    itemsize: int


@dataclass(eq=False)
class _Tensor:
    """bytes: what its elements take if each has its own; fault: why it cannot exist."""

    bytes: int
    fault: str = ""


class _Outline(pickle.Unpickler):
    """Reads a pickle with stand-ins; `storages` are the parts of the file that it refers to."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.storages: dict[str, int] = {}  # bytes, by key

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name.startswith("_rebuild_tensor"):
            return self.tensor
        module = IMPORT_MAPPING.get(module, module)  # torch.save writes the names of Python 2
        return type(name, (_StandIn,), {"label": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, count = pid[:5]
        name = kind.label.rpartition(".")[2].removesuffix("Storage")  # FloatStorage, ByteStorage
        dtype = STORAGES.get(name, name.lower())
        itemsize = getattr(torch, dtype).itemsize if kind.label != UNTYPED else 1
        self.storages[str(key)] = count * itemsize
        return _Storage(str(key), count, itemsize)

    @staticmethod
    def tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _Tensor:
        """Stands for the functions that make a tensor of a part of a storage."""
        if not isinstance(storage, _Storage):
            return _Tensor(0)
        size, stride, count = tuple(size), tuple(stride), math.prod(size)
        end = offset + 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        inside = min((0, offset, *size, *stride)) >= 0 and (count == 0 or end <= storage.count)
        return _Tensor(count * storage.itemsize, "" if inside else "lies outside its values")


def walk(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, object) for everything inside `content`: dicts, lists, stand-ins."""
    stack, seen = [("", content)], set()
    while stack:
        path, value = stack.pop()
        if id(value) in seen and not isinstance(value, (str, int, type)):
            continue
        seen.add(id(value))
        yield path, value
        parts: Any = ()
        if isinstance(value, dict):
            parts = value.items()
        elif isinstance(value, (list, tuple)):
            parts = ((f"[{i}]", part) for i, part in enumerate(value))
        elif isinstance(value, _StandIn):
            parts = value.parts.items()
        stack += [(_join(path, key), part) for key, part in parts][::-1]


def _join(path: str, key: Any) -> str:
    text = str(key) if isinstance(key, (str, int, float)) else type(key).__name__
    return (path + text if text.startswith("[") else f"{path}.{text}" if path else text)[:300]


def _outline_of_zip(file: IO[bytes]) -> Any:
    """The stand-ins in a file of torch.save; `Damaged` if its sizes do not add up."""
    with zipfile.ZipFile(file) as parts:
        entries = {entry.filename.lower(): entry for entry in parts.infolist()}
        pickles = [name for name in entries if name.endswith("data.pkl")]
        if len(entries) != len(parts.infolist()) or len(pickles) != 1:
            raise Damaged("not a checkpoint that can be read: a zip file, but not of torch.save")
        _refuse_large(sum(entry.file_size for entry in entries.values()), file)
        if (part := parts.testzip()) is not None:  # torch.load does not check the checksums
            raise Damaged(f"damaged ({part} has another checksum): copy it again")
        with parts.open(entries[pickles[0]]) as data:
            reader = _Outline(data)
            content = reader.load()
        folder = pickles[0].removesuffix("data.pkl")
        for key, size in reader.storages.items():
            entry = entries.get(f"{folder}data/{key}".lower())
            if entry is None or not 0 <= size <= entry.file_size:
                raise Damaged("damaged (values of a tensor are missing): copy it again")
    _check_tensors(content, file)
    return content


def _outline_of_legacy(file: IO[bytes]) -> Any:
    """The same for the older format: four pickles, the list of storages, and their values."""
    for _ in range(3):
        _Outline(file).load()
    reader = _Outline(file)
    content = reader.load()
    if min([0, *reader.storages.values()]) < 0 or (
            sum(reader.storages.values()) > Path(file.name).stat().st_size):
        raise Damaged("damaged (values of a tensor are missing): copy it again")
    _check_tensors(content, file)
    return content


def _check_tensors(content: Any, file: IO[bytes]) -> None:
    total = 0
    for path, value in walk(content):
        if isinstance(value, _Tensor):
            if value.fault:
                raise Damaged(f"damaged (the tensor {path} {value.fault}): copy it again")
            total += value.bytes
            _refuse_large(total, file, f" from {path} on")
    file.seek(0)


def _refuse_large(size: int, file: IO[bytes], where: str = "") -> None:
    given = Path(file.name).stat().st_size
    if size > max(INFLATED, RATIO * given):
        raise Damaged(f"a file of {given:,} bytes that would take {size:,} in memory{where}: "
                      "this is no checkpoint")


def _foreign(message: str, content: Any) -> str:
    """Say which entry holds an object that is not read, from the message of torch.load."""
    found = re.search(r"(?:GLOBAL|global) ([\w.]+)", message)
    for path, value in walk(content):
        kind = value if isinstance(value, type) else type(value)
        if found and issubclass(kind, _StandIn) and f".{kind.label}".endswith(f".{found[1]}"):
            return (f"its entry {path} holds a {kind.label}, which is not read because it could run"
                    " code: save the state dict alone (torch.save of tensors)")
    return ("not a checkpoint that can be read: give one of train.py, or a state dict (torch.save "
            "of tensors, no other objects)")


# -------------------------------------------------------------- classes that may be beside weights
class _NumpyType:
    """A NumPy dtype in a pickle: its code and, from its state, its byte order."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def _scalar(kind: _NumpyType, data: bytes) -> Any:
    """A NumPy number as Python's number."""
    dtype = np.dtype(kind.code)
    if dtype.kind not in "biuf":
        raise ValueError(f"a NumPy scalar of type {kind.code}")
    dtype = dtype.newbyteorder(">" if kind.order == ">" else "<")
    return np.frombuffer(data, dtype, 1)[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    """bytes in pickles of Python 2's protocol."""
    return text.encode("latin1" if encoding == "latin1" else "ascii")


def _path(kind: Any, *names: str) -> list[tuple[Any, str]]:
    return [(kind, name) for name in names]


# What torch.load reads for these names.
ALLOWED: list[Any] = [
    argparse.Namespace, (_NumpyType, "numpy.dtype"), (_latin1, "_codecs.encode"),
    *_path(_scalar, "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *_path(PurePosixPath, "pathlib.PosixPath", "pathlib._local.PosixPath"),
    *_path(PureWindowsPath, "pathlib.WindowsPath", "pathlib._local.WindowsPath")]
