"""TBTC: every model trains and codes; names of a run, resume, averages, schedules, flags."""

import re
import shutil

from common import UserError, cli
from common.coding import image_file
from common.loss import RateDistortionLoss
from common.training.images import find_images
from common.training.network import can_compile

import forks
import pytest
import torch
import yaml
from tbtc_cases import ROOT, TINY, photograph, tiny
from torch import nn

from tbtc import train
from tbtc.model import MODELS, build, load

NAME = "zyc2022-conv-charm-lambda=0.0067-beta=None"


def read(path):
    return torch.load(path, weights_only=True)


def last(version):
    found, = version.glob("checkpoints/*-last.ckpt")
    return found


@pytest.mark.parametrize("name", MODELS)
def test_trains_and_codes(name, run):
    version = run("--num_epochs", 1, "--steps-per-epoch", 2, model=name) / "version_0"
    model = load(last(version))
    assert model.name == name and model.provenance.step == 2
    file = image_file.encode_image(model, photograph(64, 80)[0])
    assert image_file.decode_image(model, file).shape == (3, 64, 80)


def test_names_of_a_run(run):
    version = run("-c", "first run") / "version_0"
    names = sorted(p.name for p in (version / "checkpoints").iterdir())
    assert len(names) == 2
    assert re.fullmatch(r"epoch=1-loss=\d+\.\d{4}-last\.ckpt", names[0])
    assert re.fullmatch(r"epoch=[01]-val_loss=\d+\.\d{4}-best\.ckpt", names[1])
    assert yaml.safe_load((version / "hparams.yaml").read_text())["comment"] == "first run"
    assert "GDN" in (version / "model.txt").read_text()
    assert list(version.glob("events.out.tfevents*"))
    run("--num_epochs", 1)  # Lightning begins another version
    assert (version.parent / "version_1" / "hparams.yaml").exists()
    start = run("--init_ckpt", last(version), "--net_lr", 1e-9, "--num_epochs", 1) / "version_2"
    before, after = (read(last(v))["model"]["g_a.0.weight"] for v in (version, start))
    assert torch.allclose(before, after, atol=1e-6)


@pytest.mark.parametrize("flags", [[], ["--ema", "--quantiles", "periodic", "--quantiles_every",
                                        "2", "--warmup", "0.3"]])
def test_resumed_run_is_the_run(flags, run, monkeypatch):
    straight = run(*flags, "--ckpt_dir", "ckpt") / "version_0"
    save, calls = train.LightningCheckpoints.save, []

    def dies(self, *arguments, **more):
        save(self, *arguments, **more)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.LightningCheckpoints, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    monkeypatch.setattr(train.LightningCheckpoints, "save", save)
    killed = run(*flags, "--resume") / "version_1"
    a, b = read(last(straight)), read(last(killed))
    assert a["step"] == b["step"] == 6
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    if flags:
        assert a["averaged"]["updates"] == b["averaged"]["updates"] == 6
        assert all(torch.equal(v, b["averaged"]["model"][k])
                   for k, v in a["averaged"]["model"].items())
        assert not torch.equal(a["averaged"]["model"]["g_a.0.weight"], a["model"]["g_a.0.weight"])
        coding = load(last(straight))
        assert torch.equal(coding.g_a[0].weight, a["averaged"]["model"]["g_a.0.weight"])
    for key, value in (("net_lr", 1), ("num_epochs", 3)):
        with pytest.raises(UserError, match=f"was trained with --{key}"):
            run(*flags, "--resume", f"--{key}", value)
    (killed.parent / "version_9").mkdir()  # stopped before its first checkpoint
    run(*flags, "--resume")
    assert not (killed.parent / "version_10").exists()


def test_average_is_that_of_torch():
    torch.manual_seed(0)
    model = build("zyc2022-conv-hyperprior", "XS")
    ours, updates = train.EMA(model, 0.999), []

    def average(averaged, current, count):
        n = len(updates)
        decay = min(0.999, (1 + n) / (10 + n))
        return decay * averaged + (1 - decay) * current

    theirs = torch.optim.swa_utils.AveragedModel(model, avg_fn=average)
    theirs.n_averaged += 1  # its first update would copy
    for _ in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        updates.append(1)
        ours.update(model)
        theirs.update_parameters(model)
    for a, b in zip(ours.model.parameters(), theirs.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_compiled_loss_is_the_loss():
    if not can_compile(torch.device("cpu")):
        pytest.skip("torch.compile finds no compiler here")

    import torch._inductor.config as inductor

    # not ChARM, whose ten slices take a minute and a half to compile
    model, x = tiny("zyc2022-conv-hyperprior").train(), photograph(64, 64)
    found = []
    with inductor.patch(fallback_random=True):
        for net in (model, torch.compile(model)):
            torch.manual_seed(3)
            found.append(float(RateDistortionLoss(0.01)(net(x), x)["loss"].detach()))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_two_processes(images, tmp_path):
    script = ROOT / "tbtc" / "train.py"
    forks.run(script, *TINY, "--model", "zyc2022-conv-charm", "--devices", "0", "1",
                  "--accelerator", "cpu", "--dataset_directory", images, "--num_epochs", "1",
                  "--ema", "--scale_lr", "--threads", "1", cwd=tmp_path)
    state = read(last(tmp_path / "ckpt" / NAME / "lightning_logs" / "version_0"))
    assert state["step"] == 3 and len(state["rng"]) == 2


def test_schedules():
    def rates(*flags):
        args = train.flags().parse_args([*flags, "--num_epochs", "10"])
        args.steps_per_epoch = 100
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        scheduler, found = train.schedule(optimizer, args), []
        for _ in range(1000):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    plain = rates()
    assert plain[0] == plain[899] == 1.0 and plain[900] == plain[-1] == pytest.approx(0.1)
    fork = rates("--warmup", "0.01", "--decay_at", "0.91")
    assert fork[0] == pytest.approx(0.01) and fork[5] == pytest.approx(0.505)
    assert fork[10] == fork[909] == 1.0 and fork[910] == pytest.approx(0.1)


def test_defaults_are_the_source_s():
    args = vars(train.check(train.flags().parse_args([])))
    source = {"model": "zyc2022-swint-charm", "quality": "M", "lmbda": 0.01, "beta": None,
              "train_batch_size": 8, "valid_batch_size": 1, "train_patch_size": [256, 256],
              "valid_patch_size": [1024, 1024], "num_workers": 8, "num_epochs": 5000, "seed": 10,
              "net_lr": 1e-4, "aux_lr": 1e-4, "validation_cadence": 10,
              "gradient_clip_norm": 10.0, "checkpoint_to_resume": None, "log_cadence": 25,
              "strategy": "auto", "float32_matmul_precision": None, "ema_decay": 0.999}
    assert {key: args[key] for key in source} == source


def test_a_new_version_has_the_images_of_the_run_that_it_continues(images, run, tmp_path):
    shutil.copytree(images / "train", tmp_path / "set")
    for i in range(2, 5):
        shutil.copy(images / "train" / "0.png", tmp_path / "set" / f"{i}.png")
    flags = ("--dataset_directory", "set", "--steps-per-epoch", 1, "--lr_schedule", "constant")
    folder = run(*flags, "--num_epochs", 1)
    checkpoint = next(folder.glob("version_0/checkpoints/*-last.ckpt"))
    record = find_images("set", 64, 1, False, checkpoint).crops.record
    record.add(record.numbers[:1])
    record.items[record.numbers[0]].path.unlink()
    run(*flags, "--num_epochs", 2, "--ckpt_path", checkpoint)
    run(*flags, "--num_epochs", 3, "--resume")
    assert next(folder.glob("version_1/checkpoints/epoch=2-*-last.ckpt"))


def test_the_command_line_chooses_between_lmbda_and_beta(tmp_path):
    (tmp_path / "a.yaml").write_text("lmbda: 0.01\nckpt_path: a.ckpt\n")  # the fork's key
    words = ["--config", str(tmp_path / "a.yaml"), "--beta", "0.001"]
    args = train.check(cli.parse(train.flags(), words), words)
    assert (args.lmbda, args.beta, str(args.checkpoint_to_resume)) == (None, 0.001, "a.ckpt")


@pytest.mark.parametrize("flags, message", [
    (["--beta", "0.001"], "exactly one"), (["--train_patch_size", "100"], "multiples of 64"),
    (["--train_patch_size", "64", "64", "64"], "height and width"),
    (["--warmup", "0.95"], "shares of the run"), (["--gradient_clip_norm", "nan"], "0 or more"),
    (["--ema_decay", "1"], "below 1"), (["--model", "tcn"], "invalid choice"),
    (["--checkpoint_to_resume", "no.ckpt"], "no such checkpoint"),
    (["--init_ckpt", "no.ckpt"], "no such checkpoint"), (["--net_lr", "-1"], "net_lr"),
    (["--resume", "--checkpoint_to_resume", "a"], "one of them"),
    (["--init_ckpt", "a", "--checkpoint_to_resume", "b"], "one of them"),
    (["--valid_patch_size", "32"], "give 64 or more")])
def test_training_mistakes(flags, message, run, capsys):
    try:
        run(*flags)
    except UserError as e:
        assert message in str(e)
    except SystemExit as e:
        assert e.code == 2 and message in capsys.readouterr().err
    else:
        pytest.fail("was accepted")
