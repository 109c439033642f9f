"""A paper is added by copying a folder: the checklist of CONTRIBUTING.md, step by step.

A mean-scale hyperprior (Minnen et al. 2018, section 3, without context) is made from hyperprior/ in
a temporary copy of the repository, without a change outside its folder.
"""

import json
import shutil
import subprocess
from pathlib import Path

import forks
import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
NAME = "meanscale"
CHANGES = [  # in model.py: h_s gives scales and means, and y is coded around its means
    ('tag = b"hype"', 'tag = b"mean"'),
    ("BASELINE = ScaleHyperprior", "BASELINE = MeanScaleHyperprior"),
    ("import ScaleHyperprior", "import MeanScaleHyperprior"),
    ("        conv(N, M, kernel_size=3, stride=1), nn.ReLU(inplace=True),\n    )\n\n\nclass",
     "        conv(N, 2 * M, kernel_size=3, stride=1),\n    )\n\n\nclass"),
    ("        scales = self.h_s(z_hat)  # (B, M, H/16, W/16)\n",
     "        params = self.h_s(z_hat) if self.training else exact.run(self.h_s, z_hat)\n"
     "        scales, means = params.float().chunk(2, 1)\n"
     "        means = means if self.training else exact.round_to_grid(means)\n"),
    ("self.gaussian_conditional(y.float(), scales.float())",
     "self.gaussian_conditional(y.float(), scales, means)"),
    ("        y_strings = entropy.encode(y.round(), self._indexes(z_hat),\n"
     "                                   entropy.Tables.of(self.gaussian_conditional))\n",
     "        indexes, means = self._indexes_and_means(z_hat)\n"
     "        y_strings = entropy.encode((y - means).round(), indexes,\n"
     "                                   entropy.Tables.of(self.gaussian_conditional))\n"),
    ("        y_hat = entropy.decode(y_strings, self._indexes(z_hat), tables).to(z_hat)\n",
     "        indexes, means = self._indexes_and_means(z_hat)\n"
     "        y_hat = entropy.decode(y_strings, indexes, tables) + means\n"),
    ("    def _indexes(self, z_hat: Tensor) -> Tensor:\n",
     "    def _indexes_and_means(self, z_hat: Tensor) -> tuple[Tensor, Tensor]:\n"),
    ("        def indexes(z_hat: Tensor) -> Tensor:\n"
     "            scales = exact.run(self.h_s, z_hat.to(self.coding_device or z_hat.device))\n"
     "            return exact.scale_indexes(scales, table.to(scales.device))\n\n"
     "        return tiled(indexes, z_hat, up=4, tile=256, limit=LIMIT / 16**2)\n",
     "        params = exact.run(self.h_s, z_hat.to(self.coding_device or z_hat.device))\n"
     "        scales, means = params.chunk(2, 1)\n"
     "        means = exact.round_to_grid(means).to(z_hat)\n"
     "        return exact.scale_indexes(scales, table.to(scales.device)), means\n"),
]
TINY = ["--N", "8", "--M", "12", "--batch_size", "2", "--patch-size", "64", "--no-compile",
        "--precision", "fp32", "--epoch", "2", "--steps-per-epoch", "10", "--threads", "1"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the code with the new folder in it; images and other folders are links."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "common", root / "common",
                    ignore=shutil.ignore_patterns("images", "__pycache__"))
    (root / "common" / "images").symlink_to(ROOT / "common" / "images")
    for name in ("Makefile", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root)
    home = root / NAME
    shutil.copytree(ROOT / "hyperprior", home, ignore=shutil.ignore_patterns(
        "weights", "results", "ckpts", "logs", "output", "weights.yaml", "__pycache__"))
    for path in home.glob("*.py"):
        text = path.read_text().replace("hyperprior.model", f"{NAME}.model")
        path.write_text(text.replace("Hyperprior", "MeanScale").replace(
            "ScaleMeanScale", "ScaleHyperprior"))
    model = home / "model.py"
    text = model.read_text()
    for old, new in CHANGES:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    model.write_text(text)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from common import data

    folder = tmp_path_factory.mktemp("images")
    x = data.read_image(data.KODAK / "kodim23.png")
    for i, (height, width) in enumerate(((96, 128), (70, 90))):
        data.write_image(x[:, 40 : 40 + height, 60 : 60 + width], folder / f"{i}.png")
    return folder


def run(root, *words, cwd=None):
    """Output of a Python command in the copy; its error output is shown when it fails."""
    return forks.run(*words, cwd=cwd or root / NAME, root=root)[0]


@pytest.fixture(scope="module")
def checkpoint(repository, images):
    """Step 1: it trains, with the flags and the configuration of the folder it was copied from."""
    run(repository, "train.py", "--config", "quick.yaml", *TINY, "--test_dataset", images)
    path = repository / NAME / "ckpts" / "quick" / "0" / "epoch_1.pth"
    assert path.exists()
    return path


def test_it_is_discovered(repository):
    """By the Makefile, packaging and common, without an entry in a list."""
    listing = subprocess.run(["make", "-pn", "help"], cwd=repository, capture_output=True,
                             text=True, check=False).stdout
    assert f"reproduce-{NAME}:" in listing and f"report-{NAME}:" in listing
    assert NAME in find_packages(str(repository))
    code = "from common.papers import papers; print(papers())"
    assert f"'{NAME}'" in run(repository, "-c", code)


def test_it_evaluates_codes_and_plots(repository, checkpoint, images, tmp_path):
    """Files of both images against the estimate; a table and a plot without published results."""
    out = run(repository, "eval.py", "--checkpoint", checkpoint, "--dataset_path", images,
              "--resultdir", tmp_path, "--outdir", tmp_path / "output", "--threads", "1")
    assert "no published results to compare with" in out and (tmp_path / "rd.png").exists()
    path, = tmp_path.glob("*.json")
    for row in json.loads(path.read_text())["per_image"][0]:
        header = 8 * 48 / (row["height"] * row["width"])  # bytes of header and coder states
        assert abs(row["bpp"] - row["bpp_estimated"]) <= 0.01 * row["bpp_estimated"] + header


def test_its_files_decode_in_another_process(repository, checkpoint, images, tmp_path):
    for command in (["encode", images / "1.png", "-o", tmp_path / "1.bin"],
                    ["decode", tmp_path / "1.bin", "-o", tmp_path / "1.png"]):
        run(repository, "codec.py", *command, "--checkpoint", checkpoint)
    from common import data

    assert data.read_image(tmp_path / "1.png").shape == (3, 70, 90)


def test_without_weights_and_results_each_command_says_so(repository, checkpoint):
    """One line each, and the others go on: eval.py --reproduce, report, bench."""
    out = run(repository, "eval.py", "--reproduce", "--config", "quick.yaml", "--dataset_path",
              repository / "common" / "images" / "kodak" / "kodim01.png", "--threads", "1")
    assert "small: there are no bundled weights" in out
    end = out[out.index("Trained with quick.yaml, 20 steps: "):]  # what was trained, how to use it
    assert "Trained with quick.yaml, 20 steps: meanscale/ckpts/quick/0/epoch_1.pth" in end
    assert "there are no expected numbers on record for quick.yaml" in end
    assert (repository / NAME / "results" / "quick-kodim01.png").exists()
    assert "encode photo.png -o photo.bin --checkpoint ckpts/quick/0/epoch_1.pth" in end
    out = run(repository, "-m", "common.recipes.report", NAME, cwd=repository)
    assert out == f"{NAME}: there are no bundled weights to report\n"
    out = run(repository, "-m", "common.evaluation.bench", NAME, cwd=repository)
    assert f"{NAME}: not compared, it has no bundled weights" in out


def test_its_codec_names_the_missing_weights(repository, images):
    _, errors = forks.run("codec.py", "encode", images / "0.png", status=2, root=repository,
                              cwd=repository / NAME)
    assert errors.count("\n") == 1 and "holds no bundled weights" in errors


def test_nothing_outside_the_folder_was_touched(repository, checkpoint):
    names = {path.name for path in repository.iterdir()}
    assert names == {"common", "Makefile", "pyproject.toml", "README.md", NAME}
    for path in (ROOT / "common").rglob("*.py"):
        assert (repository / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
