"""Train the ten experiments with equal steps, code Kodak with each, and compare them.

    python ablate.py                                    ten.yaml, on the bundled photographs
    python ablate.py --dataset '/data/*.tar' --threads 1
    python ablate.py --experiments base mod3            some of the ten
    python ablate.py -- --epochs 12 --precision bf16    with other flags of train.py
    python ablate.py --publish                          also write results/ten.json and the README

Each experiment is trained by train.py in experiments/<name>-<experiment>. To continue an
interrupted call, run it again: what is done is read, not repeated. bpp counts the bytes of real
files of the Kodak images; loss = bpp + lmbda * 255^2 * MSE, the mean over these images. A published
table is that of ten.yaml and Kodak: `--publish` goes with no other recipe or images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import UserError, cli, data, processes
from common.coding import bitstream
from common.coding.model_file import load_checkpoint
from common.evaluation import image_sets
from common.evaluation.evaluate import evaluate, validation_of
from common.evaluation.results import load_results, save_results
from common.recipes.tables import write_table

import torch

from advdnic import train
from advdnic.eval import macs_of
from advdnic.main import last_checkpoint
from advdnic.model import EXPERIMENTS, Experiment, load

HERE = Path(__file__).parent
WIDTH = {"variant4": 128}  # its dual path block has no other


def flags() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Train and compare the ten experiments at equal steps.")
    add = parser.add_argument
    add("--config", type=Path, default=HERE / "ten.yaml", help="YAML file of flags of train.py")
    add("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS),
        help="experiments to train; all ten if not given")
    add("--name", default="ten", help="name of the runs: experiments/<name>-<experiment>")
    add("--dataset", help="training images: a folder, a .tar shard or a quoted glob of them; "
        "bundled photographs if not given")
    add("--images", type=Path, default=data.KODAK, help="folder of test images; Kodak if not given")
    add("--device", default="auto", help="device to train and code on: auto, cpu or cuda")
    add("--threads", type=cli.threads, default=0, help="number of CPU threads; 0 uses all")
    add("--output", type=Path, help="JSON file that the results are also written to")
    add("--publish", action="store_true",
        help="write the results to results/ten.json and their table to README.md")
    return parser


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    extra = words[words.index("--") + 1 :] if "--" in words else []
    args = flags().parse_args(words[: words.index("--")] if "--" in words else words)
    if args.publish and len(args.experiments) < len(EXPERIMENTS):
        raise UserError("--publish: the table holds all experiments; leave out --experiments")
    if args.publish and (extra or args.config.resolve() != (HERE / "ten.yaml").resolve()):
        raise UserError("--publish: the table is that of ten.yaml; leave out --config and the "
                        "flags after --")
    images = data.list_images(args.images)
    digest = image_sets.set_digest([image_sets.image_digest(data.read_image(p)) for p in images])
    if args.publish and digest != image_sets.KNOWN["Kodak"]:
        raise UserError("--publish: the table is that of Kodak; leave out --images")
    device = processes.start(args.device, threads=args.threads)
    rows = {}
    for experiment in args.experiments:
        folder = Path("experiments", f"{args.name}-{experiment}")
        print(f"\n--- {experiment}", flush=True)
        train.main([
            "--config", str(args.config), "--device", args.device, "--threads", str(args.threads),
            *(["--dataset", args.dataset] if args.dataset else []), *extra,
            "--experiment", experiment, "--model-dir", str(folder),
            *(["--num_filters", str(WIDTH[experiment])] if experiment in WIDTH else []),
            "--resume", "auto"])
        rows[experiment] = result(folder, images, digest, device)
    results = {"name": args.name, "description": "the experiments at equal steps",
               "test_images": len(images), "images_digest": digest, "flags": extra,
               "rows": rows}
    print("\n" + table(rows))
    for path in (args.output, HERE / "results" / "ten.json" if args.publish else None):
        if path:
            save_results(path, results)
    if args.publish:
        write_table(HERE / "README.md", "ten", table(rows))


def result(folder: Path, images: list[Path], digest: str, device: torch.device) -> dict[str, Any]:
    """The row of a finished run; digest: that of the images."""
    path = last_checkpoint(folder)
    state = load_checkpoint(path)
    config = state["config"]
    model = load(path, device)
    model.coding_device = torch.device("cpu")
    macs = macs_of(model)
    found = coded(folder / "coded.json", model, images, digest)
    losses = [image["bpp"] + config["lmbda"] * 255**2 * 10 ** (-image["psnr-rgb"] / 10)
              for image in found["per_image"][0]]
    known = ("num_filters", "lmbda", "patchsize", "batchsize", "random_seed", "precision")
    return {"parameters": macs["parameters"], "gmacs_encoder": macs["encoder"] / 1e9,
            "gmacs_decoder": macs["decoder"] / 1e9,
            "steps": state["step"], "bpp": found["results"]["bpp"][0],
            "psnr-rgb": found["results"]["psnr-rgb"][0], "loss": sum(losses) / len(losses),
            "training_loss": state["train"]["loss"],  # the mean over the last epoch
            **{key: config[key] for key in known}, "images": config["images"],
            "validation": validation_of(model),
            "trained_on": model.provenance.hardware,
            "fingerprint": bitstream.fingerprint(model).hex()}


def coded(path: Path, model: Experiment, images: list[Path], digest: str) -> dict[str, Any]:
    """Results of real files of the images.

    They are read from `path` if it holds those of these weights and of images with this digest.
    """
    if path.exists():
        before = load_results(path)
        if (before["meta"]["fingerprint"] == [bitstream.fingerprint(model).hex()]
                and image_sets.digest_of(before) == digest):
            return before
    save_results(path, evaluate(model, images, path.parent.name, entropy_estimation=False))
    return load_results(path)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Table of the experiments, with the loss also relative to that of base."""
    heads = ("experiment", "parameters", "GMACs encoder", "decoder", "steps", "bpp", "PSNR", "loss",
             "against base", "training loss")
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    base = rows.get("base")
    for experiment, row in rows.items():
        against = f"{100 * (row['loss'] / base['loss'] - 1):+.1f} %" if base else "-"
        lines.append("| " + " | ".join((
            f"`{experiment}`", f"{row['parameters'] / 1e6:.2f} M", f"{row['gmacs_encoder']:.2f}",
            f"{row['gmacs_decoder']:.2f}", f"{row['steps']:,}", f"{row['bpp']:.4f}",
            f"{row['psnr-rgb']:.2f}", f"{row['loss']:.3f}", against,
            f"{row['training_loss']:.3f}")) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
