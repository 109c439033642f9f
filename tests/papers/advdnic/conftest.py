"""Fixtures of the tests of advDNIC: a data set and train.py on it."""

from common import data

import pytest
from PIL import Image

from advdnic import train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    kodak = Image.open(data.KODAK / "kodim15.png")
    for i in range(3):
        kodak.crop((100 * i, 100, 100 * i + 160, 230)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def fit(images, tmp_path):
    def start(*flags, folder="m", experiment="base"):
        width = "128" if experiment == "variant4" else "8"
        train.main(["--model-dir", str(tmp_path / folder), "--experiment", experiment,
                    "--num_filters", width, "--train-data-dir", str(images),
                    "--eval-data-dir", str(images), "--eval-patchsize", "64", "--patchsize", "64",
                    "--batchsize", "2", "--epochs", "1", "--num-parallel-calls", "0",
                    "--random-seed", "3", "--threads", "1", *flags])
        return tmp_path / folder
    return start
