"""The images of a run: checked at the start, held out, removed before a resume."""

import os
import time

from common import UserError, data, image_check
from common.data import digest
from common.training import images
from common.training.checkpoints import copy_record
from common.training.images import RECORD, find_images

import pytest
import torch
from training_cases import load

from hyperprior import train as hyperprior_train


@pytest.fixture
def folder(tmp_path):
    """Twenty images of 70x66 with random pixels."""
    path = tmp_path / "set"
    for i in range(20):
        pixels = torch.randint(0, 256, (3, 66, 70), dtype=torch.uint8,
                               generator=torch.Generator().manual_seed(i))
        data.write_image(pixels, path / f"{i:02}.png")
    return path


def cut(path, size=300):
    path.write_bytes(path.read_bytes()[:size])


def test_all_unusable_images_are_named_before_training(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut(folder / "03.png")
    cut(folder / "07.png", 5)
    data.write_image(torch.zeros(3, 20, 90, dtype=torch.uint8), folder / "11.png")
    for suffix in (".jpg", ".webp", ".bmp", ".gif", ".tif", ".ppm"):
        data.write_image(torch.zeros(3, 64, 64, dtype=torch.uint8), folder / f"good{suffix}")
        (folder / f"cut{suffix}").write_bytes((folder / f"good{suffix}").read_bytes()[:-200])
    with pytest.raises(UserError) as error:
        find_images(folder, 64, 0, False, tmp_path / "run")
    text = str(error.value)
    named = {path.name for path in folder.iterdir() if f"/{path.name}: " in text}
    assert named == {"03.png", "07.png", "11.png", "cut.jpg", "cut.webp", "cut.bmp", "cut.gif",
                     "cut.tif", "cut.ppm"}
    assert text.startswith("9 of 32 training images cannot be used: ")
    assert "11.png: 90x20 is smaller than the 64x64 crop; remove it" in text and "\n" not in text
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(image_check, "NAMED", 2)
    with pytest.raises(UserError, match="; and 7 more, all listed in unusable_images.txt"):
        find_images(folder, 64, 0, False, tmp_path / "run")
    assert len((tmp_path / "unusable_images.txt").read_text().splitlines()) == 9


def test_what_was_checked_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_check, "MANY", 10)
    items, opened = data.find_items(folder), []
    original = image_check._size
    monkeypatch.setattr(image_check, "_size", lambda *a: opened.append(a[0]) or original(*a))
    assert image_check.find_unusable(items, (64, 64)) == {} and len(opened) == 20
    assert list(image_check.find_unusable(items, (68, 64))) == list(range(20))
    cut(folder / "03.png")
    assert list(image_check.find_unusable(items, (64, 64))) == [3] and len(opened) == 21
    next((tmp_path / "cache").rglob("*.json")).write_text("{")
    assert list(image_check.find_unusable(items, (64, 64))) == [3]


def test_images_are_held_out_by_name(folder, tmp_path):
    first, second = (find_images(folder, 64, seed, False, tmp_path) for seed in (0, 1))
    held = [item.path for item in first.test]
    assert held == [item.path for item in second.test] and len(held) == 2 and len(first) == 18
    assert not set(held) & {item.path for item in first.crops.items}
    assert first.validation == "2 images held out of the training data"
    given = find_images(folder, 64, 0, False, tmp_path, folder)
    assert given.validation == "20 images of set" and len(given) == len(given.test) == 20
    plain = data.Crops(data.find_items(folder), 64, 0, False)  # as without anything held out
    assert all(torch.equal(given.crops[k], plain[k]) for k in range(45))
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()
    assert find_images(folder, 64, 0, False, tmp_path).validation == (
        "a training image, for want of others")


def test_a_run_from_before_goes_on_with_all_its_images(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for config in ({"lmbda": 1}, {"validation": f"24 images of kodak{images.OLDER}"}):
        torch.save({"step": 5, "config": config}, run / "latest.pth")
        found = find_images(folder, 64, 0, False, run)
        assert len(found) == 20 and found.digest == data.digest(data.find_items(folder))
        assert found.validation == "24 images of kodak, the default when the run began"
    torch.save({"step": 5, "config": {"validation": "2 images held out"}}, run / "latest.pth")
    assert len(find_images(folder, 64, 0, False, run)) == 18


def test_held_out_images_are_cropped_to_the_size_of_kodak(tmp_path):
    data.write_image(torch.rand(3, 900, 800), tmp_path / "a.png")
    data.write_image(torch.rand(3, 900, 800), tmp_path / "b.png")
    (item,) = find_images(tmp_path, 64, 0, False, tmp_path).test
    assert item.read().shape == (3, 512, 768)


def test_a_resume_goes_on_without_removed_images(folder, tmp_path, monkeypatch):
    """A damaged image is named in mid-training; all other samples stay as they were."""
    monkeypatch.chdir(tmp_path)
    for i in range(20, 30):
        data.write_image(torch.rand(3, 64, 64), folder / f"{i}.png")
    flags = ["--dataset", str(folder), "--steps-per-epoch", "30", "--epoch", "1", "--batch_size",
             "1", "--patch-size", "64", "--N", "4", "--M", "6", "--precision", "fp32", "--seed",
             "3", "--check_time", "0"]
    order = find_images(folder, 64, 3, False, tmp_path).crops
    monkeypatch.setattr(images, "_check", lambda *_: None)  # its header is right, its end is not
    victim = order.items[order._index(25)].path  # each of 28 images is seen once
    content = victim.read_bytes()
    cut(victim)
    with pytest.raises(UserError, match=f"{victim.name}: not a readable image"):
        hyperprior_train.main(flags)
    run = tmp_path / "ckpts" / "Hyperprior" / "0"
    assert (run / RECORD).exists() and not (run / "epoch_0.pth").exists()
    victim.unlink()
    other = folder / ("00.png" if victim.name != "00.png" else "01.png")
    os.rename(other, tmp_path / "other.png")
    with pytest.raises(UserError, match="trained with --dataset 28 images .*, not "):
        hyperprior_train.main([*flags, "--resume"])  # more is gone than was named
    os.rename(tmp_path / "other.png", other)
    resumed = find_images(folder, 64, 3, False, run).crops
    assert len(resumed.items) == 28
    for k in range(40):
        same = order._index(k) == resumed._index(k)
        assert same == (order.items[order._index(k)].path != victim)
        assert resumed[k].shape == (3, 64, 64)
    hyperprior_train.main([*flags, "--resume"])
    state = load(tmp_path, 0)
    assert state["step"] == 30 and state["config"]["validation"].startswith("2 images held out")
    victim.write_bytes(content)
    assert not any(i.removed for i in find_images(folder, 64, 3, False, run).crops.items)


def test_removed_images_belong_to_their_run_only(folder, tmp_path):
    run = tmp_path / "run"
    record = find_images(folder, 64, 0, False, run).crops.record
    record(4)
    record.items[record.numbers[4]].path.unlink()
    assert len(find_images(folder, 64, 0, False, run).crops.items) == 17  # no checkpoint: a new run
    (run / "latest.pth").touch()
    assert len(find_images(folder, 64, 0, False, run).crops.items) == 18


def test_a_new_run_has_no_history(folder, tmp_path):
    """A record in its folder is of an earlier run; the flags of a run tell which images it had."""
    run, other = tmp_path / "run", tmp_path / "other"
    record = find_images(folder, 64, 0, False, None, folder=run).crops.record
    record(4)
    record.items[record.numbers[4]].path.unlink()
    torch.save({"step": 5, "config": {"lmbda": 1}}, run / "latest.pth")
    new = find_images(folder, 64, 0, False, None, folder=run)
    assert len(new) == 17 and new.validation == "2 images held out of the training data"
    flags = {"images": new.digest, "validation": new.validation}
    torch.save({"step": 5, "config": flags}, run / "latest.pth")
    assert find_images(folder, 64, 0, False, run).digest == new.digest
    flags["images"] = digest(record.items[i] for i in record.numbers)
    torch.save({"step": 5, "config": flags}, run / "latest.pth")
    continued = find_images(folder, 64, 0, False, run / "latest.pth", folder=other)
    assert continued.digest == flags["images"]
    continued.crops.record(7)  # before the first checkpoint in the other folder
    assert len((run / RECORD).read_text().splitlines()) == 2
    copy_record(run, other)
    assert sorted((run / RECORD).read_text()) == sorted((other / RECORD).read_text())


def test_images_are_decoded_within_a_limit(tmp_path, monkeypatch):
    for i in range(12):
        data.write_image(torch.zeros(3, 20, 30, dtype=torch.uint8), tmp_path / f"{i}.png")
    active, most, read = [], [], data.Item.read

    def counted(item):
        active.append(item)
        most.append(len(active))
        time.sleep(0.01)
        try:
            return read(item)
        finally:
            active.remove(item)

    monkeypatch.setattr(data.Item, "read", counted)
    for pixels, count in ((1300, 2), (100, 1)):  # two images; less than one
        monkeypatch.setattr(image_check, "_decoded", image_check.Limit(pixels))
        most.clear()
        image_check.check_readable(sorted(tmp_path.iterdir()))
        assert max(most) == count and len(most) == 12


def test_loader_processes_share_one_limit_and_stay(folder, monkeypatch):
    """Workers return their process number; two epochs are served by the same two."""
    monkeypatch.setattr(data.Item, "read", lambda self: torch.full(
        (3, 64, 64), os.getpid() % 251, dtype=torch.uint8))
    crops = data.Crops(data.find_items(folder), 64)
    run = hyperprior_train.Run(Released(), Released(), crops, torch.device("cpu"), 2, 4, 2, 2, 10)
    seen = []
    for _ in run.remaining_epochs():
        for x in run.batches():
            seen.append({round(float(v) * 255) for v in x[:, 0, 0, 0]})
            run.step += 1
    assert len(seen) == 8 and len(set().union(*seen)) == 2
    assert crops.sharers == 2 and run.loader is None
    monkeypatch.setattr(data, "CACHE_PIXELS", 5 * 64 * 64)
    for k in range(20):
        crops[k]
    assert len(crops._cache) == 2  # half of five


class Released:
    """In place of checkpoints and log."""

    def release(self):
        pass

    def begin(self, step):
        pass
