"""Training in two processes; this file is also the script that each of them runs."""

import os
import subprocess
import sys
from pathlib import Path

from common import processes
from common.loss import RateDistortionLoss
from common.training.network import prepare_network
from common.training.optimizers import make_optimizers

import forks
import torch
from training_cases import ROOT, assert_equal, command, load, process

from hyperprior.model import Hyperprior


def test_two_processes_average_to_the_gradient_of_one(tmp_path):
    """torchrun, gloo: half of the batch each; equal gradients, equal quantiles after aux steps."""
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                       OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = _gradients(0, 1)
    for name, expected in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        scale = expected.abs().max().clamp_min(1e-6)
        assert ((ranks[0][name] - expected) / scale).abs().max() < 1e-4, name
    trained = [torch.load(tmp_path / f"trained-{rank}.pt", weights_only=True) for rank in range(2)]
    assert "entropy_bottleneck.quantiles" in trained[0]
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


def test_two_processes_resume_exactly(images, tmp_path):
    """--gpu_id '0 1' starts two processes; each goes on with its own noise and loss sums."""
    flags = ("--gpu_id", "0 1", "--epoch", 1, "--steps-per-epoch", 24, "--lr-schedule", "plateau",
             "--check_time", 0)
    whole = process(images, tmp_path, *flags)
    output, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors[-2000:]
    assert output.count("24 steps an epoch") == 1  # the second process is silent
    first = load(tmp_path, 0)
    assert len(first["rng"]) == 2 and not torch.equal(*(r["cpu"] for r in first["rng"]))
    (tmp_path / "ckpts" / "Hyperprior" / "0" / "epoch_0.pth").unlink()
    forks.run_ranks(2, *command(images, *flags, "--resume"), cwd=tmp_path)
    assert_equal(first, load(tmp_path, 0))
    again = process(images, tmp_path, *flags)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 2, errors
    assert errors.startswith("error: ") and len(errors.splitlines()) == 1  # not one a process


def _gradients(rank, world):
    """Gradients of one step on this rank's part of a fixed batch, without noise; then the quantiles
    after two steps of their own optimiser."""
    torch.manual_seed(0)
    model = Hyperprior(4, 6).eval()  # rounds instead of drawing noise; gradients flow through g_s
    model.gaussian_conditional.training = model.entropy_bottleneck.training = False
    x = torch.rand(4, 3, 64, 64)[rank::world]
    net = prepare_network(model)
    _, aux_optimizer = make_optimizers(model, "adam", 1e-3)
    RateDistortionLoss(0.01)(net(x), x)["loss"].backward()
    result = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for _ in range(2):
        aux_optimizer.zero_grad()
        model.aux_loss().backward()
        aux_optimizer.step()
    result["quantiles"] = model.entropy_bottleneck.quantiles.detach().clone()
    return result


def _trained():
    """The parameters after three steps; this process draws its own weights, crops and noise."""
    model = Hyperprior(4, 6)
    net = prepare_network(model)
    optimizers = make_optimizers(model, "adam", 1e-2)
    for _ in range(3):
        x = torch.rand(2, 3, 64, 64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        RateDistortionLoss(0.01)(net(x), x)["loss"].backward()
        model.aux_loss().backward()
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


if __name__ == "__main__":
    processes.start("cpu", seed=1)
    torch.save(_trained(), Path(sys.argv[1], f"trained-{processes.rank()}.pt"))
    rank = processes.rank()
    torch.save(_gradients(rank, processes.world()), Path(sys.argv[1], f"{rank}.pt"))
