"""The lessons: each runs as a script, with its solutions, and says nothing that no cell prints."""

import re
from pathlib import Path

from common.papers import ROOT

import forks
import pytest

LESSONS = ROOT / "lessons"
SOURCES = sorted(LESSONS.glob("[0-9]_*.py"))
SOLUTIONS = "_solutions"
LECTURES = [path for path in SOURCES if not path.stem.endswith(SOLUTIONS)]
MEASURED = re.compile(r"\d[\d.,]* *(dB|bpp|bits per pixel|bytes|%|seconds|ms)\b|\d\.\d+ times")


def prose(path):
    """The Markdown cells of a lesson, without the marks of comments."""
    cells = re.findall(r"^# %% \[markdown\]\n((?:#.*\n)+)", path.read_text(), re.M)
    return "\n".join(re.sub(r"^# ?", "", cell, flags=re.M) for cell in cells)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    output, _ = forks.run(path, cwd=tmp_path, environment={"SHORT": "1"})
    assert output.strip()
    assert list(tmp_path.iterdir()) == []  # it writes no files


@pytest.mark.parametrize("path", LECTURES, ids=lambda path: path.stem)
def test_three_exercises_have_solutions(path):
    text = prose(path)
    assert re.findall(r"^\*\*Exercise (\d)\.\*\*", text, re.M) == ["1", "2", "3"]
    solutions = path.with_stem(path.stem + SOLUTIONS)
    assert f"`{solutions.name}`" in text
    assert re.findall(r"^## Exercise (\d):", prose(solutions), re.M) == ["1", "2", "3"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_numbers_are_printed_not_written(path):
    """Exercises may name an amount; what was measured is printed by a cell."""
    text = prose(path).partition("## Exercises")[0]
    assert not MEASURED.search(text), MEASURED.search(text)[0]


def test_the_page_lists_them_in_order():
    page = (LESSONS / "README.md").read_text()
    assert re.findall(r"^\| \d \| \[[^]]+\]\((\S+)\)", page, re.M) == [p.name for p in LECTURES]
    assert len(LECTURES) == 6
    assert [path.name[0] for path in LECTURES] == list("123456")


def test_lessons_that_do_not_exist_are_named():
    _, errors = forks.run(LESSONS / "build.py", "9", cwd=ROOT, status=2)
    assert errors == "error: there is no lesson 9: choose from 1, 2, 3, 4, 5, 6\n"


def test_missing_packages_are_named(tmp_path):
    code = ("import importlib.util, runpy, sys\n"
            "find = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name: None if name == 'jupytext' else find('os')\n"
            "sys.argv = ['build.py', '1']\n"
            f"runpy.run_path({str(LESSONS / 'build.py')!r}, run_name='__main__')\n")
    _, errors = forks.run("-c", code, cwd=tmp_path, status=2)
    assert errors.count("\n") == 1
    assert "has no jupytext: run `make notebooks`" in errors


def test_measured_numbers_are_recognised():
    for text in ("gains 0.3 dB", "0.24 bpp", "2.5 times as fast", "takes 1,024 bytes"):
        assert MEASURED.search(text), text
    assert not MEASURED.search("8 levels, 12 positions, Section 3.2")
    assert "Exercise" in prose(LECTURES[0]) and Path(LECTURES[0]).suffix == ".py"
