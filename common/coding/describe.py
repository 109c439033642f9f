"""What a file is, in a few lines: a compressed file, a checkpoint of any origin, or results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import UserError
from common.coding import bitstream, checkpoint_file, codecs
from common.coding.contract import Codec
from common.coding.model_file import WEIGHTS, load_checkpoint
from common.coding.names import BEFORE, INSIDE, plain_name
from common.files import read_file

from torch import Tensor

WRAPPERS = {"module": "DataParallel or an average of weights", "_orig_mod": "torch.compile",
            "_fsdp_wrapped_module": "FSDP", "_checkpoint_wrapped_module": "activation checkpoints",
            "net": "a model that contains this one", "model": "a model that contains this one"}
AVERAGES = ("averaged", "ema_state_dict", "state_dict_ema", "ema", "model_ema")  # as entries


def describe(path: Path) -> list[str]:
    """Lines about a file; UserError if it is none of those above, or is damaged."""
    data = read_file(path)
    if data.startswith(bitstream.MAGIC):
        try:
            return _compressed(path, data)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
    if data.lstrip()[:1] == b"{":
        return _results(path, data)
    return _checkpoint(path, len(data))


# ---------------------------------------------------------------------------- compressed files
def _compressed(path: Path, data: bytes) -> list[str]:
    tag = bitstream.tag_of(data)
    file = bitstream.unpack(data, tag)
    sections = [len(section) for section in file.sections]
    bpp = 8 * len(data) / (file.height * file.width)
    lines = [f"{path}: compressed image, {file.width}x{file.height}, {len(data):,} bytes, "
             f"{bpp:.4f} bpp",
             f"  header and checksum  {len(data) - sum(sections):,} bytes, version {data[3]}",
             f"  sections             {' + '.join(f'{n:,}' for n in sections)} bytes"]
    if file.parameters:
        lines.append(f"  parameters           {file.parameters.hex()} (rate, patches)")
    try:
        paper = codecs.paper_of(data)
    except UserError as e:
        return [*lines, f"  codec                {e}"]
    known = codecs.find_bundled(paper, file.fingerprint)
    lines += [f"  paper                {paper}",
              f"  weights              {file.fingerprint.hex()}, "
              + (f"bundled: {known}" if known else "not bundled")]
    words = ["licodecs", "decode", str(path)] + ([] if known else ["--checkpoint"])
    return [*lines, f"next: {shlex.join(words)}{'' if known else ' WEIGHTS'}"]


# --------------------------------------------------------------------------------- checkpoints
def _checkpoint(path: Path, size: int) -> list[str]:
    content = checkpoint_file.read(path)
    state = load_checkpoint(path)
    weights = state["model"]
    count = sum(value.numel() for value in weights.values() if value.is_floating_point())
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in _named(content).values()
                    if value.is_floating_point() or str(value.dtype) == "torch.int8"})
    lines = [f"{path}: checkpoint, {size:,} bytes, {len(weights)} tensors, {count:,} values "
             f"({', '.join(kinds)})", *_entries(content), *_spelling(_named(content))]
    found, reasons = _codecs_of(path)
    if not found:
        closest = max(reasons, key=lambda paper: "missing" not in reasons[paper])
        return [*lines, f"  paper                none of {', '.join(codecs.papers())}",
                f"next: only the weights of one of these can be coded with; {closest} says: "
                f"{reasons[closest]}"]
    for paper, model in found.items():
        widths = [f"{n} = {getattr(model, n)}" for n in ("N", "M") if n in vars(model)]
        lines += [f"  paper                {paper}, {type(model).__name__}"
                  + "".join(f", {text}" for text in widths),
                  f"  fingerprint          {bitstream.fingerprint(model).hex()}"]
    lines += _tables(weights, state)
    paper, model = next(iter(found.items()))
    lines += _training(model)
    flags = ["--paper", paper, "--checkpoint", str(path)]
    return [*lines, f"next: licodecs encode photo.png {shlex.join(flags)}",
            f"      licodecs eval {shlex.join(flags)} --images FOLDER"]


def _named(content: Any) -> dict[str, Tensor]:
    """The tensors of the state dict in a checkpoint, under the names in the file."""
    if isinstance(content, Mapping):
        for key in ("model", *WEIGHTS):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def _entries(content: Mapping[str, Any]) -> list[str]:
    """What stands beside the weights."""
    if any(isinstance(value, Tensor) for value in content.values()):
        return ["  content              a bare state dict"]
    lightning = any(str(key).startswith("pytorch-lightning") for key in content)
    lines = [f"  content              {', '.join(map(str, content))}"
             + (" (PyTorch Lightning)" if lightning else "")]
    if averages := [name for name in AVERAGES if content.get(name) is not None]:
        used = "averaged" in averages or "ema_state_dict" in averages
        lines.append(f"  averaged weights     in {', '.join(averages)}"
                     + ("; they are used" if used else "; not read: to use them, save them alone"))
    return lines


def _spelling(names: Mapping[str, Tensor]) -> list[str]:
    """Wrappers in the names of the weights, and CompressAI's spelling of its densities."""
    parts = {part for name in names for part in name.split(".")[:-1] if part in INSIDE}
    first = {name.split(".")[0] for name in names} - set(INSIDE)
    parts |= first & set(BEFORE) if len(first) == 1 else set()
    lines = [f"  names                inside {part} ({WRAPPERS[part]})" for part in sorted(parts)]
    if "n_averaged" in names:
        lines.append("  names                with n_averaged: an average of torch.optim.swa_utils")
    old = {name for name in names if "entropy_bottleneck" in name and plain_name(name) != name
           and any(word in name for word in ("._matri", "._bias", "._factor"))}
    if old:
        lines.append("  names                CompressAI's of "
                     + ("its published files" if any("_matrices." in n for n in old) else "2020"))
    return lines


def _codecs_of(path: Path) -> tuple[dict[str, Codec], dict[str, str]]:
    """The papers whose model has exactly these weights, and why the others do not."""
    found, reasons = {}, {}
    for paper in codecs.papers():
        try:
            found[paper] = codecs.loader(paper)(path)
        except UserError as e:
            reasons[paper] = str(e).removeprefix(f"{path}: ")
    return found, reasons


def _tables(weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    sizes = [value.numel() for name, value in weights.items() if name.endswith("_quantized_cdf")]
    inside = "in the file" if sizes and all(sizes) else "made when it is loaded (not updated)"
    exact = "in the file" if state.get("exact") is not None else "made when it is loaded"
    lines = [f"  CDF tables           {inside}", f"  fixed-point settings {exact}"]
    if "made" in inside + exact:
        lines.append("  note                 what is made on loading may differ elsewhere: to keep "
                     "files, save the loaded model with common.coding.model_file")
    return lines


def _training(model: Codec) -> list[str]:
    origin = model.provenance
    words = [f"{name} {origin.config[name]}" for name in ("lmbda", "metric", "pretrained")
             if origin.config.get(name) is not None]
    words += [] if origin.total_steps is None else [f"{origin.total_steps:,} steps"]
    words += [] if origin.epoch is None else [f"epoch {origin.epoch}"]
    return [f"  trained              {', '.join(words)}"] if words else []


# ------------------------------------------------------------------------------------- results
def _results(path: Path, data: bytes) -> list[str]:
    try:
        content = json.loads(data)
        curves = [content] if "results" in content else content["curves"]
        lines = [f"{path}: results of {len(curves)} curve{'s' * (len(curves) != 1)}"]
        for curve in curves:
            points = zip(curve["results"]["bpp"], curve["results"]["psnr-rgb"], strict=True)
            lines.append(f"  {curve['name']}: " + ", ".join(
                f"{bpp:.4f} bpp {psnr:.2f} dB" for bpp, psnr in points))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: JSON, but no results of eval.py or compare") from None
    return [*lines, f"next: python -m common.evaluation.compare --results {shlex.quote(str(path))}"]
