"""Fixtures of the tests of ConvNeXTIC: an image, a data set, train.py in an empty folder."""

from common import data

import pytest
from convnextic_cases import TINY
from helpers import cut_kodak

from convnextic import train


@pytest.fixture(scope="module")
def x():
    image = data.to_float(data.read_image(data.KODAK / "kodim23.png"))
    return image[None, :, 100:228, 200:328]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return cut_kodak(tmp_path_factory.mktemp("dataset"), {"train": 2, "test": 2}, 160, 140)


@pytest.fixture
def run(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        train.main(["--variant", "v2_stride2", *TINY, "--trainset", str(images),
                    *map(str, flags)])
        return tmp_path / "results"
    return call
