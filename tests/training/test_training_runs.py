"""Runs as a user makes them: killed and resumed, refused, started from other weights."""

import signal
import time

from common import UserError, processes
from common.coding.model_file import load_checkpoint
from common.loss import check_size
from common.training.checkpoints import steps_of

import pytest
import torch
from helpers import locking_process
from training_cases import assert_equal, load, process

from checkerboard import train as checkerboard_train
from factorized import train as factorized_train
from hyperprior import train as hyperprior_train
from joint_ar import train as joint_ar_train


def test_killed_and_resumed_equals_straight(images, tmp_path):
    """kill -9 in mid-epoch; weights, optimisers and generators end bit for bit equal."""
    flags = ("--epoch", 3, "--steps-per-epoch", 60, "--lr-schedule", "plateau", "--optimizer",
             "muon", "--check_time", 0, "--num_workers", 0)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    whole = process(images, straight, *flags)
    part = process(images, killed, *flags)
    latest = killed / "ckpts" / "Hyperprior" / "0" / "latest.pth"
    deadline = time.monotonic() + 120
    while not (latest.exists() and torch.load(latest, weights_only=True)["step"] > 60):
        assert time.monotonic() < deadline and part.poll() is None, part.communicate()[1]
        time.sleep(0.01)
    part.send_signal(signal.SIGKILL)
    part.communicate()
    assert torch.load(latest, weights_only=True)["step"] % 60 != 0
    assert not (latest.parent / "epoch_2.pth").exists()
    resumed = process(images, killed, *flags, "--resume")
    for run in (whole, resumed):
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    assert_equal(load(straight, 2), load(killed, 2))


@pytest.mark.parametrize("flags", [
    ["--threads", 1, "--precision", "bf16"], ["--threads", 2, "--num_workers", 1, "--flip"]])
def test_resumed_in_mid_epoch_equals_straight(flags, train):
    """From latest.pth of step 20, in bfloat16 and on two threads; checkpoints are equal."""
    threads = torch.get_num_threads()
    flags = [*flags, "--steps-per-epoch", 24, "--epoch", 1, "--lr-schedule", "plateau",
             "--check_time", 0]
    folder = train(*flags)
    whole, path = load(folder, 0), folder / "ckpts" / "Hyperprior" / "0" / "epoch_0.pth"
    path.unlink()
    assert torch.load(path.with_name("latest.pth"), weights_only=True)["step"] == 20
    train(*flags, "--resume")
    torch.set_num_threads(threads)
    assert_equal(whole, load(folder, 0))


@pytest.mark.parametrize("module, prefix", [
    (joint_ar_train, "JointAutoregressiveHierarchicalPriors"),
    (checkerboard_train, "CheckerboardAutogressive")])
def test_context_models_resume_exactly(module, prefix, train):
    """From latest.pth of step 20, with Muon; masked weights included."""
    flags = ["--optimizer", "muon", "--steps-per-epoch", 24, "--epoch", 1, "--check_time", 0]
    folder = train(*flags, module=module)
    path = folder / "ckpts" / prefix / "0" / "epoch_0.pth"
    whole = torch.load(path, weights_only=True)
    path.unlink()
    train(*flags, "--resume", module=module)
    assert_equal(whole, torch.load(path, weights_only=True))


def test_a_line_that_was_written_before_the_kill_stands_in_the_log_once(train):
    folder = train("--epoch", 3)
    log, run = folder / "logs/Hyperprior/0/log.txt", folder / "ckpts/Hyperprior/0"
    whole = log.read_text()
    for epochs in ((2,), (1, 2)):  # killed between a line and its checkpoint; an epoch earlier
        for epoch in epochs:
            (run / f"epoch_{epoch}.pth").unlink()
        train("--epoch", 3, "--resume")
        assert log.read_text() == whole
    log.write_text(whole.replace("epoch 2 ", "another 2 "))
    (run / "epoch_2.pth").unlink()
    train("--epoch", 3, "--resume")
    lines = log.read_text().splitlines()
    assert lines[2].startswith("another 2 ") and lines[3] == whole.splitlines()[2]


def test_two_and_two_epochs_equal_four(train):
    train("--epoch", 4, "--lr-schedule", "constant", "--prefix", "four")
    train("--epoch", 2, "--lr-schedule", "constant", "--prefix", "two")
    folder = train("--epoch", 4, "--lr-schedule", "constant", "--prefix", "two", "--resume")
    four, two = load(folder, 3, "four"), load(folder, 3, "two")
    # a run settles its quantiles exactly at its end, so the run of two epochs did it once more
    for key, value in four["model"].items():
        if not key.startswith("entropy_bottleneck."):
            assert torch.equal(value, two["model"][key]), key
    assert_equal(four["optimizer"], two["optimizer"])


def test_load_model_epoch_goes_back(train):
    folder = train("--epoch", 2)
    before = load(folder, 1)
    train("--epoch", 2, "--load_model_epoch", 0)
    assert_equal(before["model"], load(folder, 1)["model"])


def test_second_run_does_not_overwrite(train):
    folder = train("--epoch", 1)
    path = folder / "ckpts" / "Hyperprior" / "0" / "epoch_0.pth"
    content = path.read_bytes()
    with pytest.raises(UserError, match="--resume"):
        train("--epoch", 1)
    assert path.read_bytes() == content
    train("--epoch", 1, "--resume")  # nothing is left to do
    train("--epoch", 1, "--exp_version", 1)
    assert (folder / "ckpts" / "Hyperprior" / "1" / "epoch_0.pth").exists()


def test_init_ckpt_starts_from_the_weights(train):
    folder = train("--epoch", 1)
    path = folder / "ckpts" / "Hyperprior" / "0" / "epoch_0.pth"
    train("--epoch", 1, "--exp_version", 1, "--init_ckpt", path, "--lr", "1e-12")
    again = torch.load(folder / "ckpts" / "Hyperprior" / "1" / "epoch_0.pth", weights_only=True)
    first = load(folder, 0)["model"]
    assert torch.allclose(again["model"]["g_a.0.weight"], first["g_a.0.weight"], atol=1e-6)
    train("--epoch", 2, "--exp_version", 1, "--resume", "--lr", "1e-12")  # remembers all steps
    path_2 = path.parents[1] / "1" / "epoch_1.pth"
    train("--epoch", 1, "--exp_version", 2, "--init_ckpt", path_2)
    found = [load_checkpoint(folder / "ckpts" / "Hyperprior" / name)
             for name in ("1/epoch_0.pth", "1/epoch_1.pth", "2/epoch_0.pth")]
    assert [(state["step"], steps_of(state)) for state in found] == [(6, 12), (12, 18), (6, 24)]
    with pytest.raises(UserError, match="not weights of this model"):
        train("--epoch", 1, "--init_ckpt", path, "--prefix", "other", module=factorized_train)


def test_checkpoint_codes_at_once(train):
    """Tables are in every checkpoint: no update() for the user to forget."""
    from hyperprior.model import load as load_model

    folder = train("--epoch", 1)
    model = load_model(folder / "ckpts" / "Hyperprior" / "0" / "epoch_0.pth")
    x = torch.rand(1, 3, 64, 64)
    result = model.compress(x)
    assert model.decompress(result["strings"], result["shape"])["x_hat"].shape == x.shape
    assert (folder / "logs" / "Hyperprior" / "0" / "log.txt").read_text().startswith("epoch 0")
    assert list((folder / "logs" / "Hyperprior" / "0").glob("events.*"))


@pytest.mark.parametrize("module", [factorized_train, hyperprior_train])
@pytest.mark.parametrize("flags, words", [
    (["--patch-size", 72], "--patch-size 72 is not a multiple of"),
    (["--patch-size", 128], "90x90 is smaller than the 128x128 crop"),
    (["--dataset", "absent"], "absent: no such folder"),
    (["--test_dataset", "absent"], "absent: no such file or folder"),
    (["--init_ckpt", "absent.pth"], "absent.pth: no such checkpoint"),
    (["--load_model_epoch", 3], "epoch_3.pth: no such checkpoint"),
    (["--metric", "ms-ssim"], "needs images and crops of 161 pixels"),
    (["--device", "tpu"], "device tpu")])
def test_mistakes_are_named_before_anything_is_saved(flags, words, module, train, tmp_path):
    with pytest.raises(UserError, match=words) as error:
        train("--epoch", 1, *flags, module=module)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.pth"))


def test_another_configuration_cannot_be_resumed(train, images):
    folder = train("--epoch", 1)
    path = folder / "ckpts" / "Hyperprior" / "0" / "epoch_0.pth"
    content = path.read_bytes()
    for flags, words in [(["--optimizer", "muon"], "trained with --optimizer"),
                         (["--N", 8], "quantiles"),
                         (["--lr", 0.5], "trained with --lr"),
                         (["--lmbda", 0.5], "trained with --lmbda"),
                         (["--dataset", images / "test"], "--dataset 2 images .* rename ckpts"),
                         (["--metric", "ms-ssim"], "161 pixels or more")]:
        with pytest.raises(UserError, match=words):
            train("--epoch", 2, "--resume", *flags)
    assert path.read_bytes() == content


def test_a_finished_run_says_so(train, capsys):
    train("--epoch", 1)
    assert "nothing to do" not in capsys.readouterr().out
    config = train("--epoch", 1, "--resume", "--save-every", 7) / "ckpts/Hyperprior/0/config.yaml"
    assert "save_every: 7\n" in config.read_text()
    assert "nothing to do: this run has its 1 epochs already" in capsys.readouterr().out


def test_no_more_loader_processes_than_cores(train, capsys, monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 1)
    several = load(train("--epoch", 1, "--num_workers", 3), 0)
    assert "1 data loader processes, one for each core, instead of 3" in capsys.readouterr().out
    train("--epoch", 1, "--exp_version", 1)
    alone = torch.load("ckpts/Hyperprior/1/epoch_0.pth", weights_only=True)
    assert_equal(several["model"], alone["model"])


def test_images_too_small_for_ms_ssim_are_named_before_training(train, images):
    with pytest.raises(UserError, match="set a larger --patch-size"):
        train("--epoch", 1, "--metric", "ms-ssim")
    with pytest.raises(UserError, match="0.png: --metric ms-ssim needs .*90x90; remove it"):
        check_size("ms-ssim", (90, 90), images / "test" / "0.png")
    folder = images.parent / "ckpts"
    assert not folder.exists()


def test_weights_of_another_variant_do_not_start_a_training(train):
    folder = train("--epoch", 1, "--gdn_variant", "seminar", module=joint_ar_train)
    path = next((folder / "ckpts").glob("**/epoch_0.pth"))
    with pytest.raises(UserError, match="was trained with --gdn_variant seminar, not paper"):
        train("--epoch", 1, "--exp_version", 1, "--init_ckpt", path, module=joint_ar_train)


def test_a_second_training_in_the_same_folder_is_refused(train, tmp_path):
    folder = tmp_path / "ckpts" / "Hyperprior" / "0"
    other, _ = locking_process(folder)  # a training that has not saved anything yet
    words = f"is in use by process {other.pid} on .*, or start another"
    try:
        with pytest.raises(UserError, match=words):
            train("--epoch", 1)
        assert [path.name for path in folder.iterdir()] == [".lock"]
    finally:
        other.kill()
    train("--epoch", 1)
    assert (folder / "epoch_0.pth").exists() and not (folder / ".lock").exists()


def test_a_validation_that_fails_names_step_and_checkpoint(train):
    with pytest.raises(UserError, match="after step 1; nothing was saved yet; .*learning rate"):
        train("--epoch", 1, "--steps-per-epoch", 1, "--lr", "1e6")
