"""Train the rows of the source's ablation table with equal steps, and compare with its results.

    python ablate.py                                    ablation.yaml, on the bundled photographs
    python ablate.py --rows baseline GDN --seed 1       some rows, another seed
    python ablate.py --publish                          also write results/ablation.json and README
    python ablate.py --config config.yaml -- --trainset /path --variant v1_patch --epochs 200

Each row is one change of the baseline (v1_patch), trained by train.py as results/<name>-<row>/. A
row that exists is continued or read, not trained again. Each row is then measured on the central
crops of Kodak, as large as the crops that it was trained on, with the estimated rate. Compare rows
by J, not by PSNR alone: J = bpp + lmbda * 255^2 * MSE, from mean bpp and mean PSNR, as the source
only reports these. Flags after `--` are passed to train.py. A published table is that of
ablation.yaml: `--publish` goes with no other recipe.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from common import UserError, cli, data, processes
from common.coding.model_file import load_checkpoint
from common.datasets import Item
from common.evaluation import image_sets
from common.evaluation.curve_values import cost
from common.evaluation.evaluate import validation_of
from common.evaluation.results import save_results
from common.loss import RateDistortionLoss
from common.recipes.tables import write_table
from common.training.validation import central_crops

import torch

from convnextic import train
from convnextic.model import load

HERE = Path(__file__).parent
ROWS = {
    "baseline": [],
    "AdamW": ["--optimizer", "adamw"],
    "d3393": ["--depths", "3", "3", "9", "3", "3", "3"],
    "dwtrans": ["--decoder_dw", "convtranspose"],
    "GDN": ["--block_norm", "gdn"],
    "k5 + drop path": ["--kernel_size", "5", "--drop_path_rate", "0.1"],
    "drop path": ["--drop_path_rate", "0.1"],
    "stride 2 (v2)": ["--variant", "v2_stride2"],  # from another table of the source
}
PUBLISHED = {  # bpp, PSNR after 200 epochs: Flicker test split, 256x256 crops, estimated
    "3": {"baseline": (0.3024, 28.4361), "AdamW": (0.2947, 28.2912), "d3393": (0.3025, 28.4938),
          "dwtrans": (0.3026, 28.4055), "GDN": (0.2943, 28.1276),
          "k5 + drop path": (0.3032, 28.4232), "drop path": (0.3044, 28.3524)},
    "7": {"baseline": (0.9548, 31.7102), "AdamW": (0.9149, 31.7587), "d3393": (0.9365, 31.6994),
          "dwtrans": (0.9700, 31.7013), "GDN": (0.9178, 31.4390),
          "k5 + drop path": (0.9552, 31.6454), "drop path": (0.9539, 31.6802)},
}


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    extra = words[words.index("--") + 1 :] if "--" in words else []
    words = words[: words.index("--")] if "--" in words else words
    parser = cli.Parser(description="Train and compare the rows of the ablation table.")
    parser.add_argument("--config", type=Path, default=HERE / "ablation.yaml",
                        help="YAML file of flags of train.py")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS),
                        help="rows of the table to train")
    parser.add_argument("--name", default="ablation", help="name of the runs: results/<name>-<row>")
    parser.add_argument("--seed", type=cli.seed_number, default=0,
                        help="seed of weights, noise and crops")
    parser.add_argument("--dataset", help="training images, as --trainset of train.py")
    parser.add_argument("--threads", type=cli.threads, default=0,
                        help="number of CPU threads; 0 uses all")
    parser.add_argument("--output", type=Path, help="JSON file that the table is also written to")
    parser.add_argument("--publish", action="store_true",
                        help="write results/ablation.json and the table of README.md")
    args = parser.parse_args(words)
    if args.publish and len(args.rows) < len(ROWS):
        raise UserError("--publish: the table holds all rows; leave out --rows")
    if args.publish and (extra or args.config.resolve() != (HERE / "ablation.yaml").resolve()):
        raise UserError("--publish: the table is that of ablation.yaml; leave out --config and the "
                        "flags after --")
    dataset = ["--trainset", args.dataset] if args.dataset else []
    found = {}
    for row in args.rows:
        name = f"{args.name}-{re.sub(r'[^a-z0-9]+', '-', row.lower()).strip('-')}"
        print(f"\n--- {row}: {' '.join(ROWS[row]) or 'v1_patch'}", flush=True)
        flags = ["--config", str(args.config), "--name", name, "--seed", str(args.seed),
                 "--threads", str(args.threads), *dataset, *extra, *ROWS[row], "--resume", "auto"]
        train.main(flags)
        parsed = cli.parse(train.flags(), flags)
        crops = kodak_crops(parsed.patchsize)
        found[row] = result(name, parsed.quality_level, crops,
                            processes.start(parsed.device, threads=args.threads))
    print("\n" + table(found) + "\nThe source's numbers are those of other images, crops of a test "
          "split of Flicker: only compare the columns \"against baseline\".")
    for path in (args.output, HERE / "results" / "ablation.json" if args.publish else None):
        if path:
            save_results(path, {
                "name": args.name, "description": f"central {crops.shape[-1]}x{crops.shape[-1]} "
                f"crops of {len(crops)} Kodak images, estimated rate",
                "images_digest": image_sets.set_digest(list(map(image_sets.image_digest, crops))),
                "flags": extra, "rows": found})
    if args.publish:
        write_table(HERE / "README.md", "ablation", table(found))


def kodak_crops(size: int) -> torch.Tensor:
    """Central crops of the Kodak images, uint8 (24, 3, size, size)."""
    return central_crops(map(Item, data.list_images(data.KODAK)), [size, size], "--patchsize")


def result(name: str, quality: str, crops: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """The row of a finished run: its last weights, measured on crops as in `train.validate`."""
    latest = Path("results", name, quality, "snapshots", train.LATEST)
    state = load_checkpoint(latest)
    config, model = state["config"], load(latest, device)
    criterion = RateDistortionLoss(config["lmbda"], config["metric"])
    test = train.validate(model, crops, argparse.Namespace(**config), criterion, device)
    return {"bpp": test["bpp"], "psnr": test["psnr"], "lmbda": config["lmbda"],
            "quality": config["quality_level"], "steps": state["step"], "seed": config["seed"],
            "J": cost(test["bpp"], test["psnr"], config["lmbda"]), "images": config["images"],
            "validation": validation_of(model)}


def table(found: dict[str, dict]) -> str:
    """Table with our results and the source's, and J also relative to the baseline."""
    quality = next(iter(found.values()))["quality"]
    theirs = PUBLISHED.get(str(quality), {})
    lines = ["| row | steps | bpp | PSNR | J | against baseline | source: bpp | PSNR | J | against "
             "baseline |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    base = found.get("baseline", {}).get("J")
    for row, values in found.items():
        cells = [row, f"{values['steps']:,}", f"{values['bpp']:.4f}", f"{values['psnr']:.2f}",
                 f"{values['J']:.4f}", _relative(values["J"], base)]
        if row in theirs:
            lmbda = train.LMBDAS[int(quality) - 1]
            j, j_base = cost(*theirs[row], lmbda), cost(*theirs["baseline"], lmbda)
            cells += [f"{theirs[row][0]:.4f}", f"{theirs[row][1]:.2f}", f"{j:.4f}",
                      _relative(j, j_base)]
        else:
            cells += ["-"] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _relative(value: float, base: float | None) -> str:
    return "-" if not base else f"{100 * (value / base - 1):+.1f} %"


if __name__ == "__main__":
    cli.run(main)
