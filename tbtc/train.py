"""Train one of the four models of Zhu et al., or TCM.

    python train.py -c "first run"                       the source's configuration
    python train.py --config quick.yaml                  small, on the bundled photographs
    python train.py --model zyc2022-conv-charm --quality S --lmbda 0.0067 --dataset_directory /path
    torchrun --nproc_per_node=2 train.py --scale_lr ...  several processes; or --devices 0 1

The source has a Python class of settings; here they are flags and YAML keys of the same names. A
run writes to ckpt/<model>-lambda=<lmbda>-beta=<beta>/lightning_logs/version_<n>/: hparams.yaml,
model.txt, TensorBoard events, log.txt, checkpoints/. `--resume` continues the newest version.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import UserError, cli, data, processes
from common.coding.model_file import coding_state, load_error
from common.files import write_atomic
from common.loss import RateDistortionLoss
from common.training.checkpoints import Checkpoints, check_resume, newest
from common.training.cuda_graph import Recorded
from common.training.images import find_images
from common.training.log import Log
from common.training.network import autocast, prepare_network
from common.training.optimizers import learning_rate, main_parameters, make_optimizers
from common.training.run import Run, add_training_flags
from common.training.validation import central_parts

import torch
import yaml
from torch import Tensor, nn

from tbtc.model import CHARM_WIDTHS, MODELS, SIZES, SPLITS, SliceCoder, build, load

LATEST = "latest.ckpt"
PRECISIONS = {"auto": "auto", "bf16": "bf16", "fp32": "fp32", "32-true": "fp32", "32": "fp32",
              "bf16-mixed": "bf16"}  # our names and Lightning's
SAME_RUN = ("model", "quality", "charm_widths", "split", "num_heads", "lmbda", "beta", "metric",
            "train_batch_size", "train_patch_size", "net_lr", "aux_lr", "scale_lr", "optimizer",
            "lr_schedule", "warmup", "decay_at", "gradient_clip_norm", "quantiles",
            "quantiles_every", "ema", "ema_decay", "flip", "images", "steps_per_epoch", "seed")


def flags() -> cli.Parser:
    parser = cli.Parser(description="Train a transform coder with a hyperprior or ChARM, or TCM.")
    add = parser.add_argument_group("flag and settings of the source").add_argument
    add("-c", "--comment", default="", help="free text, kept in hparams.yaml")
    add("--model", choices=MODELS, default="zyc2022-swint-charm", help="name of the model")
    add("--quality", choices=list(SIZES), default="M", help="size of the network, not of the rate")
    add("--lmbda", type=cli.positive_float,
        help="rate-distortion weight: loss = bpp + lmbda * 255^2 * MSE; 0.01 if neither --lmbda "
        "nor --beta is given")
    add("--beta", type=cli.positive_float,
        help="weight of the rate, in place of --lmbda: loss = 255^2 * MSE + beta * bits")
    add("--dataset_directory", "--dataset",
        help="folder with train/ and valid/ or test/, folder of images, or .tar shards; bundled "
        "photographs if not given; without valid/ and test/, some training images are held out")
    add("--train_batch_size", type=cli.positive_int, default=8,
        help="images per step and process")
    add("--valid_batch_size", type=cli.positive_int, default=1,
        help="maximum number of validation images of equal size per batch")
    add("--train_patch_size", type=cli.positive_int, nargs="+", default=[256],
        help="side, or height and width, of the training crops in pixels")
    add("--valid_patch_size", type=cli.positive_int, nargs="+", default=[1024],
        help="side, or height and width, of the central validation crops in pixels; smaller "
        "images are used whole")
    add("--num_workers", type=cli.count, default=8, help="number of data loader processes")
    for name in ("pin_memory", "persistent_workers"):
        add(f"--{name}", action=argparse.BooleanOptionalAction,
            help="without effect; the data loader chooses")
    add("--accelerator", choices=["auto", "gpu", "cpu"], default="auto",
        help="device to train on")
    add("--devices", type=cli.count, nargs="+", default=[0],
        help="GPU indexes; several start one process each")
    add("--strategy", default="auto",
        help="without effect; several processes always use DDP")
    add("--num_epochs", type=cli.positive_int, default=5000, help="number of epochs")
    add("--seed", type=cli.seed_number, default=10,
        help="seed of weights, noise and crops")
    add("--net_lr", type=cli.positive_float, default=1e-4,
        help="initial learning rate of the network")
    add("--aux_lr", type=cli.positive_float, default=1e-4,
        help="learning rate of the quantiles")
    add("--validation_cadence", type=cli.positive_int, default=10,
        help="epochs between validations")
    add("--gradient_clip_norm", type=float, default=10.0,
        help="maximum gradient norm; 0 disables clipping")
    add("--checkpoint_to_resume", "--ckpt_path", type=Path,
        help="checkpoint that is continued as a new version")
    add("--log_cadence", type=cli.positive_int, default=25, help="steps between log entries")
    add("--float32_matmul_precision", choices=["highest", "high", "medium"],
        help="argument of torch.set_float32_matmul_precision")
    add("--ema", action=argparse.BooleanOptionalAction, default=False,
        help="average the weights, and validate and code with the average")
    add("--precision", choices=list(PRECISIONS), default="auto",
        help="training precision; auto chooses bf16 where the hardware supports it")
    add = parser.add_argument_group("the source's fork and other variants").add_argument
    add("--ema_decay", type=cli.positive_float, default=0.999,
        help="decay of the averaged weights per step")
    add("--quantiles", choices=["optimizer", "periodic"], default="optimizer",
        help="method that sets the quantiles; periodic solves for them every --quantiles_every "
        "steps, as the fork does")
    add("--quantiles_every", type=cli.positive_int, default=1800,
        help="steps between solutions of --quantiles periodic")
    add("--warmup", type=float, default=0.0,
        help="fraction of the steps that warm up the learning rate; the fork uses 0.01")
    add("--decay_at", type=float, default=0.9,
        help="fraction of the steps after which step divides the learning rate by 10")
    add("--lr_schedule", choices=["step", "cosine", "constant"], default="step",
        help="learning-rate schedule")
    add("--scale_lr", action=argparse.BooleanOptionalAction, default=False,
        help="multiply net_lr by processes * train_batch_size / 16, as the fork does")
    add("--charm_widths", choices=CHARM_WIDTHS, default="src",
        help="channel widths of the networks of ChARM: the source's or the paper's")
    add("--split", choices=SPLITS, default="pre",
        help="place of the norm in the upsampling of SwinT: before the projection (PyTorch code) "
        "or after it (paper)")
    add("--num_heads", type=cli.positive_int,
        help="number of attention heads; channels / 32 if not given (the first PyTorch code: 4)")
    add("--init_ckpt", type=Path, help="checkpoint whose weights a new run starts from; of a model "
        "with the same transforms and another prior, the parts that both have")
    add("--ckpt_dir", type=Path, default=Path("ckpt"), help="folder of runs")
    add_training_flags(parser, lr_schedule="step", without=(
        "--aux-lr", "--lr-schedule", "--milestones", "--clip-max-norm", "--patch-size",
        "--test-every", "--save-every", "--seed", "--precision"))
    parser.set_defaults(flip=False)
    parser.add_argument("--check_time", type=cli.minutes, default=10,
                        help="minutes between checkpoints within an epoch")
    return parser


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    parser = flags()
    args = cli.parse(parser, argv)
    given = cli.summary(parser, args)
    args = check(args, {word.split("=")[0] for word in words})
    processes.launch(" ".join(map(str, args.devices)))
    wanted = {"gpu": "cuda", "cpu": "cpu", "auto": args.device}[args.accelerator]
    device = processes.start(wanted, args.seed, args.threads)
    if args.float32_matmul_precision:
        torch.set_float32_matmul_precision(args.float32_matmul_precision)

    # data
    folder, before = version(args)
    crop = (args.train_patch_size[0], args.train_patch_size[1])
    images = find_images(args.dataset_directory, crop, args.seed, args.flip, before,
                         test_folder(args.dataset_directory), folder=folder / "checkpoints")
    batch = args.train_batch_size
    per_step = batch * processes.world()
    args.steps_per_epoch = args.steps_per_epoch or max(1, len(images) // per_step)
    args.images, args.validation = images.digest, images.validation  # --resume compares images
    test_images = central_parts(images.test, args.valid_patch_size)

    # model, optimisers, schedule
    model = build(args.model, args.quality, args.charm_widths, args.split, args.num_heads)
    args.steps_before = start_from(model, args.init_ckpt) if args.init_ckpt else 0
    model = model.to(device, memory_format=torch.channels_last)
    net = prepare_network(model, args.compile)
    ema = EMA(model, args.ema_decay) if args.ema else None
    lr = args.net_lr * (processes.world() * batch / 16 if args.scale_lr else 1)
    optimizer, aux_optimizer = make_optimizers(model, args.optimizer, lr, args.aux_lr)
    scheduler = schedule(optimizer, args)
    criterion = RateDistortionLoss(args.lmbda, args.metric, args.beta)

    # the run, from its beginning or from a checkpoint
    log = Log(folder, args.num_epochs * args.steps_per_epoch)
    parts = {"model": model, "optimizer": optimizer, "aux_optimizer": aux_optimizer,
             "scheduler": scheduler, "log": log} | ({"averaged": ema} if ema else {})
    whole = () if args.lr_schedule == "constant" and not args.warmup else ("num_epochs",)
    config = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    checkpoints = LightningCheckpoints(folder / "checkpoints", parts, config, (*SAME_RUN, *whole),
                                       "--init_ckpt")
    step, best, kept = 0, math.inf, ""
    if before is not None:
        state = checkpoints.resume(before)
        step, best, kept = state["step"], state["best"], state.get("kept", "")
        kept = kept if (checkpoints.folder / kept).is_file() else ""
    checkpoints.lock()
    run = Run(checkpoints, log, images.crops, device, args.num_epochs, args.steps_per_epoch, batch,
              args.num_workers, args.check_time, LATEST, step)
    if processes.rank() == 0:
        text = yaml.safe_dump(config, sort_keys=False)
        write_atomic(folder / "hparams.yaml", text.encode())
        write_atomic(folder / "model.txt", f"{model}\n".encode())
        print(f"{given}  (all flags: {folder / 'hparams.yaml'})")
        print(f"{run.describe(bundled=not args.dataset_directory)}, to {folder}", flush=True)
        if run.is_done():
            print(f"nothing to do: this run has its {args.num_epochs} epochs (--num_epochs)")

    def train_step(x: Tensor) -> dict[str, Tensor]:
        """One optimisation step on a batch; returns the scalars to log."""
        with autocast(device, PRECISIONS[args.precision]):
            output = net(x)
        losses = criterion(output, x)

        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        losses["loss"].backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            main_parameters(model).values(), args.gradient_clip_norm or math.inf)
        run.check({**losses, "grad_norm": grad_norm})
        optimizer.step()
        aux_loss = model.aux_loss()
        if args.quantiles == "optimizer":
            aux_loss.backward()
            aux_optimizer.step()
        psnr = 10 * torch.log10(255**2 / losses["mse"].clamp_min(1e-6))
        return {**losses, "psnr": psnr, "aux": aux_loss, "grad_norm": grad_norm}

    train_step = Recorded(train_step, optimizer, aux_optimizer,
                          enabled=args.graph and args.quantiles == "optimizer")
    for epoch in run.remaining_epochs():
        model.train()
        for x in run.batches():
            rate = learning_rate(optimizer)
            values = train_step(x)
            scheduler.step()
            if args.quantiles != "optimizer" and run.step % args.quantiles_every == 0:
                checkpoints.update_tables(run.step, settle=True)
            if ema:
                ema.update(model)
            run.end_step({**values, "lr": rate}, args.log_cadence, best=best, kept=kept)

        line, means = run.end_epoch()
        test, better = {}, False
        run.settle()
        if (epoch + 1) % args.validation_cadence == 0 or run.is_last_epoch:
            test = run.test(validate, ema.settled() if ema else model, test_images, args,
                            criterion, device)
            better = test["loss"] < best
            log.scalars("valid", test, run.step)
            line += f"  valid loss {test['loss']:.4f} bpp {test['bpp']:.4f} psnr {test['psnr']:.2f}"
        log.line(line)
        if better:
            best, old = test["loss"], kept
            kept = f"epoch={epoch}-val_loss={best:.4f}-best.ckpt"
            run.save(kept, best=best, kept=kept, test=test)
            checkpoints.discard([old] if old not in ("", kept) else [])
        name = f"epoch={epoch}-loss={means['loss']:.4f}-last.ckpt"
        run.save(name, best=best, kept=kept, test=test)
        checkpoints.discard([p.name for p in checkpoints.folder.glob("*-last.ckpt")
                             if p.name != name] + [LATEST])
    log.close()


def check(args: argparse.Namespace, given: Iterable[str] = ()) -> argparse.Namespace:
    """Raise UserError for contradictory flags; a single number of a patch size means both sides.

    given: flags on the command line; --lmbda or --beta there overrides the other one of a YAML.
    """
    if args.lmbda and args.beta and ("--lmbda" in given) != ("--beta" in given):
        setattr(args, "beta" if "--lmbda" in given else "lmbda", None)
    if args.lmbda and args.beta:
        raise UserError("--lmbda and --beta: exactly one of the two weighs rate and distortion")
    if not args.lmbda and not args.beta:
        args.lmbda = 0.01
    for key in ("train_patch_size", "valid_patch_size"):
        sizes = getattr(args, key)
        if len(sizes) > 2:
            raise UserError(f"--{key} {sizes}: give one side, or height and width")
        setattr(args, key, list(sizes if len(sizes) == 2 else 2 * sizes))
    factor = SliceCoder.downsampling_factor
    if any(side % factor for side in args.train_patch_size):
        raise UserError(f"--train_patch_size {args.train_patch_size}: give multiples of {factor}")
    if min(args.valid_patch_size) < factor:
        raise UserError(f"--valid_patch_size {args.valid_patch_size}: give {factor} or more")
    if not 0 <= args.warmup < args.decay_at <= 1:
        raise UserError(f"--warmup {args.warmup} --decay_at {args.decay_at}: shares of the run, "
                        "the first the smaller one")
    if not 0 <= args.gradient_clip_norm < math.inf:
        raise UserError(f"--gradient_clip_norm {args.gradient_clip_norm}: give 0 or more")
    if not args.ema_decay < 1:
        raise UserError(f"--ema_decay {args.ema_decay}: give a number below 1")
    if args.checkpoint_to_resume and args.resume:
        raise UserError("--resume continues the newest version, --checkpoint_to_resume names a "
                        "checkpoint: give one of them")
    if args.checkpoint_to_resume and args.init_ckpt:
        raise UserError("--checkpoint_to_resume continues a run, --init_ckpt names the weights "
                        "that a new one starts from: give one of them")
    return args


# ------------------------------------------------------------------------------ runs, checkpoints
def run_folder(config: dict[str, Any]) -> Path:
    """Folder in which Lightning keeps the versions of a run, named after its settings."""
    keys = ("ckpt_dir", "model", "lmbda", "beta")
    root, model, lmbda, beta = (config.get(key) for key in keys)
    lmbda = 0.01 if lmbda is None and beta is None else lmbda
    return Path(str(root or "ckpt"), f"{model}-lambda={lmbda}-beta={beta}", "lightning_logs")


def versions(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("version_*") if re.fullmatch(r"version_\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("_")[1]))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a version that can be continued."""
    found = [*folder.glob("checkpoints/*-last.ckpt"), *folder.glob(f"checkpoints/{LATEST}")]
    return newest(found)


def version(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Folder of this run, and the checkpoint from which it continues."""
    root = run_folder(vars(args))
    have = versions(root)
    for folder in reversed(have if args.resume else []):  # some may have no checkpoint
        if checkpoint := newest_checkpoint(folder):
            return folder, checkpoint
    check_resume(args.resume, root)
    number = int(have[-1].name.split("_")[1]) + 1 if have else 0
    if processes.world() > 1:  # all use the folder of the first
        numbers = [number]
        torch.distributed.broadcast_object_list(numbers)
        number = numbers[0]
    return root / f"version_{number}", args.checkpoint_to_resume


class LightningCheckpoints(Checkpoints):
    """Checkpoints with Lightning's names, of which only the newest of each kind is kept."""

    def discard(self, names: list[str]) -> None:
        for name in names if processes.rank() == 0 else ():
            (self.folder / name).unlink(missing_ok=True)


class EMA:
    """Exponential moving average of all parameters, as a separate model for validation and coding.

    After n updates, the decay is min(decay, (1 + n) / (10 + n)), so that the first weights are
    forgotten quickly.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay, self.updates = copy.deepcopy(model).eval(), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)

    def settled(self) -> SliceCoder:
        """A copy for coding, whose quantiles and tables match the averaged densities."""
        model = copy.deepcopy(self.model)
        model.update(force=True, update_quantiles=True)
        return model

    def state_dict(self) -> dict[str, Any]:
        return {**coding_state(self.settled()), "updates": self.updates,
                "quantiles": self.model.entropy_bottleneck.quantiles.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            self.model.entropy_bottleneck.quantiles.copy_(state["quantiles"])
        self.updates = state["updates"]


def start_from(model: SliceCoder, path: Path) -> int:
    """Load the weights of a checkpoint, ours or the source's; averaged ones if there are any.

    If it is of another of the models, with the same transforms, the parts that both have (g_a, g_s,
    h_a, h_s and the entropy bottleneck) are taken over; the others keep their random weights.
    Returns the number of steps that led to the weights.
    """
    trained = load(path)
    if trained.name != model.name and all(
            shapes(trained.get_submodule(part)) == shapes(model.get_submodule(part))
            for part in ("g_a", "g_s")):
        take_parts(model, trained)
    else:
        try:
            model.load_state_dict(trained.state_dict())
        except RuntimeError as e:
            raise UserError(f"{path}: these weights of {trained.name} do not fit this "
                            f"{model.name} (--model, --quality, --split): {load_error(e)}"
                            ) from None
    return trained.provenance.total_steps or 0


def take_parts(model: SliceCoder, trained: SliceCoder) -> None:
    """Copy the parameters of the parts that both models have, with equal shapes; print which."""
    theirs = dict(trained.named_children())
    parts = {name: part for name, part in model.named_children()
             if name in theirs and shapes(part) and shapes(part) == shapes(theirs[name])}
    for name, part in parts.items():
        part.load_state_dict(dict(theirs[name].named_parameters()), strict=False)
    if processes.rank() == 0:
        print(f"{model.name} starts from {', '.join(parts)} of {trained.name}")


def shapes(part: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of the parameters of a part."""
    return {name: parameter.shape for name, parameter in part.named_parameters()}


def schedule(optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> Any:
    """Schedule, stepped every training step: linear warm-up from 1 % of the rate, then a constant
    rate with one drop to a tenth, or a cosine to zero.
    """
    total = args.num_epochs * args.steps_per_epoch
    warm = round(args.warmup * total)

    def factor(step: int) -> float:
        if step < warm:
            return 0.01 + 0.99 * step / warm
        if args.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1, (step - warm) / max(1, total - warm))))
        return 0.1 if args.lr_schedule == "step" and step >= round(args.decay_at * total) else 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ------------------------------------------------------------------------------------- validation
def test_folder(dataset: str | Path | None) -> Path | None:
    """<dataset>/valid or <dataset>/test, if there is one."""
    folders = [Path(dataset, name) for name in ("valid", "test")] if dataset else []
    return next((folder for folder in folders if folder.is_dir()), None)


@torch.no_grad()
def validate(model: SliceCoder, images: list[Tensor], args: argparse.Namespace,
             criterion: RateDistortionLoss, device: torch.device) -> dict[str, float]:
    """Mean losses over the images, quantised as in files, with estimated rate."""
    model.eval()
    sums: dict[str, float] = {}
    first = 0
    while first < len(images):
        last = first + 1
        while (last < min(len(images), first + args.valid_batch_size)
               and images[last].shape == images[first].shape):
            last += 1
        x = data.to_float(torch.stack(images[first:last]).to(device))
        output = model(x)
        losses = criterion(output, x)
        error = (output["x_hat"].clamp(0, 1) - x).square().mean(dim=(1, 2, 3))
        losses |= {"psnr": -10 * error.log10().mean(), "aux": model.aux_loss()}
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(x) / len(images)
        first = last
    return sums


if __name__ == "__main__":
    cli.run(main)
