"""Train QVRF: a fixed-rate base codec in stage 1, and all its rates in stages 2 and 3.

    python train.py --stage 1                            the source's recipe on the bundled tiles
    python train.py --stage 2                            starts from the best weights of stage 1
    python train.py --stage 3
    python train.py --config quick.yaml                  all three stages, small
    python train.py -d ./dataset -e 2000 500 500 --stage 1 2 3 --batch-size 8
    torchrun --nproc_per_node=4 train.py ...             more processes or machines

    stage   level s of a batch    lmbda       regulator     rounding in training
    1       the last              the last    1             noise
    2       drawn                 lmbda[s]    Gain[s]       noise
    3       drawn                 lmbda[s]    Gain[s]       true, straight-through gradient (STE)

Checkpoints: checkpoint.pth.tar and checkpoint_best_loss.pth.tar in --out (by default the current
folder); when a stage begins, those of the previous one are kept as ..._stage<n>.pth.tar. Logs:
logs/stage<n>/.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from common import UserError, cli, data, locks, processes
from common.coding import zoo
from common.coding.model_file import load_checkpoint
from common.files import write_atomic
from common.loss import RateDistortionLoss
from common.training.checkpoints import Checkpoints, check_resume
from common.training.cuda_graph import Recorded
from common.training.images import find_images
from common.training.log import Log
from common.training.network import autocast, prepare_network
from common.training.optimizers import (
    learning_rate,
    main_parameters,
    make_optimizers,
    make_scheduler,
)
from common.training.run import Run, add_training_flags
from common.training.validation import central_crops

import numpy as np
import torch
import yaml
from torch import Tensor

from qvrf.model import BASES, LEVELS, LMBDAS, QVRF, WIDTHS, ZOO, build
from qvrf.stages import (
    BEST,
    NEWEST,
    config_of,
    load_weights,
    set_aside,
    spread_gains,
    starting_point,
)

BUNDLED = Path(__file__).parent / "weights" / "small-balle.pth"
SOURCE_EPOCH = 1_073  # steps per epoch in the source, used for the bundled photographs
ANEW = "--checkpoint FILE --refresh 1 and another --out"  # flags that start another run
SAME_RUN = ("model", "levels", "N", "M", "stage", "ste", "lmbda", "optimizer", "learning_rate",
            "aux_learning_rate", "lr_schedule", "milestones", "batch_size", "patch_size", "flip",
            "start_gain", "start_level", "images", "steps_per_epoch", "seed",
            "clip_max_norm")  # flags that --resume must not change


def flags() -> cli.Parser:
    parser = cli.Parser(description="Train a variable-rate codec (Tong et al. 2023).")
    add = parser.add_argument_group("the source's flags").add_argument
    add("-d", "--dataset",
        help="folder with train/ and test/; without test/, some training images are held out; "
        "bundled photographs if not given")
    add("-e", "--epochs", type=cli.positive_int, nargs="+", default=[100],
        help="number of epochs; one value, or one per stage")
    add("-lr", "--learning-rate", type=cli.positive_float, nargs="+", default=[1e-4],
        help="initial learning rate; one value, or one per stage")
    add("-n", "--num-workers", type=cli.count, default=4, help="number of data loader processes")
    add("--batch-size", type=cli.positive_int, default=16,
        help="images per step, over all processes")
    add("--test-batch-size", type=cli.positive_int, default=64,
        help="number of validation images per batch")
    add("--aux-learning-rate", type=cli.positive_float, default=1e-3,
        help="learning rate of the quantiles")
    add("--patch-size", type=cli.positive_int, nargs=2, default=[256, 256],
        help="height and width of the crops in pixels: random in training, central in validation")
    add("--cuda", action="store_true",
        help="use a GPU, or the CPU with a note if there is none, as without the flag")
    add("--save", action="store_true", default=True,
        help="without effect; checkpoints are always saved")
    add("--seed", type=seed, default=0, help="seed of weights, noise, crops and levels")
    add("--clip_max_norm", type=cli.positive_float, default=1.0, help="maximum gradient norm")
    add("--checkpoint",
        help="checkpoint to continue; with --refresh 1, only its weights are used")
    add("--stage", type=int, nargs="+", choices=[0, 1, 2, 3], default=[0],
        help="stages of training, one after the other; 0 means 1")
    add("--ste", type=int, choices=[0, 1], default=0,
        help="1 rounds with a straight-through gradient in all stages")
    add("--loadFromPretrainedSinglemodel", type=int, choices=[0, 1], default=0,
        help="1 states that --checkpoint is a fixed-rate base codec, e.g. CompressAI's")
    add("--refresh", type=int, choices=[0, 1], default=0,
        help="1 resets learning rates, schedule, epoch and best loss")
    add_training_flags(parser, lr_schedule="plateau", without=(
        "--metric", "--aux-lr", "--clip-max-norm", "--patch-size", "--seed", "--save-every"))
    add = parser.add_argument_group("our flags for this paper").add_argument
    add("--model", choices=list(BASES), default="cheng", help="base codec")
    add("--levels", type=int, choices=LEVELS, default=8, help="number of discrete rates")
    add("--N", type=cli.positive_int, help="number of hidden channels; the paper's if not given")
    add("--M", type=cli.positive_int, help="number of latent channels; the paper's if not given")
    add("--start_gain", type=cli.positive_float,
        help="largest initial gain of stage 2: gains rise from 1 to it, and --start_level begins "
        "as the codec of stage 1; if not given, as in the source, the lowest rate takes over the "
        "quantisation step of stage 1, which was trained for the highest rate")
    add("--start_level", type=cli.count,
        help="level whose lmbda stage 1 used, for --start_gain; the last if not given")
    add("--lmbda", type=cli.positive_float,
        help="lmbda of a fixed-rate model for comparison, trained in stage 1 only")
    add("--out", default=".", help="folder of checkpoints and logs")
    zoo.add_flag(parser)
    add("--check_time", type=cli.minutes, default=10,
        help="minutes between checkpoints within an epoch")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = flags()
    args = cli.parse(parser, argv)
    if args.pretrained:
        args.checkpoint = zoo.start(args, ZOO[args.model], args.checkpoint)
        args.loadFromPretrainedSinglemodel = 1
    stages = [max(1, stage) for stage in args.stage]
    check(args, stages)
    device = processes.start(processes.cuda_or_cpu(args.cuda, args.device),
                             threads=args.threads)
    out = Path(args.out)
    given = cli.summary(parser, args)
    done = 0
    if not (out / NEWEST).exists():
        check_resume(args.resume, out)
    if args.resume and (out / NEWEST).exists():
        config = load_checkpoint(out / NEWEST).get("config", {})
        if config.get("stage") not in stages:
            raise UserError(f"{out / NEWEST} is of stage {config.get('stage')}, not of --stage "
                            f"{' '.join(map(str, stages))}: leave --resume out")
        done = stages.index(config["stage"])
    for i, stage in enumerate(stages):
        if i < done:
            continue
        one = copy.copy(args)
        one.stage, one.epochs = stage, args.epochs[i % len(args.epochs)]
        one.learning_rate = args.learning_rate[i % len(args.learning_rate)]
        one.resume = bool(args.resume) and i == done and (out / NEWEST).exists()
        if i > 0:  # only the first of several stages may start from --checkpoint
            one.checkpoint, one.refresh, one.loadFromPretrainedSinglemodel = None, 0, 0
        train(one, device, given)


def check(args: argparse.Namespace, stages: list[int]) -> None:
    """Raise UserError for flags that contradict each other."""
    for name in ("epochs", "learning_rate"):
        if len(getattr(args, name)) not in (1, len(stages)):
            each = f", or {len(stages)}, one for each --stage" if len(stages) > 1 else ""
            raise UserError(f"--{name.replace('_', '-')}: give one number{each}, not "
                            f"{len(getattr(args, name))}")
    if stages != sorted(set(stages)):
        raise UserError(f"--stage {' '.join(map(str, args.stage))}: give stages in rising order")
    if any(side % QVRF.downsampling_factor for side in args.patch_size):
        raise UserError(f"--patch-size {args.patch_size[0]} {args.patch_size[1]}: give multiples "
                        f"of {QVRF.downsampling_factor}")
    if args.lmbda and stages != [1]:
        raise UserError("--lmbda trains one rate: use it with --stage 1; stages 2 and 3 take the "
                        "multipliers of all levels")
    if args.model == "cheng" and args.M not in (None, N := args.N or WIDTHS["cheng"][0]):
        raise UserError(f"--M {args.M}: in cheng M is N; set it to {N}")
    if args.start_gain and args.model == "cheng":
        raise UserError(f"--start_gain {args.start_gain:g}: cheng's latent comes out of an "
                        "attention block and cannot be scaled by its weights; leave it out")
    if args.start_level is not None and not (args.start_gain and args.start_level < args.levels):
        raise UserError(f"--start_level {args.start_level}: needs --start_gain, and a level from 0 "
                        f"to {args.levels - 1}")
    if args.loadFromPretrainedSinglemodel and not args.checkpoint:
        raise UserError("--loadFromPretrainedSinglemodel 1 needs --checkpoint FILE")


def train(args: argparse.Namespace, device: torch.device, given: str) -> None:
    """Train one stage; given: the flags that differ from the defaults."""
    out = Path(args.out)
    torch.manual_seed(args.seed + 1000 * args.stage + processes.rank())
    ste = args.stage > 2 or args.ste == 1
    args.steps_before = 0
    processes.broadcast_flag(True)  # wait until all files are written

    # the run or the weights that it continues; the previous stage in --out had the same images
    start, resumed = (None, out / NEWEST) if args.resume else starting_point(args, out)
    history = resumed or (None if args.checkpoint else start)

    # data
    crop = (args.patch_size[0], args.patch_size[1])
    images = find_images(args.dataset, crop, args.seed, args.flip, history,
                         test_folder(args.dataset), folder=out)
    one_pass = max(1, len(images) // args.batch_size)
    args.steps_per_epoch = args.steps_per_epoch or (one_pass if args.dataset else SOURCE_EPOCH)
    args.images, args.validation = images.digest, images.validation  # --resume compares images
    test_images = central_crops(images.test, crop, "--patch-size")
    batch = processes.per_process_batch(args.batch_size)

    # model and its weights
    model = build(args.model, args.levels, args.N, args.M)
    args.N, args.M = model.N, model.M
    if start:
        single = bool(args.loadFromPretrainedSinglemodel)
        args.steps_before, stage_before = load_weights(model, start, single)
        if args.stage > 1 and args.start_gain and not (single or stage_before):
            raise UserError(f"--start_gain {args.start_gain:g}: {start} does not tell its stage; "
                            "start from a checkpoint of train.py")
        if args.stage > 1 and args.start_gain and (single or stage_before == 1):
            spread_gains(model, args.start_gain, args.start_level)
    elif resumed:
        args.steps_before = config_of(resumed).get("steps_before", 0)
    elif args.stage > 1 and args.start_gain:
        raise UserError(f"--start_gain {args.start_gain:g}: there is no stage 1 to start from; "
                        "train it first or name it with --checkpoint")
    locks.lock(out, f"start another run: {ANEW}")
    if resumed != out / NEWEST:
        set_aside(out)
    model.to(device, memory_format=torch.channels_last)
    net = prepare_network(model, args.compile)
    optimizer, aux_optimizer = make_optimizers(model, args.optimizer, args.learning_rate,
                                               args.aux_learning_rate)
    scheduler = make_scheduler(optimizer, args.lr_schedule, args.epochs, args.milestones,
                              patience=20)
    last = model.levels - 1
    lmbdas = [args.lmbda] if args.lmbda else list(LMBDAS[: model.levels])
    criteria = [RateDistortionLoss(lmbda) for lmbda in lmbdas]

    # the run, from its beginning or from a checkpoint
    log = Log(out / "logs" / f"stage{args.stage}", args.epochs * args.steps_per_epoch)
    parts = {"model": model, "optimizer": optimizer, "aux_optimizer": aux_optimizer,
             "scheduler": scheduler, "log": log}
    checkpoints = Checkpoints(out, parts, vars(args), SAME_RUN, ANEW)
    state = checkpoints.resume(resumed) if resumed else {}
    best = state.get("best_loss", float("inf"))
    run = Run(checkpoints, log, images.crops, device, args.epochs, args.steps_per_epoch, batch,
              args.num_workers, args.check_time, NEWEST, state.get("step", 0))
    if processes.rank() == 0:
        whole = out / "logs" / f"stage{args.stage}" / "config.yaml"
        write_atomic(whole, yaml.safe_dump(vars(args), sort_keys=False).encode())
        print(f"{given}  (all flags: {whole})")
        print(run.describe(bundled=not args.dataset))
        if run.is_done():
            print(f"stage {args.stage} has its {args.epochs} epochs already (-e for more)")
        else:
            print(opening(args.stage, resumed or start), flush=True)

    def train_step(x: Tensor, s: int) -> dict[str, Tensor]:
        """One optimisation step on a batch; returns the scalars to log."""
        with autocast(device, args.precision):
            output = net(x, s, 1.0 if args.stage == 1 else None, ste)
        losses = criteria[0 if args.lmbda else s](output, x)

        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        losses["loss"].backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            main_parameters(model).values(), args.clip_max_norm)
        run.check({**losses, "grad_norm": grad_norm})
        optimizer.step()
        aux_loss = model.aux_loss()
        aux_loss.backward()
        aux_optimizer.step()
        return {**losses, "aux": aux_loss, "grad_norm": grad_norm}

    train_step = Recorded(train_step, optimizer, aux_optimizer,
                          enabled=args.graph and not ste)  # which reads the gain on the CPU
    for epoch in run.remaining_epochs():
        model.train()
        for x in run.batches():
            # stage 1 trains one rate with step 1, which is later the step of the *lowest* rate
            s = last if args.stage == 1 else draw_level(args.seed, run.step, model.levels)
            values = train_step(x, s)
            run.end_step({**values, "level": s, "lr": learning_rate(optimizer)}, best_loss=best)

        line, means = run.end_epoch()
        run.settle()
        tested = (epoch + 1) % args.test_every == 0 or run.is_last_epoch
        improved = False
        if tested:
            test = run.test(validate, model, test_images, args, criteria, device, log, run.step)
            line += (f"  test loss {test['loss']:.4f} (sum) bpp {test['bpp']:.4f} "
                     f"psnr {test['psnr']:.2f} (means over levels)")
            improved, best = test["loss"] < best, min(best, test["loss"])
        if args.lr_schedule != "plateau":
            scheduler.step()
        elif tested:
            scheduler.step(test["loss"])
        if args.stage > 1:
            line += "  Gain " + " ".join(f"{g:.3f}" for g in model.Gain.tolist())
        log.line(line)
        # NEWEST last: a run that is killed in between repeats the epoch when it is resumed
        for name in [BEST, NEWEST] if improved else [NEWEST]:
            run.save(name, best_loss=best, loss=means["loss"])
    log.close()


def opening(stage: int, start: Path | None) -> str:
    """The last line before the progress bar: the weights that a stage starts from."""
    if start or stage == 1:
        return f"stage {stage} starts from {start or 'random weights'}"
    return (f"stage {stage} starts from RANDOM WEIGHTS, not from those of stage {stage - 1}: stop "
            f"it and train that first (`python train.py --stage {stage - 1}`), or start from "
            "trained weights (`python train.py --stage 2 --model balle --N 80 --M 192 --checkpoint "
            f"{BUNDLED} --refresh 1`)")


def draw_level(seed: int, step: int, levels: int) -> int:
    """Draw the level of a step, the same on all processes and in a resumed run."""
    key = (seed + 2**33) % 2**64
    return int(np.random.Generator(np.random.Philox(key=key, counter=step)).integers(levels))


# --------------------------------------------------------------------------------- validation
def test_folder(dataset: str | None) -> Path | None:
    """<dataset>/test, if there is one."""
    folder = Path(dataset or "", "test")
    return folder if dataset and folder.is_dir() else None


@torch.no_grad()
def validate(model: QVRF, images: Tensor, args: argparse.Namespace,
             criteria: list[RateDistortionLoss], device: torch.device, log: Log, step: int
             ) -> dict[str, float]:
    """Loss summed over the levels, and mean bpp and PSNR; quantised as in files, rate estimated.

    Stage 1 has a single rate: its regulator is 1 at each level, and only the multipliers differ.
    """
    model.eval()
    sums: dict[str, float] = {}

    def add(name: str, value: Any, n: int) -> None:
        sums[name] = sums.get(name, 0.0) + float(value) * n / len(images)

    for batch in images.split(args.test_batch_size):
        x = data.to_float(batch.to(device))
        latents = model.analyse(x)
        z_likelihoods = model.z_likelihoods(latents)
        output: dict[str, Any] = {}
        for s, criterion in enumerate(criteria):
            if not output or args.stage > 1:
                output = model.estimate(latents, s, 1.0 if args.stage == 1 else None)
                output["likelihoods"]["z"] = z_likelihoods
                error = (output["x_hat"].clamp(0, 1) - x).square().mean(dim=(1, 2, 3))
            losses = criterion(output, x)
            add("loss", losses["loss"], len(x))
            add("bpp", losses["bpp"] / len(criteria), len(x))
            add("psnr", -10 * error.log10().mean() / len(criteria), len(x))
            if args.stage > 1:
                add(f"bpp_level{s}", losses["bpp"], len(x))
                add(f"psnr_level{s}", -10 * error.log10().mean(), len(x))
    log.images(x[-1], output["x_hat"][-1], step)
    log.scalars("test", sums, step)
    return sums


def seed(text: str) -> int:
    """Parse a seed; the source's is a float, so 1926.0 is accepted."""
    return cli.seed_number(text.removesuffix(".0"))


if __name__ == "__main__":
    cli.run(main)
