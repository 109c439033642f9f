"""make sweep: the points of a curve are one recipe at several values of lmbda."""

import json

from common import cli
from common.recipes import sweep

import pytest
from recipes_cases import change


@pytest.fixture
def run(root, capfd):
    """Runs the command on the paper `fake`, whose stages have a lmbda; returns its lines."""
    change(root, "lr: 0.001, epoch: 3", "lr: 0.001, lmbda: 0.013, epoch: 3")
    change(root, 'for flag in ("config",', 'for flag in ("lmbda", "config",', "train.py")
    change(root, "{args.lr} {epoch}", "{args.lr} {args.lmbda} {epoch}", "train.py")

    def call(*argv, status=0):
        capfd.readouterr()
        code = 0
        try:
            cli.run(lambda: sweep.main(["fake", *map(str, argv), "--threads", "1"], root))
        except SystemExit as e:
            code = e.code
        out, err = capfd.readouterr()
        assert code == status, out + err
        return (out + err).splitlines()
    return call


def points(root):
    return {path.parents[1].name: path.read_text()
            for path in (root / "fake" / "ckpts").glob("sweep-*/13/epoch_2.pth")}


def test_points_are_trained_once_and_evaluated_together(root, run):
    run(0.02, 0.005)
    assert set(points(root)) == {"sweep-0.005", "sweep-0.02"}
    assert len(set(points(root).values())) == 2  # lmbda reaches the training
    words = json.loads((root / "fake" / "results" / "sweep.json").read_text())
    files = [word for word in words if word.endswith(".pth")]
    assert [file.rpartition("/")[2] for file in files] == ["0.005.pth", "0.02.pth"]
    assert run(0.005, 0.02) == ["nothing to do: fake/sweep is done"]
    lines = run(0.005, 0.01, 0.02)  # another point
    assert [line for line in lines if "30 steps" in line] == ["fake 0.01: 30 steps, about 0.1 h"]
    assert len(points(root)) == 3
    assert not (root / "fake" / "weights").exists()  # nothing is bundled


def test_seeds_of_a_shorter_training_from_scratch(root, run):
    change(root, "lmbda: 0.013, epoch: 3", "lmbda: 0.013, epoch: 3, steps-per-epoch: 10")
    change(root, 'for flag in ("lmbda",', 'for flag in ("seed", "steps-per-epoch", "lmbda",',
           "train.py")
    change(root, "{args.lmbda} {epoch}", "{args.lmbda} {args.seed} {epoch}", "train.py")
    run(0.02, "--seeds", 3, 4, "--steps", 20, "--set", "lr=0.5", "--name", "equal")
    found = {path.parents[1].name: path.read_text()
             for path in (root / "fake" / "ckpts").glob("*/13/epoch_1.pth")}
    assert set(found) == {"equal-0.02-seed-3", "equal-0.02-seed-4"}
    assert len(set(found.values())) == 2 and not points(root)
    record = json.loads(next((root / "fake" / "ckpts").glob("equal-*3/13/stage.json")).read_text())
    assert {"lr": 0.5, "seed": 3, "epoch": 2}.items() <= record["definition"]["flags"].items()
    assert (root / "fake" / "results" / "equal.json").exists()
    assert "give a multiple of 10" in run(0.02, "--steps", 15, status=2)[-1]


def test_a_stage_with_a_start_can_begin_from_scratch(root, run):
    change(root, "lr: 0.0005, epoch: 2", "lr: 0.0005, lmbda: 0.0035, epoch: 2")
    run(0.02, "--stage", "0.0035", "--from-scratch")
    assert not (root / "fake" / "ckpts" / "weights").exists()


def test_mistakes_are_one_line(root, run):
    assert run(0.01, "--stage", "7", status=2)[-1].startswith(
        "error: fake/weights.yaml: there is no stage 7; choose from 0.013, 0.0035")
    assert "stage 0.0035 has no lmbda to vary" in run(0.01, "--stage", "0.0035", status=2)[-1]
    assert "argument LMBDA: invalid" in run(-1, status=2)[-1]
    assert "argument --set: invalid" in run(0.01, "--set", "N=[", status=2)[-1]
    assert "argument --name: invalid" in run(0.01, "--name", "../a", status=2)[-1]
    for name in ("small", "published"):
        assert "would replace other results" in run(0.01, "--name", name, status=2)[-1]
