"""Finding the images of a data set, and the crops of a run."""

import io
import tarfile
import zlib
from pathlib import Path

from common import UserError, data

import forks
import pytest
import torch
from helpers import photo
from PIL import Image

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------- sets of images
def shard(path, names, folder):
    """A tar of small images, each of another seed; returns {name: pixels}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = {}
    with tarfile.open(path, "w") as tar:
        for name in names:
            pixels[name] = photo(folder / "member.png", 8, 8, zlib.crc32(name.encode()))
            tar.add(folder / "member.png", name)
        (folder / "note.txt").write_text("not an image")
        tar.add(folder / "note.txt", "note.txt")
    return pixels


def test_bundled_images():
    test = data.list_images(data.KODAK)
    assert [p.name for p in test] == [f"kodim{i:02}.png" for i in range(1, 25)]
    train = data.find_items(None)
    assert train and not {item.path.stem for item in train} & {p.stem for p in test}
    for item in train:
        with Image.open(item.path) as image:
            assert min(image.size) >= 256, item.name  # the default crop


@pytest.mark.parametrize("files, expected", [
    pytest.param(["b.png", "a.JPG", "note.txt"], ["a.JPG", "b.png"], id="flat"),
    pytest.param(["train/b.png", "train/deep/a.png", "test/c.png"],
                 ["train/b.png", "train/deep/a.png"], id="train and test"),
    pytest.param(["train/s1/im1.png", "train/s1/im2.png", "train/s2/im1.png", "test/s3/im1.png"],
                 ["train/s1/im1.png", "train/s2/im1.png"], id="first frame of each sequence"),
    pytest.param(["sequences/00001/0001/im1.png", "sequences/00001/0001/im2.png",
                  "sequences/00001/0002/im1.png", "sequences/00002/0001/im1.png"],
                 ["sequences/00001/0001/im1.png", "sequences/00002/0001/im1.png"],
                 id="Vimeo-90k as published"),
])
def test_folder_layouts(files, expected, tmp_path):
    for i, name in enumerate(files):
        photo(tmp_path / name.replace(".txt", ".png"), 8, 8, i)
        if name.endswith(".txt"):
            (tmp_path / name.replace(".txt", ".png")).rename(tmp_path / name)
    if files[0].startswith("sequences"):
        (tmp_path / "sep_trainlist.txt").write_text("00001/0001\n00002/0001\n")
        (tmp_path / "sep_testlist.txt").write_text("00001/0002\n")
    items = data.find_items(tmp_path)
    assert [item.name for item in items] == [str(tmp_path / name) for name in expected]
    assert all(item.read().shape == (3, 8, 8) for item in items)


@pytest.mark.parametrize("shards, root", [
    (["a.tar"], "a.tar"), (["a.tar", "b.tar"], "."),
    (["train_0/a.tar", "train_1/a.tar", "test_0/c.tar"], ".")])
def test_tar_shards(shards, root, tmp_path):
    pixels = [shard(tmp_path / "set" / s, [f"{s}-2.png", f"x/{s}-1.png"], tmp_path) for s in shards]
    items = data.find_items(tmp_path / "set" / root)
    expected = [(tmp_path / "set" / s, x) for s, x in zip(shards, pixels, strict=True)
                if not s.startswith("test")]
    assert [i.name for i in items] == [f"{s}:{n}" for s, x in expected for n in sorted(x)]
    wanted = [x[n] for _, x in expected for n in sorted(x)]
    assert all(torch.equal(i.read(), x) for i, x in zip(items, wanted, strict=True))


def test_mistakes_name_the_file_or_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "note.txt").write_text("no image")
    (tmp_path / "broken.tar").write_bytes(b"\1" * 2000)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "empty" / "note.txt", "note.txt")
    with tarfile.open(tmp_path / "texts.tar", "w") as tar:
        tar.add(tmp_path / "empty" / "note.txt", "note.txt")
    for name in ["absent", "empty", "broken.tar", "packed.tar", "texts.tar", "absent.tar"]:
        with pytest.raises(UserError, match=name):
            data.find_items(tmp_path / name)
    for name in ["absent", "empty"]:
        with pytest.raises(UserError, match=name):
            data.list_images(tmp_path / name)


def test_broken_members_and_lists_are_named(tmp_path):
    shard(tmp_path / "a.tar", ["one.png", "two.png"], tmp_path)
    items = data.find_items(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[: items[1].offset + 60])
    items[0].read()
    with pytest.raises(UserError, match="a.tar:two.png"):
        items[1].read()
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UserError, match="a.tar:one.png"):
        items[0].read()

    vimeo = tmp_path / "vimeo"
    vimeo.mkdir()
    (vimeo / "sep_trainlist.txt").write_text("00001/0001\n")
    with pytest.raises(UserError, match="0001/im1.png"):
        data.find_items(vimeo)[0].read()
    (vimeo / "sep_trainlist.txt").write_text("\n")
    with pytest.raises(UserError, match="sep_trainlist"):
        data.find_items(vimeo)


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


# ---------------------------------------------------------------------------------------- crops
@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Seven images of different size whose red channel is the number of the image."""
    folder = tmp_path_factory.mktemp("items")
    for i in range(7):
        x = torch.randint(0, 256, (3, 40 + i, 50 - i), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(i))
        x[0] = i
        data.write_image(x, folder / f"{i}.png")
    return data.find_items(folder)


def steps(crops, first, last, batch=4, **kwargs):
    return torch.cat(list(data.loader(crops, first, last, batch, **kwargs)))


@pytest.mark.parametrize("flip", [False, True])
def test_sample_depends_on_seed_and_number_only(items, flip):
    first, second = (data.Crops(items, 16, 3, flip) for _ in range(2))
    forwards = [first[k] for k in range(30)]
    backwards = [second[k] for k in reversed(range(30))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert all(x.shape == (3, 16, 16) and x.dtype == torch.uint8 for x in forwards)
    other = data.Crops(items, 16, 4, flip)
    assert sum(torch.equal(x, other[k]) for k, x in enumerate(forwards)) == 0
    assert [int(x[0, 0, 0]) for x in forwards] != [int(other[k][0, 0, 0]) for k in range(30)]
    assert torch.equal(data.Crops(items, 16, -1, flip)[5], data.Crops(items, 16, -1, flip)[5])


def test_one_pass_visits_each_image_once(items):
    crops = data.Crops(items, 16)
    passes = [[int(crops[k][0, 0, 0]) for k in range(7 * p, 7 * p + 7)] for p in range(4)]
    assert all(sorted(p) == list(range(7)) for p in passes)
    assert len({tuple(p) for p in passes}) > 1


def test_crops_are_parts_of_the_image_everywhere_in_it(items):
    """Of 40 + 0 rows and 50 columns, a 39x39 crop has 2 x 12 places: all occur, half flipped."""
    image = items[0].read()
    crops = data.Crops(items[:1], 39, flip=True)
    places = {(t, f, left): (image.flip(-1) if f else image)[:, t : t + 39, left : left + 39]
              for t in range(2) for left in range(12) for f in (False, True)}
    seen = [next(key for key, x in places.items() if torch.equal(x, crops[k])) for k in range(400)]
    assert {key[0] for key in seen} == {0, 1} and {key[2] for key in seen} == set(range(12))
    assert 140 < sum(key[1] for key in seen) < 260
    assert data.Crops(items[:1], 40)[0].shape == (3, 40, 40)  # the largest that fits


def test_batches_do_not_depend_on_loader_processes(items):
    crops = data.Crops(items, 16, flip=True)
    alone = steps(crops, 0, 5)
    assert alone.shape == (20, 3, 16, 16)
    assert torch.equal(alone, torch.stack([crops[k] for k in range(20)]))
    assert torch.equal(steps(data.Crops(items, 16, flip=True), 0, 5, num_workers=2), alone)
    assert torch.equal(steps(data.Crops(items, 16, flip=True), 3, 5), alone[12:])  # resumed


def test_two_processes_share_the_batch_of_one(items):
    crops = data.Crops(items, 16)
    whole = list(data.loader(crops, 2, 5, 6))
    halves = [list(data.loader(crops, 2, 5, 3, rank, 2)) for rank in (0, 1)]
    assert len(whole) == len(halves[0]) == len(data.loader(crops, 2, 5, 3, 1, 2)) == 3
    for batch, a, b in zip(whole, *halves, strict=True):
        assert torch.equal(batch, torch.cat([a, b]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_numbers_are_left_alone(items, num_workers):
    before = torch.get_rng_state()
    steps(data.Crops(items, 16, flip=True), 0, 2, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_decoded_images_are_cached_up_to_a_limit(items, monkeypatch):
    reads = []
    original = data.Item.read
    monkeypatch.setattr(data.Item, "read", lambda self: reads.append(self) or original(self))
    crops = data.Crops(items, 16)
    samples = [crops[k] for k in range(21)]
    assert len(reads) == 7
    monkeypatch.setattr(data, "CACHE_PIXELS", 3 * 50 * 50)
    bounded = data.Crops(items, 16)
    assert all(torch.equal(x, bounded[k]) for k, x in enumerate(samples))
    assert 7 + 3 * 4 > len(reads) - 7 > 7  # three images at least were read once


def test_image_smaller_than_the_crop_is_named(items):
    with pytest.raises(UserError, match="6.png: 44x46 is smaller than the 45x45 crop"):
        data.Crops(items[6:], 45)[0]


def test_error_in_a_loader_process_is_one_line(items):
    script = ("from common import cli, data\n"
              "from pathlib import Path\n"
              "def main():\n"
              f"    crops = data.Crops([data.Item(Path({str(items[6].path)!r}))], 45)\n"
              "    next(iter(data.loader(crops, 0, 1, 2, num_workers=1)))\n"
              "cli.run(main)\n")
    _, errors = forks.run("-c", script, cwd=ROOT, status=2)
    lines = errors.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {items[6].path}: 44x46 is smaller")
