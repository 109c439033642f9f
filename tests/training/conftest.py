"""Fixtures of the tests of training: a data set and a train.py on it, in an empty folder."""

from common import data

import pytest
from PIL import Image
from training_cases import TINY

from hyperprior import train as hyperprior_train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two training tiles and one test image of 64x64."""
    folder = tmp_path_factory.mktemp("images")
    kodak = Image.open(data.KODAK / "kodim23.png")
    for sub, count in (("train", 2), ("test", 1)):
        (folder / sub).mkdir()
        for i in range(count):
            kodak.crop((200 + 90 * i, 100, 290 + 90 * i, 190)).save(folder / sub / f"{i}.png")
    return folder


@pytest.fixture
def train(images, tmp_path, monkeypatch):
    """Runs a train.py in this process, in an empty folder; returns that folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, module=hyperprior_train):
        module.main([*TINY, "--dataset", str(images), "--test_dataset", str(images / "test"),
                     *map(str, flags)])
        return tmp_path
    return call
