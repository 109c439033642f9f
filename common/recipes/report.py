"""Evaluate a paper's bundled weights on Kodak: results JSON, plot, and the rows of its pages.

    python -m common.recipes.report hyperprior       or  make report-hyperprior

Every curve of weights.yaml whose files are bundled is evaluated and published under its name. Other
bundled weights are published as the curve "small", unless weights.yaml's own "small" is complete;
then they are named and left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import UserError, cli, data
from common.evaluation.results import load_results
from common.papers import ROOT, papers
from common.recipes.jobs import environment
from common.recipes.pages import publish
from common.recipes.recipe_file import as_list, read_recipe


def bundled_curves(home: Path, known: dict[str, Any]) -> dict[str, tuple[list[Path], list[str]]]:
    """Weights files, and flags of eval.py for them, by the name of their curve.

    known: the curves of weights.yaml.
    """
    left = sorted((home / "weights").glob("*.pth"))
    curves = {}
    for name, curve in known.items():
        files = [home / "weights" / file for file in curve["files"]]
        if curve.get("bundle", True) and all(file in left for file in files):
            curves[name] = files, [str(word) for word in curve.get("evaluate", [])]
            left = [file for file in left if file not in files]
    if left and "small" not in curves:
        curves["small"] = left, []
    elif left:
        names = ", ".join(file.name for file in left)
        print(f"note: {home.name}/weights has {names}, which belong to no curve of weights.yaml")
    return curves


def report(root: Path, args: argparse.Namespace) -> None:
    """Evaluate and publish the bundled weights of one paper."""
    home, images = root / args.paper, data.list_images(args.dataset)
    path = home / "weights.yaml"
    recipe = read_recipe(path) if path.exists() else None
    curves = bundled_curves(home, recipe["curves"] if recipe else {})
    if not curves:
        print(f"{args.paper}: there are no bundled weights to report")
    dataset = []
    if args.dataset != data.KODAK:
        if not recipe:
            raise UserError(f"--dataset: {path} is missing, which names the flag of eval.py for it")
        dataset = [*as_list(recipe["eval"]["dataset"]), str(args.dataset.resolve())]
    for name, (files, flags) in curves.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "eval.py", *dataset, "--checkpoint", *map(str, files),
                       "--resultdir", folder, "--outdir", str(Path(folder, "output")),
                       "--threads", str(args.threads), "--device", args.device, *flags]
            sys.stdout.flush()
            done = subprocess.run(command, cwd=home, stderr=subprocess.PIPE, text=True,
                                  env=environment(root))
            results = sorted(Path(folder).glob("*.json"))
            if done.returncode or len(results) != 1:
                reason = (done.stderr.strip().splitlines() or ["no results file"])[-1]
                raise UserError(f"{args.paper}: eval.py did not evaluate {name}: "
                                f"{reason.removeprefix('error: ')}")
            into = publish(root, args.paper, load_results(results[0]) | {"name": name}, args.into,
                           images)
        print(f"{args.paper}: {into / name}.json and .png are written")


def main(argv: list[str] | None = None, root: Path = ROOT) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("paper", choices=papers(root), help="name of the paper's folder")
    parser.add_argument("--dataset", type=Path, default=data.KODAK, help="folder of test images")
    parser.add_argument("--into", type=Path,
                        help="folder to write to; the paper's results/ if not given")
    parser.add_argument("--threads", type=cli.threads, default=0,
                        help="number of CPU threads; 0 uses all")
    parser.add_argument("--device", default="auto", help="device to code on: auto, cpu or cuda")
    report(root, parser.parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
