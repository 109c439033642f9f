"""Optimisers, schedules of the learning rate, losses that are not finite."""

import importlib.util
from pathlib import Path

from common import UserError
from common.training.optimizers import (
    check_finite,
    grouped_muon,
    main_parameters,
    make_optimizers,
    make_scheduler,
)

import pytest
import torch

from hyperprior.model import Hyperprior


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


def test_grouped_muon_is_timms(monkeypatch):
    """Batching the kernels of equal shape changes the rounding in bf16, nothing else."""
    from timm.optim import muon

    timm = importlib.util.module_from_spec(muon.__spec__)  # as it is before any change of ours
    muon.__spec__.loader.exec_module(timm)
    timm.zeropower_via_newtonschulz = muon.zeropower_via_newtonschulz
    trained = {}
    for name, function in (("timm", timm._single_tensor_muon), ("grouped", grouped_muon)):
        monkeypatch.setattr(muon, "_single_tensor_muon", function)
        torch.manual_seed(0)
        model = Hyperprior(8, 12)
        start = {key: p.detach().clone() for key, p in main_parameters(model).items()}
        optimizer, _ = make_optimizers(model, "muon", 0.01)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        trained[name] = {key: p.detach() - start[key] for key, p in main_parameters(model).items()}
    for key, moved in trained["timm"].items():
        assert moved.norm() > 0
        assert (trained["grouped"][key] - moved).norm() < 0.02 * moved.norm(), key
