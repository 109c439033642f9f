"""Fixtures of the tests of training: a data set and a train.py on it, in an empty folder."""

import pytest
from helpers import cut_kodak
from training_cases import TINY

from hyperprior import train as hyperprior_train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two training tiles and one test image of 64x64."""
    return cut_kodak(tmp_path_factory.mktemp("images"), {"train": 2, "test": 1}, 90, 90)


@pytest.fixture
def train(images, tmp_path, monkeypatch):
    """Runs a train.py in this process, in an empty folder; returns that folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, module=hyperprior_train):
        module.main([*TINY, "--dataset", str(images), "--test_dataset", str(images / "test"),
                     *map(str, flags)])
        return tmp_path
    return call
