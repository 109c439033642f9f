"""make weights: failing stages, full disks, other processes, mistakes in weights.yaml."""

import fcntl
import resource

from common.recipes import jobs

import pytest
from recipes_cases import change, result


def test_failing_stage(root, make):
    """It is named, what needs it is left out, the rest goes on; later it is taken up."""
    change(root, '    from: "0.013"\n', "")
    change(root, 'Path("diverges").exists()', '"13" in args.prefix and Path("diverges").exists()',
           "train.py")
    (root / "fake" / "diverges").touch()
    lines = make(status=2)
    assert "fake 0.013 failed: loss not finite in the batch of step 3" in lines
    assert any("fake 0.0035: done" in line for line in lines)
    assert lines[-1] == "error: not done: fake 0.013, fake small (see above)"
    (root / "fake" / "diverges").unlink()
    make()
    assert len(result(root)) == 2


def test_ended_by_a_signal(root, make):
    change(root, "text = done[-1]", "os.kill(os.getpid(), 9)\ntext = done[-1]", "train.py")
    assert any("fake 0.013 failed: was ended by signal 9, see" in x for x in make(status=2))


def test_missing_data_set(root, make):
    assert make("--dataset", "nowhere", status=2)[0].endswith(
        "nowhere: no such folder or .tar shard")
    assert "no folder or .tar shard has such a name" in make("--dataset", "no*.tar", status=2)[0]
    assert not (root / "fake" / "ckpts").exists()


def test_full_disk(root, make, monkeypatch):
    """A real limit of the system on the size of files: one line, and nothing is lost."""
    monkeypatch.setenv("FAKE_SIZE", "50000")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        lines = make(status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "fake 0.013 failed: cannot write ckpts/weights/13/epoch_0.pth: File too large" in lines
    monkeypatch.delenv("FAKE_SIZE")
    make()
    assert len(result(root)) == 2


def test_stage_of_another_process(root, make, monkeypatch):
    monkeypatch.setattr(jobs.Job.lock, "__defaults__", (0.1,))
    folder = root / "fake" / "ckpts" / "weights" / "13"
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = make(status=2)
    assert "fake 0.013 failed: another process is training fake 0.013" in lines
    make()


@pytest.mark.parametrize("old, new, words", [
    ("lr: 0.001,", "lr: [", "not YAML"), ("images:", "pictures:", "there is no key pictures"),
    ("steps: 30", "stepz: 30", "stages: 0.013: there is no key stepz"),
    ("checkpoint: epoch_*.pth\n", "\n", "stages: 0.013: checkpoint is missing"),
    ("hours: 0.1", "hours: long", "hours: 'long'"), ('"0.013":', "0.013:", "quotes"),
    ('from: "0.013"', 'from: "0.14"', "stages: 0.0035: from: there is no stage 0.14"),
    ('from: "0.013"', 'from: nowhere/0.14', "nowhere"),
    ('from: "0.013"', 'from: "0.0035"', "starts from itself"),
    ('small-0.013.pth: "0.013"', 'small-0.013.pth: "0.13"', "there is no stage 0.13"),
    ("resume: [--resume]", "resume: 3", "train: resume: 3"),
    ("steps: 30", "steps: 0", "give 1 or more"), ("steps: 30", "steps: true", "steps: True is not"),
    ("hours: 0.1", "hours: .nan", "hours: nan is not"),
    ("checkpoint: epoch_*.pth\n", "checkpoint: /epoch_*.pth\n", "below the paper's folder"),
    ('small-0.013.pth: "0.013"', 'small-0.013.pth: ["0.013"]', "there is no stage"),
    ('small-0.013.pth: "0.013"', '../small.pth: "0.013"', "name of a file in weights/")])
def test_mistakes_in_the_file(old, new, words, root, make):
    change(root, old, new)
    line, = make("fake", status=2)
    assert "weights.yaml" in line and words in line


def test_mistakes_on_the_command_line(root, make):
    assert "there is no curve big" in make("fake/big", status=2)[0]
    assert "weights.yaml" in make("nowhere", status=2)[0]
    assert "--images" in make("--images", root, status=2)[0]
    change(root, "short:", "curves2:")
    assert "there is no key curves2" in make(status=2)[0]
