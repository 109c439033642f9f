"""Fixtures of the tests of TBTC: a data set and train.py on it, in an empty folder."""

from common import data

import pytest
from PIL import Image
from tbtc_cases import TINY

from tbtc import train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    kodak = Image.open(data.KODAK / "kodim23.png")
    for sub in ("train", "valid"):
        (folder / sub).mkdir()
        for i in range(2):
            kodak.crop((200 + 90 * i, 100, 300 + 90 * i, 190)).save(folder / sub / f"{i}.png")
    return folder


@pytest.fixture
def run(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*flags, model="zyc2022-conv-charm"):
        train.main([*TINY, "--model", model, "--dataset_directory", str(images),
                    *map(str, flags)])
        return tmp_path / "ckpt" / f"{model}-lambda=0.0067-beta=None" / "lightning_logs"
    return call
