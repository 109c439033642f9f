"""Training as a user runs it: killed and resumed, on several processes, gone wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import UserError, data, processes
from common.loss import RateDistortionLoss, check_size
from common.training.network import prepare_network
from common.training.optimizers import make_optimizers

import pytest
import torch
from PIL import Image

from checkerboard import train as checkerboard_train
from factorized import train as factorized_train
from factorized.model import Factorized
from hyperprior import train as hyperprior_train
from hyperprior.model import Hyperprior
from joint_ar import train as joint_ar_train

ROOT = Path(__file__).parents[1]
TINY = ("--steps-per-epoch 6 --batch_size 2 --patch-size 64 --N 4 --M 6 --precision fp32 "
        "--seed 3 --lr 0.001").split()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two training tiles and one test image of 64x64."""
    folder = tmp_path_factory.mktemp("images")
    kodak = Image.open(data.KODAK / "kodim23.png")
    for sub, count in (("train", 2), ("test", 1)):
        (folder / sub).mkdir()
        for i in range(count):
            kodak.crop((200 + 90 * i, 100, 290 + 90 * i, 190)).save(folder / sub / f"{i}.png")
    return folder


@pytest.fixture
def train(images, tmp_path, monkeypatch):
    """Runs a train.py in this process, in an empty folder; returns that folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, module=hyperprior_train):
        module.main([*TINY, "--dataset", str(images), "--test_dataset", str(images / "test"),
                     *map(str, flags)])
        return tmp_path
    return call


def process(images, cwd, *flags, threads=1, paper="hyperprior"):
    command = [sys.executable, ROOT / paper / "train.py", *TINY, "--dataset", images,
               "--test_dataset", images / "test", *flags]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(threads))
    return subprocess.Popen(list(map(str, command)), cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def assert_equal(a, b, where="checkpoint"):
    """Two checkpoints, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("resume", "load_model_epoch"):
                assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def load(folder, epoch, prefix="Hyperprior"):
    return torch.load(folder / "ckpts" / prefix / "0" / f"epoch_{epoch}.pth", weights_only=True)


# --------------------------------------------------------------------------------------- resume
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
                         (["--dataset", images / "test"], "trained with --dataset 2 images"),
                         (["--metric", "ms-ssim"], "161 pixels or more")]:
        with pytest.raises(UserError, match=words):
            train("--epoch", 2, "--resume", *flags)
    assert path.read_bytes() == content


def test_a_finished_run_says_so(train, capsys):
    train("--epoch", 1)
    assert "nothing to do" not in capsys.readouterr().out
    train("--epoch", 1, "--resume")
    assert "nothing to do: this run has its 1 epochs already" in capsys.readouterr().out


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


# --------------------------------------------------------------------------- learning, divergence
@pytest.mark.parametrize("kind", [Factorized, Hyperprior])
def test_overfits_one_batch(kind):
    torch.manual_seed(0)
    model = kind(8, 12).train()
    optimizer, _ = make_optimizers(model, "muon", 5e-3)
    criterion = RateDistortionLoss(0.01)
    tiles = data.Crops(data.find_items(None), 64)
    x = torch.stack([data.to_float(tiles[k]) for k in range(4)])
    losses = []
    for _ in range(200):
        loss = criterion(model(x), x)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_divergence_ends_with_one_line(train):
    folder = train("--epoch", 1)
    path = folder / "ckpts" / "Hyperprior" / "0" / "epoch_0.pth"
    state = torch.load(path, weights_only=True)
    state["model"]["g_s.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, path)
    with pytest.raises(UserError, match="not finite in the batch of step 6; .*epoch_0.pth"):
        train("--epoch", 2, "--resume")
    assert not path.with_name("epoch_1.pth").exists()


@pytest.mark.parametrize("module, prefix", [(factorized_train, "FactorizedPrior"),
                                            (hyperprior_train, "Hyperprior")])
def test_bad_gradient_is_caught_before_it_reaches_the_weights(module, prefix, train, monkeypatch):
    """A finite loss with an infinite gradient, in the last step before a save."""
    folder = train("--epoch", 1, module=module)
    path = folder / "ckpts" / prefix / "0" / "epoch_0.pth"
    content = path.read_bytes()
    steps = []

    def clip(*_):
        steps.append(0)
        return torch.tensor(float("inf") if len(steps) == 6 else 1.0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(UserError, match="grad_norm not finite in the batch of step 11; "):
        train("--epoch", 2, "--resume", module=module)
    assert path.read_bytes() == content and not path.with_name("epoch_1.pth").exists()


@pytest.mark.parametrize("paper", ["factorized", "hyperprior"])
def test_huge_learning_rate_exits_with_one_line(paper, images, tmp_path):
    run = process(images, tmp_path, "--epoch", 1, "--lr", "1e30", paper=paper)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2 and "Traceback" not in errors
    assert len([x for x in errors.splitlines() if "error: " in x]) == 1
    assert "not finite in the batch of step 1; nothing was saved yet" in errors
    assert not list(tmp_path.rglob("*.pth"))


# ------------------------------------------------------------------------------------ processes
def test_two_processes_average_to_the_gradient_of_one(tmp_path):
    """torchrun, gloo: half of the batch each; equal gradients, equal quantiles after aux steps."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
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
    resumed = process(images, tmp_path, *flags, "--resume")
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors[-2000:]
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
