"""Compress a folder of images to files, decode them, and measure rate, distortion and time.

    python eval.py                                      bundled small weights, Kodak
    python eval.py checkpoint /path/to/kodak -a zyc2022-swint-charm --cuda -v -p A.ckpt B.ckpt
    python eval.py pretrained /path/to/kodak -a zyc2022-swint-charm      its bundled weights
    python eval.py --complexity                         parameters and MACs of all models, by part
    torchrun --nproc_per_node=4 eval.py ...             images divided over processes

bpp is 8 * file size on disk / original pixels, including the header. PSNR and MS-SSIM are computed
on 8-bit images without padding and averaged over the images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import UserError, cli, processes
from common.coding import codecs
from common.coding.precision import use_precision
from common.evaluation import compare, evaluate, reproduction
from common.files import write_atomic

from tbtc.complexity import report
from tbtc.model import MODELS, SliceCoder, load
from tbtc.train import newest_checkpoint, run_folder, versions

HERE = Path(__file__).parent
SOURCE_STEPS = 1_020_000  # 5,000 epochs of 204 batches


def flags() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Compress images to files and measure rate and distortion.")
    add = parser.add_argument_group("flags of the source's eval_model").add_argument
    add("source", nargs="?", choices=["pretrained", "checkpoint"],
        help="weights to evaluate: the bundled ones (pretrained) or those of -p (checkpoint)")
    add("dataset", nargs="?", help="folder of test images; Kodak if not given")
    add("-a", "--architecture", choices=MODELS, help="model that the weights must belong to")
    add("-p", "--path", type=Path, nargs="*", help="weights files; each is one point of the curve")
    add("-q", "--quality", help="lmbdas of the bundled weights, separated by commas")
    add("-c", "--entropy-coder", choices=["ans"], default="ans", help="entropy coder")
    add("-m", "--metric", choices=["mse", "ms-ssim"], default="mse",
        help="part of the name of the JSON; both are always measured")
    add("-d", "--output_directory", type=Path, help="folder of the JSON that eval_model writes")
    add("-o", "--output-file", help="name of that JSON, without .json")
    add("--cuda", action="store_true",
        help="use a GPU, or the CPU with a note if there is none, as without the flag")
    add("--half", action="store_true", help="run g_a and g_s in float16")
    add("--entropy-estimation", action="store_true",
        help="estimate the rate from the likelihoods instead of writing files")
    add("--per-image", action="store_true", help="print the results of each image, too")
    add("-v", "--verbose", action="store_true", help="print the models that are read")
    add("--no-update", action="store_true",
        help="without effect; the CDF tables are those of the checkpoint")
    evaluate.add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    device = processes.start(processes.cuda_or_cpu(args.cuda, args.device),
                             threads=args.threads, jobs=args.jobs)
    coding_device = processes.parse_device(args.entropy_device)
    if args.complexity:
        print(report([args.architecture] if args.architecture else list(MODELS)))
        return
    images = evaluate.test_images(args.dataset)

    def evaluate_weights(name: str, checkpoint: Path) -> list[dict[str, Any]]:
        model = load(checkpoint, device)
        if args.architecture not in (None, model.name):
            raise UserError(f"{checkpoint}: holds weights of {model.name}, not of "
                            f"-a {args.architecture}")
        model.coding_device = coding_device
        if args.half and args.precision != "fp32":
            raise UserError(f"--half, --precision {args.precision}: give one of them")
        use_precision(model, args.precision)
        if args.half:
            for part in (model.g_a, model.g_s):
                evaluate.in_half(part)
        if args.verbose and processes.rank() == 0:
            print(f"{checkpoint}: {model.name}, {sum(p.numel() for p in model.parameters()):,}"
                  f" parameters; {len(images)} images", flush=True)
        return [measure(model, images, name, checkpoint, args)]

    checkpoints = find_checkpoints(args)
    curves = evaluate.curves_of(checkpoints, evaluate_weights)
    if processes.rank() == 0:
        compare.report(curves, HERE / "results" / "published.json", images, Path(args.resultdir),
                       "TBTC")
        if args.reproduce:
            reproduction.conclude(args, HERE, checkpoints, curves, images)
        if args.per_image:
            print(json.dumps(curves[0]["per_image"], indent=1))
        if args.source:
            as_eval_model(curves[0], args)


def find_checkpoints(args: argparse.Namespace) -> dict[str, list[Path]]:
    """Weights to evaluate, by the name of the curve; bundled weights have a curve per model."""
    if args.source == "checkpoint" and not (args.path or args.checkpoint):
        raise UserError("checkpoint: name weights with -p")
    if args.path and args.source != "checkpoint":
        raise UserError("-p: goes with `checkpoint DATASET`")
    if paths := args.path or args.checkpoint:
        return {evaluate.curve_name(paths): paths}
    bundled: dict[str, list[Path]] = {}
    for stem, path in codecs.bundled(HERE / "weights").items():
        name, lmbda = stem.rsplit("-", 1)
        wanted = args.architecture in (None, f"zyc2022-{name}", name)
        if wanted and (args.quality is None or lmbda in args.quality.split(",")):
            bundled.setdefault(name, []).append(path)
    if args.reproduce:
        if not args.config:
            raise UserError("--reproduce needs --config, the file that the run was trained with")
        folder = run_folder(cli.read_yaml(args.config))
        have = versions(folder)
        newest = newest_checkpoint(have[-1]) if have else None
        if newest is None:
            raise UserError(f"{folder}: holds no trained model; run train.py --config first")
        return {args.config.stem: [newest], **bundled}
    if not bundled:
        raise UserError("no bundled weights of this -a and -q; name others: checkpoint DATASET -p")
    return bundled


def measure(model: SliceCoder, images: list[Path], name: str, checkpoint: Path,
            args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate one operating point."""
    config = model.provenance.config
    meta = {"model": model.name, "quality": config.get("quality"), "steps_source": SOURCE_STEPS}
    meta = {key: value for key, value in meta.items() if value is not None}
    if args.entropy_estimation:
        return evaluate.evaluate_estimate(
            model, images, f"{name}-estimated", model.downsampling_factor,
            meta | {"lmbda": config.get("lmbda")})
    out = evaluate.output_folder(args.outdir, model, checkpoint)
    return evaluate.evaluate(model, images, name, str(checkpoint.name), out,
                             args.test_batch_size, meta)


def as_eval_model(curve: dict[str, Any], args: argparse.Namespace) -> None:
    """Print and write the results as CompressAI's eval_model does."""
    kind = "entropy estimation" if args.entropy_estimation else args.entropy_coder
    keys = ("psnr-rgb", "ms-ssim-rgb", "bpp", "encoding_time", "decoding_time")
    name = args.architecture or curve["name"]
    text = json.dumps({"name": f"{name}-{args.metric}", "description": f"Inference ({kind})",
                       "results": {key: curve["results"][key] for key in keys}}, indent=2)
    print(text)
    if args.output_directory or args.output_file:
        file = args.output_file or f"{name}-{args.metric}-{args.entropy_coder}"
        write_atomic((args.output_directory or Path()) / f"{file}.json", f"{text}\n".encode())


if __name__ == "__main__":
    cli.run(main)
