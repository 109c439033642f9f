"""QVRF: weights of CompressAI and of the source, by all their spellings; wrong ones are named."""

from common import UserError

import pytest
import torch
from qvrf_cases import tiny

from qvrf import train
from qvrf.model import build, initial_gain, load


def spellings(state):
    """Keys as CompressAI 1.1, 1.1-1.2.6 and its zoo files, and the newest spell them."""
    parts = (("matrices.", "_matrices.", "_matrix"), ("biases.", "_biases.", "_bias"),
             ("factors.", "_factors.", "_factor"))
    for which in (1, 2, 0):
        renamed = {}
        for key, value in state.items():
            for names in parts:
                key = key.replace("entropy_bottleneck." + names[0],
                                  "entropy_bottleneck." + names[which])
            renamed[key.replace(".skip.", ".downsample.") if which == 1 else key] = value
        yield renamed


def test_three_spellings_of_fixed_rate_weights(base, tmp_path):
    fixed = {k: v for k, v in tiny(base, seed=4).state_dict().items() if k != "Gain"}
    for i, state in enumerate(spellings(fixed)):
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}},
                   tmp_path / f"{i}.pth.tar")
        model = build(base, N=8, M=12)
        train.load_weights(model, tmp_path / f"{i}.pth.tar", single=True)
        assert torch.equal(model.Gain, initial_gain(8))
        assert all(torch.equal(model.state_dict()[k], v) for k, v in fixed.items())
        with pytest.raises(UserError, match="Gain"):
            train.load_weights(build(base, N=8, M=12), tmp_path / f"{i}.pth.tar", single=False)


@pytest.mark.parametrize("levels", [8, 11])
def test_base_widths_and_levels_are_inferred(base, levels, tmp_path):
    state = tiny(base, levels).state_dict()
    for i, spelled in enumerate(spellings(state)):
        torch.save(spelled, tmp_path / f"{i}.pth")
        loaded = load(tmp_path / f"{i}.pth")
        assert (loaded.model, loaded.levels, loaded.N) == (base, levels, 8)
        assert all(torch.equal(loaded.state_dict()[k], v) for k, v in state.items())


def test_wrong_weights_are_named(model, tmp_path):
    state = model.state_dict()
    for changed, message in (
            ({**state, "Gain": torch.ones(5)}, "Gain has 5 levels, not 8 or 11"),
            ({k: v for k, v in state.items() if k != "Gain"}, "'Gain' is missing"),
            ({k: v for k, v in state.items() if k != "h_s.0.bias"}, "h_s.0.bias"),
            ({**state, "extra": torch.ones(1)}, "extra")):
        torch.save(changed, tmp_path / "a.pth")
        with pytest.raises(UserError, match=message):
            load(tmp_path / "a.pth")
    torch.save(state, tmp_path / "a.pth")
    other = "balle" if model.model != "balle" else "minnen"
    with pytest.raises(UserError, match=f"not weights of --model {other}"):
        train.load_weights(build(other, N=8, M=12), tmp_path / "a.pth", single=False)
    with pytest.raises(UserError, match=r"--M 16: size mismatch for \S+ .*\[8[],]"):
        train.load_weights(build(model.model, N=16, M=16), tmp_path / "a.pth", single=False)
    with pytest.raises(UserError, match="has a Gain already"):
        train.load_weights(build(model.model, N=8, M=12), tmp_path / "a.pth", single=True)
