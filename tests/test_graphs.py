"""A training step recorded as a CUDA graph does what the ordinary step does."""

from common.loss import RateDistortionLoss
from common.training.cuda_graph import WARM_UP, Recorded
from common.training.optimizers import check_finite, load_optimizer, make_optimizers, make_scheduler

import pytest
import torch
from networks import NETWORKS, arguments, build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def training(device, enabled=True, look=False, lr=0.05):
    """A network, its optimisers (quantiles have their own) and a recorded step on (x, scale)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model.quantiles = nn.Parameter(torch.ones(4))
    model.to(device)
    optimizer, aux_optimizer = make_optimizers(model, "muon", lr)

    def step(x, scale):
        noisy = x + torch.empty_like(x).uniform_(-0.01, 0.01)
        loss = scale * model(noisy).square().mean() + model.quantiles.square().sum()
        optimizer.zero_grad()
        aux_optimizer.zero_grad()
        loss.backward()
        if look and loss.item() < 0:
            raise AssertionError
        check_finite({"loss": loss}, 0, None)
        optimizer.step()
        aux_optimizer.step()
        return {"loss": loss}

    return model, (optimizer, aux_optimizer), Recorded(step, optimizer, aux_optimizer,
                                                       enabled=enabled)


def losses(step, device, scales, count=12):
    generator = torch.Generator().manual_seed(1)
    return [step(torch.rand(2, 3, 16, 16, generator=generator).to(device),
                 scales[i % len(scales)])["loss"].item() for i in range(count)]


def test_on_a_cpu_every_step_is_an_ordinary_one():
    model, optimizers, step = training("cpu")
    assert not step.enabled
    before = model[0].weight.clone()
    values = losses(step, "cpu", [1.0])
    assert values[-1] < values[0] and not torch.equal(before, model[0].weight)
    assert isinstance(optimizers[0].param_groups[0]["lr"], float)


class Transfers(TorchDispatchMode):
    """What would make a GPU wait for the CPU: numbers read from tensors, tensors from numbers."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function.overloadpacket)
        if name in ("aten._local_scalar_dense", "aten.lift_fresh", "aten.nonzero"):
            self.seen.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_can_be_recorded(name):
    """Forward, loss, backward, clipping and the quantiles' loss leave a GPU to itself."""
    model, more = build(name), arguments(name)
    side = 128 if name.startswith("convnextic") else 64  # kernels without padding
    x = torch.rand(1, 3, side, side)
    criterion = RateDistortionLoss(0.01)
    for turn in range(2):  # the first may prepare masks and tables
        with Transfers() as transfers:
            losses = criterion(model(x, *more), x)
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            model.aux_loss().backward()
        assert turn == 0 or transfers.seen == []


@pytest.mark.gpu
def test_replayed_steps_are_the_ordinary_ones():
    """Also with another graph for each value of an argument that is no tensor."""
    curves = {}
    for enabled in (False, True):
        model, _, step = training("cuda", enabled)
        curves[enabled] = losses(step, "cuda", [1.0, 2.0]), model[0].weight.detach().cpu()
        assert len(step.graphs) == (2 if enabled else 0)
    assert curves[True][0] == pytest.approx(curves[False][0], rel=1e-3)
    assert torch.allclose(curves[True][1], curves[False][1], atol=1e-3)


@pytest.mark.gpu
def test_schedules_reach_a_recorded_step():
    model, (optimizer, _), step = training("cuda")
    schedule = make_scheduler(optimizer, "cosine", 2, [])
    losses(step, "cuda", [1.0], WARM_UP + 2)
    schedule.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)
    schedule.step()  # the rate is zero now
    before = model[0].weight.clone()
    losses(step, "cuda", [1.0], 2)
    assert torch.equal(before, model[0].weight)


@pytest.mark.gpu
def test_a_step_that_reads_a_value_is_not_recorded(capsys):
    _, _, step = training("cuda", look=True)
    values = losses(step, "cuda", [1.0])
    assert not step.enabled and values[-1] < values[0]
    assert "training without a CUDA graph" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["cpu", "cuda"])
def test_optimisers_move_between_devices(source):
    """A run that was started on a CPU goes on on a GPU, and the reverse."""
    target = {"cpu": "cuda", "cuda": "cpu"}[source]
    _, saved, step = training(source)
    losses(step, source, [1.0])
    _, restored, step = training(target, lr=0.5)
    for before, after in zip(saved, restored, strict=True):
        load_optimizer(after, before.state_dict())
        rates = [float(o.param_groups[0]["lr"]) for o in (before, after)]
        assert rates[0] == pytest.approx(rates[1])  # a tensor holds it in float32
    losses(step, target, [1.0])
    assert step.enabled == (target == "cuda")
