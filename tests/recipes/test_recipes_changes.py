"""make weights: what is trained again after a change, and which runs are kept."""

import shutil

from common.recipes import stages

import pytest
from PIL import Image
from recipes_cases import change, result


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
