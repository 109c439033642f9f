"""Fixtures of the tests of `make weights`: a repository of one paper, and the command in it."""

from common import cli
from common.recipes import weights

import pytest
from recipes_cases import CURVES, EVAL, EXPORT, PAGES, TRAIN, WEIGHTS


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of one paper whose scripts do what ours do, without networks."""
    monkeypatch.setattr(weights.os, "nice", lambda _: 0)
    for name, text in {"fake/weights.yaml": WEIGHTS, "fake/train.py": TRAIN, "fake/eval.py": EVAL,
                       "common/recipes/export.py": EXPORT, "common/recipes/pages.py": PAGES,
                       "common/evaluation/curves.py": CURVES,
                       "common/__init__.py": ""}.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "root"


@pytest.fixture
def make(root, capfd):
    """Runs the command in this process; returns its lines. status: the expected exit status."""
    def call(*argv, status=0):
        capfd.readouterr()
        code = 0
        try:
            cli.run(lambda: weights.main(["--threads", "1", *map(str, argv)], root))
        except SystemExit as e:
            code = e.code
        out, err = capfd.readouterr()
        assert code == status, out + err
        if status:
            assert err.startswith("error: ") and err.count("\n") == 1, err
        return (out + err).splitlines()
    return call
