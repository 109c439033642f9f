"""Compress a folder of images to files, decode them, and measure rate, distortion and time.

    python eval.py                                  bundled small weights, Kodak
    python eval.py --snapshot ./results/VCIP/7/snapshots/best.pt --testset /path/to/Kodak
    python eval.py --checkpoint A.pt B.pt           these weights, one point of the curve each
    python eval.py --snapshot VR.pt --lmbda 0.0035 0.0067 0.013     rates of a variable-rate model
    torchrun --nproc_per_node=4 eval.py ...         images divided over processes

bpp is 8 * file size on disk / original pixels, including the header. PSNR and MS-SSIM are computed
on 8-bit images without padding and averaged over the images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import UserError, cli, processes
from common.coding import codecs
from common.coding.precision import use_precision
from common.complexity import complexity
from common.evaluation import compare, evaluate, reproduction

import numpy as np

from convnextic.model import ConvNeXTIC, build, load
from convnextic.variants import VARIANTS

HERE = Path(__file__).parent
SOURCE_STEPS = 980_000  # 400 epochs of about 2,450
RATES = 6  # number of rates between lambda_min and lambda_max


def flags() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Compress images to files and measure rate and distortion.")
    add = parser.add_argument_group("the source's flags").add_argument
    add("--snapshot", type=Path, help="weights file; bundled weights if not given")
    add("--quality", help="without effect; the checkpoint determines the rate")
    add("--testset", help="folder of test images; Kodak if not given")
    add = parser.add_argument_group("our flags for this codec").add_argument
    add("--lmbda", type=cli.positive_float, nargs="+",
        help=f"lmbdas of a variable-rate model; {RATES} over its trained range if not given")
    evaluate.add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    device = processes.start(args.device, threads=args.threads, jobs=args.jobs)
    coding_device = processes.parse_device(args.entropy_device)
    if args.complexity:
        print_complexity()
        return
    images = evaluate.test_images(args.testset)

    def measure(name: str, checkpoint: Path) -> list[dict[str, Any]]:
        model = load(checkpoint, device)
        model.coding_device = coding_device
        use_precision(model, args.precision)
        out = evaluate.output_folder(args.outdir, model, checkpoint)
        points = []
        for rate in rates(model, args):
            folder = out / f"lmbda_{rate['lmbda']:g}" if rate else out
            meta = {"variant": model.variant, "steps_source": SOURCE_STEPS}
            meta |= {key: float(f"{value:.6g}") for key, value in rate.items()}
            points.append(evaluate.evaluate(model, images, name, str(checkpoint.name), folder,
                                            args.test_batch_size, meta, rate=rate))
        return points

    checkpoints = find_checkpoints(args)
    curves = evaluate.curves_of(checkpoints, measure)
    if processes.rank() == 0:
        compare.report(curves, HERE / "results" / "published.json", images, Path(args.resultdir),
                       "ConvNeXTIC")
        if args.reproduce:
            reproduction.conclude(args, HERE, checkpoints, curves, images)


def find_checkpoints(args: argparse.Namespace) -> dict[str, list[Path]]:
    """Weights to evaluate, by the name of the curve."""
    small = list(codecs.bundled(HERE / "weights").values())
    if args.snapshot or args.checkpoint:
        paths = [args.snapshot] if args.snapshot else args.checkpoint
        return {evaluate.curve_name(paths): paths}
    if args.reproduce:
        if not args.config:
            raise UserError("--reproduce needs --config, the file that the run was trained with")
        config = cli.read_yaml(args.config)
        folder = Path("results", str(config.get("name", "VCIP")),
                      str(config.get("quality_level", "7")), "snapshots")
        if not (folder / "latest.pt").exists():
            raise UserError(f"{folder}: holds no trained model; run train.py --config first")
        return {args.config.stem: [folder / "latest.pt"], "small": small}
    return {"small": small}


def rates(model: ConvNeXTIC, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The operating points of a model: one, or several if its rate is variable."""
    if not model.variable_rate:
        if args.lmbda:
            raise UserError("--lmbda is for variable-rate models; this one has one rate")
        return [{}]
    config = model.provenance.config
    if not args.lmbda and not {"lambda_min", "lambda_max"} <= set(config):
        raise UserError("these weights do not state their range of rates: give --lmbda")
    values = args.lmbda or np.geomspace(config["lambda_min"], config["lambda_max"], RATES).tolist()
    low, high = config.get("lambda_min", 0), config.get("lambda_max", max(values))
    if args.lmbda and not (0.999 * low <= min(values) and max(values) <= 1.001 * high):
        raise UserError(f"--lmbda {min(values):g} ... {max(values):g}: these weights are trained "
                        f"for {low:g} to {high:g}")
    return [{"lmbda": float(np.float32(value))} for value in values]


def print_complexity() -> None:
    """Print parameters and multiply-accumulates for a 768x512 image, by both counting rules."""
    print("one 768x512 image; masked convolutions with all their taps; 'thop' counts transposed "
          "convolutions per output pixel")
    for variant in VARIANTS:
        for N, M in ((128, 192), (192, 320)):
            model = build(variant, N, M)
            counts = complexity(model, **({"lmbda": 0.01} if model.variable_rate else {}))
            macs = counts["macs_true"] + counts["macs_masked"]
            print(f"{variant:10s} N={N} M={M}  parameters {counts['params_total']:,} "
                  f"(thop {counts['params_thop']:,})  MACs {macs / 1e9:.2f} G "
                  f"(thop {counts['macs_thop'] / 1e9:.2f} G)")


if __name__ == "__main__":
    cli.run(main)
