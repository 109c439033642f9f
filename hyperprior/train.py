"""Train a scale hyperprior.

    python train.py                                      the source's recipe on the bundled tiles
    python train.py --config quick.yaml                  six to eight minutes on two cores
    python train.py --dataset /path/to/vimeo --lmbda 0.013 --exp_version 1
    python train.py --gpu_id '0 1 2' ...                 three processes
    torchrun --nproc_per_node=4 train.py ...             the same, or on several machines

Checkpoints: ./ckpts/<prefix>/<exp_version>/epoch_<n>.pth. Logs: ./logs/<prefix>/<exp_version>/.
"""

from __future__ import annotations

from pathlib import Path

from common import UserError, cli, processes
from common.coding import zoo
from common.loss import RateDistortionLoss
from common.training.checkpoints import Checkpoints, load_weights
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
from common.training.validation import check_images, validate

import torch
from torch import Tensor

from hyperprior.model import ZOO, build

MODEL_NAMES = ("Hyperprior", "ScaleHyperprior")  # spellings of one model
WIDTHS = {"low": (128, 192), "high": (192, 320)}  # --code_rate -> N, M
SOURCE_EPOCH = 1_010  # steps per epoch in the source, used for the bundled photographs
LMBDAS = (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483, 0.0932, 0.18)  # --quality 1..8


def flags() -> cli.Parser:
    parser = cli.Parser(description="Train a scale hyperprior (Balle et al. 2018).")
    add = parser.add_argument_group("the source's flags").add_argument
    add("--dataset",
        help="folder or .tar shards of training images; bundled photographs if not given")
    add("--test_dataset",
        help="folder of validation images; if not given, some training images are held out")
    add("--lmbda", type=cli.positive_float, default=0.01,
        help="rate-distortion weight: loss = bpp + lmbda * 255^2 * MSE")
    add("--lr", type=cli.positive_float, default=1e-4, help="initial learning rate")
    add("--batch_size", type=cli.positive_int, default=64,
        help="images per step, over all processes")
    add("--test_batch_size", type=cli.positive_int, default=24,
        help="maximum number of validation images of equal size per batch")
    add("--epoch", type=cli.positive_int, default=250, help="number of epochs")
    add("--model_name", default=MODEL_NAMES[0], type=cli.one_of(MODEL_NAMES),
        choices=MODEL_NAMES, help="name of the model")
    add("--prefix", default="Hyperprior", help="folder of the run under ./ckpts and ./logs")
    add("--exp_version", type=int, default=0, help="number of the run, a sub-folder of --prefix")
    add("--gpu_id", default="0",
        help="GPU indexes, e.g. '0 1 2'; several start one process each")
    add("--code_rate", default="low", choices=sorted(WIDTHS),
        help="widths of the network: N, M = 128, 192 (low) or 192, 320 (high)")
    add("--init_ckpt", default="", help="checkpoint whose weights a new run starts from")
    add("--load_model_epoch", type=int, help="epoch n from whose epoch_<n>.pth the run continues")
    add("--num_workers", type=cli.count, default=0, help="number of data loader processes")
    add("--check_time", type=cli.minutes, default=10, help="minutes between saves of latest.pth")
    add_training_flags(parser, lr_schedule="multistep")
    parser.add_argument("--N", type=cli.positive_int,
                        help="number of hidden channels; overrides --code_rate")
    parser.add_argument("--M", type=cli.positive_int,
                        help="number of latent channels; overrides --code_rate")
    zoo.add_flag(parser)
    parser.add_argument("--quality", type=int, choices=range(1, 9),
                        help="CompressAI's quality level of lmbda; overrides --lmbda")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = flags()
    args = cli.parse(parser, argv)
    given = cli.summary(parser, args)
    args.init_ckpt = zoo.start(args, ZOO, args.init_ckpt)
    args.N, args.M = args.N or WIDTHS[args.code_rate][0], args.M or WIDTHS[args.code_rate][1]
    args.lmbda = LMBDAS[args.quality - 1] if args.quality else args.lmbda
    processes.launch(args.gpu_id)
    device = processes.start(args.device, args.seed, args.threads)
    name = Path(args.prefix, str(args.exp_version))

    # data
    images = find_images(args.dataset, args.patch_size, args.seed, args.flip, "ckpts" / name,
                         args.test_dataset)
    one_pass = max(1, len(images) // args.batch_size)
    args.steps_per_epoch = args.steps_per_epoch or (one_pass if args.dataset else SOURCE_EPOCH)
    args.images, args.validation = images.digest, images.validation  # --resume compares images
    check_images(args.metric, images.test, args.patch_size)
    batch = processes.per_process_batch(args.batch_size)

    # model, optimisers (Adam, and Adam for the quantiles of p(z)), schedule
    model = build(args.N, args.M).to(device, memory_format=torch.channels_last)
    if args.patch_size % model.downsampling_factor:
        raise UserError(f"--patch-size {args.patch_size} is not a multiple of "
                        f"{model.downsampling_factor}")
    args.steps_before = load_weights(model, args.init_ckpt) if args.init_ckpt else 0
    net = prepare_network(model, args.compile)
    optimizer, aux_optimizer = make_optimizers(model, args.optimizer, args.lr, args.aux_lr)
    scheduler = make_scheduler(optimizer, args.lr_schedule, args.epoch, args.milestones)
    # R + lmbda * D in bits per pixel, with D = 255^2 * MSE as in CompressAI
    criterion = RateDistortionLoss(args.lmbda, args.metric)

    # the run, from its beginning or from a checkpoint
    log = Log("logs" / name, args.epoch * args.steps_per_epoch)
    parts = {"model": model, "optimizer": optimizer, "aux_optimizer": aux_optimizer,
             "scheduler": scheduler, "log": log}
    checkpoints = Checkpoints("ckpts" / name, parts, vars(args))
    state = checkpoints.begin(args.resume, args.load_model_epoch)
    best = state.get("best", float("inf"))
    run = Run(checkpoints, log, images.crops, device, args.epoch, args.steps_per_epoch, batch,
              args.num_workers, args.check_time, step=state.get("step", 0))
    run.announce(given, checkpoints.folder / "config.yaml", bundled=not args.dataset,
                 flag="--epoch")

    def train_step(x: Tensor) -> dict[str, Tensor]:
        """One optimisation step on a batch; returns the scalars to log."""
        with autocast(device, args.precision):
            output = net(x)
        losses = criterion(output, x)

        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        losses["loss"].backward()
        # the source clips the gradient at norm 1; the quantiles have their own loss below
        grad_norm = torch.nn.utils.clip_grad_norm_(
            main_parameters(model).values(), args.clip_max_norm)
        run.check({**losses, "grad_norm": grad_norm})
        optimizer.step()
        # the loss of the quantiles depends on p(z) only, not on data, and trains only them
        aux_loss = model.aux_loss()
        aux_loss.backward()
        aux_optimizer.step()
        return {**losses, "aux": aux_loss, "grad_norm": grad_norm}

    train_step = Recorded(train_step, optimizer, aux_optimizer, enabled=args.graph)
    for epoch in run.remaining_epochs():
        model.train()
        for x in run.batches():
            values = train_step(x)
            run.end_step({**values, "lr": learning_rate(optimizer)}, best=best)

        line, means = run.end_epoch()
        # the source's README halves the learning rate after 40, 90 and 140 epochs
        scheduler.step(*([means["loss"]] if args.lr_schedule == "plateau" else []))
        run.settle()
        if (epoch + 1) % args.test_every == 0 or run.is_last_epoch:
            test = run.test(validate, model, images.test, args.test_batch_size, criterion, device,
                            log, run.step)
            best = min(best, test["loss"])
            line += f"  test loss {test['loss']:.4f} bpp {test['bpp']:.4f} psnr {test['psnr']:.2f}"
        log.line(line)
        if (epoch + 1) % args.save_every == 0 or run.is_last_epoch:
            run.save(f"epoch_{epoch}.pth", best=best)
    log.close()


if __name__ == "__main__":
    cli.run(main)
