"""The command and the import `licodecs`, over all papers, in a checkout and outside of one."""

import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

from common import UserError, cli, commands, data
from common.coding import bitstream, codecs
from common.coding.model_file import load_checkpoint

import forks
import pytest
import torch
from helpers import cut_kodak

import licodecs

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    return cut_kodak(tmp_path_factory.mktemp("photo"), {"test": 1}, 96, 64) / "test/0.png"


def say(capsys, *words):
    commands.main([*map(str, words)])
    return capsys.readouterr().out


def refused(capsys, *words):
    """The one line of error that the command ends with."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: commands.main([*map(str, words)]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


# ---------------------------------------------------------------------------------- the command
@pytest.mark.parametrize("paper", codecs.papers())
def test_decode_finds_the_paper_and_the_weights(paper, photo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    say(capsys, "encode", photo, "-o", "a.bin", "--paper", paper, "--threads", 1)
    assert codecs.paper_of(Path("a.bin").read_bytes()) == paper
    assert "b.png: decoded" in say(capsys, "decode", "a.bin", "-o", "b.png", "--threads", 1)
    decoded = data.to_uint8(licodecs.decode("a.bin"))
    assert (data.read_image("b.png").int() - decoded.int()).abs().max() <= 1
    said = say(capsys, "info", "a.bin")
    parts = bitstream.unpack(Path("a.bin").read_bytes(), codecs.codec_class(paper).tag)
    assert f"paper                {paper}\n" in said and "96x64" in said and "bundled: " in said
    assert " + ".join(f"{len(section):,}" for section in parts.sections) + " bytes" in said


def test_lmbda_names_the_bundled_weights(photo, tmp_path, capsys):
    for lmbda in ("0.0035", "0.013"):
        path = tmp_path / f"{lmbda}.bin"
        say(capsys, "encode", photo, "-o", path, "--paper", "hyperprior", "--lmbda", lmbda)
        assert f"bundled: {lmbda}\n" in say(capsys, "info", path)
    line = refused(capsys, "encode", photo, "--paper", "hyperprior", "--lmbda", "0.1")
    assert "choose --weights from 0.0035, 0.013" in line
    line = refused(capsys, "encode", photo, "--paper", "hyperprior", "--lmbda", "0.013",
                   "--weights", "0.013")
    assert "give one of them" in line


def test_lmbda_of_a_variable_rate_is_its_rate(photo, tmp_path, capsys):
    words = "encode", photo, "--paper", "convnextic", "-o"
    assert "lmbda 0.008" in say(capsys, *words, tmp_path / "a.bin", "--lmbda", "0.008")
    say(capsys, *words, tmp_path / "b.bin", "-lb", "80")
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    assert "give one" in refused(capsys, *words, tmp_path / "c.bin", "--lmbda", "1", "-lb", "80")


def test_files_in_patches_decode_from_python(photo, tmp_path, capsys):
    say(capsys, "encode", photo, "-o", tmp_path / "a.bin", "--paper", "convnextic", "-ph", 64,
        "-pw", 64)
    say(capsys, "decode", tmp_path / "a.bin", "-o", tmp_path / "a.png")
    decoded = data.to_uint8(licodecs.decode(tmp_path / "a.bin"))
    assert (data.read_image(tmp_path / "a.png").int() - decoded.int()).abs().max() <= 1


def test_mistakes_are_one_line(photo, tmp_path, capsys):
    (tmp_path / "text.bin").write_text("nothing")
    foreign = bitstream.pack(b"????", bytes(8), 64, 64, [b"abc"])
    (tmp_path / "foreign.bin").write_bytes(foreign)
    (tmp_path / "cut.bin").write_bytes(foreign[:-1])
    (tmp_path / "other.json").write_text('{"a": 1}')
    for words, expected in (
            (["encode", photo], "choose --paper from advdnic, "),
            (["encode", photo, "--paper", "other"], "choose --paper from advdnic, "),
            (["compress", photo], "choose from encode, decode, eval, info"),
            (["decode", tmp_path / "none.bin"], "none.bin"),
            (["decode", tmp_path / "text.bin"], "not one of our compressed files"),
            (["decode", tmp_path / "foreign.bin"], "codec b'????', which is not installed"),
            (["info", tmp_path / "cut.bin"], "damaged or cut short"),
            (["info", tmp_path / "other.json"], "no results"),
            (["info", photo], "not a checkpoint")):
        assert expected in refused(capsys, *words)


def test_eval_takes_one_name_for_the_images(photo, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = photo.parent
    for paper in ("factorized", "advdnic", "tbtc"):
        weights = codecs.choose(codecs.weights_folder(paper))
        said = say(capsys, "eval", "--paper", paper, "--images", folder, "--checkpoint", weights,
                   "--resultdir", tmp_path / paper, "--threads", 1)
        assert "bpp" in said, said
        assert list((tmp_path / paper).glob("*.json"))


# -------------------------------------------------------------------------------- info: checkpoints
def renamed(weights, change):
    return OrderedDict((change(name), value) for name, value in weights.items())


def spelling(old):
    """CompressAI's names of the densities: in its published files, or those of 2020."""
    def change(name):
        for today, then in (("matrices", "matrix"), ("biases", "bias"), ("factors", "factor")):
            name = name.replace(f"bottleneck.{today}.", f"bottleneck._{today}." if old == "zoo"
                                else f"bottleneck._{then}")
        return name
    return change


@pytest.fixture(scope="module")
def weights():
    """Those of hyperprior, by today's names, without CDF tables."""
    path = codecs.choose(ROOT / "hyperprior/weights")
    return {name: value for name, value in load_checkpoint(path)["model"].items()
            if not name.endswith(("_quantized_cdf", "_offset", "_cdf_length", "scale_table"))}


@pytest.mark.parametrize("make, expected", [
    (lambda w: w, ["a bare state dict", "not updated"]),
    (lambda w: renamed(w, spelling("zoo")), ["CompressAI's of its published files"]),
    (lambda w: renamed(w, spelling("2020")), ["CompressAI's of 2020"]),
    (lambda w: {"state_dict": renamed(w, "module.{}".format), "epoch": 3},
     ["inside module (DataParallel"]),
    (lambda w: {"state_dict": renamed(w, "model.{}".format), "pytorch-lightning_version": "2.4"},
     ["PyTorch Lightning", "inside model ("]),
    (lambda w: renamed(w, "module.{}".format) | {"n_averaged": torch.tensor(3)},
     ["an average of torch.optim.swa_utils"]),
    (lambda w: {"state_dict": w, "state_dict_ema": w}, ["in state_dict_ema; not read"]),
    (lambda w: {"model": w, "averaged": {"model": w}}, ["in averaged; they are used"]),
], ids=["bare", "zoo", "2020", "parallel", "lightning", "swa", "timm", "ours"])
def test_info_knows_checkpoints_of_others(make, expected, weights, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    torch.save(make(weights), path)
    said = say(capsys, "info", path)
    for text in [*expected, "hyperprior, Hyperprior, N = 80, M = 192",
                 f"next: licodecs encode photo.png --paper hyperprior --checkpoint {path}"]:
        assert text in said, said


@pytest.mark.parametrize("paper", codecs.papers())
def test_info_finds_the_paper_of_bundled_weights(paper, capsys):
    path = codecs.choose(codecs.weights_folder(paper))
    said = say(capsys, "info", path)
    found = [line.split()[1] for line in said.splitlines() if line.startswith("  paper ")]
    assert found == [f"{paper},"], said
    assert f"{path.stat().st_size:,} bytes" in said and "CDF tables           in the file" in said


def test_info_on_weights_of_nothing_here(tmp_path, capsys):
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "other.pth")
    said = say(capsys, "info", tmp_path / "other.pth")
    assert "none of advdnic, " in said and "next: only the weights" in said


def test_info_on_results(capsys):
    path = ROOT / "hyperprior/results/small.json"
    bpp = json.loads(path.read_text())["results"]["bpp"]
    assert f"small: {bpp[0]:.4f} bpp" in say(capsys, "info", path)


# ------------------------------------------------------------------------------------ the import
def test_python_and_the_command_write_the_same_file(photo, tmp_path, capsys):
    say(capsys, "encode", photo, "-o", tmp_path / "a.bin", "--paper", "factorized", "--lmbda",
        "0.0035")
    codec = licodecs.load("factorized", lmbda=0.0035)
    file = licodecs.encode(codec, photo)
    assert file == (tmp_path / "a.bin").read_bytes()
    assert torch.equal(licodecs.decode(file), licodecs.decode(file, codec))
    assert "factorized" in licodecs.papers()
    with pytest.raises(UserError, match="choose --paper from"):
        licodecs.load("nothing")
    with pytest.raises(UserError, match="choose --weights from"):
        licodecs.load("factorized", lmbda=1)


COLLIDING = """
import sys
sys.path.insert(0, sys.argv[1])
import hyperprior, common
import licodecs
codec = licodecs.load("hyperprior", lmbda=0.0035)
file = licodecs.encode(codec, sys.argv[2])
print(licodecs.decode(file).shape, type(codec).__module__)
import common.own
assert common.MINE and hyperprior.MINE and common.own.MINE and "common.coding" not in sys.modules
assert licodecs.encode(codec, sys.argv[2]) == file
try:
    licodecs.load("hyperprior", lmbda=1)
except Exception as e:
    print(type(e).__name__)
"""


def test_modules_of_the_same_names_keep_working(photo, tmp_path):
    (tmp_path / "common").mkdir()
    for name in ("hyperprior.py", "common/__init__.py", "common/own.py"):
        (tmp_path / name).write_text("MINE = True\n")
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COLLIDING, tmp_path, photo], cwd=tmp_path,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch.Size([3, 64, 96]) hyperprior.model", "UserError"]


def test_the_command_is_a_process(photo, tmp_path):
    said, _ = forks.run(ROOT / "licodecs.py", "papers", cwd=tmp_path)
    assert [line.split()[0] for line in said.splitlines()] == codecs.papers()
