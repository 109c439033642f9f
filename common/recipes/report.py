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
from common.evaluation import image_sets
from common.papers import ROOT, papers
from common.recipes import pages
from common.recipes.jobs import environment
from common.recipes.publishing import evaluate_and_publish
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
    if args.dataset != data.KODAK and not args.into:
        pages.check_official(args.paper, image_sets.set_digest(
            [image_sets.image_digest(data.read_image(path)) for path in images]))
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
            for command in evaluate_and_publish(
                    args.paper, name, files, Path(folder), dataset=dataset, threads=args.threads,
                    device=args.device, flags=flags, into=args.into and args.into.resolve()):
                if command[0] == "-m":  # pages, without another start of Python
                    pages.main([str(word) for word in command[2:]], root)
                else:
                    run(command, home, root, name)
        print(f"{args.paper}: {(args.into or home / 'results') / name}.json and .png are written")


def run(command: list[Any], home: Path, root: Path, curve: str, quiet: bool = False) -> None:
    """Run a command in the paper's folder; UserError with its last line if it fails."""
    sys.stdout.flush()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=home, stderr=subprocess.PIPE,
                          stdout=subprocess.DEVNULL if quiet else None, text=True,
                          env=environment(root))
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"{home.name}: eval.py did not evaluate {curve}: "
                        f"{reason.removeprefix('error: ')}")


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
