"""Compress a folder of images to files, decode them, and measure rate, distortion and time.

    python eval.py                                  bundled small weights, Kodak
    python eval.py --epoch_num 199                  every run under ./ckpts that has this epoch
    python eval.py --checkpoint A.pth B.pth         these weights, one point of the curve each
    torchrun --nproc_per_node=4 eval.py ...         images divided over processes

bpp is 8 * file size on disk / original pixels, including the header. PSNR and MS-SSIM are computed
on 8-bit images without padding and averaged over the images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import cli, processes
from common.coding import zoo
from common.complexity import complexity
from common.evaluation import compare, evaluate, reproduction

from joint_ar.model import ZOO, JointAutoregressive, build, load

HERE = Path(__file__).parent
MODEL_NAMES = ("JointAutoregressiveHierarchicalPriors", "JointAutoregressive")
WIDTHS = {"low": (192, 192), "high": (192, 320)}  # the report's N, M
SOURCE_STEPS = 250_000  # the seminar's 250 epochs of about 1,010; CompressAI trains 4-5 M


def flags() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Compress images to files and measure rate and distortion.")
    add = parser.add_argument_group("the source's flags").add_argument
    add("--model_name", default=MODEL_NAMES[0], type=cli.one_of(MODEL_NAMES),
        choices=MODEL_NAMES, help="name of the model")
    add("--load_model_epoch", "--epoch_num", type=int,
        help="epoch of the runs under ./ckpts; bundled weights if not given")
    add("--dataset_path", help="folder of test images; Kodak if not given")
    evaluate.add_flags(parser)
    zoo.add_flag(parser, several=True)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = flags().parse_args(argv)
    zoo.use(args, ZOO, JointAutoregressive)
    device = processes.start(args.device, threads=args.threads, jobs=args.jobs)
    coding_device = processes.parse_device(args.entropy_device)
    if args.complexity:
        print_complexity()
        return
    images = evaluate.test_images(args.dataset_path)
    checkpoints = evaluate.find_checkpoints(args, HERE / "weights", prefix=MODEL_NAMES[0],
                                            names=MODEL_NAMES)
    curves = evaluate.fixed_rate_curves(args, checkpoints, load, images, device, coding_device,
                                        lambda _: {"steps_source": SOURCE_STEPS})
    if processes.rank() == 0:
        compare.report(curves, HERE / "results" / "published.json", images, Path(args.resultdir),
                       args.model_name)
        if args.reproduce:
            reproduction.conclude(args, HERE, checkpoints, curves, images)


def print_complexity() -> None:
    """Print parameters and multiply-accumulates for a 768x512 image, by both counting rules."""
    print("one 768x512 image; 'thop' counts transposed convolutions per output pixel, 4x too many,"
          " and omits GDN, entropy models and the masked convolution")
    for code_rate, (N, M) in WIDTHS.items():
        counts = complexity(build(N, M))
        print(f"{code_rate:5s} N={N} M={M}  parameters {counts['params_total']:,} "
              f"(thop {counts['params_thop']:,})  MACs {counts['macs_true'] / 1e9:.3f} G + GDN "
              f"{counts['macs_gdn'] / 1e9:.3f} G + context {counts['macs_masked'] / 1e9:.3f} G "
              f"(thop {counts['macs_thop'] / 1e9:.3f} G)")


if __name__ == "__main__":
    cli.run(main)
