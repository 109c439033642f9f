"""ConvNeXTIC: folders of a run, resume, optimisers, the flags of train.py."""

import shutil

from common import UserError
from common.training.checkpoints import Checkpoints
from common.training.images import find_images

import pytest
import torch

from convnextic import train
from convnextic.model import build


def read(path):
    return torch.load(path, weights_only=True)


def test_folders_of_a_run(run):
    folder = run("--name", "a", "--snapshot_save_epoch", 1) / "a" / "3"
    names = sorted(p.name for p in (folder / "snapshots").iterdir())
    assert "best.pt" in names and "latest.pt" in names
    kept = [n for n in names if n[0].isdigit()]
    assert len(kept) == 2
    number, bpp, mse = kept[1].removesuffix(".pt").split("_")
    assert number == "001" and len(bpp.split(".")[1]) == 4 and len(mse.split(".")[1]) == 8
    assert 0 < float(mse) < 1 and (folder / "config.yaml").exists()
    assert read(folder / "snapshots" / "latest.pt")["config"]["lmbda"] == 0.0067
    with pytest.raises(UserError, match="holds a run"):
        run("--name", "a")


def test_resumed_run_is_the_run(run, monkeypatch):

    straight = run("--name", "straight")
    save, count = Checkpoints.save, []

    def dies(self, *arguments, **more):
        save(self, *arguments, **more)
        count.append(1)
        if len(count) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run("--name", "killed")
    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(UserError, match="no checkpoint to continue"):  # only best.pt is there
        run("--name", "killed", "--resume")
    run("--name", "killed", "--resume", "auto")
    a, b = (read(straight / name / "3" / "snapshots" / "latest.pt")
            for name in ("straight", "killed"))
    assert a["step"] == b["step"] == 6
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())


@pytest.mark.parametrize("name, value", [("decoder_dw", "convtranspose"), ("lambda_input", "raw")])
def test_resume_from_a_network_of_the_same_shapes(name, value, tmp_path):
    model = build("v5_vr", 16, 24)
    state = {"model": model.state_dict(), "config": {"variant": "v5_vr", name: value}}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=f"was trained with --{name} {value}, not "):
        train.load_weights(model, str(tmp_path / "other.pt"))


def test_resume_from_a_file_takes_weights(run):
    """As in the source: fixed rate to variable rate, first epoch as told; and back."""
    folder = run("--name", "fixed", "--variant", "v3_scctx", "--latent_dim", 24)
    start = folder / "fixed" / "3" / "snapshots" / "best.pt"
    run("--name", "vr", "--variant", "v5_vr", "--latent_dim", 24, "--resume", start,
        "--startepoch", 1, "--lr", 1e-9, "--lr_aux", 1e-9)
    state = read(folder / "vr" / "3" / "snapshots" / "latest.pt")
    assert state["step"] == 6 and (folder / "vr" / "3" / "snapshots" / "001.pt").exists()
    assert torch.allclose(state["model"]["g_a.0.down.0.weight"],
                          read(start)["model"]["g_a.0.down.0.weight"], atol=1e-6)
    run("--name", "back", "--variant", "v3_scctx", "--latent_dim", 24, "--lr", 1e-9, "--lr_aux",
        1e-9, "--resume", folder / "vr" / "3" / "snapshots" / "latest.pt")
    back = read(folder / "back" / "3" / "snapshots" / "latest.pt")["model"]
    assert not [key for key in back if key.startswith("scale_")]
    assert torch.allclose(back["g_a.0.down.0.weight"], state["model"]["g_a.0.down.0.weight"],
                          atol=1e-6)


def test_a_run_from_weights_in_its_own_folder(images, run, tmp_path):
    """The weights are kept, and the new run has the images that it finds, not the old one's."""
    shutil.copytree(images / "train", tmp_path / "set")
    for i in range(2, 5):
        shutil.copy(images / "train" / "0.png", tmp_path / "set" / f"{i}.png")
    flags = ("--trainset", "set", "--name", "a", "--epochs", 1, "--steps-per-epoch", 1)
    snapshots = run(*flags) / "a" / "3" / "snapshots"
    state = read(snapshots / "latest.pt")
    record = find_images("set", 128, 1, False, snapshots / "latest.pt").crops.record
    record.add(record.numbers[:1])
    record.items[record.numbers[0]].path.unlink()
    run(*flags, "--resume", snapshots / "best.pt")
    new = read(snapshots / "latest.pt")["config"]
    assert new["images"].startswith("3 images") and state["config"]["images"].startswith("4 images")
    run(*flags, "--resume", "auto")
    old = snapshots.parent.with_name("3_1") / "snapshots" / "best.pt"
    (snapshots / "latest.pt").unlink()
    with pytest.raises(UserError, match="holds a run without latest.pt"):
        run(*flags, "--resume", old)
    run(*flags, "--resume", snapshots / "best.pt")
    assert read(snapshots.parent.with_name("3_2") / "snapshots" / "best.pt")["config"] == new
    assert read(old)["config"] == state["config"]


@pytest.mark.parametrize("flags, kind", [
    (["--optimizer", "adamw", "--wd_exclude_1d"], torch.optim.AdamW),
    (["--eb_group", "aux"], torch.optim.Adam)])
def test_optimizers(flags, kind):
    model = build("v2_stride2", 8, 12)
    main, aux = train.optimizers(model, train.flags().parse_args(flags))
    assert type(main) is kind
    groups = [[id(p) for p in g["params"]] for o in (main, aux) for g in o.param_groups]
    assert sorted(sum(groups, [])) == sorted(map(id, model.parameters()))
    if kind is torch.optim.AdamW:
        assert [g["weight_decay"] for g in main.param_groups] == [0.05, 0.0]
        assert all(p.dim() < 2 for p in main.param_groups[1]["params"])
    else:
        mine = {id(p) for p in model.entropy_bottleneck.parameters()}
        assert mine == set(groups[-1])


def test_defaults_are_the_source_s():
    args = vars(train.flags().parse_args([]))
    source = {"snapshot_save_epoch": 10, "log_itr": 1000, "epochs": 400, "lr": 1e-4,
              "lr_aux": 1e-3, "clip_max_norm": 1, "metric": "mse", "quality_level": "7",
              "in_chans": 3, "embed_dim": 128, "latent_dim": 192, "batchsize": 8,
              "batchsize_test": 1, "patchsize": 256, "worker_num": 8, "name": "VCIP",
              "milestones": [250, 350], "gamma": 0.1, "optimizer": "adam"}
    assert {key: args[key] for key in source} == source


@pytest.mark.parametrize("flags, message", [
    (["--quality_level", "9"], "give 1 to 8"), (["--patchsize", "100"], "multiple of"),
    (["--resume", "no.pt"], "no such checkpoint"), (["--depths", "0"] + ["1"] * 5, "depths"),
    (["--lambda_min", "0.5"], "is above"), (["--drop_path_rate", "1.5"], "below 1"),
    (["--drop_path_rate", "nan"], "drop_path_rate"), (["--dw_groups", "3"], "divisor of"),
    (["--optimizer", "adamw", "--weight_decay", "-1"], "weight_decay"),
    (["--quality_level", "\u00b3"], "give 1 to 8"), (["--name", "../a"], "name of a folder"),
    (["--eta_min", "1"], "is above"), (["--resume"], "no checkpoint to continue"),
    (["--optimizer", "muon", "--eb_group", "aux"], "not with"),
    (["--quality_level", "../a", "--lmbda", "1", "--lambda_min", "1", "--lambda_max", "1"],
     "folder")])
def test_training_mistakes(flags, message, run, capsys):
    try:
        run(*flags)
    except UserError as e:
        assert message in str(e)
    except SystemExit as e:
        assert e.code == 2 and message in capsys.readouterr().err
    else:
        pytest.fail("was accepted")
