"""A training that is killed three times; `make torture` does so with every paper, 20 times."""

import pytest
from torture import torture


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights_and_log(monkeypatch):
    monkeypatch.setattr("torture.EPOCHS", 6)
    assert torture("tbtc", kills=3, seed=0) > 0
