"""The runner of weights.yaml: chains, interruptions, changes, failures; the rows of the pages."""

import contextlib
import fcntl
import importlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

from common import UserError, cli, data
from common.recipes import jobs, pages, stages, weights
from common.recipes.recipe_file import words

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
PAPERS = sorted(path.parent.name for path in ROOT.glob("*/weights.yaml"))
WEIGHTS = """
images: two tiles
train: {dataset: --dataset, start: --init_ckpt, resume: [--resume]}
eval: {dataset: --dataset_path}
stages:
  "0.013":
    steps: 30
    hours: 0.1
    folders: ["ckpts/{run}/13", "logs/{run}/13"]
    checkpoint: epoch_*.pth
    flags: {prefix: "{run}/13", lr: 0.001, epoch: 3}
  "0.0035":
    from: "0.013"
    steps: 20
    hours: 0.1
    folders: ["ckpts/{run}/35", "logs/{run}/35"]
    checkpoint: epoch_*.pth
    flags: {prefix: "{run}/35", lr: 0.0005, epoch: 2, test_images: "{images}"}
curves:
  small:
    files: {small-0.0035.pth: "0.0035", small-0.013.pth: "0.013"}
short:
  steps: 10
  flags: {epoch: 1}
"""
TRAIN = """
import argparse, hashlib, os, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
for flag in ("config", "prefix", "lr", "dataset", "init_ckpt", "threads", "device", "test_images"):
    parser.add_argument(f"--{flag}")
parser.add_argument("--epoch", type=int)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
folder, logs = Path("ckpts", args.prefix), Path("logs", args.prefix)
folder.mkdir(parents=True, exist_ok=True)
logs.mkdir(parents=True, exist_ok=True)
if Path("diverges").exists():
    sys.exit("error: loss not finite in the batch of step 3")
start = Path(args.init_ckpt).read_text() if args.init_ckpt else ""
done = sorted(folder.glob("epoch_*.pth"))
text = done[-1].read_text() if done and args.resume else start
for epoch in range(len(done), args.epoch):
    time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
    text = hashlib.sha256(f"{text} {args.lr} {epoch}".encode()).hexdigest()
    part = folder / "part"
    try:
        part.write_text(text + " " * int(os.environ.get("FAKE_SIZE", 0)))
    except OSError as e:
        sys.exit(f"error: cannot write {folder}/epoch_{epoch}.pth: {e.strerror}")
    part.rename(folder / f"epoch_{epoch}.pth")
    with open(logs / "log.txt", "a") as f:
        f.write(f"epoch {epoch}  step {10 * (epoch + 1)}  train loss 1.5 bpp 0.5\\n")
"""
EVAL = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--resultdir") + 1])
folder.mkdir(parents=True)
(folder / "Fake-small.json").write_text(json.dumps(sys.argv[1:]))
(folder / "rd.png").touch()
"""
EXPORT = """
import sys
from pathlib import Path
paper, checkpoint, _, output, _, steps = sys.argv[1:]
Path(output).write_text(f"{Path(checkpoint).read_text()} {steps}")
"""
PAGES = """
import shutil, sys
from pathlib import Path
into = Path(sys.argv[5])
into.mkdir(exist_ok=True)
shutil.copy(sys.argv[3], into / f"{sys.argv[2]}.json")
(into / f"{sys.argv[2]}.png").touch()
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository of one paper whose scripts do what ours do, without networks."""
    monkeypatch.setattr(weights.os, "nice", lambda _: 0)
    for name, text in {"fake/weights.yaml": WEIGHTS, "fake/train.py": TRAIN, "fake/eval.py": EVAL,
                       "common/recipes/export.py": EXPORT, "common/recipes/pages.py": PAGES,
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


def change(root, old, new, file="weights.yaml"):
    text = (root / "fake" / file).read_text()
    assert old in text
    (root / "fake" / file).write_text(text.replace(old, new))


def result(root):
    return {p.name: p.read_bytes() for p in (root / "fake" / "weights").glob("*.pth")}


# ---------------------------------------------------------------------------------------- the chain
def test_chain(root, make):
    """Stages in order, steps added up, files and results where they belong; then nothing to do."""
    lines = make()
    assert lines[0] == "fake 0.013: 30 steps, about 0.1 h"
    assert "fake 0.013: done in" in lines[1] and "train loss 1.5" in lines[1]
    home = root / "fake"
    assert (home / "weights" / "small-0.013.pth").read_text().endswith(" 30")
    assert (home / "weights" / "small-0.0035.pth").read_text().endswith(" 50")
    words = json.loads((home / "results" / "small.json").read_text())
    files = words[words.index("--checkpoint") + 1 : words.index("--resultdir")]
    assert [Path(file).name for file in files] == ["small-0.0035.pth", "small-0.013.pth"]
    record = json.loads((home / "ckpts" / "weights" / "13" / "stage.json").read_text())
    assert record["done"] and record["checkpoint"] == "epoch_2.pth" and record["ended"]
    assert make() == ["nothing to do: fake/small is done"]
    assert any("0.013" in line and "done" in line for line in make("--list"))


def test_list(root, make):
    lines = make("--list")
    assert lines[0] == "fake: two tiles"
    assert [line.split()[0] for line in lines[1:]] == ["0.013", "0.0035", "small"]
    assert all(line.endswith("to do") for line in lines[1:])
    assert not (root / "fake" / "ckpts").exists()


def test_short_form(root, make, tmp_path):
    """The same chain with other flags, under ckpts/short; nothing is published."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    make("--short", "--images", tmp_path / "images")
    home = root / "fake"
    assert not (home / "weights").exists() and not (home / "results").exists()
    assert not (home / "ckpts" / "weights").exists()
    folder = home / "ckpts" / "short" / "small"
    assert (folder / "small-0.0035.pth").read_text().endswith(" 20")
    assert json.loads((folder / "small.json").read_text())[:2] == [
        "--dataset_path", str(tmp_path / "images")]


def test_two_at_once(root, make):
    change(root, '    from: "0.013"\n', "")
    lines = make("--jobs", "2")
    assert [line.split(":")[0] for line in lines[:2]] == ["fake 0.013", "fake 0.0035"]
    assert "steps" in lines[0] and "steps" in lines[1]
    assert len(result(root)) == 2


def test_stages_of_another_paper(root, make):
    """It is trained first, and its steps count."""
    other = root / "other"
    shutil.copytree(root / "fake", other)
    text = WEIGHTS.replace('  "0.013":', '  "0.02":\n    from: fake/0.0035').replace(
        'from: "0.013"', 'from: "0.02"').replace(': "0.013"}', ': "0.02"}')
    (other / "weights.yaml").write_text(text)
    lines = make("other/small")
    assert [line.split(":")[0] for line in lines if "steps" in line and "done" not in line] == [
        "fake 0.013", "fake 0.0035", "other 0.02", "other 0.0035"]
    assert (other / "weights" / "small-0.0035.pth").read_text().endswith(" 100")
    assert not (root / "fake" / "weights").exists()


def test_one_flag_to_start_and_to_resume(root, make):
    """As in convnextic: --resume FILE starts, --resume continues."""
    change(root, "start: --init_ckpt, resume: [--resume]", "start: --go, resume: --go")
    change(root, 'parser.add_argument("--resume", action="store_true")',
           'parser.add_argument("--go", nargs="?", const="")', "train.py")
    change(root, "args = parser.parse_args()", "args = parser.parse_args()\n"
           "args.resume, args.init_ckpt = args.go == '', args.go", "train.py")
    make()
    (root / "fake" / "ckpts" / "weights" / "35" / "epoch_1.pth").unlink()
    whole = result(root)
    record = root / "fake" / "ckpts" / "weights" / "35" / "stage.json"
    record.write_text(record.read_text().replace('"done": true', '"done": false'))
    (root / "fake" / "weights" / "small-0.0035.pth").unlink()
    make()
    assert result(root) == whole


def test_files_of_no_curve_are_named(root, make):
    (root / "fake" / "weights").mkdir()
    (root / "fake" / "weights" / "small-0.5.pth").touch()
    assert any("small-0.5.pth, of no curve" in line for line in make())
    assert (root / "fake" / "weights" / "small-0.5.pth").exists()


# ---------------------------------------------------------------------------------------- changes
def test_changed_flag(root, make):
    """The stage and what starts from it are trained again; the old runs are kept."""
    make()
    before = result(root)
    change(root, "lr: 0.001", "lr: 0.002")
    lines = make()
    assert lines[0] == ("fake 0.013: lr was 0.001, is 0.002: its run is kept as "
                        "fake/ckpts/weights/13.before-1 and trained again")
    assert lines[1].startswith("fake 0.0035: fake/0.013, from which it starts, was changed")
    for folder in ("ckpts", "logs"):
        for name in ("13", "35"):
            assert (root / "fake" / folder / "weights" / f"{name}.before-1").is_dir()
    assert not set(before.values()) & set(result(root).values())
    change(root, "lr: 0.002", "lr: 0.001")
    make()
    assert result(root) == before
    assert (root / "fake" / "ckpts" / "weights" / "13.before-2").is_dir()


def test_changed_end_of_the_chain(root, make):
    """The stage before it is kept; threads and hours are no part of a definition."""
    make()
    change(root, "lr: 0.0005, epoch: 2", "lr: 0.0005, epoch: 3")
    change(root, "hours: 0.1", "hours: 0.2")
    lines = make("--threads", "2")
    assert lines[0].startswith("fake 0.0035: epoch was 2, is 3")
    assert not any(line.startswith("fake 0.013: ") for line in lines)
    assert "note: the log of fake 0.0035 ends at step 20, weights.yaml says 20" not in lines


def test_changed_config_and_images(root, make, tmp_path):
    change(root, "lr: 0.001,", "lr: 0.001, config: small.yaml,")
    (root / "fake" / "small.yaml").write_text("N: 8\n")
    make("fake/small")
    (root / "fake" / "small.yaml").write_text("# the same\nN: 8\n")
    assert make("fake/small") == ["nothing to do: fake/small is done"]
    (root / "fake" / "small.yaml").write_text("N: 9\n")
    assert make("--list")[1].endswith("to do: small.yaml was changed")
    (root / "fake" / "small.yaml").write_text("N: 8\n")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert "the images were 60 images" in make("--dataset", tmp_path)[0]


def test_forgotten_images_are_asked_for(root, make, tmp_path):
    """What is done stays so; what is not must not go on with other images."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    make("--dataset", tmp_path)
    assert make("fake/small") == ["nothing to do: fake/small is done"]
    record = root / "fake" / "ckpts" / "weights" / "13" / "stage.json"
    record.write_text(record.read_text().replace('"done": true', '"done": false'))
    assert "fake 0.013 failed: was begun on 1 images" in "\n".join(make("fake/small", status=2))
    assert "fake 0.013: done" in "\n".join(make("fake/small", "--dataset", tmp_path))


def test_forgotten_images_do_not_become_others(root, make, tmp_path):
    """Neither for a stage that was not begun nor for one whose definition has changed."""
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    Image.new("RGB", (64, 64)).save(tiles / "a.png")
    make("--dataset", tiles)
    home = root / "fake" / "ckpts" / "weights"
    shutil.rmtree(home / "35")
    assert "fake 0.0035 failed: was begun on 1 images" in "\n".join(make(status=2))
    make("--dataset", tiles)
    change(root, "lr: 0.001,", "lr: 0.002,")
    for _ in range(2):
        assert "fake 0.013 failed: was begun on 1 images" in "\n".join(make(status=2))
    assert not list(home.glob("*.before-1"))


@pytest.mark.parametrize("text", ['{"done": true}', "[]", "3", "no JSON"])
def test_what_is_no_record(text, root, make):
    make()
    path = root / "fake" / "ckpts" / "weights" / "13" / "stage.json"
    path.write_text(text)
    assert any("stage.json: not a record of fake 0.013: remove it" in line
               for line in make(status=2))


def test_a_stage_removed_while_others_wait(root, make, monkeypatch):
    """The runner says so and ends, instead of waiting for ever."""
    ended = stages.Stage.end

    def end(stage):
        if stage.name == "0.0035" and stage.done():
            shutil.rmtree(root / "fake" / "ckpts" / "weights" / "13", ignore_errors=True)
        return ended(stage)

    monkeypatch.setattr(stages.Stage, "end", end)
    assert any("was changed or removed meanwhile: call again" in line for line in make(status=2))


def test_config_changed_between_stages(root, make, monkeypatch):
    change(root, "lr: 0.0005,", "lr: 0.0005, config: small.yaml,")
    (root / "fake" / "small.yaml").write_text("N: 8\n")
    ended = stages.Stage.end

    def end(stage):
        (root / "fake" / "small.yaml").write_text("N: 9\n")
        return ended(stage)

    monkeypatch.setattr(stages.Stage, "end", end)
    lines = make(status=2)
    assert any("small.yaml was changed while this call runs: call again" in line for line in lines)


def test_run_without_a_record_is_not_continued(root, make):
    folder = root / "fake" / "logs" / "weights" / "13"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("epoch 2  step 30  train loss 1\n")
    lines = make()
    assert "there is no fake/ckpts/weights/13/stage.json" in lines[0]
    assert (folder.parent / "13.before-1" / "log.txt").exists()


def test_gone_checkpoint(root, make):
    """An error only where something needs it."""
    make()
    path = root / "fake" / "ckpts" / "weights" / "13" / "epoch_2.pth"
    content = path.read_bytes()
    path.unlink()
    assert make() == ["nothing to do: fake/small is done"]
    change(root, "lr: 0.0005", "lr: 0.0006")
    lines = make(status=2)
    assert any("fake/ckpts/weights/13/epoch_2.pth is gone, and fake 0.0035 starts from it: put it "
               "back, or remove fake/ckpts/weights/13 to train it again" in line for line in lines)
    path.write_bytes(content + b"x")
    assert any("epoch_2.pth has changed" in line for line in make(status=2))
    path.write_bytes(content)
    make()


def test_removed_folder_is_trained_again(root, make):
    make()
    before = result(root)
    shutil.rmtree(root / "fake" / "ckpts" / "weights" / "13")
    lines = make()
    assert "is kept as fake/logs/weights/13.before-1" in lines[0]
    assert not any(line.startswith("fake 0.0035") for line in lines)
    assert result(root) == before


# ---------------------------------------------------------------------------------------- failures
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
    ("steps: 30", "steps: 0", "give 1 or more"),
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


# -------------------------------------------------------------------------------- interruptions
def runner(root, *argv, output):
    """The command in a process of its own, forked from this one, which has imported all."""
    child = os.fork()
    if child:
        return child
    with contextlib.suppress(BaseException):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(f, "w"), write_through=True)
                                  for f in (1, 2))
        os._exit(weights.main(["--threads", "1", *map(str, argv)], root) or 0)
    os._exit(1)


def processes_in(folder):
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if path.resolve().is_relative_to(folder):
                found.append(path)
    return found


def kill_when(child, condition, folder):
    """SIGKILL, as soon as the condition holds; no process must be left. False: it ended before."""
    deadline = time.monotonic() + 120
    while not condition():
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while processes_in(folder):
        assert time.monotonic() < deadline, "a process was left"
        time.sleep(0.01)
    return True


def after(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def test_interrupted_at_ten_moments(root, make, tmp_path, monkeypatch):
    straight = tmp_path / "straight"
    shutil.copytree(root, straight)
    weights.main(["--threads", "1"], straight)
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    killed = sum(kill_when(runner(root, output=tmp_path / "out"), after(0.06 * i), root)
                 for i in range(1, 11))
    assert killed >= 3
    monkeypatch.delenv("FAKE_SECONDS")
    make()
    assert result(root) == result(straight) and len(result(root)) == 2


@pytest.mark.slow
def test_hyperprior_interrupted_at_ten_moments(tmp_path):
    """The short form of the real chain ends with the same weights files, bit for bit."""
    (tmp_path / "images").mkdir()
    kodak = Image.open(data.KODAK / "kodim23.png")
    kodak.crop((200, 100, 296, 196)).save(tmp_path / "images" / "a.png")
    content = yaml.safe_load((ROOT / "hyperprior" / "weights.yaml").read_text())
    content["stages"] = {"0.013": content["stages"]["0.013"]}
    content["curves"]["small"]["files"] = {"small-0.013.pth": "0.013"}
    content["short"]["steps"] = 18
    content["short"]["flags"]["epoch"] = 6
    for name in ("straight", "killed"):
        (tmp_path / name / "common").mkdir(parents=True)
        for path in (ROOT / "common").iterdir():
            (tmp_path / name / "common" / path.name).symlink_to(path)
        (tmp_path / name / "common" / "pages.py").unlink()
        (tmp_path / name / "common" / "pages.py").write_text(PAGES)
        home = tmp_path / name / "hyperprior"
        home.mkdir()
        for path in (ROOT / "hyperprior").glob("*.py"):
            shutil.copy(path, home)
        shutil.copy(ROOT / "hyperprior" / "small.yaml", home)
        (home / "eval.py").write_text(EVAL)
        (home / "weights.yaml").write_text(yaml.safe_dump(content))
    argv, out = ["--short", "--images", tmp_path / "images"], tmp_path / "out"
    whole = runner(tmp_path / "straight", *argv, output=out)
    folder = tmp_path / "killed" / "hyperprior" / "ckpts" / "short"
    moments = [(folder / "13" / "stage.json").exists, after(1), after(2),
               *((folder / "13" / f"epoch_{i}.pth").exists for i in range(5)),
               (folder / "small" / "output.txt").exists,
               (folder / "small" / "small-0.013.pth").exists]
    killed = [kill_when(runner(tmp_path / "killed", *argv, output=out), moment, tmp_path / "killed")
              for moment in moments]
    assert all(killed), out.read_text()
    for child in (whole, runner(tmp_path / "killed", *argv, output=out)):
        assert os.waitpid(child, 0)[1] == 0, out.read_text()
    files = [(tmp_path / name / "hyperprior/ckpts/short/small/small-0.013.pth").read_bytes()
             for name in ("straight", "killed")]
    assert files[0] == files[1]


# ---------------------------------------------------------------------------- the files of the tree
@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("short", [False, True])
def test_every_file_of_the_tree(paper, short, monkeypatch):
    """It is accepted, and so are all flags by train.py; configurations exist."""
    monkeypatch.chdir(ROOT / paper)
    settings = jobs.Settings(ROOT, "short" if short else "weights", "tiles.tar", "", 1, "cpu",
                                str(data.KODAK) if short else None)
    module = importlib.import_module(f"{paper}.train")
    for job in weights.Plan(settings, [paper]).jobs:
        if job.paper == paper and isinstance(job, stages.Stage):
            job.definition()
            flags = {key: job.fill(value, settings) for key, value in job.flags.items()}
            cli.parse(module.flags(), words(flags))


# ------------------------------------------------------------------------------------------- pages
def test_rows_of_the_pages():
    """Those of the curve are replaced in the columns of the table, others are kept."""
    results = {"results": {"bpp": [0.2, 0.4], "psnr-rgb": [28.0, 30.0],
                           "ms-ssim-rgb": [0.93, None]},
               "meta": {"N": [64, 64], "M": 192, "steps": [140_000, 100_000],
                        "lmbda": [0.0035, 0.013]}}
    reference = {"results": {"bpp": [0.1, 0.5], "psnr-rgb": [27.0, 33.0]}}
    jpeg = {"results": {"bpp": [0.3, 0.5], "psnr-rgb": [26.0, 29.0]}}
    points = pages.cells(results, reference, jpeg)
    page = ("text\n<!-- results: small -->\n\n| codec | bpp | PSNR | MS-SSIM | above JPEG | other |"
            "\n|---|---|\n| first, lmbda 1 | 1 |\n| small, lmbda 0.1 | 9 |\n| small-b, x | 2 |\n"
            "| small, lmbda 0.2 | 8 |\n| last | 3 |\n\n<!-- end of results -->\nmore\n")
    new, rows = pages.replace(page, "<!-- results: small -->", "small", ["small, a", "small, b"],
                              points)
    assert rows[0] == "| small, a | 0.2000 | 28.00 | 0.9300 | - | 29.58 |"
    assert rows[1].startswith("| small, b | 0.4000 | 30.00 | - | +2.")
    assert new.splitlines()[5:10] == ["| first, lmbda 1 | 1 |", *rows, "| small-b, x | 2 |",
                                      "| last | 3 |"]
    assert pages.replace(new, "<!-- results: small -->", "small", ["small, a", "small, b"],
                         points) == (new, rows)
    assert pages.replace("no table", "<!-- results -->", "x", ["x", "x"], points)[0] == "no table"
    front = ("<!-- results -->\n\n| codec | steps | theirs |\n|---|\n| x (b), level 0 | 1 | 1 |\n"
             "| x2 | 2 | 2 |\n| x, quick | 3 | 3 |\n| x (b), quick | 4 | 4 |\n\n"
             "<!-- end of results -->\n")
    new, _ = pages.replace(front, "<!-- results -->", "x", ["x", "x"], points)
    assert new.splitlines()[4:9] == ["| x | 140,000 | 29.58 |", "| x | 100,000 | 32.17 |",
                                     "| x2 | 2 | 2 |", "| x, quick | 3 | 3 |",
                                     "| x (b), quick | 4 | 4 |"]


def test_publish_writes_what_the_pages_give(tmp_path, capsys):
    """The bundled results of hyperprior: their own rows again; without a table they are printed."""
    results = json.loads((ROOT / "hyperprior" / "results" / "small.json").read_text())
    home = tmp_path / "hyperprior"
    (home / "results").mkdir(parents=True)
    shutil.copy(ROOT / "hyperprior" / "results" / "published.json", home / "results")
    shutil.copy(ROOT / "README.md", tmp_path)
    (home / "README.md").write_text("nothing\n")
    path = tmp_path / "Hyperprior-x.json"
    path.write_text(json.dumps(results | {"name": "x"}))
    pages.main(["hyperprior", "small", str(path), "--dataset", str(data.KODAK / "kodim23.png")],
               tmp_path)
    out = capsys.readouterr().out
    assert "hyperprior/README.md has no table after <!-- results: small -->" in out
    front = (tmp_path / "README.md").read_text()
    for bpp, psnr in zip(*(results["results"][key] for key in ("bpp", "psnr-rgb")), strict=True):
        assert f"| {bpp:.4f} | {psnr:.2f} |" in out and f"| {bpp:.4f} | {psnr:.2f} |" in front
    assert front.count("\n| hyperprior |") == len(results["results"]["bpp"])
    assert "| hyperprior, quick |" in front
    assert json.loads((home / "results" / "small.json").read_text())["name"] == "small"
    assert (home / "results" / "small.png").exists()


# --------------------------------------------------------------------------------- glob data sets
def test_glob_data_sets(tmp_path):
    """Several shards by one name, in the order of their names."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    for folder, name in (("train_2", "a"), ("train_1", "b"), ("train_1", "c")):
        (tmp_path / folder).mkdir(exist_ok=True)
        with tarfile.open(tmp_path / folder / f"{name}_free.tar", "w") as tar:
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(content.getvalue())
            tar.addfile(info, io.BytesIO(content.getvalue()))
    (tmp_path / "train_1" / "d_other.tar").touch()
    items = data.find_items(str(tmp_path / "train_*" / "*_free.tar"))
    assert [item.member for item in items] == ["b.png", "c.png", "a.png"]
    assert data.digest(items).startswith("3 images") and items[0].read().shape == (3, 8, 8)
    (tmp_path / "[odd]").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "[odd]" / "x.png")
    assert len(data.find_items(tmp_path / "[odd]")) == 1
    with pytest.raises(UserError, match="no folder or .tar shard has such a name"):
        data.find_items(str(tmp_path / "train_*" / "*_paid.tar"))
