"""Checkpoints of a run: full disks, diverged weights, which one is the newest."""

import errno
import os
from pathlib import Path

from common import UserError
from common.files import write_atomic
from common.training.checkpoints import Checkpoints, epoch_checkpoints

import forks
import pytest
import torch

from factorized.model import Factorized
from hyperprior.model import Hyperprior

ROOT = Path(__file__).parents[1]


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
        "from common import cli\n"
        "from common.coding.model_file import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "path = pathlib.Path('a.pth')\n"
        "save_checkpoint(path, {'x': torch.zeros(10)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "cli.run(lambda: save_checkpoint(path, {'x': torch.zeros(100_000)}))\n")
    _, errors = forks.run("-c", code, cwd=tmp_path, status=2)
    assert errors.startswith("error: cannot write a.pth") and errors.count("\n") == 1
    assert torch.equal(torch.load(tmp_path / "a.pth")["x"], torch.zeros(10))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


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


def test_epochs_are_numbers(tmp_path):
    for name in ("epoch_10.pth", "epoch_9.pth", "epoch_best.pth", "latest.pth"):
        (tmp_path / name).touch()
    assert [p.name for p in epoch_checkpoints(tmp_path)] == ["epoch_9.pth", "epoch_10.pth"]
