"""Training lowers the loss; one that diverges ends with one line and saves nothing."""

from common import UserError, data
from common.loss import RateDistortionLoss
from common.training.optimizers import make_optimizers

import pytest
import torch
from training_cases import process

from factorized import train as factorized_train
from factorized.model import Factorized
from hyperprior import train as hyperprior_train
from hyperprior.model import Hyperprior


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
    state["model"]["g_s.0.weight"][0, 0, 0, 0] = 1e38  # finite; x_hat is not
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
