"""Exported scales are multiplied by the factor that codes photographs in the fewest bits."""

from __future__ import annotations

import importlib

from common.coding.contract import Codec
from common.papers import papers
from common.recipes import export

import pytest
import torch

IMAGES = [torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def bits(model: Codec) -> float:
    with torch.no_grad():
        return sum(float(-torch.log2(p).sum()) for x in IMAGES
                   for p in model(x)["likelihoods"].values())


def with_outputs() -> list[str]:
    return [paper for paper in papers()
            if importlib.import_module(f"{paper}.model").build().scale_outputs()]


PAPERS = with_outputs()


@pytest.mark.parametrize("paper", PAPERS)
def test_scale_outputs_multiply_all_scales(paper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = importlib.import_module(f"{paper}.model").build(8, 12).eval()
    seen: list[torch.Tensor] = []
    likelihood = model.gaussian_conditional._likelihood

    def record(y: torch.Tensor, scales: torch.Tensor, *means: torch.Tensor) -> torch.Tensor:
        seen.append(scales)
        result: torch.Tensor = likelihood(y, scales, *means)
        return result

    monkeypatch.setattr(model.gaussian_conditional, "_likelihood", record)
    bits(model)
    with torch.no_grad():
        for values in model.scale_outputs():
            values.mul_(2)  # exact in floating point and in fixed point
    bits(model)
    half = len(seen) // 2
    assert half and all(a.abs().max() > 0 for a in seen)
    for once, twice in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(twice, 2 * once, rtol=0, atol=2**-10)


def test_calibration_takes_the_factor_with_the_fewest_bits(monkeypatch: pytest.MonkeyPatch
                                                           ) -> None:
    torch.manual_seed(0)
    model = importlib.import_module("joint_ar.model").build(8, 12).eval()
    with torch.no_grad():
        model.g_a[-1].weight.mul_(20)  # y far larger than the scales of untrained weights
    model.update(force=True)
    monkeypatch.setattr(export, "FACTORS", (0.5, 1.0, 4.0, 1e-3))
    before, weight = bits(model), model.entropy_parameters[-1].weight.clone()
    assert export.calibrate(model, IMAGES) == 4.0
    assert bits(model) < before
    assert torch.equal(model.entropy_parameters[-1].weight[:12], weight[:12] * 4)
    assert torch.equal(model.entropy_parameters[-1].weight[12:], weight[12:])  # of the means


def test_a_model_without_scales_stays_as_it_is() -> None:
    model = importlib.import_module("factorized.model").build(8, 12).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert export.calibrate(model, IMAGES) == 1.0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
