"""Every command of every README runs, on tiny data; every mistake is one line and exit status 2."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from common import UserError, cli
from common.coding import image_file
from common.coding.model_file import load_checkpoint

import forks
import numpy as np
import pytest
from helpers import cut_kodak
from PIL import Image

ROOT = Path(__file__).parents[1]
PAPERS = ("factorized", "hyperprior", "joint_ar", "checkerboard")
PREFIXES = {"factorized": "FactorizedPrior", "hyperprior": "Hyperprior",
            "joint_ar": "JointAutoregressiveHierarchicalPriors",
            "checkerboard": "CheckerboardAutogressive"}
TINY = ("--epoch 1 --steps-per-epoch 2 --batch_size 2 --patch-size 64 --N 4 --M 6 --seed 1 "
        "--num_workers 0 --precision fp32 --no-compile").split()


def run(paper, *command, cwd):
    """A script of a paper folder, started elsewhere, so that nothing is written into it."""
    script = ROOT / paper / command[0]
    if "--gpu_id" in command:  # the processes that train.py would start by itself
        forks.run_ranks(len(command[command.index("--gpu_id") + 1].split()), script, *command[1:],
                        cwd=cwd)
    else:
        forks.run(script, *command[1:], cwd=cwd)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a script in this process: it must print one line of error with `words` and exit 2."""
    def call(paper, *command, cwd, words=()):
        monkeypatch.chdir(cwd)
        script = importlib.import_module(f"{paper}.{command[0].removesuffix('.py')}")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: script.main([str(word) for word in command[1:]]))
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        for word in words:
            assert word in lines[0]
    return call


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """photo.png and folders of two small photographs, cut from Kodak."""
    folder = cut_kodak(tmp_path_factory.mktemp("images"), {"train": 2, "test": 2}, 96, 70)
    kodak = Image.open(ROOT / "common" / "images" / "kodak" / "kodim23.png")
    kodak.crop((100, 100, 197, 165)).save(folder / "photo.png")
    return folder


def readme_commands(paper):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / paper / "README.md").read_text(), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python ", "torchrun "))]


@pytest.mark.parametrize("paper", PAPERS)
def test_readme_commands(paper, images, tmp_path):
    """In their order, in one folder, as a reader would type them; only sizes are made tiny."""
    commands = readme_commands(paper)
    scripts = [shlex.split(c)[1] for c in commands]
    assert scripts == sorted(scripts, key=["train.py", "eval.py", "codec.py"].index)
    assert len(scripts) >= 7
    (tmp_path / "photo.png").write_bytes((images / "photo.png").read_bytes())
    for command in commands:
        words = shlex.split(command.replace("/path/to/vimeo", str(images)))[1:]
        if words[0] == "train.py":
            words = [str(ROOT / paper / w) if w.endswith(".yaml") else w for w in words]
            words += [*TINY, "--test_dataset", images / "test"]
            if "--init_ckpt" in words:  # joint_ar's bundled weights, in place of those of its run
                start = min((ROOT / "joint_ar" / "weights").glob("*.pth"))
                config = load_checkpoint(start)["config"]
                words[words.index("--init_ckpt") + 1] = start
                words += ["--N", config["N"], "--M", config["M"]]
        elif words[0] == "eval.py":
            words = ["0" if w in ("199", "249") else w for w in words]
            words += ["--dataset_path", images / "test"]
        run(paper, *words, cwd=tmp_path)
    assert Image.open(tmp_path / "decoded.png").size == (97, 65)
    for version in ("1", "2"):
        assert (tmp_path / "ckpts" / PREFIXES[paper] / version / "epoch_0.pth").is_file()
    assert list((tmp_path / "results").glob("*.json"))


@pytest.mark.parametrize("paper", PAPERS)
def test_codec_round_trip_is_close(paper, images, tmp_path):
    run(paper, "codec.py", "encode", images / "photo.png", "-o", tmp_path / "a.bin", cwd=tmp_path)
    run(paper, "codec.py", "decode", tmp_path / "a.bin", cwd=tmp_path)
    a = np.asarray(Image.open(images / "photo.png"), dtype=float)
    b = np.asarray(Image.open(tmp_path / "a.decoded.png"), dtype=float)
    assert 10 * np.log10(255**2 / ((a - b) ** 2).mean()) > 24


@pytest.mark.parametrize("mistake",
                         ["missing", "foreign", "cut", "changed", "other paper", "folder"])
def test_codec_refuses(mistake, images, tmp_path, refused):
    path = tmp_path / "a.bin"
    codec = importlib.import_module("factorized.codec")
    codec.main(["encode", str(images / "photo.png"), "-o", str(path)])
    data = bytearray(path.read_bytes())
    paper, words = "factorized", []
    if mistake == "missing":
        path.unlink()
        words = ["a.bin"]
    elif mistake == "foreign":
        path.write_bytes((images / "photo.png").read_bytes())
    elif mistake == "cut":
        path.write_bytes(data[:-5])
    elif mistake == "changed":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif mistake == "other paper":
        paper, words = "hyperprior", ["fact"]
    else:
        path.unlink()
        path.mkdir()
        words = ["a.bin"]
    output = tmp_path / "out.png"
    refused(paper, "codec.py", "decode", path, "-o", output, cwd=tmp_path, words=words)
    assert not output.exists()


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("command, words", [
    (["train.py", "--dataset", "nowhere"], ["nowhere"]),
    (["train.py", "--lr", "-1"], ["--lr"]),
    (["train.py", "--model_name", "JPEG"], ["--model_name"]),
    (["train.py", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
    (["train.py", "--batch_szie", "4"], ["--batch_szie"]),
    (["train.py", "--init_ckpt", "nowhere.pth"], ["nowhere.pth"]),
    (["train.py", "--gpu_id", "all"], ["--gpu_id"]),
    (["eval.py", "--dataset_path", "nowhere"], ["nowhere"]),
    (["eval.py", "--epoch_num", "7"], ["7"]),
    (["eval.py", "--checkpoint", "nowhere.pth"], ["nowhere.pth"]),
    (["eval.py", "--reproduce", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
    (["codec.py", "encode", "nowhere.png"], ["nowhere.png"]),
    (["codec.py"], ["command"])])
def test_mistakes_are_one_line(paper, command, words, tmp_path, refused):
    refused(paper, *command, cwd=tmp_path, words=words)
    assert not (tmp_path / "ckpts").exists()


@pytest.mark.parametrize("paper, other", [("factorized", "hyperprior"),
                                          ("hyperprior", "factorized"), ("joint_ar", "hyperprior"),
                                          ("checkerboard", "factorized"),
                                          ("joint_ar", "checkerboard"),
                                          ("checkerboard", "joint_ar")])
def test_weights_of_the_other_paper(paper, other, images, tmp_path, refused):
    weights = sorted((ROOT / other / "weights").glob("small-*.pth"))[-1]
    refused(paper, "codec.py", "encode", images / "photo.png", "--checkpoint", weights,
            cwd=tmp_path, words=[weights.name])


@pytest.mark.parametrize("paper, width, counts", [
    ("factorized", "N=128 M=192", ["2,998,147", "28.941", "4.228", "72.352"]),
    ("hyperprior", "N=128 M=192", ["5,075,843", "30.013", "4.228", "74.014"]),
    ("joint_ar", "N=192 M=192", ["14,130,467", "12,052,835", "66.946", "2.831", "162.232"]),
    ("checkerboard", "N=192 M=192", ["14,130,467", "12,052,835", "66.946", "9.513", "162.232"])])
def test_complexity(paper, width, counts, capsys):
    """Parameters, and MACs of one Kodak image; the checkerboard's contexts in one pass."""
    importlib.import_module(f"{paper}.eval").main(["--complexity"])
    line, = (x for x in capsys.readouterr().out.splitlines() if width in x)
    for count in counts:
        assert count in line


def test_decoding_leaves_the_original_alone(images, tmp_path, refused):
    photo = tmp_path / "photo.png"
    photo.write_bytes((images / "photo.png").read_bytes())
    codec = importlib.import_module("factorized.codec")
    codec.main(["encode", str(photo)])
    codec.main(["decode", str(tmp_path / "photo.bin")])
    assert photo.read_bytes() == (images / "photo.png").read_bytes()
    assert (tmp_path / "photo.decoded.png").is_file()
    refused("factorized", "codec.py", "encode", photo, "-o", photo, cwd=tmp_path,
            words=["would replace the input"])
    refused("factorized", "codec.py", "encode", photo, "-o", ".", cwd=tmp_path, words=["folder"])


def test_blank_images_are_evaluated(tmp_path, monkeypatch, capsys):
    """Decoded without loss, or coded by JPEG so: an infinite PSNR is on no curve."""
    (tmp_path / "in").mkdir()
    Image.new("RGB", (180, 200), "white").save(tmp_path / "in" / "blank.png")
    monkeypatch.chdir(tmp_path)
    importlib.import_module("factorized.eval").main(["--dataset_path", "in"])
    assert "small" in capsys.readouterr().out


def test_no_compiler_means_no_compilation(images, tmp_path):
    environment = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    tiny = [word for word in TINY if word != "--no-compile"]
    output, _ = forks.run(ROOT / "factorized" / "train.py", *tiny, "--compile", "--dataset",
                              images, "--test_dataset", images / "test", cwd=tmp_path,
                              libraries=environment)
    assert "training without --compile" in output


def test_export_makes_weights_that_code_alike(images, tmp_path, monkeypatch):
    from common import data
    from common.recipes import export

    from hyperprior import model, train

    monkeypatch.chdir(tmp_path)
    train.main([*TINY, "--dataset", str(images), "--test_dataset", str(images / "test")])
    export.main(["hyperprior", "ckpts/Hyperprior/0/epoch_0.pth", "-o", "small.pth", "--steps", "7"])
    checkpoint = "ckpts/Hyperprior/0/epoch_0.pth"
    for output, words in ((checkpoint, "would replace the checkpoint"), (".", "it is a folder")):
        with pytest.raises(UserError, match=words):
            export.main(["hyperprior", checkpoint, "-o", output])
    weights = model.load("small.pth")
    assert weights.provenance.step == 7 and weights.provenance.config["lmbda"] == 0.01
    x = data.to_float(data.read_image(images / "photo.png"))
    file = image_file.encode_image(weights, x)
    assert image_file.decode_image(model.load("small.pth"), file).shape == x.shape


def test_front_page(images, tmp_path, monkeypatch):
    """The make targets of the pages exist, and the Python of the front page runs."""
    text = (ROOT / "README.md").read_text()
    pages = text + (ROOT / "RESULTS.md").read_text() + (ROOT / "common" / "README.md").read_text()
    code = "\n".join(re.findall(r"```\w*\n.*?```|`[^`\n]+`", pages, re.S))  # not the prose
    targets = set(re.findall(r"make ([a-z][a-z_-]*)", code)) - {"reproduce-", "report-", "sweep-"}
    assert targets >= {"reproduce-hyperprior", "test", "bench", "compare"}
    for target in sorted(targets):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (target, done.stderr)
    (tmp_path / "photo.png").write_bytes((images / "photo.png").read_bytes())
    for paper in PAPERS:
        (tmp_path / paper).symlink_to(ROOT / paper)
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("paper", PAPERS)
def test_pages_give_the_bundled_results(paper):
    """bpp and PSNR of results/small.json stand on the paper's page and in RESULTS.md."""
    results = json.loads((ROOT / paper / "results" / "small.json").read_text())["results"]
    for page in (ROOT / "RESULTS.md", ROOT / paper / "README.md"):
        text = page.read_text()
        for bpp, psnr in zip(results["bpp"], results["psnr-rgb"], strict=True):
            assert f"| {bpp:.4f} | {psnr:.2f} |" in text, page


def test_training_curves_of_two_runs(tmp_path, capsys, monkeypatch):
    from common.evaluation import curves

    monkeypatch.chdir(tmp_path)
    line = "epoch {}  step {}  train loss {} bpp 0.5"
    for name, loss in (("a", 2.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        lines = [line.format(0, 10, 3.0), line.format(1, 20, 9.0), line.format(1, 20, loss)
                 + "  test loss 1.5 bpp 0.4 psnr 27.25"]  # the second epoch was done twice
        (tmp_path / name / "log.txt").write_text("\n".join(lines))
    curves.main(["a", "b", "--plot", "c.png"])
    rows = capsys.readouterr().out.splitlines()[2:4]
    assert rows == [f"| {name} | 20 | {loss:.4f} | 0.5000 | 1.5000 | 0.4000 | 27.25 |"
                    for name, loss in (("a", 2.0), ("b", 1.0))]
    assert Image.open("c.png").width > 500
    with pytest.raises(UserError, match="--names: give 2 different names"):
        curves.main(["a", "b", "--names", "a", "a", "b"])
    curves.main([str(tmp_path / "b"), "--plot", "c.png"])  # not in the folder of a paper
    assert capsys.readouterr().out.splitlines()[2].startswith(f"| {tmp_path / 'b'} |")


def test_mistake_exit_status_of_the_script(tmp_path):
    """The same through a real process, once: no traceback, status 2."""
    done = subprocess.run([sys.executable, ROOT / "factorized" / "codec.py", "decode", "no.bin"],
                          cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT)), text=True,
                          capture_output=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: cannot read no.bin: No such file or directory"]
