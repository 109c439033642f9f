"""make weights: stages in order, the short form, several papers and processes, missing flags."""

import json
import shutil
from pathlib import Path

from PIL import Image
from recipes_cases import WEIGHTS, change, result


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
    logs = (home / "results" / "small-training.png").read_text().split()
    assert logs == [str(home / "logs" / "weights" / run) for run in ("35", "13")] + [
        "--names", "0.0035", "0.013"]
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
