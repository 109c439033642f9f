"""Train a ConvNeXTIC.

    python train.py                                      the source's config.yaml
    python train.py --config quick.yaml                  small, on the bundled photographs
    python train.py --config=./config.yaml --name=nic_cvt                the source's command
    python train.py --variant v3_scctx --quality_level 3 --trainset /path --name scctx
    python train.py --variant v5_vr --resume results/scctx/3/snapshots/best.pt --name vr
    torchrun --nproc_per_node=4 train.py ...             more processes or machines

A run writes to ./results/<name>/<quality_level>/: config.yaml, snapshots/best.pt,
snapshots/<epoch>_<bpp>_<mse>.pt, snapshots/latest.pt, logs/. `--resume` alone continues that run
where it stopped; `--resume FILE` starts a new run from weights, as in the source. If FILE is of the
run in that folder, its folder is kept beside the new one under another name.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from common import UserError, cli, data, processes
from common.coding.model_file import load_checkpoint, load_error
from common.files import write_atomic
from common.loss import RateDistortionLoss, check_size
from common.training.checkpoints import Checkpoints, check_options, check_resume, steps_of
from common.training.cuda_graph import Recorded
from common.training.images import find_images
from common.training.log import Log
from common.training.network import autocast, prepare_network
from common.training.optimizers import learning_rate, main_parameters, make_optimizers
from common.training.run import Run, add_training_flags
from common.training.validation import central_crops

import numpy as np
import torch
import yaml
from torch import Tensor

from convnextic.model import LMBDAS, ConvNeXTIC, build
from convnextic.variants import BASELINE, CHOICES, VARIANTS, merged

HERE = Path(__file__).parent
SOURCE_EPOCH = 2_450  # steps, about: the source has 20,000 photographs in batches of 8
LATEST, BEST = "latest.pt", "best.pt"
LMBDA_MIN = (0.0003, 0.0007, 0.001, 0.0015, 0.0035, 0.007, 0.013, 0.03)  # for a variable rate
LMBDA_MAX = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483, 0.0932, 0.23)
VARIABLE_RATES = 21  # equally spaced from lambda_max to lambda_min
SCHEDULES = ("multistep", "cosine", "cosine_restarts", "constant")
SAME_RUN = ("variant", "embed_dim", "latent_dim", *BASELINE, "metric", "lmbda", "lambda_min",
            "lambda_max", "optimizer", "weight_decay", "wd_exclude_1d", "eb_group", "lr", "lr_aux",
            "lr_schedule", "milestones", "gamma", "T_max", "eta_min", "batchsize", "patchsize",
            "flip", "images", "steps_per_epoch", "seed", "clip_max_norm")


def flags() -> cli.Parser:
    parser = cli.Parser(description="Train a ConvNeXt image codec (VCIP 2022 challenge).")
    add = parser.add_argument_group("flags of the source and keys of its config.yaml").add_argument
    add("--name", default="VCIP", help="folder of the run under ./results")
    add("--resume", nargs="?", const="", metavar="FILE",
        help="continue this run; with FILE, start a new run from its weights; with auto, continue "
        "this run or begin it")
    add("--seed", type=cli.seed_number, default=0, help="seed of weights, noise and crops")
    add("--snapshot_save_epoch", type=cli.positive_int, default=10,
        help="epochs between kept checkpoints")
    add("--log_itr", type=cli.positive_int, default=1000,
        help="without effect; the log takes all steps into account")
    add("--startepoch", type=cli.count, default=0,
        help="first epoch; only with --resume FILE, as in the source")
    add("--epochs", type=cli.positive_int, default=400,
        help="number of epochs, counting those before --startepoch")
    add("--lr", type=cli.positive_float, default=1e-4, help="initial learning rate")
    add("--lr_aux", type=cli.positive_float, default=1e-3, help="learning rate of the quantiles")
    add("--clip_max_norm", type=cli.number, default=1.0,
        help="maximum gradient norm; 0 disables clipping")
    add("--metric", choices=["mse", "ms-ssim"], default="mse",
        help="distortion measure of the loss")
    add("--gpu_id", default="0",
        help="GPU indexes, e.g. '0 1 2'; several start one process each")
    add("--quality_level", default="7",
        help="sub-folder of the run; 1 to 8 also choose lmbda if that is not given")
    add("--lmbda", type=cli.positive_float,
        help="rate-distortion weight: loss = bpp + lmbda * 255^2 * MSE; that of --quality_level "
        "if not given")
    add("--lambda_min", type=cli.positive_float,
        help="smallest lmbda of v5_vr; that of --quality_level if not given")
    add("--lambda_max", type=cli.positive_float,
        help="largest lmbda of v5_vr; that of --quality_level if not given")
    add("--in_chans", type=int, choices=[3], default=3, help="number of image channels")
    add("--embed_dim", type=cli.positive_int, default=128,
        help="number N of hidden channels")
    add("--latent_dim", type=cli.positive_int, default=192,
        help="number M of latent channels")
    add("--trainset", "--dataset",
        help="folder with train/ and test/; without test/, some training images are held out; "
        "bundled photographs if not given")
    add("--batchsize", type=cli.positive_int, default=8,
        help="images per step, over all processes")
    add("--batchsize_test", type=cli.positive_int, default=1,
        help="number of validation images per batch")
    add("--patchsize", type=cli.positive_int, default=256, help="side of the crops in pixels")
    add("--worker_num", type=cli.count, default=8, help="number of data loader processes")
    for dead in ("lr_shedule_step", "lr_shedule_scale", "set_lr", "p"):
        add(f"--{dead}", nargs="*", help="without effect, as in the source")
    add = parser.add_argument_group("ablations; the values of --variant if not given").add_argument
    add("--variant", choices=list(VARIANTS), default="v2_stride2", help="revision of the source")
    add("--depths", type=cli.positive_int, nargs=6, help="blocks in each stage of g_a and h_a")
    add("--kernel_size", type=cli.positive_int, nargs="+",
        help="kernel size of the depthwise convolutions; two numbers: that of g_a and g_s, and "
        "that of h_a and h_s")
    add("--mlp_ratio", type=cli.positive_int, help="expansion factor of the MLPs")
    add("--dw_groups", type=cli.count,
        help="groups of the depthwise convolutions; 0 uses one per channel")
    add("--drop_path_rate", type=cli.number, help="stochastic depth rate of the deepest block")
    add("--layer_scale_init", type=cli.positive_float, help="initial value of the layer scales")
    for key in CHOICES:
        add(f"--{key}", choices=CHOICES[key])
    for key in ("variable_rate", "external_attention"):
        add(f"--{key}", action=argparse.BooleanOptionalAction, default=None)
    add("--optimizer", choices=["adam", "adamw", "muon"], default="adam",
        help="optimiser of the main parameters")
    add("--weight_decay", type=cli.number, default=0.05, help="weight decay of adamw")
    add("--wd_exclude_1d", action=argparse.BooleanOptionalAction, default=False,
        help="exempt biases, norms and scales from weight decay")
    add("--eb_group", choices=["main", "aux"], default="main",
        help="optimiser of the network of p(z); the source uses aux")
    add("--lr_schedule", choices=SCHEDULES, default="multistep",
        help="learning-rate schedule, stepped once per epoch")
    add("--gamma", type=cli.positive_float, default=0.1,
        help="factor of the learning rate at each milestone of multistep")
    add("--T_max", type=cli.positive_int,
        help="period of the cosine in epochs; --epochs if not given")
    add("--eta_min", type=cli.number, default=0.0, help="smallest learning rate of the cosine")
    add_training_flags(parser, lr_schedule="multistep", without=(
        "--resume", "--metric", "--optimizer", "--aux-lr", "--lr-schedule", "--clip-max-norm",
        "--patch-size", "--seed", "--save-every"))
    parser.set_defaults(milestones=[250, 350], config=str(HERE / "config.yaml"))
    parser.add_argument("--check_time", type=cli.minutes, default=10,
                        help="minutes between checkpoints within an epoch")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = flags()
    args = cli.parse(parser, argv)
    given = cli.summary(parser, args)
    options = merged(args.variant, {key: getattr(args, key) for key in BASELINE})
    for key, value in options.items():
        setattr(args, key, list(value) if isinstance(value, tuple) else value)
    choose_lmbda(args)
    check(args)
    processes.launch(args.gpu_id)
    device = processes.start(args.device, args.seed, args.threads)
    folder = Path("results", args.name, args.quality_level)
    latest = folder / "snapshots" / LATEST
    continued = latest if args.resume in ("", "auto") and latest.exists() else None
    start = args.resume if args.resume not in (None, "", "auto") else None
    # weights of the run in this folder, which is then renamed
    own = start and latest.parent.resolve() in Path(start).resolve().parents

    # data
    test = Path(args.trainset or "", "test")
    images = find_images(args.trainset, args.patchsize, args.seed, args.flip, continued,
                         test if args.trainset and test.is_dir() else None, folder=latest.parent)
    one_pass = max(1, len(images) // args.batchsize)
    args.steps_per_epoch = args.steps_per_epoch or (one_pass if args.trainset else SOURCE_EPOCH)
    args.images, args.validation = images.digest, images.validation  # --resume compares images
    test_images = central_crops(images.test, 2 * [args.patchsize], "--patchsize")
    check_size(args.metric, (args.patchsize, args.patchsize))
    batch = processes.per_process_batch(args.batchsize)

    # model, optimisers, schedule
    model = build(args.variant, args.embed_dim, args.latent_dim, **options)
    model = model.to(device, memory_format=torch.channels_last)
    if args.patchsize % model.downsampling_factor:
        raise UserError(f"--patchsize {args.patchsize} is not a multiple of "
                        f"{model.downsampling_factor}")
    net = prepare_network(model, args.compile)
    optimizer, aux_optimizer = optimizers(model, args)
    scheduler = schedule(optimizer, args)
    criterion = RateDistortionLoss(args.lmbda, args.metric)

    # the run, from its beginning or from a checkpoint
    log = Log(folder / "logs", args.epochs * args.steps_per_epoch)
    parts = {"model": model, "optimizer": optimizer, "aux_optimizer": aux_optimizer,
             "scheduler": scheduler, "log": log}
    checkpoints = Checkpoints(latest.parent, parts, vars(args), SAME_RUN,
                              "--resume FILE and another --name")
    step, best = 0, math.inf
    args.steps_before = load_weights(model, start) if start else 0
    if processes.broadcast_flag(bool(own)):
        checkpoints.lock()  # no other process trains there
        checkpoints.release()
        set_aside(folder)
    elif continued:
        state = checkpoints.resume(continued)
        step, best = state["step"], state["best"]
    elif args.resume == "":
        check_resume("newest", folder)
    elif latest.exists() and args.resume != "auto":
        raise UserError(f"{folder} holds a run: continue it with --resume alone, or give this one "
                        "another --name")
    elif kept := args.resume != "auto" and sorted(latest.parent.glob("*.pt")):
        raise UserError(f"{folder} holds a run without {LATEST}, which cannot be continued, but "
                        f"has {kept[0].name}: rename it, or give this one another --name")
    if start:
        step = args.startepoch * args.steps_per_epoch
        args.steps_before = max(0, args.steps_before - step)
        for _ in range(args.startepoch):
            scheduler.step()
    checkpoints.lock()
    run = Run(checkpoints, log, images.crops, device, args.epochs, args.steps_per_epoch, batch,
              args.worker_num, args.check_time, LATEST, step)
    if processes.rank() == 0:
        text = yaml.safe_dump(vars(args), sort_keys=False)
        write_atomic(folder / "config.yaml", text.encode())
    run.announce(given, folder / "config.yaml", bundled=not args.trainset)

    def train_step(x: Tensor, lmbda: Tensor | None) -> dict[str, Tensor]:
        """One optimisation step on a batch; returns the scalars to log."""
        with autocast(device, args.precision):
            output = net(x, lmbda)
        # lmbda weights the distortion of its own sample
        losses = criterion(output, x, lmbda)

        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        losses["loss"].backward()
        limit = args.clip_max_norm if args.clip_max_norm > 0 else math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(
            main_parameters(model).values(), limit)
        run.check({**losses, "grad_norm": grad_norm})
        optimizer.step()
        aux_loss = model.aux_loss()
        aux_loss.backward()
        aux_optimizer.step()
        return {**losses, "aux": aux_loss, "grad_norm": grad_norm}

    train_step = Recorded(train_step, optimizer, aux_optimizer, enabled=args.graph)
    for epoch in run.remaining_epochs():
        model.train()
        for x in run.batches():
            lmbda = draw_lmbda(args, run.step, len(x)).to(device) if args.variable_rate else None
            values = train_step(x, lmbda)
            run.end_step({**values, "lr": learning_rate(optimizer)}, best=best)

        line, _ = run.end_epoch()
        scheduler.step()
        names, test = [LATEST], {}
        run.settle()
        if (epoch + 1) % args.test_every == 0 or run.is_last_epoch:
            test = run.test(validate, model, test_images, args, criterion, device, log, run.step)
            line += f"  test loss {test['loss']:.4f} bpp {test['bpp']:.4f} psnr {test['psnr']:.2f}"
            if test["loss"] < best:
                best = test["loss"]
                names.insert(0, BEST)  # before LATEST, so a resumed run can repeat it
            if (epoch + 1) % args.snapshot_save_epoch == 0 or run.is_last_epoch:
                scores = f"_{test['bpp']:.4f}_{test['mse'] / 255**2:.8f}"
                scores = "" if args.variable_rate else scores
                names.insert(0, f"{epoch:03}{scores}.pt")
        log.line(line)
        for name in names:
            run.save(name, best=best, test=test)
    log.close()


def choose_lmbda(args: argparse.Namespace) -> None:
    """Set lmbda and its range from quality_level where they are not given."""
    quality = args.quality_level
    known = quality in map(str, range(1, len(LMBDAS) + 1))
    for key, values in (("lmbda", LMBDAS), ("lambda_min", LMBDA_MIN), ("lambda_max", LMBDA_MAX)):
        if getattr(args, key) is None:
            if not known:
                raise UserError(f"--quality_level {quality}: give 1 to {len(LMBDAS)}, or --{key}")
            setattr(args, key, values[int(quality) - 1])
    if args.lambda_min > args.lambda_max:
        raise UserError(f"--lambda_min {args.lambda_min} is above --lambda_max {args.lambda_max}")
    for key in ("quality_level", "name"):
        value = getattr(args, key)
        if not value or value == ".." or Path(value).name != value:
            raise UserError(f"--{key} '{value}': must be the name of a folder")


def check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other."""
    if args.eta_min > args.lr:
        raise UserError(f"--eta_min {args.eta_min} is above --lr {args.lr}")
    if args.startepoch and args.resume in (None, "", "auto"):
        cli.note(f"--startepoch {args.startepoch}: without effect unless --resume FILE is given, "
                 "as in the source")
    if args.optimizer == "muon" and (args.eb_group == "aux" or args.wd_exclude_1d):
        raise UserError("--eb_group aux, --wd_exclude_1d: not with --optimizer muon")


def draw_lmbda(args: argparse.Namespace, step: int, count: int) -> Tensor:
    """Draw lmbda (count,) for each sample, uniformly from 21 equally spaced values."""
    values = np.linspace(args.lambda_max, args.lambda_min, VARIABLE_RATES)
    key = (args.seed + 2**33 + processes.rank()) % 2**64
    rng = np.random.Generator(np.random.Philox(key=key, counter=step))
    return torch.from_numpy(rng.choice(values, count)).float()


def optimizers(model: ConvNeXTIC, args: argparse.Namespace) -> tuple[Any, Any]:
    """Optimisers (main, aux); in the source, aux trains all of p(z), not only its quantiles."""
    if args.optimizer == "muon":
        return make_optimizers(model, "muon", args.lr, args.lr_aux)
    named = dict(model.named_parameters())
    aux = [n for n in named if n.endswith("quantiles")
           or (args.eb_group == "aux" and n.startswith("entropy_bottleneck"))]
    main = [named[n] for n in named if n not in aux]
    if args.optimizer == "adam":
        optimizer: Any = torch.optim.Adam(main, lr=args.lr)
    else:
        flat = [p for p in main if p.dim() < 2] if args.wd_exclude_1d else []
        rest = [p for p in main if p.dim() >= 2] if args.wd_exclude_1d else main
        groups = [{"params": rest}, {"params": flat, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr,
                                      weight_decay=args.weight_decay)
    return optimizer, torch.optim.Adam([named[n] for n in aux], lr=args.lr_aux)


def schedule(optimizer: Any, args: argparse.Namespace) -> Any:
    """Schedule by name; past T_max, cosine rises again, as PyTorch's, cosine_restarts restarts."""
    rates = torch.optim.lr_scheduler
    period = args.T_max or args.epochs
    if args.lr_schedule == "multistep":
        return rates.MultiStepLR(optimizer, args.milestones, gamma=args.gamma)
    if args.lr_schedule == "cosine":
        return rates.CosineAnnealingLR(optimizer, period, eta_min=args.eta_min)
    if args.lr_schedule == "cosine_restarts":
        return rates.CosineAnnealingWarmRestarts(optimizer, period, eta_min=args.eta_min)
    return rates.LambdaLR(optimizer, lambda _: 1.0)


def set_aside(folder: Path) -> None:
    """Rename the folder of a run, from whose weights another one of the same name starts."""
    if processes.world() > 1:  # all have read the weights
        torch.distributed.barrier()
    if processes.rank() == 0:
        kept = next(path for n in range(1, 10**6)
                    if not (path := folder.with_name(f"{folder.name}_{n}")).exists())
        folder.rename(kept)
        print(f"{folder}: the run that was there is kept as {kept}")
    processes.broadcast_flag(True)


def load_weights(model: ConvNeXTIC, path: str) -> int:
    """Load weights strictly, but for the scales of v5, which a fixed-rate model does not have.

    v5 keeps its own, all 1, if the weights are of a fixed-rate model; a fixed-rate model leaves out
    those of v5. Returns the number of steps that led to the weights.
    """
    state = load_checkpoint(path)
    hidden = ["decoder_dw", *["lambda_input"] * model.variable_rate]  # shapes do not tell these
    check_options(model, state, path, hidden)
    scales = {n: t for n, t in model.state_dict().items() if n.startswith("scale_")}
    weights = scales | {n: t for n, t in state["model"].items()
                        if n in scales or not n.startswith("scale_")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise UserError(f"{path}: not weights of this model: {load_error(e)}") from None
    return steps_of(state)


# --------------------------------------------------------------------------------- validation
@torch.no_grad()
def validate(model: ConvNeXTIC, images: Tensor, args: argparse.Namespace,
             criterion: RateDistortionLoss, device: torch.device, log: Log | None = None,
             step: int = 0) -> dict[str, float]:
    """Mean losses over central crops, quantised as in files, rate estimated; v5: at lambda_max.

    images: uint8 (n, 3, size, size). The losses and the last crop are logged, if there is a log.
    """
    model.eval()
    sums: dict[str, float] = {}
    for batch in images.split(args.batchsize_test):
        x = data.to_float(batch.to(device))
        lmbda = x.new_full((len(x),), args.lambda_max) if args.variable_rate else None
        output = model(x, lmbda)
        losses = criterion(output, x, lmbda)
        error = (output["x_hat"].clamp(0, 1) - x).square().mean(dim=(1, 2, 3))
        losses["psnr"] = -10 * error.log10().mean()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(x) / len(images)
    if log:
        log.images(x[-1], output["x_hat"][-1], step)
        log.scalars("test", sums, step)
    return sums


if __name__ == "__main__":
    cli.run(main)
