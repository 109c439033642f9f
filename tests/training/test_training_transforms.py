"""--init_transforms: g_a and g_s of another paper's weights, also of a wider latent."""

from __future__ import annotations

from pathlib import Path

from common import UserError
from common.coding.model_file import save_checkpoint
from common.training.checkpoints import load_transforms

import pytest
import torch

from hyperprior.model import ScaleHyperprior
from joint_ar.model import JointAutoregressive


def saved(tmp_path: Path, N: int, M: int, off: tuple[int, ...] = ()
          ) -> tuple[Path, ScaleHyperprior]:
    """A checkpoint of hyperprior whose channels `off` of y are switched off."""
    torch.manual_seed(1)
    other = ScaleHyperprior(N, M)
    with torch.no_grad():
        other.g_a[-1].weight[list(off)] *= 1e-3
    save_checkpoint(tmp_path / "other.pth", {"model": other.state_dict()})
    return tmp_path / "other.pth", other


def test_equal_width(tmp_path: Path) -> None:
    image = torch.rand(1, 3, 64, 64)
    path, other = saved(tmp_path, 8, 12)
    model = JointAutoregressive(8, 12)
    h_s = model.h_s[0].weight.clone()
    load_transforms(model, path)
    y = other.g_a(image)
    assert torch.equal(model.g_a(image), y) and torch.equal(model.g_s(y), other.g_s(y))
    assert torch.equal(model.h_s[0].weight, h_s)


def test_a_wider_latent_loses_the_channels_that_are_off(tmp_path: Path) -> None:
    path, other = saved(tmp_path, 8, 12, off=(0, 3, 11))
    model = JointAutoregressive(8, 9)
    load_transforms(model, path)
    image = torch.rand(1, 3, 64, 64)
    y, kept = other.g_a(image), [1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert torch.equal(model.g_a(image), y[:, kept])
    y_hat = torch.zeros_like(y)
    y_hat[:, kept] = y[:, kept]
    torch.testing.assert_close(model.g_s(y[:, kept]), other.g_s(y_hat))


@pytest.mark.parametrize(("widths", "N", "M", "message"), [
    ((8, 12), 8, 16, "fewer than --M 16"), ((8, 12), 16, 12, "this model's has"),
    ((12, 12), 8, 8, "this model's has")])  # where N = M, hidden channels are not latent ones
def test_other_widths_are_refused(tmp_path: Path, widths: tuple[int, int], N: int, M: int,
                                  message: str) -> None:
    path, _ = saved(tmp_path, *widths)
    with pytest.raises(UserError, match=message):
        load_transforms(JointAutoregressive(N, M), path)


def test_other_transforms_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "other.pth", {"model": {"g_a.0.weight": torch.zeros(8, 3, 5, 5)}})
    with pytest.raises(UserError, match="other transforms"):
        load_transforms(JointAutoregressive(8, 12), tmp_path / "other.pth")
