"""Training runs as one HTML page: curves by steps and by hours, and a table of the runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from common import html_page
from common.evaluation.curve_values import number
from common.evaluation.runs import Points, TrainingRun
from common.files import write_atomic

PARTS = Path(__file__).parent / "page"
MOST = 2000  # points of one line; of longer series, every n-th point is shown
# labels of the quantities that are shown at first; the page can show the others, too
QUANTITIES = {"loss": "loss", "bpp": "bits per pixel", "mse": "MSE (of values 0 to 255)",
              "ms_ssim": "MS-SSIM", "psnr": "PSNR (dB)", "lr": "learning rate",
              "grad_norm": "gradient norm"}
HEAD = ["run", "paper", "lmbda", "steps", "steps before", "pixels seen", "hours", "hardware",
        "validation loss", "validation bpp", "validation PSNR", "flags other than the defaults"]


def write_page(path: Path, runs: dict[str, TrainingRun]) -> None:
    """Write the page of runs, which are given with their names."""
    found = dict.fromkeys(name for run in runs.values() for name, _ in run.series)
    names = [*(name for name in QUANTITIES if name in found),
             *sorted(name for name in found if name not in QUANTITIES)]
    content = {"title": "Training runs", "notes": _notes(runs), "head": HEAD,
               "quantities": {name: QUANTITIES.get(name, name) for name in names},
               "first": [name for name in names if name in QUANTITIES],
               "runs": [{"name": name, "row": _row(name, run),
                         "series": [_series(*key, points) for key, points in run.series.items()]}
                        for name, run in runs.items()]}
    write_atomic(path, html_page.assemble(PARTS, "curves", ["curves.js"], content))


def _series(name: str, kind: str, points: Points) -> dict[str, Any]:
    steps = sorted(points)
    steps = sorted({*steps[::math.ceil(len(steps) / MOST)], steps[-1]})
    values = [points[step][1] for step in steps]
    hours = [points[step][0] for step in steps]
    return {"name": name, "kind": kind, "steps": steps,
            "hours": [None if h is None else round(h, 5) for h in hours],
            "values": [float(f"{v:.6g}") if math.isfinite(v) else None for v in values]}


def _row(name: str, run: TrainingRun) -> list[str]:
    """Cells of a run's row, in the order of HEAD."""
    lmbda, before = run.config.get("lmbda"), run.config.get("steps_before")
    return [name, run.paper or "-", "-" if lmbda is None else f"{lmbda:g}", f"{run.steps:,}",
            f"{before:,}" if before else "-",
            "-" if run.pixels is None else f"{run.pixels / 1e6:,.4g} M", number(run.hours, ".2f"),
            run.hardware or "-", number(run.last("loss"), ".4f"), number(run.last("bpp"), ".4f"),
            number(run.last("psnr"), ".2f"), run.flags or "-"]


def _notes(runs: dict[str, TrainingRun]) -> list[str]:
    """Lines on how the page is to be read, and on what some runs lack."""
    lines = ["Steps before are those of the run whose weights this one started from. Hours are "
             "those of training and validation, without interruptions. Pixels seen are those of "
             "all crops.",
             f"A line shows at most {MOST:,} points of the log: of more, every n-th."]
    for name, run in runs.items():
        lacks = [what for what, there in (
            ("TensorBoard's event files, so only the means of its epochs are shown, by steps",
             run.hours is not None), ("the file of its flags", run.config),
            ("a checkpoint that names the hardware", run.hardware)) if not there]
        if lacks:
            lines.append(f"{name} lacks {'; '.join(lacks)}.")
    return lines
