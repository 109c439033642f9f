"""Flags, checkpoints, optimisers, schedules."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

from common import UserError, cli, processes
from common.coding import exact
from common.coding.model_file import coding_state, load_checkpoint, load_model, save_checkpoint
from common.files import write_atomic
from common.recipes import export
from common.training.checkpoints import Checkpoints, epoch_checkpoints
from common.training.optimizers import check_finite, make_optimizers, make_scheduler

import pytest
import torch

from factorized.model import Factorized
from factorized.train import flags
from hyperprior.model import Hyperprior
from hyperprior.model import load as load_hyperprior

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------------------- flags
def test_priority_is_default_yaml_command_line(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("lr: 0.5\nbatch_size: 3\nsteps-per-epoch: 7\nlr_schedule: cosine\n"
                      "flip: true\nmilestones: [1, 2]\n")
    args = cli.parse(flags(), ["--config", str(config), "--batch_size", "5", "--no-flip"])
    assert (args.lr, args.batch_size, args.epoch) == (0.5, 5, 250)
    assert (args.steps_per_epoch, args.lr_schedule, args.flip) == (7, "cosine", False)
    assert args.milestones == [1, 2]


@pytest.mark.parametrize("text, word", [
    ("no_such_flag: 1", "no_such_flag"), ("lr: fast", "lr"), ("lr: -1", "lr"),
    ("epoch: 1.5", "epoch"), ("lr:", "lr: None"), ("threads: -1", "threads"),
    ("model_name: JPEG", "Factorized"), ("flip: 3", "flip"), ("lr: [1, 2]", "lr"),
    ("- a list", "flag: value"), ("a: [", "not YAML")])
def test_yaml_mistakes_name_the_key(text, word, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=word) as error:
        cli.parse(flags(), ["--config", str(tmp_path / "c.yaml")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argv", [
    ["--config", "absent.yaml"], ["--config", "."], ["--config"], ["--no_such_flag"],
    ["--metric", "psnr"], ["--lr", "inf"], ["--lr", "0"], ["--num_workers", "-1"],
    ["--steps-per-epoch", "-1"], ["--model_name", "Hyperprior"]])
def test_command_line_mistakes_are_one_line(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: cli.parse(flags(), argv))
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert argv[-1] in errors


def test_keys_with_dashes_or_underscores_and_empty_values(tmp_path):
    (tmp_path / "c.yaml").write_text("aux-lr: 0.5\nclip_max_norm: 2\nbatch-size: 3\ndataset:\n")
    args = cli.parse(flags(), ["--config", str(tmp_path / "c.yaml")])
    assert (args.aux_lr, args.clip_max_norm, args.batch_size, args.dataset) == (0.5, 2.0, 3, None)
    assert cli.parse(flags(), ["--model_name", "FactorizedPrior"]).model_name == "FactorizedPrior"


@pytest.mark.parametrize("config", ["config.yaml", "small.yaml", "quick.yaml"])
@pytest.mark.parametrize("paper", ["factorized", "hyperprior"])
def test_shipped_configurations_are_valid(paper, config):
    import importlib

    parser = importlib.import_module(f"{paper}.train").flags()
    args = cli.parse(parser, ["--config", str(ROOT / paper / config)])
    assert args.epoch * (args.steps_per_epoch or 1_010) >= 5_000


def test_source_defaults():
    """seminar.md 3.1; the paths of its machine are the exceptions."""
    args = cli.parse(flags(), [])
    assert (args.lmbda, args.lr, args.batch_size, args.test_batch_size) == (0.01, 1e-4, 64, 24)
    assert (args.epoch, args.check_time, args.exp_version) == (250, 10, 0)
    assert (args.gpu_id, args.code_rate, args.num_workers, args.init_ckpt) == ("0", "low", 0, "")
    assert (args.prefix, args.model_name, args.load_model_epoch) == (
        "FactorizedPrior", "Factorized", None)


# ---------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file(call, tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    write_atomic(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="No space left on device; the file that was there is kept"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_while_saving(tmp_path):
    """A real limit of the system on the size of files, in a process of its own."""
    code = (
        "import resource, signal, pathlib, torch\n"
        "from common import runs\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path = pathlib.Path('a.pth')\n"
        "runs.save_checkpoint(path, {'x': torch.zeros(10)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "runs.cli(lambda: runs.save_checkpoint(path, {'x': torch.zeros(100_000)}))\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                          capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write a.pth") and done.stderr.count("\n") == 1
    assert torch.equal(torch.load(tmp_path / "a.pth")["x"], torch.zeros(10))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut zip"])
def test_unreadable_checkpoint_is_named(content, tmp_path):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(UserError, match="bad.pth"):
        load_checkpoint(tmp_path / "bad.pth")


def test_cut_checkpoint_folder_and_other_objects_are_named(tmp_path):
    path = tmp_path / "bad.pth"
    save_checkpoint(path, {"model": Factorized(4, 6).state_dict()})
    content = path.read_bytes()
    for part in (0.1, 0.9, 0.999):
        path.write_bytes(content[: int(part * len(content))])
        with pytest.raises(UserError, match="bad.pth"):
            load_checkpoint(path)
    for other in ([1, 2], {}, {"model": 3}, {"state": {}, "param_groups": []},
                  {0: torch.zeros(1)}, torch.zeros(2)):
        torch.save(other, path)
        with pytest.raises(UserError, match="bad.pth: holds no state dict"):
            load_checkpoint(path)
    for missing in (tmp_path, tmp_path / "absent.pth"):
        with pytest.raises(UserError, match=missing.name):
            load_checkpoint(missing)


def test_old_spelling_of_compressai_loads(tmp_path):
    """Its first releases kept the densities as _matrix0, _bias0, _factor0."""
    model = Hyperprior(4, 6)
    model.update()
    state = {re.sub(r"\.(matri|biase|factor)(?:ces|x|s)\.(\d)$", lambda m: "._" + {
        "matri": "matrix", "biase": "bias", "factor": "factor"}[m[1]] + m[2], k): v
        for k, v in model.state_dict().items()}
    assert "entropy_bottleneck._matrix0" in state and len(state) == len(model.state_dict())
    torch.save(state, tmp_path / "old.pth")
    loaded = load_hyperprior(tmp_path / "old.pth").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_checkpoint_with_code_in_it_is_refused(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}, "hook": subprocess.run}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="bad.pth"):
        load_checkpoint(tmp_path / "bad.pth")


def test_prefixes_of_wrappers_are_dropped(tmp_path):
    state = Factorized(4, 6).state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        torch.save({"state_dict": {prefix + k: v for k, v in state.items()}}, tmp_path / "a.pth")
        assert load_checkpoint(tmp_path / "a.pth")["model"].keys() == state.keys()


def test_loading_is_strict_and_names_the_weights(tmp_path):
    state = Factorized(4, 6).state_dict()
    torch.save({k: v for k, v in state.items() if k != "g_s.2.bias"}, tmp_path / "less.pth")
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save(Hyperprior(4, 6).state_dict(), tmp_path / "other.pth")
    for name, key in (("less", "g_s.2.bias"), ("more", "extra.weight"), ("other", "h_a.0.weight")):
        with pytest.raises(UserError, match=key):
            load_model(tmp_path / f"{name}.pth", Factorized)


def test_tables_come_from_the_checkpoint(tmp_path):
    """Never rebuilt on load: an altered table stays altered, altered exponents too."""
    torch.manual_seed(0)
    model = Hyperprior(4, 6)
    model.update()
    state = coding_state(model)
    state["model"]["entropy_bottleneck._quantized_cdf"][0, 1] += 1
    state["exact"]["h_s"]["shifts"][0] -= 3
    save_checkpoint(tmp_path / "a.pth", state)
    loaded = load_hyperprior(tmp_path / "a.pth")
    table = loaded.entropy_bottleneck._quantized_cdf
    assert torch.equal(table, state["model"]["entropy_bottleneck._quantized_cdf"])
    assert torch.equal(exact.spec(loaded.h_s)["shifts"][0], state["exact"]["h_s"]["shifts"][0])


@pytest.mark.parametrize("small_kernel", [0, 2000, 10**9])  # all in 8 bits, some, none
def test_export_is_the_model_in_the_file(small_kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SMALL_KERNEL", small_kernel)
    torch.manual_seed(0)
    model = Hyperprior(8, 12).eval()
    model.update()
    export.write(tmp_path / "a.pth", model, config={"lmbda": 0.013}, step=5)
    loaded = load_hyperprior(tmp_path / "a.pth")
    assert (loaded.provenance.config["lmbda"], loaded.provenance.step) == (0.013, 5)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x = torch.rand(1, 3, 64, 64)
    assert loaded.compress(x)["strings"] == model.compress(x)["strings"]
    table = model.entropy_bottleneck._quantized_cdf.clone()
    table[0, 1] += 1  # of older weights, say: what the file holds is what its streams were coded by
    model.entropy_bottleneck._quantized_cdf.copy_(table)
    export.write(tmp_path / "b.pth", model)
    assert torch.equal(
        load_hyperprior(tmp_path / "b.pth").entropy_bottleneck._quantized_cdf, table)
    plain = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert (tmp_path / "a.pth").stat().st_size < plain / 2


@pytest.mark.parametrize("out", [0, 1])
def test_eight_bit_kernels_are_close(out):
    weight = torch.randn(64, 48, 5, 5, generator=torch.Generator().manual_seed(0))
    weight.select(out, 0).zero_()  # a dead channel stays zero
    weight.select(out, 1).mul_(1e-3)  # and a faint one has a step of its own
    q, step = export._to_int8(weight, out)
    assert q.dtype == torch.int8 and step.numel() == weight.size(out)
    assert q.select(out, 0).abs().max() == 0
    error = (q * step - weight).transpose(0, out).flatten(1).square().mean(1)[1:]
    power = weight.transpose(0, out).flatten(1).square().mean(1)[1:]
    assert (10 * torch.log10(power / error)).min() > 38  # dB, each channel


# ------------------------------------------------------------------------ optimisers, schedules
@pytest.mark.parametrize("name", ["adam", "muon"])
def test_each_parameter_has_one_optimiser(name):
    model = Hyperprior(4, 6)
    main, aux = make_optimizers(model, name, 1e-3)
    owned = [[id(p) for g in o.param_groups for p in g["params"]] for o in (main, aux)]
    assert sorted(owned[0] + owned[1]) == sorted(id(p) for p in model.parameters())
    assert owned[1] == [id(model.entropy_bottleneck.quantiles)]


def rates(name, losses, epochs=200, milestones=(40, 90, 140)):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = make_scheduler(optimizer, name, epochs, milestones)
    result = []
    for loss in losses:
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([loss] if name == "plateau" else []))
    return result


def test_multistep_halves_at_the_report_s_epochs():
    lr = rates("multistep", range(200))
    assert [lr[e] for e in (39, 40, 89, 90, 139, 140, 199)] == pytest.approx(
        [1e-4, 5e-5, 5e-5, 2.5e-5, 2.5e-5, 1.25e-5, 1.25e-5])


def test_plateau_halves_after_ten_epochs_without_progress():
    lr = rates("plateau", [1.0] * 14)
    assert lr[11] == 1e-4 and lr[12] == 5e-5


def test_cosine_ends_near_zero():
    lr = rates("cosine", range(10), epochs=10)
    assert lr[0] == 1e-4 and lr[5] == pytest.approx(5e-5) and lr[9] < 3e-6


def test_non_finite_loss_names_term_step_and_checkpoint():
    losses = {"loss": torch.tensor(float("nan")), "bpp": torch.tensor(1.0)}
    with pytest.raises(UserError, match="loss not finite in the batch of step 7; .*epoch_3.pth"):
        check_finite(losses, 7, Path("ckpts/epoch_3.pth"))
    check_finite({"bpp": torch.tensor(1.0)}, 7, None)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_diverged_weights_are_not_saved(value, tmp_path):
    model = Hyperprior(4, 6)
    density = model.entropy_bottleneck
    checkpoints = Checkpoints(tmp_path, {"model": model}, {})
    checkpoints.save("epoch_0.pth", 0, 5)
    with torch.no_grad():
        for matrix, bias in zip(density.matrices, density.biases, strict=True):
            matrix.fill_(value)
            bias.copy_(value * (-1) ** torch.arange(bias.numel()).reshape(bias.shape))
    with pytest.raises(UserError, match="not finite in the batch of step 9; .*epoch_0.pth"):
        checkpoints.save("epoch_1.pth", 1, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["epoch_0.pth"]


def test_newest_checkpoint_is_the_last_written(tmp_path):
    """Not the one of most steps: --load_model_epoch goes back and leaves later epochs behind."""
    checkpoints = Checkpoints(tmp_path, {"model": Factorized(4, 6)}, {})
    for age, (name, step) in enumerate([("epoch_0.pth", 9), ("epoch_1.pth", 19),
                                        ("latest.pth", 14)]):
        checkpoints.save(name, 0, step)
        os.utime(tmp_path / name, (age, age))
    assert checkpoints.begin(True, None)["step"] == 14
    assert checkpoints.begin(False, 0)["step"] == 9
    with pytest.raises(UserError, match="epoch_7.pth: no such checkpoint"):
        checkpoints.begin(False, 7)


@pytest.mark.parametrize("ids", ["", "a", "0 -1", "0;1"])
def test_gpu_id_must_be_numbers(ids):
    with pytest.raises(UserError, match="gpu_id"):
        processes.launch(ids)


def test_a_damaged_checkpoint_is_not_loaded(tmp_path):
    """torch.load reads past the checksums of the zip file that a checkpoint is."""
    path = tmp_path / "a.pth"
    export.write(path, Hyperprior(8, 12).eval())
    whole = path.read_bytes()
    for position in range(300, len(whole) - 300, len(whole) // 40):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(bytes(damaged))
        try:
            state = load_checkpoint(path)["model"]
        except UserError:
            continue
        path.write_bytes(whole)  # a flip that changed no content, as in a time stamp
        good = load_checkpoint(path)["model"]
        assert all(torch.equal(v, good[k]) for k, v in state.items())


@pytest.mark.parametrize("content, words", [
    (b"# a text\n", "give one of train.py"), (b"PK\3\4", "give one of train.py|damaged"),
    (b"", "can be read, it is damaged")])
def test_what_is_no_checkpoint(content, words, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_checkpoint(tmp_path / "a.pth")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_kernels_without_steps_are_refused(tmp_path):
    torch.save({"model": {"a": torch.ones(2, dtype=torch.int8)}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="8-bit kernels are missing"):
        load_checkpoint(tmp_path / "a.pth")


def test_epochs_are_numbers(tmp_path):
    for name in ("epoch_10.pth", "epoch_9.pth", "epoch_best.pth", "latest.pth"):
        (tmp_path / name).touch()
    assert [p.name for p in epoch_checkpoints(tmp_path)] == ["epoch_9.pth", "epoch_10.pth"]


@pytest.mark.parametrize("kind, text", [
    (cli.positive_float, "1e31"), (cli.positive_float, "nan"), (cli.threads, "100000"),
    (cli.minutes, "nan"), (cli.minutes, "-1")])
def test_values_out_of_range(kind, text):
    with pytest.raises(ValueError):
        kind(text)
