"""Fixtures of the tests of TBTC: a data set and train.py on it, in an empty folder."""

import pytest
from helpers import cut_kodak
from tbtc_cases import TINY

from tbtc import train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return cut_kodak(tmp_path_factory.mktemp("dataset"), {"train": 2, "valid": 2}, 100, 90)


@pytest.fixture
def run(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*flags, model="zyc2022-conv-charm"):
        train.main([*TINY, "--model", model, "--dataset_directory", str(images),
                    *map(str, flags)])
        return tmp_path / "ckpt" / f"{model}-lambda=0.0067-beta=None" / "lightning_logs"
    return call
