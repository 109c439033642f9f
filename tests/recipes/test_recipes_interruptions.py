"""make weights, killed at many moments and called again: the same weights files."""

import contextlib
import shutil
import time
from pathlib import Path

from common import data
from common.recipes import weights

import forks
import pytest
import yaml
from PIL import Image
from recipes_cases import EVAL, PAGES, ROOT, result

CALL = """
import sys
from pathlib import Path
from common.recipes import weights
weights.main(["--threads", "1", *sys.argv[3:]], Path(sys.argv[2]))
"""


def runner(root, *argv, **environment):
    """`make weights` of the repository `root`, in a process of its own."""
    return forks.start("-c", CALL, root, *argv, cwd=root, environment=environment)


def processes_in(folder):
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if path.resolve().is_relative_to(folder):
                found.append(path)
    return found


def kill_when(process, condition, folder):
    """SIGKILL, as soon as the condition holds; no process must be left. False: it ended before."""
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    while processes_in(folder):
        assert time.monotonic() < deadline, "a process was left"
        time.sleep(0.01)
    return True


def after(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def test_interrupted_at_ten_moments(root, make, tmp_path):
    straight = tmp_path / "straight"
    shutil.copytree(root, straight)
    weights.main(["--threads", "1"], straight)
    killed = sum(kill_when(runner(root, FAKE_SECONDS="0.05"), after(0.06 * i), root)
                 for i in range(1, 11))
    assert killed >= 3
    make()
    assert result(root) == result(straight) and len(result(root)) == 2


@pytest.mark.slow
def test_hyperprior_interrupted_at_five_moments(tmp_path):
    """The short form of the real chain ends with the same weights files, bit for bit."""
    (tmp_path / "images").mkdir()
    kodak = Image.open(data.KODAK / "kodim23.png")
    kodak.crop((200, 100, 296, 196)).save(tmp_path / "images" / "a.png")
    content = yaml.safe_load((ROOT / "hyperprior" / "weights.yaml").read_text())
    content["stages"] = {"0.013": content["stages"]["0.013"]}
    content["curves"] = {"small": {"files": {"small-0.013.pth": "0.013"}}}
    content["short"]["steps"] = 18
    content["short"]["flags"]["epoch"] = 6
    for name in ("straight", "killed"):
        shutil.copytree(ROOT / "common", tmp_path / name / "common",
                        ignore=shutil.ignore_patterns("images", "__pycache__"))
        (tmp_path / name / "common" / "images").symlink_to(ROOT / "common" / "images")
        (tmp_path / name / "common" / "recipes" / "pages.py").write_text(PAGES)
        home = tmp_path / name / "hyperprior"
        home.mkdir()
        for path in (ROOT / "hyperprior").glob("*.py"):
            shutil.copy(path, home)
        shutil.copy(ROOT / "hyperprior" / "small.yaml", home)
        (home / "eval.py").write_text(EVAL)
        (home / "weights.yaml").write_text(yaml.safe_dump(content))
    argv = ["--short", "--images", tmp_path / "images"]
    whole = runner(tmp_path / "straight", *argv)
    folder = tmp_path / "killed" / "hyperprior" / "ckpts" / "short"
    moments = [(folder / "13" / "stage.json").exists,
               *((folder / "13" / f"epoch_{i}.pth").exists for i in (0, 3)),
               (folder / "small" / "output.txt").exists,
               (folder / "small" / "small-0.013.pth").exists]
    killed = [kill_when(runner(tmp_path / "killed", *argv), moment, tmp_path / "killed")
              for moment in moments]
    assert all(killed)
    for process in (whole, runner(tmp_path / "killed", *argv)):
        said = process.communicate()
        assert process.returncode == 0, said
    files = [(tmp_path / name / "hyperprior/ckpts/short/small/small-0.013.pth").read_bytes()
             for name in ("straight", "killed")]
    assert files[0] == files[1]
