"""`make setup`: what stops it is one line that says what to do. Nothing is downloaded here."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from common import install, installed

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path):
    """The files that `make setup` reads, and a small environment with pip."""
    for name in ("Makefile", "pyproject.toml", "requirements.txt", "requirements-nodeps.txt",
                 "requirements-dev.txt", "requirements-demo.txt", "requirements-notebooks.txt",
                 "common/install.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(checkout, *words, **environment):
    """Run make without any package index; return its status and what it says on stderr."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "MAKE"))}
    kept |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", **environment}
    done = subprocess.run(["make", *words], cwd=checkout, env=kept, capture_output=True, text=True)
    return done.returncode, done.stderr


def error(stderr):
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_python_that_is_not_supported_is_refused(checkout):
    old = checkout / "python3.8"
    old.write_text('#!/bin/sh\necho "Python 3.8.1"\nexit 1\n')
    old.chmod(0o755)
    for name in (old, "no-such-python"):
        status, stderr = make(checkout, "setup", f"PYTHON={name}")
        assert status and "is not Python 3.10 to 3.14; name one: make PYTHON=" in error(stderr)
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("words, expected", [
    (["TORCH=gpu"], "TORCH=gpu: not a build of torch; choose cpu, cu126"),
    (["UV=1"], "UV=1: there is no uv"),
])
def test_choices_that_do_not_exist(words, expected, checkout):
    status, stderr = make(checkout, "setup", f"PYTHON={sys.executable}", *words,
                          PATH="/usr/bin:/bin")
    assert status and expected in error(stderr)
    assert not (checkout / ".venv").exists()


def test_no_compiler_is_said_before_the_large_download(checkout):
    """Without an index there is no wheel of CompressAI, as on Python 3.13."""
    status, stderr = make(checkout, "setup", f"PYTHON={sys.executable}", CXX="no-such-compiler")
    assert status and "no C++17 compiler" in error(stderr) and "(no no-such-compiler)" in stderr
    assert "apt install g++" in stderr and "torch" not in stderr
    assert not (checkout / ".venv/.stamp").exists()


def test_a_half_made_environment_is_taken_up(checkout):
    """One without pip, as venv leaves it when it is interrupted, is made anew."""
    venv.create(checkout / ".venv", with_pip=False)
    status, stderr = make(checkout, "setup", f"PYTHON={sys.executable}", CXX="no-such-compiler")
    assert status and "no C++17 compiler" in error(stderr)
    subprocess.run([checkout / ".venv/bin/python", "-m", "pip", "--version"], check=True)


def test_jupyter_and_gradio_that_cannot_be_installed(checkout):
    venv.create(checkout / ".venv", with_pip=True)
    (checkout / ".venv/.stamp").touch()
    for target, package in (("notebooks", "jupytext"), ("demo", "gradio")):
        status, stderr = make(checkout, target, f"PYTHON={sys.executable}")
        assert status and f"there is no {package}==" in error(stderr)
        assert not (checkout / f".venv/.stamp-{target}").exists()


@pytest.mark.parametrize("fault, expected", [
    ("WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'\n"
     "ERROR: No matching distribution found for torch==2.13.0", "index cannot be reached"),
    ("ERROR: No matching distribution found for torch==2.13.0", "there is no torch==2.13.0 for"),
    ("OSError: [Errno 28] No space left on device", "the disk is full"),
    ("error: something else\n\n", "packages were not installed (error: something else)"),
    ("", "no message"),
])
def test_reasons_of_pip_become_one_line(fault, expected):
    line = install.reason(fault)
    assert expected in line and "\n" not in line


def test_compiler_is_tried_with_the_headers_of_python(monkeypatch, tmp_path):
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\ngrep -q Python.h && [ $1 = -std=c++17 ]\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert install.compiler_fault() == ""
    fake.write_text("#!/bin/sh\necho 'a.cc:1: fatal error: Python.h: No such file' >&2\nexit 1\n")
    assert "Python.h: No such file" in install.compiler_fault()


# ------------------------------------------------------------------- environments that do not match
def distribution(folder, name, version, requires=""):
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info/METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")


@pytest.mark.parametrize("torch, torchvision, expected", [
    ("2.13.0+cpu", "2.13.0", ""),
    ("2.5.1", "2.5.1", "has torch 2.5.1, but 2.6 or newer is needed: run `make setup`"),
    ("2.14.0", "2.13.0", "torchvision is for torch 2.13.0, but"),
])
def test_a_torch_that_does_not_match(torch, torchvision, expected, tmp_path, monkeypatch):
    distribution(tmp_path, "torch", torch)
    distribution(tmp_path, "torchvision", "0.1", f"Requires-Dist: torch (=={torchvision})\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert expected in installed.fault() if expected else installed.fault() == ""


def test_only_compressai_is_missing(monkeypatch):
    """As after `pip install .` on Python 3.13: it says which command is left."""
    found = installed.importlib.util.find_spec
    monkeypatch.setattr(installed.importlib.util, "find_spec",
                        lambda name: None if name == "compressai" else found(name))
    assert f"pip install --no-deps {installed.COMPRESSAI}`" in installed.fault()


@pytest.mark.parametrize("words", [["-m", "common.evaluation.compare"], ["licodecs.py", "papers"],
                                   ["hyperprior/train.py"]])
def test_every_command_says_what_is_missing(words):
    done = subprocess.run([sys.executable, "-S", "-E", *words], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "has no torch, numpy" in done.stderr, done.stderr
