"""The end of `make reproduce-<paper>`: what was trained, whether it is as expected, how to use it.

<paper>/results/quick.json holds what the runs of quick.yaml have reached before, in the form of a
results JSON. Its "expected" block states the band: {"band": 0.04, "why": "..."} accepts costs (bpp
+ lmbda * 255^2 * MSE) up to 4 % above and below.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import data, metrics
from common.coding.model_file import load_checkpoint
from common.evaluation.curve_values import Results, cost, count, entry
from common.evaluation.image_sets import digest_of, title
from common.evaluation.results import image_names, load_results
from common.papers import ROOT

import torch

SAME = ("N", "M", "lmbda", "steps")  # of the recipe's run and of the expected one


def conclude(args: argparse.Namespace, home: Path, checkpoints: dict[str, list[Path]],
             curves: list[Results], images: list[Path]) -> None:
    """Print the end of `eval.py --reproduce`, and write a picture: original beside decoded image.

    home: the paper's folder; checkpoints, curves: weights and their results on `images`, those of
    the run of --config first.
    """
    if args.config is None or next(iter(checkpoints)) != args.config.stem:
        return  # other weights were named
    checkpoint, trained = checkpoints[args.config.stem][0], curves[0]
    steps = entry(trained["meta"], "steps", 0)
    note = f", {count(steps)} steps" if steps else ""
    print(f"\nTrained with {args.config.name}{note}: {_show(checkpoint)}")
    for i, rate in enumerate(trained["results"]["bpp"]):
        print(f"  result: {rate:.4f} bpp, {trained['results']['psnr-rgb'][i]:.2f} dB "
              f"({_point(trained, i)}) on {title(digest_of(trained))}")
    other = departure(home, load_checkpoint(checkpoint).get("config") or {})
    for line in verdict(trained, expected(home, args.config), args.config.name, other):
        print(f"  {line}")
    picture, words = _picture(args, home, checkpoint, trained, images)
    print(f"  picture: {_show(picture)}, {words}")
    print("Code a photograph with these weights, and decode it:")
    for words in ("encode photo.png -o photo.bin", "decode photo.bin -o decoded.png"):
        print(f"  {_command(home)} {words} --checkpoint {shlex.quote(str(checkpoint))}")


def _command(home: Path) -> str:
    """The paper's codec.py as a command; from the root of the repository, if possible."""
    python = Path(sys.executable)  # not resolved: that of a virtual environment is a link
    if python.is_relative_to(ROOT):
        python = Path(os.path.relpath(python))
    if Path.cwd() == home:
        return f"cd {_show(home)} && {python} codec.py"
    return f"{python} {os.path.relpath(home / 'codec.py')}"


def expected(home: Path, config: Path) -> Results | None:
    """The results on record for a recipe of the paper, which have an "expected" block."""
    path = home / "results" / f"{config.stem}.json"
    record = load_results(path) if path.exists() else {}
    return record if "expected" in record else None


def departure(home: Path, config: dict[str, Any]) -> str:
    """The flag by which a run of this configuration left the recipe's images or metric, or ""."""
    parser = importlib.import_module(f"{home.name}.train").flags()
    keys = [action.dest for action in parser._actions if "--dataset" in action.option_strings]
    if keys and config.get(keys[0]):  # a recipe with expected numbers has the bundled photographs
        return f"--dataset {config[keys[0]]}"
    metric = config.get("metric") or "mse"
    return "" if metric == "mse" else f"--metric {metric}"


def verdict(trained: Results, record: Results | None, recipe: str, other: str = "") -> list[str]:
    """Lines that compare the results of a run with those on record for its recipe.

    other: a flag that makes it another run.
    """
    if record is None:
        return [f"there are no expected numbers on record for {recipe}"]
    if digest_of(trained) != digest_of(record):
        return [f"the expected numbers are those of {title(digest_of(record))}"]
    points = range(len(trained["results"]["bpp"]))
    for key in SAME:
        ours, theirs = ([entry(curve["meta"], key, i) for i in range(len(curve["results"]["bpp"]))]
                        for curve in (trained, record))
        if ours != theirs:
            return [f"the expected numbers are those of another run, with {key} "
                    f"{', '.join(map(str, theirs))}"]
    if other:
        return [f"the expected numbers are those of {recipe} without {other}"]
    lines, band = [], record["expected"]["band"]
    for i in points:
        lmbda = entry(trained["meta"], "lmbda", i)
        rates = [(c["results"]["bpp"][i], c["results"]["psnr-rgb"][i]) for c in (record, trained)]
        ratio = cost(*rates[1], lmbda) / cost(*rates[0], lmbda) - 1
        word = "as" if abs(ratio) <= band else "better than" if ratio < 0 else "worse than"
        lines.append(f"expected: {rates[0][0]:.4f} bpp, {rates[0][1]:.2f} dB; the cost bpp + lmbda "
                     f"* 255² * MSE is {100 * ratio:+.1f} % from it, {100 * band:g} % are usual: "
                     f"{word} expected")
    return lines


def _picture(args: argparse.Namespace, home: Path, checkpoint: Path, trained: Results,
             images: list[Path]) -> tuple[Path, str]:
    """Code the image of median PSNR by the paper's codec.py; write it beside the decoded one."""
    rows = sorted(trained["per_image"][0], key=lambda row: row["psnr-rgb"] or 0)
    name = rows[len(rows) // 2]["image"]
    source = next(path for path, known in image_names(images).items() if known == name)
    codec = importlib.import_module(f"{home.name}.codec")
    device = ["--device", args.device, "--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file, decoded = Path(folder, "x.bin"), Path(folder, "x.png")
        for words in (["encode", source, "-o", file], ["decode", file, "-o", decoded]):
            codec.main([*map(str, words), "--checkpoint", str(checkpoint), *device])
        x, x_hat, size = data.read_image(source), data.read_image(decoded), file.stat().st_size
    gap = torch.full((3, x.shape[1], 8), 255, dtype=torch.uint8)
    picture = Path(args.resultdir, f"{args.config.stem}-{Path(name).stem}.png")
    data.write_image(torch.cat([x, gap, x_hat], dim=2), picture)
    rate, psnr = metrics.bpp(size, *x.shape[1:]), metrics.psnr(x, x_hat)
    return picture, (f"original on the left, on the right decoded from {size:,} bytes ({rate:.3f} "
                     f"bpp, {psnr:.2f} dB)")


def _point(curve: Results, i: int) -> str:
    """Widths and lmbda of an operating point."""
    meta = {key: entry(curve["meta"], key, i) for key in ("N", "M", "lmbda")}
    return ", ".join(f"{key} {value:g}" for key, value in meta.items() if value is not None)


def _show(path: Path) -> str:
    """The path relative to the root of the repository, if it is below it."""
    path = Path(os.path.abspath(path))
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
