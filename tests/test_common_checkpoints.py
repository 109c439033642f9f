"""Checkpoints of a run: full disks, diverged weights, which one is the newest."""

import errno
import os
from pathlib import Path

from common import UserError, files
from common.files import write_atomic
from common.training.checkpoints import Checkpoints, epoch_checkpoints, newest

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


def checkpoints_of(folder):
    return Checkpoints(folder, {"model": Factorized(4, 6)}, {})


def test_newest_checkpoint_is_that_of_most_steps(tmp_path):
    """Times of files say nothing: a copied run has others."""
    checkpoints = checkpoints_of(tmp_path)
    for age, (name, step) in enumerate([("latest.pth", 14), ("epoch_10.pth", 22),
                                        ("epoch_9.pth", 20)]):
        checkpoints.save(name, 0, step)
        os.utime(tmp_path / name, (age, age))
    assert newest(checkpoints.found()) == tmp_path / "epoch_10.pth"
    assert checkpoints.begin(True, None)["step"] == 22
    checkpoints.save("latest.pth", 11, 23)
    os.utime(tmp_path / "latest.pth", (0, 0))
    assert checkpoints.begin(True, None)["step"] == 23
    checkpoints.release()


def test_a_run_that_went_back_continues_there(tmp_path):
    """--load_model_epoch leaves later epochs behind, which are of an earlier branch."""
    first = checkpoints_of(tmp_path)
    for epoch, step in enumerate((10, 20, 30)):
        first.save(f"epoch_{epoch}.pth", epoch, step)
    back = checkpoints_of(tmp_path)
    assert back.begin(False, 0)["step"] == 10
    back.save("latest.pth", 1, 15)
    assert checkpoints_of(tmp_path).begin(True, None)["step"] == 15
    again = checkpoints_of(tmp_path)
    again.begin(True, None)
    again.save("epoch_1.pth", 1, 20)  # the resumed run is of the same branch
    assert checkpoints_of(tmp_path).begin(True, None)["step"] == 20
    twice = checkpoints_of(tmp_path)
    twice.begin(False, 0)
    twice.save("latest.pth", 1, 12)
    assert checkpoints_of(tmp_path).begin(True, None)["step"] == 12
    with pytest.raises(UserError, match="epoch_7.pth: no such checkpoint"):
        checkpoints_of(tmp_path).begin(False, 7)
    first.release()


def test_an_unreadable_checkpoint_is_passed_over(tmp_path, capsys):
    checkpoints = checkpoints_of(tmp_path)
    checkpoints.save("epoch_0.pth", 0, 10)
    (tmp_path / "epoch_1.pth").write_bytes(b"cut")
    assert newest(checkpoints.found()) == tmp_path / "epoch_0.pth"
    assert "epoch_1.pth: cannot be read, and is passed over" in capsys.readouterr().out


def test_temporary_names_are_unpredictable_and_do_not_stay(tmp_path, monkeypatch):
    names = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(a), replace(a, b)))
    monkeypatch.setattr(files, "_cleaned", set())
    old, fresh = (tmp_path / f".a.pth.lic-k3j4h5g{i}.tmp" for i in range(2))
    foreign = [tmp_path / name for name in (".own.tmp", ".a.pth.77.tmp", ".a.k3j4h5g6.tmp")]
    for path in (old, fresh, *foreign):
        path.touch()
    for path in (old, *foreign):
        os.utime(path, (0, 0))
    for content in (b"1", b"2"):
        write_atomic(tmp_path / "a.pth", content)
    assert len(set(names)) == 2 and all(Path(name).parent == tmp_path for name in names)
    assert all(str(os.getpid()) not in Path(name).name for name in names)
    assert set(tmp_path.iterdir()) == {*foreign, fresh, tmp_path / "a.pth"}
    assert (tmp_path / "a.pth").stat().st_mode & 0o777 == 0o666 & ~files.UMASK


def test_epochs_are_numbers(tmp_path):
    for name in ("epoch_10.pth", "epoch_9.pth", "epoch_best.pth", "latest.pth"):
        (tmp_path / name).touch()
    assert [p.name for p in epoch_checkpoints(tmp_path)] == ["epoch_9.pth", "epoch_10.pth"]
