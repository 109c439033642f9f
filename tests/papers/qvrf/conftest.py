"""Fixtures of the tests of QVRF: networks, an image, a data set, train.py in an empty folder."""

from common import data

import pytest
from helpers import cut_kodak
from qvrf_cases import BASES, TINY, tiny

from qvrf import train


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return request.param


@pytest.fixture(scope="module")
def model(base):
    return tiny(base)


@pytest.fixture(scope="module")
def x():
    image = data.to_float(data.read_image(data.KODAK / "kodim23.png"))
    return image[None, :, 100:228, 200:392]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return cut_kodak(tmp_path_factory.mktemp("dataset"), {"train": 3, "test": 2}, 96, 90)


@pytest.fixture
def run(images, tmp_path, monkeypatch):
    """Runs train.py in this process, in an empty folder; returns that folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        train.main([*TINY, "-d", str(images), *map(str, flags)])
        return tmp_path
    return call
