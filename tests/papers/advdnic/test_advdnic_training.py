"""advDNIC: every experiment trains, resumes and codes; optimisers, decays, starting weights."""

import json
from pathlib import Path

from common import UserError, data
from common.coding import image_file
from common.loss import RateDistortionLoss

import forks
import pytest
import torch
from advdnic_cases import ROOT, photograph, tiny
from torch import nn
from torch.nn import functional as F

from advdnic import main, params, train
from advdnic.model import EXPERIMENTS, build


@pytest.mark.parametrize("experiment", [*EXPERIMENTS, "variant1 of mod3"])
def test_trains_and_codes(experiment, fit, images):
    more = ["--variant1", "mod3"] if experiment == "variant1 of mod3" else []
    folder = fit(*more, experiment=experiment.split()[0])
    model = main.newest(folder, torch.device("cpu"))
    x = data.to_float(data.read_image(images / "0.png"))
    file = image_file.encode_image(model, x)
    assert image_file.decode_image(model, file).shape == x.shape


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_overfits_one_crop(experiment):
    """The loss of one crop falls by a third."""
    torch.manual_seed(0)
    model = build(experiment, 128 if experiment == "variant4" else 32)
    model.train()
    x = photograph(64, 64).repeat(2, 1, 1, 1)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        output = model(x)
        bits = -sum(p.log2().sum() for p in output["likelihoods"].values()) / (2 * 64 * 64)
        loss = bits + 0.01 * 255**2 * F.mse_loss(output["x_hat"], x)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        adam.step()
        losses.append(float(loss))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_files_of_a_run(fit, capsys):
    folder = fit("--epochs", "7")
    said = capsys.readouterr().out
    assert "--epochs 7 " in said and f"  (all flags: {folder / 'config.yaml'})\n" in said
    names = {p.name for p in folder.iterdir()}
    assert {"params.json", "log.txt", "config.yaml"} <= names
    assert len([n for n in names if n.startswith("epoch_")]) == 5
    assert json.loads((folder / "params.json").read_text())["num_filters"] == 8


def test_resumed_run_is_the_run(fit, monkeypatch):
    def stop(model, *_):
        raise KeyboardInterrupt

    whole = fit("--epochs", "4", folder="whole")
    validate, calls = train.validate, []

    def twice(*args):
        calls.append(1)
        return stop(args[0]) if len(calls) == 3 else validate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", twice)
        with pytest.raises(KeyboardInterrupt):
            fit("--epochs", "4", "--test-every", "1", folder="part")
    part = fit("--epochs", "4", "--test-every", "1", "--resume", folder="part")
    a, b = (torch.load(f / "epoch_3.pth", weights_only=True)["model"] for f in (whole, part))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_aux_optimizer_has_the_quantiles_alone():
    model = build("variant2", 8)
    args = train.flags().parse_args([])
    for key, value in params.DEFAULTS.items():
        setattr(args, key, value)
    optimizer, aux = train.optimizers(model, args)
    mine = [id(p) for g in optimizer.param_groups for p in g["params"]]
    others = [id(p) for g in aux.param_groups for p in g["params"]]
    assert others == [id(model.entropy_bottleneck.quantiles)]
    assert sorted(mine + others) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("name", params.OPTIMIZERS)
def test_every_optimizer_takes_a_step(name, fit):
    fit("--main_optimizer", name)


@pytest.mark.parametrize("name", params.DECAYS)
def test_decays(name):
    weight = nn.Parameter(torch.zeros(1))
    scheduler = train.schedule(torch.optim.SGD([weight], lr=1.0), name, 100, 1000)
    rates = []
    for _ in range(1000):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    assert rates[0] == 1
    if name == "constant":
        assert set(rates) == {1}
    elif name == "exponential":  # 0.97 every 2.4 epochs, in steps
        assert rates[239] == 1 and rates[240] == pytest.approx(0.97)
        assert rates[999] == pytest.approx(0.97**4)
    else:
        assert rates[500] == pytest.approx(0.5) and rates[999] < 1e-4
        if name == "cosine_restarts":  # the second cycle from 3/4, five times as long
            assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(0.75)


def test_start_from_weights(fit, images, tmp_path):
    """A run of no effect (lr 1e-30) keeps them; those of another experiment are refused."""
    folder = fit()
    path = main.last_checkpoint(folder)
    more = ["--num_filters", "8", "--train-data-dir", str(images), "--eval-data-dir", str(images),
            "--eval-patchsize", "64", "--patchsize", "64", "--batchsize", "3", "--epochs", "1",
            "--num-parallel-calls", "0", "--init-ckpt", str(path)]
    train.main(["--model-dir", str(tmp_path / "on"), "--base_learning_rate", "1e-30", *more])
    old, new = (torch.load(p, weights_only=True)["model"]
                for p in (path, tmp_path / "on" / "epoch_0.pth"))
    assert torch.equal(old["g_a.0.weight"], new["g_a.0.weight"])
    train.main(["--model-dir", str(tmp_path / "new"), "--base_learning_rate", "1e-30",
                "--resume", "auto", *more])  # nothing to resume: as make reproduce-advdnic does
    new = torch.load(tmp_path / "new" / "epoch_0.pth", weights_only=True)["model"]
    assert torch.equal(old["g_a.0.weight"], new["g_a.0.weight"])
    with pytest.raises(UserError, match="was trained with --experiment base, not variant2"):
        train.main(["--model-dir", str(tmp_path / "no"), "--experiment", "variant2", *more])


def test_experiment_is_in_the_folder_s_name(images, tmp_path):
    train.main(["--model-dir", str(tmp_path / "experiments/mod4_model/generator"), "--num_filters",
                "8", "--train-data-dir", str(images), "--eval-data-dir", str(images),
                "--eval-patchsize", "64", "--patchsize", "64", "--batchsize", "3", "--epochs", "1",
                "--num-parallel-calls", "0"])
    assert params.read(tmp_path / "experiments/mod4_model/generator")["experiment"] == "mod4"


def test_two_processes(images, tmp_path):
    """As torchrun starts them."""
    forks.run_ranks(
        2, "train.py", "--model-dir", tmp_path / "two", "--num_filters", "8", "--train-data-dir",
        images, "--eval-data-dir", images, "--eval-patchsize", "64", "--patchsize", "64",
        "--batchsize", "2", "--epochs", "2", "--num-parallel-calls", "0", "--random-seed", "1",
        "--precision", "fp32", "--threads", "1", cwd=ROOT / "advdnic")
    found = torch.load(tmp_path / "two" / "epoch_1.pth", weights_only=True)
    assert found["step"] == 4 and all(v.isfinite().all() for v in found["model"].values()
                                      if v.is_floating_point())


def test_compiled_loss_is_the_loss():
    """As torch.compile traces it; without generating C++, which takes far longer."""
    x = photograph(64, 64)
    losses = []
    for compiled in (False, True):
        model = tiny("variant2").train()
        net = torch.compile(model, backend="aot_eager") if compiled else model
        model.gaussian_conditional.quantize = lambda y, *_: y
        model.entropy_bottleneck.quantize = lambda z, *_: z
        losses.append(float(RateDistortionLoss(0.01, "mse")(net(x), x)["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_the_source_shows_in_tensorboard_and_traces(fit, tmp_path):
    """An image beside its reconstruction, histograms; a trace of the whole training step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = fit("--save-profiling-steps", "1")
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0})
    tags = events.Reload().Tags()
    assert tags["images"] == ["reconstruction"]
    assert {"eval/y", "parameters/g_a.0.weight"} <= set(tags["histograms"])
    trace = json.loads((folder / "profile" / "0.json").read_text())["traceEvents"]
    names = {event.get("name", "") for event in trace}
    assert {"ConvolutionBackward0", "Optimizer.step#Adam.step"} <= names


def test_main_continues_the_run_in_its_folder(fit, images):
    """The source's command, given twice, as the source does; train.py asks for --resume."""
    folder = fit()
    with pytest.raises(UserError, match="holds the checkpoints of a run"):
        fit("--epochs", "2")
    main.main([f"--model-dir={folder}", "train", f"--train-data-dir={images}", "--epochs=2",
               f"--eval-data-dir={images}", "--eval_patchsize=64", "--batchsize=2",
               "--num-parallel-calls=0", "--random-seed=3", "--threads=1"])
    assert (folder / "epoch_1.pth").exists()


@pytest.mark.parametrize("path", [".", "/"])
def test_a_folder_is_no_image(path):
    with pytest.raises(UserError, match="it is a folder"):
        main.appended(Path(path), ".ncf")
