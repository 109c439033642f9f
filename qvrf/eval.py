"""Compress a folder of images at all rates of a model, decode them, and measure the results.

    python eval.py                                          bundled weights, Kodak, all levels
    python eval.py -p ./Cheng2020VR.pth.tar --dataset ./dataset/Kodak --s 8      the source's call
    python eval.py -p W --factormode 1 --factor 1/2.5       a rate between the levels
    python eval.py -p W --factormode 1 --sweep              the source's 27 factors
    python eval.py --checkpoint A.pth B.pth --s 0           one point of the curve from each
    torchrun --nproc_per_node=4 eval.py ...                 images divided over processes

bpp is 8 * file size on disk / original pixels, including the header. PSNR and MS-SSIM are computed
on 8-bit images without padding and averaged over the images.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from common import UserError, cli, data, metrics, processes
from common.coding import bitstream, zoo
from common.coding.precision import use_precision
from common.complexity import complexity
from common.evaluation import compare, evaluate, reproduction
from common.evaluation.image_sets import digest_of, title
from common.evaluation.results import image_names, load_results
from common.files import read_file, write_atomic

from qvrf.model import (
    BASES,
    FACTORS,
    LMBDAS,
    QVRF,
    WIDTHS,
    ZOO,
    build,
    load,
    with_gain,
)

HERE = Path(__file__).parent
SWEEP = (.5, .7, .9, 1.1, 1.25, 1.45, 1.7, 2, 2.4, 2.8, 3.3, 3.8, 4, 4.6, 5.4, 5.8, 6.5, 6.8, 7.5,
         7.9, 8.3, 9.1, 9.4, 9.7, 10.5, 11, 12)
SOURCE_STEPS = 3_219_000  # 3,000 epochs of 1,073
BUNDLED = "small-balle.pth"
COLUMNS = ("name", "bits", "pixels", "bpp", "y_bpp", "z_bpp", "mse", "psnr(dB)", "ms-ssim",
           "enc_time(s)", "dec_time(s)")


def flags() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Compress images to files and measure rate and distortion.")
    add = parser.add_argument_group("the source's flags").add_argument
    add("--dataset", help="folder of test images; Kodak if not given")
    add("--output_path",
        help="name of the folder of decoded images, next to the dataset; --outdir if not given")
    add("-c", "--entropy-coder", choices=["ans"], default="ans", help="entropy coder")
    add("--cuda", action="store_true",
        help="use a GPU, or the CPU with a note if there is none, as without the flag")
    add("--half", action="store_true", help="run g_a and g_s in float16")
    add("--entropy-estimation", action="store_true",
        help="estimate the rate from the likelihoods instead of writing files")
    add("-p", "--path", help="checkpoint; bundled weights if not given")
    add("--factormode", type=int, choices=[0, 1], default=0,
        help="parameter that sets the rate: --s (0) or --factor (1)")
    add("--factor", type=factor, default=1.5,
        help="regulator, e.g. 1.5 or 1/2.5; "
        f"a decimal outside [{FACTORS[0]:g}, {FACTORS[1]:g}] means --sweep")
    add("--patch", type=cli.positive_int, default=64,
        help="multiple to which height and width are padded, in pixels")
    add("--s", type=int, help="level of rate; the number of levels or more means all of them. "
        "If not given, all levels, or with --path the source's 2")
    add = parser.add_argument_group("our flags for this paper").add_argument
    add("--sweep", action="store_true",
        help="evaluate the source's 27 factors, with --factormode 1")
    add("--name", help="name of the curve; that of the weights if not given")
    evaluate.add_flags(parser)
    add_pretrained(parser, several=True)
    return parser


def add_pretrained(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add the flags for CompressAI's weights, which have one rate: level 0."""
    zoo.add_flag(parser, several)
    parser.add_argument("--model", choices=list(BASES), default="cheng",
                        help="base codec of --pretrained")


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    check(args)
    zoo.use(args, ZOO[args.model], QVRF, with_gain)
    device = processes.start(processes.cuda_or_cpu(args.cuda, args.device),
                             threads=args.threads, jobs=args.jobs)
    coding_device = processes.parse_device(args.entropy_device)
    if args.complexity:
        print_complexity()
        return
    images = evaluate.test_images(args.dataset)

    def measure(name: str, checkpoint: Path) -> list[dict[str, Any]]:
        model = load(checkpoint, device)
        model.coding_device = coding_device
        if args.half and args.precision != "fp32":
            raise UserError(f"--half, --precision {args.precision}: give one of them")
        use_precision(model, args.precision)
        if args.half:
            for part in (model.g_a, model.g_s):
                evaluate.in_half(part)
        return [evaluate_rate(model, images, rate, name, checkpoint, args)
                for rate in rates(model, args)]

    checkpoints = find_checkpoints(args)
    curves = evaluate.curves_of(checkpoints, measure)
    if args.reproduce and (HERE / "results" / "fixed.json").exists():
        fixed = load_results(HERE / "results" / "fixed.json")
        if digest_of(fixed) == digest_of(curves[0]):
            curves.append(fixed)
        elif processes.rank() == 0:
            print(f"fixed.json is left out: it was measured on {title(digest_of(fixed))}")
    if processes.rank() == 0:
        compare.report(curves, HERE / "results" / "published.json", images, Path(args.resultdir),
                       "QVRF")
        if args.reproduce and curves[-1]["name"] == "fixed":
            print(against_fixed(curves[0], curves[-1]))
        if args.reproduce:
            reproduction.conclude(args, HERE, checkpoints, curves, images)
        if args.path:  # the output of the source's script
            keys = {"psnr-rgb": "psnr", "bpp": "bpp", "encoding_time": "encoding_time",
                    "decoding_time": "decoding_time"}
            kind = "entropy estimation" if args.entropy_estimation else "ans"
            print(json.dumps({"description": f"Inference ({kind})", "results": {
                name: curves[0]["results"][key] for key, name in keys.items()}}, indent=2))


def check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other."""
    if args.factormode == 1 and not args.factor > 0:
        raise UserError(f"--factor {args.factor:g}: give a positive number, as 1.5 or 1/2.5")
    if args.sweep and args.factormode == 0:
        raise UserError("--sweep is for continuous rates: give --factormode 1 with it")
    if args.path and args.pretrained:
        raise UserError("--path, --pretrained: give one of them")
    if args.s is not None and args.s < 0:
        raise UserError(f"--s {args.s}: levels are counted from 0")
    if args.patch % QVRF.downsampling_factor:
        raise UserError(f"--patch {args.patch}: give a multiple of {QVRF.downsampling_factor}")
    if args.patch != QVRF.downsampling_factor and not args.entropy_estimation:
        raise UserError(f"--patch {args.patch}: files hold images padded to multiples of "
                        f"{QVRF.downsampling_factor}; others only with --entropy-estimation")


def find_checkpoints(args: argparse.Namespace) -> dict[str, list[Path]]:
    """Weights to evaluate, by the name of the curve."""
    small = [HERE / "weights" / BUNDLED]
    if args.path:
        path = exported(Path(args.path))
        return {args.name or evaluate.run_name(path): [path]}
    if args.checkpoint:
        return {args.name or evaluate.curve_name(args.checkpoint): args.checkpoint}
    if args.reproduce:
        if not args.config:
            raise UserError("--reproduce needs --config, the file that the run was trained with")
        out = Path(str(cli.read_yaml(args.config).get("out", ".")))
        best = out / "checkpoint_best_loss.pth.tar"
        if not best.exists():
            raise UserError(f"{out}: holds no trained model; run train.py --config first")
        return {args.config.stem: [best], "small": small}
    return {args.name or "small": small}


def exported(path: Path) -> Path:
    """Return `path`, or the file with a hash that update.py has written: NAME-1a2b3c4d.pth.tar."""
    stem, dot, suffixes = path.name.partition(".")
    found = sorted(path.parent.glob(f"{stem}-????????{dot}{suffixes}"))
    if not path.exists() and len(found) > 1:
        raise UserError(f"{path}: ambiguous, name one of {', '.join(p.name for p in found)}?")
    return found[0] if found and not path.exists() else path


def rates(model: QVRF, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The operating points that the flags request."""
    if args.factormode == 1:
        low, high = factor_range(model)
        meant = low <= args.factor <= high or isinstance(args.factor, Ratio)
        if args.sweep or not meant:
            if not args.sweep:
                print(f"--factor {args.factor:g} is outside [{low:g}, {high:g}]: the source's "
                      f"sweep of {len(SWEEP)} factors")
            return [{"factor": f} for f in SWEEP]
        return [{"factor": args.factor}]
    if model.provenance.config.get("lmbda"):  # a fixed-rate model for comparison
        return [{"s": 0}]
    s = args.s if args.s is not None else (2 if args.path else model.levels)
    return [{"s": s}] if s < model.levels else [{"s": s} for s in range(model.levels)]


def factor_range(model: QVRF) -> tuple[float, float]:
    """The source's range of factors; with eleven levels, its end is scaled with the last gain."""
    return FACTORS[0], FACTORS[1] * math.sqrt(LMBDAS[model.levels - 1] / LMBDAS[7])


def evaluate_rate(model: QVRF, images: list[Path], rate: dict[str, Any], name: str,
                  checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate one operating point; decoded images and the source's CSV go to a separate folder."""
    label = f"s_{rate['s']}" if "s" in rate else f"factor_{rate['factor']:g}"
    if args.output_path:
        dataset = Path(args.dataset or data.KODAK).resolve()
        folder = dataset.parent / f"{args.output_path}_{label}"
    else:
        folder = evaluate.output_folder(args.outdir, model, checkpoint) / label
    config = model.provenance.config
    s = rate.get("s")
    meta = {"model": model.model, "levels": model.levels, "level": s,
            "factor": model.gain(**rate).item(),
            "lmbda": config.get("lmbda") or (None if s is None else LMBDAS[s]),
            "steps": model.provenance.total_steps or None, "steps_source": SOURCE_STEPS}
    meta = {key: value for key, value in meta.items() if value is not None}
    if args.entropy_estimation:
        point = evaluate.evaluate_estimate(model, images, f"{name}-estimated", args.patch, meta,
                                           rate)
    else:
        point = evaluate.evaluate(model, images, name, str(checkpoint.name), folder,
                                  args.test_batch_size, meta, rate=rate)
    if processes.rank() == 0:
        sections = None if args.entropy_estimation else folder
        text = csv(point["per_image"][0], images, sections)
        write_atomic(folder / f"{folder.name}_result.csv",
                     text.encode("utf-8", "surrogateescape"))
    return point


def csv(rows: list[dict[str, Any]], images: list[Path], folder: Path | None) -> str:
    """The source's table, a row per image: mse on the 255 scale, y_bpp and z_bpp of the payload."""
    lines = [",".join(COLUMNS)]
    files = {name: path.name for path, name in image_names(images).items()}
    for row in rows:
        pixels = row["height"] * row["width"]
        if folder:
            file = bitstream.unpack(read_file(folder / f"{row['image']}.bin"), QVRF.tag)
            y_bits, z_bits = (8 * len(section) for section in file.sections)
        else:
            y_bits, z_bits = row["y_bits"], row["z_bits"]
        psnr = row["psnr-rgb"]
        mse = 0.0 if psnr is None or math.isinf(psnr) else 255**2 / 10 ** (psnr / 10)
        values = [8 * row["bytes"], pixels, row["bpp"], y_bits / pixels, z_bits / pixels, mse, psnr,
                  row["ms-ssim-rgb"], row.get("encoding_time"), row.get("decoding_time")]
        cells = ["" if v is None else f"{v:.8g}" for v in values]
        lines.append(",".join([files[row["image"]], *cells]))
    return "\n".join(lines) + "\n"


def against_fixed(ours: dict[str, Any], fixed: dict[str, Any]) -> str:
    """BD-rate of a variable-rate model against one model per rate."""
    curves = [(c["results"]["bpp"], c["results"]["psnr-rgb"]) for c in (fixed, ours)]
    value = metrics.bd_rate(*curves[0], *curves[1])
    text = "no common range of PSNR" if value is None else f"{value:+.1f} %"
    return (f"BD-rate of {ours['name']}, one model for {len(curves[1][0])} rates, against "
            f"{len(curves[0][0])} models of a fixed rate, each trained as long: {text}")


def print_complexity() -> None:
    """Print parameters and multiply-accumulates for a 768x512 image, by both counting rules."""
    print("one 768x512 image; 'thop' counts transposed convolutions per output pixel, 4x too many,"
          " and omits GDN, entropy models and the masked convolution")
    for base, (N, M) in WIDTHS.items():
        counts = complexity(build(base))
        print(f"{base:6s} N={N} M={M}  parameters {counts['params_total']:,} "
              f"(thop {counts['params_thop']:,})  MACs {counts['macs_true'] / 1e9:.3f} G + GDN "
              f"{counts['macs_gdn'] / 1e9:.3f} G (thop {counts['macs_thop'] / 1e9:.3f} G)")


class Ratio(float):
    """A factor written as a fraction, which is always used, while a small decimal means --sweep."""


def factor(text: str) -> float:
    """Parse a number or a fraction, e.g. 1/2.5: the reciprocal of the quantisation step."""
    try:
        numerator, slash, denominator = text.partition("/")
        value = Ratio(float(numerator) / float(denominator)) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number: give one as 1.5 or 1/2.5")
    return value


if __name__ == "__main__":
    cli.run(main)
