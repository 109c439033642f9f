"""Results of a codec on a set of images, and the JSON file that holds them.

A results JSON describes one codec in CompressAI's form. Each list in "results" and "meta" has one
entry per operating point, in order of increasing rate; so has "per_image", whose entries are lists
with a row per image. An undefined number (such as the MS-SSIM of a small image) is null.
"images_digest" in "meta" identifies the images by their pixels (`common.evaluation.image_sets`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from common import UserError, metrics
from common.evaluation import further_metrics, image_sets
from common.files import read_file, write_atomic

from torch import Tensor

MEASURES = ("bpp", "psnr-rgb", "ms-ssim-rgb", "encoding_time", "decoding_time", "bpp_estimated")


def image_names(paths: list[Path]) -> dict[Path, str]:
    """Name of each image in the results: its stem, or its file name if stems are not unique."""
    unique = len({p.stem for p in paths}) == len(paths)
    return {p: p.stem if unique else p.name for p in paths}


def image_record(image: str, x: Tensor, x_hat: Tensor, num_bytes: int,
                 ms_ssim: bool = True, digest: str | None = None) -> dict[str, Any]:
    """Results of one image; x, x_hat: original and decoded image (3, H, W), uint8.

    digest: that of x, if it is known already.
    """
    height, width = x.shape[-2:]
    return {"image": image, "digest": digest or image_sets.image_digest(x), "height": height,
            "width": width, "bytes": num_bytes,
            "bpp": metrics.bpp(num_bytes, height, width), "psnr-rgb": metrics.psnr(x, x_hat),
            "ms-ssim-rgb": metrics.ms_ssim(x, x_hat) if ms_ssim else None}


def operating_point(name: str, description: str, rows: list[dict[str, Any]], meta: dict[str, Any]
          ) -> dict[str, Any]:
    """Results of one operating point: the means over the rows of its images."""
    if not rows:
        raise UserError("there are no images to evaluate: name a folder that holds some")
    further = [key for key in further_metrics.METRICS if all(key in row for row in rows)]
    results = {key: [mean([r.get(key) for r in rows])] for key in (*MEASURES, *further)}
    meta = meta | {"images": len(rows)}
    if all("digest" in row for row in rows):
        meta["images_digest"] = image_sets.set_digest([row["digest"] for row in rows])
    return {"name": name, "description": description, "results": results,
            "meta": {key: [value] for key, value in meta.items()},
            "per_image": [rows]}


def merge_points(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge several results of one codec, sorted by rate; name and description are the first's."""
    parts = [(p["results"]["bpp"][i], p, i) for p in points
             for i in range(len(p["results"]["bpp"]))]
    parts.sort(key=lambda part: part[0])

    def gather(block: str) -> dict[str, list[Any]]:
        keys = dict.fromkeys(key for p in points for key in p[block])
        return {key: [p[block][key][i] if key in p[block] else None for _, p, i in parts]
                for key in keys}

    return {"name": points[0]["name"], "description": points[0]["description"],
            "results": gather("results"), "meta": gather("meta"),
            "per_image": [p["per_image"][i] for _, p, i in parts]}


def save_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write results as JSON, with one line per image and eight significant digits."""
    write_atomic(path, (format_json(results) + "\n").encode())


def load_results(path: str | Path) -> dict[str, Any]:
    """Read the results of one codec; UserError if the file holds something else."""
    return _checked(_parse(path), path)


def folders_of_points(results: dict[str, Any], output: Path) -> list[Path]:
    """The folder of files and decoded images of each operating point, below that of eval.py.

    A point is recognised by the sizes of its files.
    """
    def sizes(curve: dict[str, Any], i: int) -> tuple[int, ...]:
        return tuple(row["bytes"] for row in curve["per_image"][i])

    known = {sizes(load_results(file), 0): file.parent for file in output.rglob("results.json")}
    return [known[sizes(results, i)] for i in range(len(results["results"]["bpp"]))]


def load_published(path: str | Path) -> list[dict[str, Any]]:
    """Read the curves of a published.json; the one that "reference" names becomes the first.

    Each curve gets the "dataset" of the file and, in "meta", the digest of these images, if it is
    known. Raises UserError if the file holds something else.
    """
    content = _parse(path)
    curves = content.get("curves") if isinstance(content, dict) else None
    if not isinstance(curves, list):
        raise UserError(f"{path}: not published curves, there are no \"curves\" in it")
    curves = [_checked(curve, path) for curve in curves]
    reference = content.get("reference")
    if curves and reference not in [curve["name"] for curve in curves]:
        raise UserError(f"{path}: \"reference\" must name the curve that results are compared "
                        f"with, not {json.dumps(reference)}")
    for curve in curves:
        curve.setdefault("dataset", content.get("dataset"))
        curve.setdefault("meta", {}).setdefault("images_digest", image_sets.named(content))
    return sorted(curves, key=lambda curve: curve["name"] != reference)


def _parse(path: str | Path) -> Any:
    try:
        return json.loads(read_file(path))
    except ValueError as e:
        raise UserError(f"{path}: not a results JSON ({e})") from None


def _checked(curve: Any, path: str | Path) -> dict[str, Any]:
    """Return `curve` if it is a results JSON; UserError says what is wrong with it."""
    if wrong := _fault(curve):
        raise UserError(f"{path}: not a results JSON: {wrong}")
    checked: dict[str, Any] = curve
    return checked


def _fault(curve: Any) -> str:
    """What a results JSON lacks, in words: the form of its lists, or numbers; "" for nothing."""
    form = ("it needs a name, and bpp and psnr-rgb as lists of equal length "
            "(published.json goes to --published)")
    if not isinstance(curve, dict) or not isinstance(curve.get("name"), str):
        return form
    results, meta = curve.get("results"), curve.get("meta", {})
    if not isinstance(results, dict) or not all(
            isinstance(results.get(key), list) for key in ("bpp", "psnr-rgb")):
        return form
    if not isinstance(meta, dict):
        return '"meta" must hold "key: values" pairs'
    count = len(results["bpp"])
    for key, values in [*results.items(), *meta.items()]:
        if isinstance(values, list) and len(values) != count:
            return f"{key} has {len(values)} entries, bpp has {count}"
    numbers = results | {key: meta[key] for key in ("lmbda", "N", "M", "steps") if key in meta}
    for key, values in numbers.items():
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not is_number(value):
                return f"{key}: {json.dumps(value)} is not a number"
    if not count or not all(rate and rate > 0 for rate in results["bpp"]):
        return "bpp: give at least one rate, and only positive ones"
    return ""


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number."""
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and math.isfinite(value))


def mean(values: list[float | None]) -> float | None:
    """The mean; None if a value is None."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None


def format_json(value: Any, indent: str = "") -> str:
    """Format as JSON; only lists and dicts that contain others are spread over several lines."""
    if isinstance(value, float):
        return f"{value:.8g}" if math.isfinite(value) else "null"
    if not isinstance(value, (dict, list, tuple)):
        return json.dumps(value)
    items = list(value.values()) if isinstance(value, dict) else value
    nested = any(isinstance(item, (dict, list, tuple)) for item in items)
    inner = indent + " " if nested else ""
    texts = [format_json(item, inner) for item in items]
    if isinstance(value, dict):
        texts = [f"{json.dumps(k)}: {t}" for k, t in zip(value, texts, strict=True)]
    joint = f",\n{inner}" if nested else ", "
    body = f"\n{inner}{joint.join(texts)}\n{indent}" if nested else joint.join(texts)
    return f"{{{body}}}" if isinstance(value, dict) else f"[{body}]"
