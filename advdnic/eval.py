"""Compress a folder of images to files, decode them, and measure rate, distortion and time.

    python eval.py                                       bundled small weights, Kodak
    python eval.py --model-dir experiments/variant2      last checkpoint of one or more folders
    python eval.py --checkpoint A.pth B.pth              these weights, one point of the curve each
    python eval.py --complexity                          parameters and GMACs of the ten
    torchrun --nproc_per_node=4 eval.py ...              images divided over processes

bpp is 8 * file size on disk / original pixels, including the header. PSNR and MS-SSIM are computed
on 8-bit images without padding and averaged over the images. The source's command is
`main.py benchmark`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import UserError, cli, processes
from common.coding import codecs
from common.complexity import complexity_of_parts
from common.evaluation import compare, evaluate, reproduction

from advdnic.main import last_checkpoint
from advdnic.model import EXPERIMENTS, Experiment, build, load

HERE = Path(__file__).parent


def flags() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Compress images to files and measure rate and distortion.")
    add = parser.add_argument_group("images and weights").add_argument
    add("--model-dir", type=Path, nargs="+",
        help="folders of train.py, whose last checkpoints are evaluated")
    add("--experiment", choices=EXPERIMENTS,
        help="experiment of the bundled weights; all if not given")
    add("--dataset", "--data-dir", help="folder of test images; Kodak if not given")
    evaluate.add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    device = processes.start(args.device, threads=args.threads, jobs=args.jobs)
    coding_device = processes.parse_device(args.entropy_device)
    if args.complexity:
        print_complexity()
        return
    images = evaluate.test_images(args.dataset)
    checkpoints = find(args)
    curves = evaluate.fixed_rate_curves(args, checkpoints, load, images, device, coding_device,
                                        lambda model: {"experiment": model.experiment})
    if processes.rank() == 0:
        compare.report(curves, HERE / "results" / "published.json", images, Path(args.resultdir),
                       "advDNIC")
        if args.reproduce:
            reproduction.conclude(args, HERE, checkpoints, curves, images)


def find(args: argparse.Namespace) -> dict[str, list[Path]]:
    """Weights to evaluate, by the name of the curve."""
    if args.checkpoint:
        return {evaluate.curve_name(args.checkpoint): args.checkpoint}
    if args.model_dir:
        names = [folder.parent.name if folder.name == "generator" else folder.name
                 for folder in args.model_dir]
        if len(set(names)) < len(names):
            names = ["-".join(folder.parts[-3:]).strip("/") for folder in args.model_dir]
        return {name: [last_checkpoint(folder)]
                for name, folder in zip(names, args.model_dir, strict=True)}
    bundled: dict[str, list[Path]] = {}
    for stem, path in codecs.bundled(HERE / "weights").items():
        experiment = stem.rsplit("-", 1)[0]
        if args.experiment in (None, experiment):
            bundled.setdefault(experiment, []).append(path)
    if args.reproduce:
        if not args.config:
            raise UserError("--reproduce needs --config, the file that the run was trained with")
        folder = Path(cli.read_yaml(args.config).get("model_dir", "experiments/base_model"))
        return {args.config.stem: [last_checkpoint(folder)], **bundled}
    if not bundled:
        raise UserError(f"no bundled weights of {args.experiment or 'any experiment'}; name a "
                        "--model-dir")
    return bundled


def print_complexity(num_filters: int = 128) -> None:
    """Print parameters and multiply-accumulates of the ten experiments for a 768x512 image."""
    print(f"one 768x512 image, N = {num_filters}; GMACs of convolutions, GDN and "
          "attention")
    print(f"{'':14s}{'parameters':>11s}{'encoder':>9s}{'decoder':>9s}{'of it context':>15s}")
    for experiment in EXPERIMENTS:
        macs = macs_of(build(experiment, num_filters))
        print(f"{experiment:14s}{macs['parameters']:11,d}" + "".join(
            f"{macs[part] / 1e9:{width}.2f}" for part, width in (
                ("encoder", 9), ("decoder", 9), ("context", 15))))


def macs_of(model: Experiment) -> dict[str, int]:
    """Parameters, and multiply-accumulates of encoder, decoder and context for a 768x512 image."""
    found = complexity_of_parts(model)
    macs = {name: sum(part[f"macs_{kind}"] for kind in ("true", "gdn", "masked", "products"))
            for name, part in found.items()}
    shared = sum(value for name, value in macs.items() if name in (
        "h_s", "h_scale_s", "h_mean_s", "context_model", "entropy_parameters"))
    return {"parameters": sum(part["params_total"] for part in found.values()),
            "encoder": macs["g_a"] + macs["h_a"] + shared, "decoder": macs["g_s"] + shared,
            "context": sum(macs.get(part, 0) for part in ("context_model", "entropy_parameters"))}


if __name__ == "__main__":
    cli.run(main)
