"""Train one of the ten experiments.

    python train.py --experiment variant2 --model-dir experiments/variant2 --train-data-dir /path
    python train.py --config quick.yaml                             base, small, bundled photographs
    python main.py --model-dir experiments/base train --epochs 10   the source's form of the same
    torchrun --nproc_per_node=4 train.py ...                        several processes

The parameters of an experiment are in params.json in its folder. Flags of the same names override
them, and are written there if the folder is new. Checkpoints, log and TensorBoard events go there,
too.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import secrets
from pathlib import Path
from typing import Any

from common import UserError, cli, data, processes
from common.coding.model_file import load_checkpoint
from common.loss import RateDistortionLoss, check_size
from common.training.checkpoints import Checkpoints, epoch_checkpoints, load_weights, newest
from common.training.cuda_graph import Recorded
from common.training.images import find_images
from common.training.log import Log
from common.training.network import autocast, prepare_network
from common.training.optimizers import learning_rate, main_parameters, make_optimizers
from common.training.run import Run, add_training_flags
from common.training.validation import central_parts

import torch
from torch import Tensor

from advdnic import params
from advdnic.model import EXPERIMENTS, Experiment, build

KEPT = 5  # number of checkpoints that are kept
LATEST = "latest.pth"
MODEL = ("experiment", "num_filters", "variant1", "ep_compat", "mod2_down_inverse", "resnets",
         "stages", "scales_min", "scales_max", "scales_levels")
SAME_RUN = (*params.DEFAULTS, "batchsize", "images", "steps_per_epoch", "random_seed", "metric")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `main.py train`, and ours."""
    add = parser.add_argument_group("the source's flags").add_argument
    add("--train-data-dir", "--dataset",
        help="folder or .tar shards of training images; bundled photographs if not given")
    add("--eval-data-dir",
        help="folder of validation images; if not given, some training images are held out")
    add("--batchsize", type=cli.positive_int, default=4,
        help="images per step, over all processes")
    add("--num-parallel-calls", type=cli.count, default=4,
        help="number of data loader processes")
    add("--epochs", type=cli.positive_int, default=1000, help="number of epochs")
    add("--steps", type=cli.positive_int,
        help="number of training steps, in place of --epochs; rounded up to whole epochs")
    add("--save-summary-steps", type=cli.positive_int, default=100,
        help="steps between TensorBoard entries")
    add("--random-seed", type=cli.seed_number,
        help="seed of weights, noise and crops; a random one if not given")
    add("--allow-growth", type=params.boolean, default=True,
        help="without effect; GPU memory always grows on demand")
    add("--xla", type=params.boolean, default=False,
        help="true compiles the network with torch.compile")
    add("--save-profiling-steps", type=cli.count, default=0,
        help="steps between profiler traces; 0 writes none")
    add("--log-verbosity", choices=["DEBUG", "ERROR", "FATAL", "INFO", "WARN"], default="INFO",
        help="verbosity of the terminal; INFO and DEBUG show progress")
    add = parser.add_argument_group("keys of params.json").add_argument
    for key, value in params.DEFAULTS.items():
        if key == "use_adversarial_loss":  # also a flag before the command
            continue
        kind = params.boolean if isinstance(value, bool) else type(value)
        names = [f"--{key}"] if key != "lmbda" else ["--lmbda", "--lambda"]
        add(*names, type=kind, choices=params.CHOICES.get(key),
            help=f"{value} if neither this flag nor params.json gives it")
    add_training_flags(parser, lr_schedule="constant", without=(
        "--optimizer", "--aux-lr", "--lr-schedule", "--milestones", "--clip-max-norm",
        "--patch-size", "--flip", "--save-every", "--seed", "--compile", "--config"))
    parser.add_argument("--init-ckpt", "--init_ckpt",
                        help="checkpoint whose weights a new run starts from")
    parser.add_argument("--eval-patchsize", type=cli.positive_int,
                        help="side of the central validation crops in pixels; whole images if not "
                        "given")
    parser.add_argument("--check-time", type=cli.minutes, default=10,
                        help="minutes between checkpoints within an epoch")


def flags() -> cli.Parser:
    parser = cli.Parser(description="Train one of the ten experiments.")
    parser.add_argument("--config", help="YAML file of flags; the command line overrides it")
    parser.add_argument("--model-dir", type=Path, default=Path("experiments/base_model"),
                        help="folder of params.json, checkpoints and logs")
    parser.add_argument("--name", help="name of the run, shown in its log")
    parser.add_argument("--verbose", "-V", action="store_true", help="without effect in training")
    parser.add_argument("--use_adversarial_loss", "--use-adversarial-loss", type=params.boolean,
                        default=False, help="not supported, as there is no discriminator")
    add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = flags()
    args = cli.parse(parser, argv)
    run(args, cli.summary(parser, args))


def run(args: argparse.Namespace, given: str) -> None:
    """Train; given: the flags that differ from the defaults."""
    settle_params(args)
    quiet = args.log_verbosity in ("ERROR", "FATAL", "WARN")
    device = processes.start(args.device, threads=args.threads)
    folder = args.model_dir
    args.random_seed = seed_of(args)
    torch.manual_seed(args.random_seed + processes.rank())

    # data
    found = find_images(args.train_data_dir, args.patchsize, args.random_seed, args.flip, folder,
                        args.eval_data_dir, quiet)
    args.steps_per_epoch = args.steps_per_epoch or math.ceil(len(found) / args.batchsize)
    args.images, args.validation = found.digest, found.validation  # --resume compares images
    per_epoch = args.steps_per_epoch
    args.epochs = math.ceil(args.steps / per_epoch) if args.steps else args.epochs
    images = validation_images(args, found.test)
    check_size(args.metric, (args.patchsize, args.patchsize))
    batch = processes.per_process_batch(args.batchsize)

    # model, optimisers, schedules
    model = build(**{key: getattr(args, key) for key in MODEL})
    # --resume replaces the weights of --init-ckpt
    args.steps_before = load_weights(model, args.init_ckpt) if args.init_ckpt else 0
    model = model.to(device, memory_format=torch.channels_last)
    if args.patchsize % model.downsampling_factor:
        raise UserError(f"--patchsize {args.patchsize}: give a multiple of "
                        f"{model.downsampling_factor}")
    net = prepare_network(model, args.xla)
    optimizer, aux_optimizer = optimizers(model, args)
    schedulers = [schedule(o, kind, per_epoch, args.epochs * per_epoch)
                  for o, kind in ((optimizer, args.main_opt_lr_decay_type),
                                  (aux_optimizer, args.aux_opt_lr_decay_type))]
    criterion = RateDistortionLoss(args.lmbda, args.metric)

    # the run, from its beginning or from a checkpoint
    log = Log(folder, args.epochs * per_epoch, quiet)
    parts = {"model": model, "optimizer": optimizer, "aux_optimizer": aux_optimizer,
             "scheduler": schedulers[0], "aux_scheduler": schedulers[1], "log": log}
    config = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    decays = args.main_opt_lr_decay_type, args.aux_opt_lr_decay_type
    whole = ("epochs",) if "cosine" in decays else ()  # the whole schedule depends on it
    checkpoints = Checkpoints(folder, parts, config, (*SAME_RUN, *whole), "another --model-dir")
    state = checkpoints.begin(args.resume, None)
    best = state.get("best", math.inf)
    if not state and processes.rank() == 0:
        params.write(folder, {key: getattr(args, key) for key in params.DEFAULTS})
    run = Run(checkpoints, log, found.crops, device, args.epochs, per_epoch, batch,
              args.num_parallel_calls, args.check_time, LATEST, state.get("step", 0))
    if processes.rank() == 0 and not quiet:
        print(f"{given}  (all flags: {folder / 'config.yaml'})")
        name = f"{args.name}: " if args.name else ""
        print(f"{name}{args.experiment}, {run.describe(bundled=not args.train_data_dir)}, to "
              f"{folder}", flush=True)
        if run.is_done():
            print(f"nothing to do: this run has its {args.epochs} epochs (--epochs)")

    def train_step(x: Tensor) -> dict[str, Tensor]:
        """One optimisation step on a batch; returns the scalars to log."""
        with autocast(device, args.precision):
            output = net(x)
        losses = criterion(output, x)  # of x_hat before clipping

        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        losses["loss"].backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            main_parameters(model).values(), args.clip_norm or math.inf)
        run.check({**losses, "grad_norm": grad_norm})
        optimizer.step()
        aux_loss = model.aux_loss()
        aux_loss.backward()
        aux_optimizer.step()
        return {**losses, "aux": aux_loss, "grad_norm": grad_norm}

    train_step = Recorded(train_step, optimizer, aux_optimizer,
                          enabled=args.graph and not args.save_profiling_steps)
    for epoch in run.remaining_epochs():
        model.train()
        for x in run.batches():
            rate = learning_rate(optimizer)
            with profile(args, run.step, folder):
                values = train_step(x)
            for scheduler in schedulers:
                scheduler.step()
            run.end_step({**values, "lr": rate}, args.save_summary_steps, best=best)

        line, means = run.end_epoch()
        test = {}
        run.settle()
        if (epoch + 1) % args.test_every == 0 or run.is_last_epoch:
            test = run.test(validate, model, images, criterion, device, log, run.step)
            line += f"  eval loss {test['loss']:.4f} bpp {test['bpp']:.4f} psnr {test['psnr']:.2f}"
            best = min(best, test["loss"])
        log.line(line)
        run.save(f"epoch_{epoch}.pth", best=best, test=test, train=means)
        if processes.rank() == 0:
            for old in [*epoch_checkpoints(folder)[:-KEPT], folder / LATEST]:
                old.unlink(missing_ok=True)
    log.close()


def settle_params(args: argparse.Namespace) -> None:
    """Set args from params.json in the folder, where no flag is given.

    A new run writes params.json; with --resume, flags must not contradict it.
    """
    given = {key: getattr(args, key) for key in params.DEFAULTS
             if getattr(args, key, None) is not None}
    there = args.model_dir / params.NAME
    before = params.read(args.model_dir) if there.exists() else None
    if before is None and "experiment" not in given:  # from the path: experiments/variant2
        names = {name: part for part in EXPERIMENTS for name in (part, f"{part}_model")}
        given["experiment"] = next((names[p] for p in reversed(args.model_dir.parts) if p in names),
                                   "base")
    values = params.checked((before or {}) | given, "parameters")
    for key, value in values.items():
        setattr(args, key, value)
    taken = [f"{key} {value}" for key, value in (before or {}).items()
             if value != params.DEFAULTS[key] and key not in given]
    if taken and processes.rank() == 0 and args.log_verbosity in ("INFO", "DEBUG"):
        print(f"{there}: {', '.join(taken)}")


def seed_of(args: argparse.Namespace) -> int:
    """--random-seed, that of the run to resume, or a new one, the same in all processes."""
    if args.random_seed is not None:
        return args.random_seed
    found = newest([*args.model_dir.glob(LATEST), *epoch_checkpoints(args.model_dir)])
    if args.resume and found:
        return int(load_checkpoint(found).get("config", {}).get("random_seed", 0))
    seed = [secrets.randbits(31)]
    if processes.world() > 1:
        torch.distributed.broadcast_object_list(seed)
    return seed[0]


def optimizers(model: Experiment, args: argparse.Namespace) -> tuple[Any, Any]:
    """Optimisers (main, aux) of the main parameters and of the quantiles."""
    if args.main_optimizer == "muon":
        return make_optimizers(model, "muon", args.base_learning_rate, args.aux_learning_rate)
    aux = [p for n, p in model.named_parameters() if n.endswith("quantiles")]
    return (optimizer_of(args.main_optimizer, main_parameters(model).values(),
                         args.base_learning_rate, args.weight_decay),
            optimizer_of(args.aux_optimizer, aux, args.aux_learning_rate, 0.0))


def optimizer_of(name: str, parameters: Any, lr: float, weight_decay: float) -> Any:
    """Make an optimiser by its name in the source."""
    import timm.optim

    kinds = {"adam": torch.optim.Adam, "adam_w": torch.optim.AdamW, "adamwd": torch.optim.AdamW,
             "radam": torch.optim.RAdam, "sgd": torch.optim.SGD, "momentum": torch.optim.SGD,
             "rmsprop": torch.optim.RMSprop, "adafactor": torch.optim.Adafactor,
             "lamb": timm.optim.Lamb}
    if name not in kinds:
        raise UserError(f"optimizer {name}: choose from {', '.join(kinds)}")
    more = {"momentum": 0.9} if name == "momentum" else {}
    return kinds[name](list(parameters), lr=lr, weight_decay=weight_decay, **more)


def schedule(optimizer: Any, kind: str, per_epoch: int, total: int) -> Any:
    """Schedule by its name in the source, stepped every training step."""
    rates = torch.optim.lr_scheduler
    def restarts(step: int) -> float:
        """Cycles: the first has 1,000 steps, each next one 5 times the length and 3/4 the rate."""
        height, length = 1.0, 1000
        while step >= length:
            height, length, step = 0.75 * height, 5 * length, step - length
        return height * 0.5 * (1 + math.cos(math.pi * step / length))

    factors = {
        "cosine_restarts": restarts,
        "constant": lambda step: 1.0,
        "exponential": lambda step: 0.97 ** (step // max(1, round(2.4 * per_epoch))),
        "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))}
    return rates.LambdaLR(optimizer, factors[kind])


def profile(args: argparse.Namespace, step: int, folder: Path) -> Any:
    """Write a trace of this training step to <folder>/profile, if it is due."""
    if not args.save_profiling_steps or step % args.save_profiling_steps or processes.rank():
        return contextlib.nullcontext()
    (folder / "profile").mkdir(parents=True, exist_ok=True)
    return torch.profiler.profile(on_trace_ready=lambda p: p.export_chrome_trace(
        str(folder / "profile" / f"{step}.json")))


# ------------------------------------------------------------------------------------- validation
def validation_images(args: argparse.Namespace, test: list[data.Item]) -> list[Tensor]:
    """Central crops (3, h, w), uint8, of --eval-patchsize or of whole images, in whole 64s."""
    if args.eval_patchsize and args.eval_patchsize < 64:
        raise UserError(f"--eval-patchsize {args.eval_patchsize}: give 64 or more")
    return central_parts(test, 2 * [args.eval_patchsize or 2**20])


@torch.no_grad()
def validate(model: Experiment, images: list[Tensor], criterion: RateDistortionLoss,
             device: torch.device, log: Log, step: int) -> dict[str, float]:
    """Mean losses over the images, quantised as in files, with estimated rate.

    TensorBoard also gets the last image with its reconstruction, and histograms of its latent and
    of all parameters.
    """
    model.eval()
    sums: dict[str, float] = {}
    for image in images:
        x = data.to_float(image[None].to(device))
        output = model(x)
        losses = criterion(output, x)
        error = (output["x_hat"].clamp(0, 1) - x).square().mean()
        losses["psnr"] = -10 * error.log10()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value) / len(images)
    log.scalars("eval", sums, step)
    log.images(x[0], output["x_hat"][0], step)
    log.histograms("eval", {"y": model.g_a(x)}, step)
    log.histograms("parameters", dict(model.named_parameters()), step)
    return sums


if __name__ == "__main__":
    cli.run(main)
