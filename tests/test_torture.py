"""A training that is killed three times; `make torture` does so with every paper, 20 times."""

import forks
import pytest


@pytest.mark.slow
def test_killed_training_ends_with_the_same_weights_and_log(tmp_path):
    said, _ = forks.run(forks.ROOT / "tests" / "torture.py", "tbtc", "--kills", 3, "--epochs", 6,
                        cwd=tmp_path)
    assert said.startswith("tbtc: 3 kills, ") and "weights and logs are those of an" in said
