"""QVRF: what each stage trains, from which weights it starts and which files it keeps."""

import copy
import math
from types import SimpleNamespace

from common import UserError, data
from common.training.checkpoints import Checkpoints

import pytest
import torch
from compressai.models import (
    JointAutoregressiveHierarchicalPriors,
)
from qvrf_cases import read, tiny

from qvrf import train, update
from qvrf.model import LMBDAS, QVRF, initial_gain


def test_stages_follow_each_other(run):
    """Each starts from the best weights of the one before, which are kept."""
    folder = run("--stage", 1)
    first = read(folder / "checkpoint_best_loss.pth.tar")
    assert first["step"] == 4 and torch.equal(first["model"]["Gain"], initial_gain(8))
    run("--stage", 2, "-e", 2)
    kept = read(folder / "checkpoint_best_loss_stage1.pth.tar")
    assert all(torch.equal(v, kept["model"][k]) for k, v in first["model"].items())
    second = read(folder / "checkpoint.pth.tar")
    assert second["step"] == 8 and second["config"]["steps_before"] == 4
    assert second["model"]["Gain"][0] == 1
    assert not torch.equal(second["model"]["Gain"], initial_gain(8))
    run("--stage", 3)
    third = read(folder / "checkpoint.pth.tar")
    assert third["config"]["stage"] == 3 and third["model"]["Gain"][0] == 1
    assert (folder / "checkpoint_stage2.pth.tar").exists()
    assert third["scheduler"]["patience"] == 20 and third["scheduler"]["factor"] == 0.5
    assert [s["step"] for s in third["aux_optimizer"]["state"].values()] == [4]
    with pytest.raises(UserError, match="of a run of stage 3"):
        run("--stage", 2)


@pytest.mark.parametrize("stage, flags", [(1, []), (2, []), (2, ["--ste", 1]), (3, [])])
def test_what_a_stage_trains(stage, flags, run, monkeypatch):
    """Level, regulator and rounding of each step, and the multiplier of its loss."""
    steps, losses = [], []
    forward, loss = QVRF.forward, train.RateDistortionLoss.forward

    def recorded(self, x, s=2, factor=None, ste=False):
        if self.training:
            steps.append((s, factor, ste))
        return forward(self, x, s, factor, ste)

    def measured(self, output, x):
        if torch.is_grad_enabled():
            losses.append(self.lmbda)
        return loss(self, output, x)

    monkeypatch.setattr(QVRF, "forward", recorded)
    monkeypatch.setattr(train.RateDistortionLoss, "forward", measured)
    run("--stage", stage, *flags)
    levels = [7] * 4 if stage == 1 else [train.draw_level(3, step, 8) for step in range(4)]
    assert steps == [(s, 1.0 if stage == 1 else None, stage == 3 or bool(flags)) for s in levels]
    assert losses == [LMBDAS[s] for s in levels]


@pytest.mark.parametrize("stage", [1, 2])
def test_validation_sums_the_levels(stage, model, x):
    """Stage 1: the same codec, with step 1, at each multiplier."""
    images = torch.stack([data.to_uint8(x[0, :, :64, i : i + 64]) for i in (0, 50, 100)])
    args = SimpleNamespace(stage=stage, test_batch_size=2)
    log = SimpleNamespace(images=lambda *_: None, scalars=lambda *_: None)
    criteria = [train.RateDistortionLoss(lmbda) for lmbda in LMBDAS[:8]]
    found = train.validate(copy.deepcopy(model), images, args, criteria, torch.device("cpu"), log,
                           0)
    total, bpp = 0.0, 0.0
    for s, lmbda in enumerate(LMBDAS[:8]):
        with torch.no_grad():
            output = model(data.to_float(images), s, 1.0 if stage == 1 else None)
        bits = sum(-p.log2().sum() for p in output["likelihoods"].values()) / (3 * 64**2)
        total += bits + lmbda * 255**2 * (output["x_hat"] - data.to_float(images)).square().mean()
        bpp += bits / 8
    assert found["loss"] == pytest.approx(float(total), rel=1e-3)
    assert found["bpp"] == pytest.approx(float(bpp), rel=1e-3)


@pytest.mark.parametrize("absolute", [False, True])
def test_checkpoint_without_refresh_goes_on(run, absolute):
    """As in the source: the same run, with its optimisers, whatever the path is called."""
    folder = run("--stage", 1, "-e", 2, "--out", "straight")
    run("--stage", 1, "-e", 1, "--out", "out")
    path = folder / "out" / "checkpoint_best_loss.pth.tar"
    run("--stage", 1, "-e", 2, "--out", "out", "--checkpoint",
        path if absolute else path.relative_to(folder))
    a, b = (read(folder / name / "checkpoint.pth.tar") for name in ("straight", "out"))
    assert b["step"] == 8 and b["config"]["steps_before"] == 0
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


def test_nothing_is_overwritten(run):
    """What a new run finds in its folder is copied first, each file by its own stage."""
    folder = run("--stage", 1, "--out", "a")
    run("--stage", 2, "--out", "b", "--checkpoint", "a/checkpoint.pth.tar", "--refresh", 1)
    before = read(folder / "b" / "checkpoint.pth.tar")["model"]
    run("--stage", 1, "-e", 2, "--out", "b", "--checkpoint", "a/checkpoint.pth.tar")
    kept = read(folder / "b" / "checkpoint_stage2.pth.tar")["model"]
    assert all(torch.equal(v, kept[k]) for k, v in before.items())
    (folder / "a" / "checkpoint.pth.tar").unlink()
    run("--stage", 2, "--out", "a", "--checkpoint", "a/checkpoint_best_loss.pth.tar",
        "--refresh", 1)
    assert read(folder / "a" / "checkpoint_best_loss_stage1.pth.tar")["config"]["stage"] == 1


def test_plateau_with_rare_validation(run):
    assert read(run("--stage", 1, "-e", 3, "--test-every", 2) / "checkpoint.pth.tar")["step"] == 12


def test_a_stage_that_was_never_validated(run, monkeypatch):
    """Its newest weights are the start of the next, not the best ones of the stage before it."""
    folder = run("--stage", 1)
    save = Checkpoints.save

    def dies(self, *arguments, **more):
        save(self, *arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run("--stage", 2, "-e", 3, "--test-every", 3)
    monkeypatch.setattr(Checkpoints, "save", save)
    run("--stage", 3)
    assert read(folder / "checkpoint.pth.tar")["config"]["steps_before"] == 8


def test_cheng_trains_in_fp32(run):
    folder = run("--stage", 1, "--model", "cheng", "--N", 16, "--M", 16)
    assert read(folder / "checkpoint.pth.tar")["step"] == 4


def test_from_a_fixed_rate_model(run, tmp_path):
    """CompressAI's weights as stage 1, as the source's short cut."""
    torch.manual_seed(1)
    fixed = JointAutoregressiveHierarchicalPriors(4, 6)
    fixed.update(force=True)
    torch.save(fixed.state_dict(), tmp_path / "mbt2018.pth.tar")
    folder = run("--stage", 2, "--checkpoint", "mbt2018.pth.tar", "--refresh", 1,
                 "--loadFromPretrainedSinglemodel", 1, "-lr", 1e-9)
    state = read(folder / "checkpoint.pth.tar")
    assert state["step"] == 4 and state["config"]["steps_before"] == 0
    assert torch.allclose(state["model"]["g_a.0.weight"], fixed.g_a[0].weight, atol=1e-6)
    assert torch.allclose(state["model"]["Gain"], initial_gain(8), atol=1e-6)


def test_weights_without_a_gain_or_of_other_transforms(run, tmp_path):
    fixed = JointAutoregressiveHierarchicalPriors(4, 6)
    fixed.update(force=True)
    torch.save(fixed.state_dict(), tmp_path / "mbt2018.pth.tar")
    torch.save({"model": fixed.state_dict(), "config": {"gdn_variant": "seminar"}},
               tmp_path / "seminar.pth")
    with pytest.raises(UserError, match="add --loadFromPretrainedSinglemodel 1"):
        run("--stage", 2, "--checkpoint", "mbt2018.pth.tar", "--refresh", 1)
    with pytest.raises(UserError, match="was trained with --gdn_variant seminar"):
        run("--stage", 2, "--checkpoint", "seminar.pth", "--refresh", 1,
            "--loadFromPretrainedSinglemodel", 1)


def test_start_gain_needs_a_known_stage(run, capsys):
    run("--stage", 1)
    update.main(["checkpoint_best_loss.pth.tar", "-n", "S1"])
    path = capsys.readouterr().out.split()[-1]
    with pytest.raises(UserError, match="does not tell its stage"):
        run("--stage", 2, "--start_gain", 10, "--checkpoint", path, "--refresh", 1)


@pytest.mark.parametrize("name", ["balle", "minnen"])
@pytest.mark.parametrize("last, level", [(16.0, None), (128.0, 2), (128.0, 0)])
def test_start_gain_makes_a_level_the_codec_of_stage_one(name, last, level, x):
    """The same symbols and tables as with step 1 before."""
    model, before = tiny(name), tiny(name)
    train.spread_gains(model, last, level)  # steps that are powers of two: nothing is rounded
    s = 7 if level is None else level
    assert model.compress(x, s)["strings"] == before.compress(x, 0)["strings"]
    assert torch.allclose(model(x, s)["x_hat"], before(x, 0)["x_hat"], atol=1e-5)
    assert torch.allclose(model.Gain, torch.tensor([last ** (i / 7) for i in range(8)]))


def test_start_gain_in_training(run):
    folder = run("--stage", 1)
    first = read(folder / "checkpoint_best_loss.pth.tar")["model"]
    run("--stage", 2, "--start_gain", 10, "-lr", 1e-9)
    second = read(folder / "checkpoint.pth.tar")["model"]
    assert torch.allclose(second["g_a.6.weight"], first["g_a.6.weight"] / 10, rtol=1e-4)
    run("--stage", 3, "--start_gain", 10, "-lr", 1e-9)  # once, not again
    third = read(folder / "checkpoint.pth.tar")["model"]
    assert torch.allclose(third["g_a.6.weight"], first["g_a.6.weight"] / 10, rtol=1e-4)


def test_best_loss_begins_anew_with_refresh(run):
    folder = run("--stage", 1)
    path = folder / "checkpoint_best_loss.pth.tar"
    state = read(path)
    state["best_loss"] = 0.0
    torch.save(state, path)
    run("--stage", 2, "--checkpoint", path, "--refresh", 1)
    assert 0 < read(path)["best_loss"] < math.inf


def test_stage_two_without_a_start_says_so_last(run, capsys):
    """Right before the training, with a command that starts from trained weights and works."""
    folder = run("--stage", 2, "--out", "a")
    said = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(said) if line.startswith("epoch 0")) - 1
    assert "starts from RANDOM WEIGHTS" in said[at] and "--stage 1" in said[at]
    assert "--learning-rate 0.001 --num-workers 0 --batch-size 2" in said[at - 2]
    assert f"all flags: a/{'logs/stage2/config.yaml'}" in said[at - 2]
    command = said[at].split("`")[3].split()[2:]
    run(*command, "--steps-per-epoch", 1, "--out", "b")
    assert read(folder / "b" / "checkpoint.pth.tar")["config"]["stage"] == 2
    assert "starts from" in capsys.readouterr().out
    with pytest.raises(UserError, match="no checkpoint to continue"):
        run("--stage", 2, "--out", "c", "--resume")
