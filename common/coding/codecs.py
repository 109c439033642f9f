"""The codecs of all papers: their classes, the bundled weights, and the codec that a file needs."""

from __future__ import annotations

import importlib
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import UserError, data
from common.coding import bitstream, image_file
from common.coding.contract import Codec
from common.files import read_file
from common.papers import ROOT, papers

import torch
from torch import Tensor


def check_paper(paper: str | None) -> str:
    """Return the name of a paper's folder; UserError lists those that there are."""
    if paper not in papers():
        asked = f"no paper {paper!r}" if paper else "which paper?"
        raise UserError(f"{asked}: choose --paper from {', '.join(papers())}")
    return str(paper)


def loader(paper: str) -> Callable[..., Codec]:
    """The function `load` of the paper's model.py."""
    load: Callable[..., Codec] = importlib.import_module(f"{paper}.model").load
    return load


def codec_class(paper: str) -> type[Codec]:
    """The class of the paper's codec: what its `load` is declared to return."""
    kind: type[Codec] = typing.get_type_hints(loader(paper))["return"]
    return kind


def paper_of(file: bytes) -> str:
    """The paper whose codec wrote this file, by the tag in its header."""
    tag = bitstream.tag_of(file)
    for paper in papers():
        if codec_class(paper).tag == tag:
            return paper
    raise UserError(f"the file was written by the codec {tag!r}, which is not installed here: "
                    f"there are {', '.join(papers())}")


def weights_folder(paper: str) -> Path:
    return ROOT / paper / "weights"


def bundled(folder: Path) -> dict[str, Path]:
    """The bundled weights in a folder, by their names without `small-`."""
    return {p.stem.removeprefix("small-"): p for p in sorted(folder.glob("small-*.pth"))}


def find_bundled(paper: str, fingerprint: bytes) -> str:
    """Name of the bundled weights with this fingerprint; an empty string if there are none."""
    for name, path in bundled(weights_folder(paper)).items():
        if bitstream.fingerprint(loader(paper)(path)) == fingerprint:
            return name
    return ""


def choose(folder: Path, name: str | None = None, lmbda: float | None = None, prefix: str = ""
           ) -> Path:
    """The bundled weights with this name or trained with this lmbda.

    By default the last ones, which have the highest rate, of those whose names begin with `prefix`.
    """
    names = bundled(folder)
    if not names:
        raise UserError(f"{folder}: holds no bundled weights: name others with --checkpoint")
    preferred = [n for n in names if n.startswith(prefix)] or list(names)
    if name is not None:
        if name not in names:
            raise UserError(f"--weights {name}: choose from {', '.join(names)}")
        return names[name]
    if lmbda is None:
        return names[preferred[-1]]
    for candidate in [*preferred, *names]:
        if math.isclose(_lmbda(candidate), lmbda, rel_tol=1e-3):
            return names[candidate]
    raise UserError(f"--lmbda {lmbda:g}: no bundled weights of {folder.parent.name} have it; "
                    f"choose --weights from {', '.join(names)}, or name others with --checkpoint")


def _lmbda(name: str) -> float:
    """The number at the end of the name of bundled weights: 0.0035 of swint-charm-0.0035."""
    try:
        return float(name.rpartition("-")[2])
    except ValueError:
        return math.nan


def default_prefix(paper: str) -> str:
    """Beginning of the names of the bundled weights that the paper's codec.py prefers."""
    return getattr(importlib.import_module(f"{paper}.codec"), "BUNDLED", "")


def load(paper: str, lmbda: float | None, weights: str | None, checkpoint: str | Path | None,
         device: str) -> Codec:
    """`licodecs.load`."""
    check_paper(paper)
    if sum(value is not None for value in (lmbda, weights, checkpoint)) > 1:
        raise UserError("lmbda, weights, checkpoint: give one of them")
    path = checkpoint or choose(weights_folder(paper), weights, lmbda, default_prefix(paper))
    return loader(paper)(path, torch.device(device))


def encode(codec: Codec, image: str | Path | Tensor, **rate: Any) -> bytes:
    """`licodecs.encode`."""
    x = data.to_float(data.read_image(image)) if isinstance(image, (str, Path)) else image
    if isinstance(x, Tensor):
        x = x.to(next(codec.parameters()).device)
    return image_file.encode_image(codec, x, **rate)


def decode(file: bytes | str | Path, codec: Codec | None, device: str) -> Tensor:
    """`licodecs.decode`."""
    content = file if isinstance(file, bytes) else read_file(Path(file))
    if codec is None:
        paper = paper_of(content)
        codec = image_file.find_model(content, codec_class(paper),
                                      bundled(weights_folder(paper)).values(), loader(paper),
                                      torch.device(device))
    package = type(codec).__module__.partition(".")[0]
    if package in papers():  # a paper's codec.py may know more files, such as those in patches
        own = importlib.import_module(f"{package}.codec")
        return getattr(own, "decode", image_file.decode_image)(codec, content)
    return image_file.decode_image(codec, content)
