"""Train a factorized-prior model.

    python train.py                                      the source's recipe on the bundled tiles
    python train.py --config quick.yaml                  nine minutes on two CPU cores
    python train.py --dataset /path/to/vimeo --lmbda 0.013 --exp_version 1
    python train.py --gpu_id '0 1 2' ...                 three processes
    torchrun --nproc_per_node=4 train.py ...             the same, or more machines

Checkpoints: ./ckpts/<prefix>/<exp_version>/epoch_<n>.pth. Logs: ./logs/<prefix>/<exp_version>/.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import UserError, cli, data, processes
from common.coding.image_file import crop, pad
from common.loss import RateDistortionLoss, check_size
from common.training import cuda_graph
from common.training.checkpoints import Checkpoints, load_weights
from common.training.log import Log
from common.training.network import autocast, prepare_network
from common.training.optimizers import (
    check_finite,
    learning_rate,
    main_parameters,
    make_optimizers,
    make_scheduler,
)
from common.training.run import add_training_flags

import torch
import yaml
from torch import Tensor

from factorized.model import Factorized, build

MODEL_NAMES = ("Factorized", "FactorizedPrior")
WIDTHS = {"low": (128, 192), "high": (192, 320)}  # --code_rate -> N, M
SOURCE_EPOCH = 1_010  # steps of the source's epochs, for the few bundled photographs
LMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483, 0.0932, 0.18)  # --quality 1..8


def flags() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Train a factorized-prior model (Balle et al. 2017).")
    add = parser.add_argument_group("the source's flags").add_argument
    add("--dataset", help="training images; none: the bundled photographs")
    add("--test_dataset", help="validation images; none: Kodak")
    add("--lmbda", type=cli.positive_float, default=0.01, help="weight of 255^2 MSE")
    add("--lr", type=cli.positive_float, default=1e-4, help="initial learning rate")
    add("--batch_size", type=cli.positive_int, default=64, help="over all processes")
    add("--test_batch_size", type=cli.positive_int, default=24, help="images of equal size")
    add("--epoch", type=cli.positive_int, default=250, help="number of epochs")
    add("--model_name", default="Factorized", choices=MODEL_NAMES)
    add("--prefix", default="FactorizedPrior", help="folder of the run under ./ckpts and ./logs")
    add("--exp_version", type=int, default=0, help="sub-folder of the run")
    add("--gpu_id", default="0", help="'0 1 2': three processes")
    add("--code_rate", default="low", choices=sorted(WIDTHS), help="N, M = 128, 192 or 192, 320")
    add("--init_ckpt", default="", help="start from these weights")
    add("--load_model_epoch", type=int, help="continue this run from its epoch_<n>.pth")
    add("--num_workers", type=cli.count, default=0, help="data loader processes")
    add("--check_time", type=cli.minutes, default=10, help="minutes between saves of latest.pth")
    add_training_flags(parser, lr_schedule="plateau")
    parser.add_argument("--N", type=cli.positive_int, help="overrides --code_rate")
    parser.add_argument("--M", type=cli.positive_int, help="overrides --code_rate")
    parser.add_argument("--quality", type=int, choices=range(1, 9), help="overrides --lmbda")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse(flags(), argv)
    args.N, args.M = args.N or WIDTHS[args.code_rate][0], args.M or WIDTHS[args.code_rate][1]
    args.lmbda = LMBDAS[args.quality - 1] if args.quality else args.lmbda
    processes.launch(args.gpu_id)
    device = processes.start(args.device, args.seed, args.threads)
    folder = Path("ckpts", args.prefix, str(args.exp_version))

    # data
    items = data.find_items(args.dataset)
    crops = data.Crops(items, args.patch_size, args.seed, args.flip)
    one_pass = max(1, len(items) // args.batch_size)
    args.steps_per_epoch = args.steps_per_epoch or (one_pass if args.dataset else SOURCE_EPOCH)
    args.images, steps_per_epoch = data.digest(items), args.steps_per_epoch
    test_images = data.list_images(args.test_dataset or data.KODAK)
    check_size(args.metric, (args.patch_size, args.patch_size))
    for path in test_images:  # what is wrong with one is said now, not after hours
        check_size(args.metric, data.read_image(path, notice=lambda _: None).shape[-2:], path)
    batch = processes.per_process_batch(args.batch_size)

    # model, optimisers (Adam, and Adam for the quantiles of p(y)), schedule
    model = build(args.N, args.M).to(device, memory_format=torch.channels_last)
    if args.patch_size % model.downsampling_factor:
        raise UserError(f"--patch-size {args.patch_size} is not a multiple of "
                        f"{model.downsampling_factor}")
    if args.init_ckpt:
        load_weights(model, args.init_ckpt)
    net = prepare_network(model, args.compile)
    optimizer, aux_optimizer = make_optimizers(model, args.optimizer, args.lr, args.aux_lr)
    scheduler = make_scheduler(optimizer, args.lr_schedule, args.epoch, args.milestones)
    criterion = RateDistortionLoss(args.lmbda, args.metric)

    # resume
    log = Log(Path("logs", args.prefix, str(args.exp_version)), args.epoch * steps_per_epoch)
    parts = {"model": model, "optimizer": optimizer, "aux_optimizer": aux_optimizer,
             "scheduler": scheduler, "log": log}
    checkpoints = Checkpoints(folder, parts, vars(args))
    state = checkpoints.begin(args.resume, args.load_model_epoch)
    step, best = state.get("step", 0), state.get("best", float("inf"))
    log.begin(step)
    if processes.rank() == 0:
        print(yaml.safe_dump(vars(args), sort_keys=False).strip())
        print(f"{len(items)} training images{'' if args.dataset else ' (bundled photographs)'}, "
              f"{steps_per_epoch} steps an epoch, on {processes.describe_hardware(device)}",
              flush=True)

    if step >= args.epoch * steps_per_epoch and processes.rank() == 0:
        print(f"nothing to do: this run has its {args.epoch} epochs already (--epoch for more)")

    def train_step(x: Tensor) -> dict[str, Tensor]:
        """One optimisation step on a batch; returns the scalars to log."""
        with autocast(device, args.precision):
            output = net(x)
        losses = criterion(output, x)

        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        losses["loss"].backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            main_parameters(model).values(), args.clip_max_norm)
        check_finite({**losses, "grad_norm": grad_norm}, step, checkpoints.last)
        optimizer.step()
        # the quantiles follow p(y): their loss depends on no data and on no other parameter
        aux_loss = model.aux_loss()
        aux_loss.backward()
        aux_optimizer.step()
        return {**losses, "aux": aux_loss, "grad_norm": grad_norm}

    recorded_step = cuda_graph.Recorded(train_step, optimizer, aux_optimizer, enabled=args.graph)
    saved = time.monotonic()
    for epoch in range(step // steps_per_epoch, args.epoch):
        model.train()
        last_step = (epoch + 1) * steps_per_epoch
        for images in data.loader(crops, step, last_step, batch, processes.rank(),
                                  processes.world(), args.num_workers):
            x = data.to_float(images.to(device, non_blocking=True))
            x = x.contiguous(memory_format=torch.channels_last)
            values = recorded_step(x)
            step += 1
            log.step(step, {**values, "lr": learning_rate(optimizer)})
            due = step % 20 == 0 and time.monotonic() - saved > 60 * args.check_time
            if step < last_step and processes.broadcast_flag(due):
                checkpoints.save("latest.pth", epoch, step, best=best)
                saved = time.monotonic()

        means = log.means()
        scheduler.step(*([means["loss"]] if args.lr_schedule == "plateau" else []))
        line = f"epoch {epoch}  step {step}  train loss {means['loss']:.4f} bpp {means['bpp']:.4f}"
        if epoch + 1 == args.epoch:
            checkpoints.update_tables(step, settle=True)
        if (epoch + 1) % args.test_every == 0 or epoch + 1 == args.epoch:
            test = validate(model, test_images, args.test_batch_size, criterion, device, log, step)
            best = min(best, test["loss"])
            line += f"  test loss {test['loss']:.4f} bpp {test['bpp']:.4f} psnr {test['psnr']:.2f}"
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == args.epoch:
            checkpoints.save(f"epoch_{epoch}.pth", epoch, step, best=best)
            saved = time.monotonic()
        log.line(line)
    log.close()


@torch.no_grad()
def validate(model: Factorized, paths: list[Path], batch_size: int, criterion: RateDistortionLoss,
             device: torch.device, log: Log, step: int) -> dict[str, float]:
    """Mean losses over whole images, quantised as in coding, rate estimated; float32."""
    model.eval()
    sums: dict[str, float] = {}
    for _, images in data.batches(paths, batch_size):
        x = data.to_float(images.to(device))
        output = model(pad(x, model.downsampling_factor))
        output["x_hat"] = crop(output["x_hat"], x.shape[-2:])
        losses = criterion(output, x)
        error = (output["x_hat"].clamp(0, 1) - x).square().mean(dim=(1, 2, 3))
        losses["psnr"] = -10 * error.log10().mean()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(x) / len(paths)
    log.images(x[-1], output["x_hat"][-1], step)
    log.scalars("test", sums, step)
    return sums


if __name__ == "__main__":
    cli.run(main)
