"""Pictures of the page: decoded images of every codec, and where the bits of our files go."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import UserError, data
from common.coding import bitstream
from common.coding.codecs import loader
from common.coding.contract import Codec
from common.coding.image_file import pad
from common.comparison import own
from common.comparison.own import Bundled
from common.comparison.table import classical_name, point_name
from common.evaluation.classical import CODECS
from common.files import write_atomic
from common.image_io import to_pillow

import torch
from torch import Tensor
from tqdm import tqdm

TARGETS = (0.12, 0.25, 0.4, 0.65, 1.0)  # bpp at which classical codecs are shown
MOST = 4  # operating points of one codec
QUALITY = 85  # of WebP, for decoded images and originals
MIME = {".jpg": "image/jpeg", ".webp": "image/webp", ".avif": "image/avif"}


def pictures(paths: Sequence[Path], bundled: Sequence[Bundled],
             classical: dict[str, dict[str, Any]], cache: Path, problems: list[str]
             ) -> dict[str, Any]:
    """What the viewer shows: {"images": [...], "codecs": [{"name", "points": [...]}]}.

    Each point has a "views" entry per image: its data URI, bpp, PSNR, bytes, and of our codecs
    "rate", see `where_bits_go`. A codec that fails is left out and named in `problems`.
    """
    found: list[dict[str, Any]] = []
    for curve in bundled:
        name = f"{curve.paper}, {curve.curve}"
        try:
            found.append({"name": name, "points": _own_points(curve, paths)})
        except (UserError, OSError, ValueError, RuntimeError, StopIteration) as e:
            problems.append(f"{name}: not in the viewer: {e}")
    for codec, results in tqdm(classical.items(), desc="viewer", unit="codec", disable=None):
        points = [_classical_point(codec, results, i, paths, cache / "viewer")
                  for i in near(results["results"]["bpp"], TARGETS)]
        found.append({"name": classical_name(results["name"]), "points": points})
    images = []
    for path in paths:
        x = data.read_image(path, lambda _: None)
        images.append({"name": path.stem, "height": x.shape[1], "width": x.shape[2],
                       "src": _uri(_webp(x), ".webp")})
    return {"images": images, "codecs": found}


def near(rates: Sequence[float], targets: Sequence[float]) -> list[int]:
    """Indexes of the rates that are nearest, in ratio, to one of the targets."""
    return sorted({min(range(len(rates)), key=lambda i: abs(math.log(rates[i] / target)))
                   for target in targets})


# -------------------------------------------------------------------------------- classical codecs
def _classical_point(codec: str, results: dict[str, Any], i: int, paths: Sequence[Path],
                     folder: Path) -> dict[str, Any]:
    """An operating point of a classical codec; the browser gets the file itself if it can show it.
    """
    classical = CODECS[codec]
    value, rows = results["meta"][classical.parameter][i], results["per_image"][i]
    views, other = [], f"-{QUALITY}.webp"
    for path in paths:
        row = next(row for row in rows if row["image"] == path.stem)
        kept = folder / f"{codec}-{value}-{row['digest']}{classical.suffix or other}"
        if not kept.exists():
            file, decoded, _, _ = classical.code(data.read_image(path, lambda _: None), value)
            write_atomic(kept, file if classical.suffix else _webp(decoded))
        views.append(_view(row, _uri(kept.read_bytes(), kept.suffix)))
    return {"label": f"{classical.parameter} {value}", "bpp": results["results"]["bpp"][i],
            "views": views}


def _view(row: dict[str, Any], src: str) -> dict[str, Any]:
    return {"src": src, "bpp": round(row["bpp"], 4), "bytes": row["bytes"],
            "psnr": row["psnr-rgb"] and round(row["psnr-rgb"], 2)}


# --------------------------------------------------------------------------------------- our codecs
def _own_points(curve: Bundled, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The operating points of bundled weights, at most MOST of them."""
    rates = curve.results["results"]["bpp"]
    steps = range(len(rates)) if len(rates) <= MOST else sorted(
        {round(i * (len(rates) - 1) / (MOST - 1)) for i in range(MOST)})
    shown = own.as_curve(curve)
    models: dict[str, Codec] = {}
    points = []
    for i in steps:
        views = []
        for path in paths:
            row = next(r for r in curve.results["per_image"][i] if r["image"] == path.stem)
            stem = curve.points[i] / path.stem
            picture, rate = Path(f"{stem}-{QUALITY}.webp"), Path(f"{stem}.rate.json")
            if not picture.exists():
                write_atomic(picture, _webp(data.read_image(f"{stem}.png")))
            if not rate.exists():
                file = Path(f"{stem}.bin").read_bytes()
                model = _model_of(curve, file, models)
                x = data.read_image(path, lambda _: None)
                write_atomic(rate, json.dumps(where_bits_go(model, x, file)).encode())
            views.append(_view(row, _uri(picture.read_bytes(), ".webp"))
                         | {"rate": json.loads(rate.read_text())})
        points.append({"label": point_name(shown, i), "bpp": rates[i], "views": views})
    return points


def _model_of(curve: Bundled, file: bytes, models: dict[str, Codec]) -> Codec:
    """The codec with the weights that a file names; `models` keeps those that were loaded."""
    for path in curve.weights:
        if str(path) not in models:
            models[str(path)] = loader(curve.paper)(path)
        model = models[str(path)]
        if bitstream.unpack(file, model.tag).fingerprint == bitstream.fingerprint(model):
            return model
    raise UserError("a file was coded with other weights")


@torch.no_grad()
def where_bits_go(model: Codec, x: Tensor, file: bytes) -> dict[str, Any]:
    """The bytes of a compressed file of x (3, H, W), uint8, by what they are for.

    header: everything but the coded sections, the checksum included. z, y: -log2 of the likelihoods
    of `forward`, which are those that the file was coded with; y is a list with an entry for each
    step of `Codec.coding_steps`, whose name is "step". coder: what the sections have beyond that
    (it is what rounding to whole bytes, 16-bit tables and escape codes cost). "map" holds the bits
    of y at each latent position, summed over channels, rounded to tenths.
    """
    part = bitstream.unpack(file, model.tag)
    rate = model.read_parameters(part.parameters)
    padded = pad(data.to_float(x)[None], model.downsampling_factor)
    likelihoods = model.eval()(padded, **rate)["likelihoods"]
    bits = {key: -p[0].double().log2() for key, p in likelihoods.items()}
    y = bits["y"]
    name, steps = model.coding_steps((y.shape[0], y.shape[1], y.shape[2]))
    by_step = torch.bincount(steps.flatten(), y.flatten()) / 8
    other = {key: float(b.sum()) / 8 for key, b in bits.items() if key != "y"}
    coded = sum(len(section) for section in part.sections)
    stride = padded.shape[-1] // y.shape[-1]
    height, width = (-(-side // stride) for side in x.shape[-2:])
    per_position = y.sum(0)[:height, :width]
    return {"header": len(file) - coded, **{key: round(v, 1) for key, v in other.items()},
            "y": [round(v, 1) for v in by_step.tolist()], "step": name,
            "coder": round(coded - sum(other.values()) - float(by_step.sum()), 1),
            "map": {"height": height, "width": width,
                    "bits": [round(v, 1) for v in per_position.flatten().tolist()]}}


def _webp(x: Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pillow(x).save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


def _uri(content: bytes, suffix: str) -> str:
    return f"data:{MIME[suffix]};base64,{base64.b64encode(content).decode()}"
