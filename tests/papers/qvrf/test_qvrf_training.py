"""QVRF: stages killed and resumed, the loss falls, the flags of train.py."""

import contextlib
import signal
import time

from common import UserError
from common.training.checkpoints import Checkpoints
from common.training.optimizers import make_optimizers

import forks
import pytest
import torch
from qvrf_cases import ROOT, TINY, read

from qvrf import train
from qvrf.model import LMBDAS, build, initial_gain


@pytest.mark.parametrize("when", (0, 3, 6))
def test_several_stages_at_once_and_resumed(when, run, monkeypatch):
    """Killed after any file that it writes, and continued: as the straight run, bit for bit."""
    flags = ("--stage", 1, 2, 3, "-e", 1, 2, 1, "-lr", 0.001, 0.002, 0.001, "--optimizer", "muon",
             "--lr-schedule", "cosine")
    folder = run(*flags, "--out", "straight")
    save, saves = Checkpoints.save, []

    def dies(self, name, *arguments, **more):
        save(self, name, *arguments, **more)
        saves.append(name)
        if len(saves) == when + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", dies)
    with contextlib.suppress(KeyboardInterrupt):
        run(*flags, "--out", "killed")
    assert len(saves) >= min(when + 1, 6)
    monkeypatch.setattr(Checkpoints, "save", save)
    run(*flags, "--out", "killed", "--resume", "auto")
    straight, killed = (read(folder / name / "checkpoint.pth.tar") for name in
                        ("straight", "killed"))
    assert all(torch.equal(v, killed["model"][k]) for k, v in straight["model"].items())
    assert straight["config"]["steps_before"] == killed["config"]["steps_before"] == 12
    best = [read(folder / name / "checkpoint_best_loss.pth.tar")["step"]
            for name in ("straight", "killed")]
    assert best[0] == best[1]


def test_stopped_between_two_stages(run, monkeypatch):
    """Before stage 2 has saved anything: stage 1 is not lost, and not trained again."""
    flags = ("--stage", 1, 2, "--out", "out")
    save = Checkpoints.save

    def dies(self, *arguments, **more):
        if self.config["stage"] == 2:
            raise KeyboardInterrupt
        save(self, *arguments, **more)

    monkeypatch.setattr(Checkpoints, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    monkeypatch.setattr(Checkpoints, "save", save)
    folder = run(*flags, "--resume") / "out"
    assert read(folder / "checkpoint.pth.tar")["config"]["stage"] == 2
    assert sorted(p.name for p in folder.glob("*_stage*")) == [
        "checkpoint_best_loss_stage1.pth.tar", "checkpoint_stage1.pth.tar"]


def test_killed_stage_two_resumes_bit_for_bit(images, run, tmp_path):
    """kill -9 in mid-epoch; weights, optimisers, schedule and generators end equal."""
    run("--stage", 1, "--out", "first")
    flags = [*TINY, "-d", images, "--stage", 2, "--checkpoint",
             tmp_path / "first" / "checkpoint_best_loss.pth.tar", "--refresh", 1,
             "--steps-per-epoch", 60, "-e", 2, "--check_time", 0]

    def process(out, *more):
        return forks.start(ROOT / "qvrf" / "train.py", *flags, "--out", out, *more,
                               cwd=tmp_path)

    whole, part = process("whole"), process("part")
    newest = tmp_path / "part" / "checkpoint.pth.tar"
    deadline = time.monotonic() + 180
    while not (newest.exists() and read(newest)["step"] > 60):
        assert time.monotonic() < deadline and part.poll() is None, part.communicate()[1]
        time.sleep(0.01)
    part.send_signal(signal.SIGKILL)
    part.communicate()
    assert read(newest)["step"] % 60 != 0
    resumed = process("part", "--resume")
    for one in (whole, resumed):
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors
    a, b = read(tmp_path / "whole" / "checkpoint.pth.tar"), read(newest)
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    assert str(a["optimizer"]) == str(b["optimizer"]) and a["best_loss"] == b["best_loss"]
    assert str(a["scheduler"]) == str(b["scheduler"])
    assert torch.equal(a["rng"][0]["cpu"], b["rng"][0]["cpu"])


def test_two_hundred_steps_of_stage_two_lower_the_loss(base, x):
    torch.manual_seed(0)
    model = build(base, N=8, M=12).train()
    optimizer, _ = make_optimizers(model, "adam", 1e-3)
    losses = []
    for step in range(200):
        s = train.draw_level(0, step, 8)
        output = model(x[..., :64, :64], s)
        bits = sum(-p.log2().sum() for p in output["likelihoods"].values()) / 64**2
        error = (output["x_hat"] - x[..., :64, :64]).square().mean()
        loss = bits + LMBDAS[s] * 255**2 * error
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / LMBDAS[s])
    assert sum(losses[-50:]) < 0.7 * sum(losses[:50])
    assert model.Gain[0] == 1 and not torch.equal(model.Gain.detach(), initial_gain(8))


def test_levels_are_drawn_alike_on_all_processes():
    drawn = [train.draw_level(7, step, 8) for step in range(4000)]
    assert drawn == [train.draw_level(7, step, 8) for step in range(4000)]
    counts = torch.bincount(torch.tensor(drawn))
    assert len(counts) == 8 and 420 < counts.min() and counts.max() < 580


def test_flags_of_the_source():
    args = train.flags().parse_args(
        "-d ./dataset -e 500 -lr 1e-4 -n 8 --batch-size 8 --test-batch-size 64 "
        "--aux-learning-rate 1e-3 --patch-size 256 256 --cuda --save --seed 1926 --clip_max_norm "
        "1.0 --stage 3 --ste 1 --refresh 1 --loadFromPretrainedSinglemodel 0 --checkpoint "
        "checkpoint_best_loss.pth.tar".split())
    assert (args.seed, args.stage, args.epochs, args.learning_rate) == (1926, [3], [500], [1e-4])
    defaults = vars(train.flags().parse_args([]))
    assert {k: defaults[k] for k in ("epochs", "learning_rate", "num_workers", "batch_size",
                                     "test_batch_size", "aux_learning_rate", "patch_size", "stage",
                                     "ste", "loadFromPretrainedSinglemodel", "refresh",
                                     "clip_max_norm", "checkpoint")} == {
        "epochs": [100], "learning_rate": [1e-4], "num_workers": 4, "batch_size": 16,
        "test_batch_size": 64, "aux_learning_rate": 1e-3, "patch_size": [256, 256], "stage": [0],
        "ste": 0, "loadFromPretrainedSinglemodel": 0, "refresh": 0, "clip_max_norm": 1.0,
        "checkpoint": None}


@pytest.mark.parametrize("flags, message", [
    (["--patch-size", "60", "64"], "give multiples of 64"),
    (["--stage", "1", "2", "-e", "1", "2", "3"], "--epochs: give one number, or 2"),
    (["--stage", "2", "1"], "rising order"),
    (["--stage", "2", "--lmbda", "0.01"], "--lmbda trains one rate"),
    (["--start_gain", "9", "--model", "cheng", "--M", "4"], "attention block"),
    (["--start_level", "2"], "needs --start_gain"),
    (["--start_gain", "9", "--start_level", "8"], "a level from 0 to 7"),
    (["--model", "cheng"], "in cheng M is N"),
    (["--stage", "2", "--start_gain", "9"], "there is no stage 1"),
    (["--loadFromPretrainedSinglemodel", "1"], "needs --checkpoint"),
    (["--stage", "2", "--checkpoint", "no.pth.tar"], "no such checkpoint"),
    (["--patch-size", "128", "64"], "96x90 is smaller than the 64x128 crop")])
def test_training_mistakes(flags, message, run):
    with pytest.raises(UserError, match=message):
        run(*flags)
