"""Flags: their types and ranges, YAML files, the defaults of the source."""

import importlib
import os
import shlex
import sys
import types
from pathlib import Path

from common import UserError, cli, processes
from common.papers import papers

import pytest
import torch

from factorized.train import flags

ROOT = Path(__file__).parents[1]


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


def test_a_flag_that_may_stand_alone_has_one_value_in_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("resume: auto\n")
    assert cli.parse(flags(), ["--config", str(tmp_path / "c.yaml")]).resume == "auto"


@pytest.mark.parametrize("name", ["FactorizedPrior", "Factorized", "factorized_prior"])
def test_all_spellings_of_a_model_are_one_model(name, tmp_path):
    assert cli.parse(flags(), ["--model_name", name]).model_name == "Factorized"
    (tmp_path / "c.yaml").write_text(f"model_name: {name}")
    args = cli.parse(flags(), ["--config", str(tmp_path / "c.yaml")])
    assert args.model_name == "Factorized"


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


@pytest.mark.parametrize("ids", ["", "a", "0 -1", "0;1"])
def test_gpu_id_must_be_numbers(ids):
    with pytest.raises(UserError, match="gpu_id"):
        processes.launch(ids)


@pytest.mark.parametrize("module, loaded", [("__main__", types.ModuleType("__main__")),
                                            ("ipykernel", types.ModuleType("ipykernel"))])
def test_several_processes_cannot_be_started_from_a_notebook(module, loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, module, loaded)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="'0 1': a notebook .*!python train.py"):
        processes.launch("0 1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    processes.launch("0")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
    RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. "), None])
def test_lack_of_memory_is_one_line(error, capsys):
    def main():
        if error:
            raise error
        torch.empty(2**55, dtype=torch.uint8)

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.startswith("error: out of memory: train with a smaller")
    assert text.count("\n") == 1


def test_other_errors_of_torch_are_not_taken_for_lack_of_memory():
    with pytest.raises(RuntimeError, match="shape"):
        cli.run(lambda: torch.ones(2).view(3))


@pytest.mark.parametrize("kind, text", [
    (cli.positive_float, "1e31"), (cli.positive_float, "nan"), (cli.threads, "100000"),
    (cli.minutes, "nan"), (cli.minutes, "-1")])
def test_values_out_of_range(kind, text):
    with pytest.raises(ValueError):
        kind(text)


@pytest.mark.parametrize("paper", papers())
def test_dashes_and_underscores_are_alike_in_every_flag(paper):
    for script in ("train", "eval"):
        parser = importlib.import_module(f"{paper}.{script}").flags()
        for name, action in parser._option_string_actions.items():
            for other in (name[2:].replace("-", "_"), name[2:].replace("_", "-")):
                if name.startswith("--"):
                    known, = parser._own_spelling([f"--{other}=1"])
                    assert parser._option_string_actions[known.removesuffix("=1")] is action


def test_other_spelling_on_the_command_line():
    args = cli.parse(flags(), ["--lr_schedule", "cosine", "--batch-size=3", "--no_flip",
                               "--dataset", "--a_b-c".lstrip("-")])
    assert (args.lr_schedule, args.batch_size, args.dataset) == ("cosine", 3, "a_b-c")


def test_summary_is_what_one_would_type(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 0.5\nflip: true\nmilestones: [1, 2]\n")
    parser = flags()
    args = cli.parse(parser, ["--config", str(tmp_path / "c.yaml"), "--batch_size", "5",
                              "--no-graph", "--dataset", "a b", "--test_batch_size", "24"])
    words = shlex.split(cli.summary(parser, args))
    assert cli.parse(flags(), words) == args
    assert "--test_batch_size" not in words and "--lr" in words  # a default; from the YAML
    assert cli.summary(parser, cli.parse(parser := flags(), [])) == "all flags have their defaults"


def test_flags_without_effect_say_so(tmp_path, capsys):
    """Keys that the source's code ignores, in its YAML file and on the command line."""
    parser = importlib.import_module("convnextic.train").flags()
    (tmp_path / "c.yaml").write_text("log_itr: 50\nset_lr: 0\nlr_shedule_step: [200, 300]\n"
                                     "startepoch: 90\nepochs: 150\n")
    args = cli.parse(parser, ["--config", str(tmp_path / "c.yaml"), "--p", "0.2"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].strip() for line in said] == [
        "--log_itr", "--set_lr", "--lr_shedule_step", "--p"]
    assert all("without effect" in line for line in said) and args.epochs == 150


def test_cuda_without_a_gpu_is_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert processes.cuda_or_cpu(True, "auto") == "cpu"
    assert "there is no GPU here" in capsys.readouterr().out
    assert processes.cuda_or_cpu(False, "auto") == "auto" and not capsys.readouterr().out
