"""What counts as an image of a data set: hidden files, links, archives, frames, odd names."""

import os
import shutil
import tarfile

from common import UserError, data

import pytest
from helpers import photo


def tree(root, *names):
    for i, name in enumerate(names):
        photo(root / name, 8, 8, i)
    return root


def names(found, root):
    return [str(item.path.relative_to(root)) for item in found.items]


def test_hidden_files_and_folders_are_no_images(tmp_path):
    tree(tmp_path, "c/0.png", "c/._0.png", ".trash/1.png", "album.png/x.png", "d.JFIF.png")
    for name in ("a.avif", "b.jp2", "c.jfif"):
        (tmp_path / name).touch()
    (tmp_path / "note.txt").touch()
    (tmp_path / "LICENSE").touch()
    (tmp_path / "SHA256SUMS").touch()
    found = data.find(tmp_path)
    assert names(found, tmp_path) == ["a.avif", "album.png/x.png", "b.jp2", "c/0.png", "c.jfif",
                                      "d.JFIF.png"]
    assert str(found) == (f"6 images, files in {tmp_path}; skipped: 2 hidden, "
                          "2 files without an extension, 1 .txt file")
    told = []
    paths = data.list_images(tmp_path, told.append)
    assert [path.name for path in paths] == ["a.avif", "b.jp2", "c.jfif", "d.JFIF.png"]
    assert told == [f"{tmp_path}: 4 images, in one folder; skipped: 1 hidden, 2 files without an "
                    "extension, 1 folder named like an image, 1 .txt file"]


def test_linked_folders_are_followed_once(tmp_path):
    tree(tmp_path / "real", "c0/0.png", "c1/1.png")
    train = tree(tmp_path / "set", "train/own/2.png") / "train"
    (train / "a0").symlink_to(tmp_path / "real" / "c0")
    (train / "z1").symlink_to(tmp_path / "real" / "c1")
    (train / "again").symlink_to(train / "own")
    (train / "own" / "loop").symlink_to(train)
    (train / "broken.png").symlink_to("absent")
    found = data.find(tmp_path / "set")
    assert names(found, train) == ["a0/0.png", "broken.png", "own/2.png", "z1/1.png"]
    assert found.skipped == {"folder linked again": 2}


def test_a_folder_wins_over_archives_beside_it(tmp_path):
    tree(tmp_path, "train/c/0.png", "train/c/1.png", "other/2.png")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(tmp_path / "other" / "2.png", "2.png")
    found = data.find(tmp_path)
    assert names(found, tmp_path) == ["train/c/0.png", "train/c/1.png"]
    assert str(found).endswith("; skipped: 1 archive beside train/")
    shutil.copy(tmp_path / "val.tar", tmp_path / "test.tar")
    assert str(data.find(tmp_path)).endswith("; skipped: 2 archives beside train/")
    (tmp_path / "test.tar").unlink()
    (tmp_path / "train").rename(tmp_path / "photos")
    with pytest.raises(UserError, match=r"holds images \(2.png, 3 in all\) and shards \(val.tar, "):
        data.find(tmp_path)


def test_shards_without_images_are_counted(tmp_path):
    tree(tmp_path, "x/0.png")
    for name, member in (("a.tar", "0.png"), ("b.tar", "._0.png"), ("c.tar", "./d/0.png")):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.add(tmp_path / "x" / "0.png", member)
    (tmp_path / "x" / "0.png").unlink()
    found = data.find(tmp_path)
    assert [item.member for item in found.items] == ["0.png", "./d/0.png"]
    assert found.skipped == {"hidden": 1, "shard without images": 1}


def test_first_frames_only_where_all_are_frames(tmp_path):
    tree(tmp_path, "s1/im1.png", "s1/im2.png", "s2/im1.png")
    assert names(data.find(tmp_path), tmp_path) == ["s1/im1.png", "s2/im1.png"]
    tree(tmp_path, "holiday/beach.png")
    assert len(data.find(tmp_path).items) == 4


def test_names_that_are_not_utf8(tmp_path):
    tree(tmp_path, "b.png")
    photo(tmp_path / "a.png", 8, 8)
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    found = data.find(tmp_path)
    assert [item.read().shape for item in found.items] == [(3, 8, 8)] * 2
    assert data.digest(found.items).startswith("2 images ")
    os.rename(os.fsencode(tmp_path) + b"/caf\xe9.png", os.fsencode(tmp_path) + b"/caf\xe8.png")
    assert data.digest(data.find_items(tmp_path)) != data.digest(found.items)


def test_the_bundled_images_keep_their_digest():
    """Runs on the bundled photographs are identified by it."""
    assert data.digest(data.find_items(None)).startswith("60 images")
