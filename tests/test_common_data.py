"""Reading any image, finding the images of a data set, and the crops of a run."""

import io
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

from common import UserError, data, files

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
RGB = np.array([[[200, 10, 30], [0, 255, 128], [255, 255, 255]],
                [[1, 2, 3], [90, 80, 70], [0, 0, 0]]], dtype=np.uint8)  # 2 rows, 3 columns
GRAY = RGB[..., 0]


def png16(samples, colour_type):
    """A PNG of 16 bits a sample, which Pillow cannot write; samples (H, W, channels)."""
    def chunk(tag, body):
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def photo(path, height=40, width=48, seed=0):
    """Write a random RGB PNG; returns its pixels (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    data.write_image(x, path)
    return x


def read(path):
    """The pixels as (H, W, 3) and what was said."""
    said = []
    x = data.read_image(path, said.append)
    assert x.dtype == torch.uint8 and x.is_contiguous()
    return x.permute(1, 2, 0).numpy(), said


# ------------------------------------------------------------------------------- single images
def gray_rgb(a):
    return np.repeat(a[..., None], 3, axis=-1)


def with_alpha(a, alpha):
    return np.concatenate([a if a.ndim == 3 else a[..., None],
                           np.full((2, 3, 1), alpha, np.uint8)], axis=-1)


def palette(transparency=None):
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 255])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def stored(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


COLOURS = np.array([[10, 20, 30], [200, 100, 50], [0, 0, 255]], np.uint8)
PALETTED = COLOURS[[[0, 1, 2], [2, 1, 0]]]
HOLE = PALETTED.copy()
HOLE[PALETTED[..., 2] == 50] = 255  # the colour number 1
BITS = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
DEEP = RGB.astype(np.uint16) * 257  # v * 257 is v cut to 8 bits, whichever way one rounds


@pytest.mark.parametrize("content, expected, word", [
    pytest.param(stored(Image.fromarray(RGB)), RGB, None, id="RGB"),
    pytest.param(stored(Image.fromarray(GRAY)), gray_rgb(GRAY), "grayscale", id="L"),
    pytest.param(stored(Image.fromarray(GRAY), transparency=200),
                 gray_rgb(np.where(GRAY == 200, 255, GRAY).astype(np.uint8)), "on white",
                 id="L, one level transparent"),
    pytest.param(stored(Image.fromarray(RGB), transparency=(1, 2, 3)),
                 np.where((RGB == [1, 2, 3]).all(-1, keepdims=True), 255, RGB).astype(np.uint8),
                 "on white", id="RGB, one colour transparent"),
    pytest.param(stored(Image.fromarray(with_alpha(GRAY, 255), "LA")), gray_rgb(GRAY), "mode LA",
                 id="LA opaque"),
    pytest.param(stored(Image.fromarray(with_alpha(GRAY, 0), "LA")), np.full_like(RGB, 255),
                 "on white", id="LA transparent"),
    pytest.param(stored(Image.fromarray(with_alpha(RGB, 255), "RGBA")), RGB, "mode RGBA",
                 id="RGBA opaque"),
    pytest.param(stored(Image.fromarray(with_alpha(RGB, 51), "RGBA")),
                 np.rint(0.2 * RGB + 0.8 * 255).astype(np.uint8), "on white", id="RGBA one fifth"),
    pytest.param(stored(palette()), PALETTED, "palette", id="P"),
    pytest.param(stored(palette(1)), HOLE, "on white", id="P, one colour transparent"),
    pytest.param(stored(Image.fromarray(BITS).convert("1")), gray_rgb(BITS), "black and white",
                 id="1"),
    pytest.param(stored(Image.fromarray(DEEP[..., 0])), gray_rgb(GRAY), "16-bit", id="I;16"),
    pytest.param(stored(Image.fromarray(GRAY.astype(np.float32) / 255), "TIFF"), gray_rgb(GRAY),
                 "float grayscale, 0 to 1 taken", id="float to 1"),
    pytest.param(stored(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), gray_rgb(GRAY),
                 "float grayscale, 0 to 255 taken", id="float to 255"),
    pytest.param(stored(Image.fromarray(GRAY.astype(np.int32)), "TIFF"), gray_rgb(GRAY),
                 "32-bit grayscale, 0 to 255 taken", id="32 bit"),
    pytest.param(png16(DEEP[..., :1], 0), gray_rgb(GRAY), "16-bit", id="16-bit gray"),
    pytest.param(png16(DEEP, 2), RGB, "16 bits", id="16-bit RGB"),
])
def test_every_mode_becomes_rgb(content, expected, word, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    x, said = read(path)
    assert x.shape == expected.shape
    assert np.abs(x.astype(int) - expected).max() <= (word == "on white")  # blending may round
    if word is None:
        assert said == []
    else:
        assert len(said) == 1 and word in said[0] and str(path) in said[0]


def test_cmyk_jpeg(tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("CMYK", (24, 16), (0, 255, 255, 0)).save(path, quality=100)  # red ink
    x, said = read(path)
    assert x.shape == (16, 24, 3) and "CMYK" in said[0]
    assert np.abs(x.astype(int) - [255, 0, 0]).max() <= 8


def test_grayscale_beyond_16_bits_is_refused(tmp_path):
    for values in ([[70000, 3]], [[-1, 3]]):
        Image.fromarray(np.array(values, np.int32)).save(tmp_path / "x.tiff")
        with pytest.raises(UserError, match="x.tiff: .*outside 0 to 65535"):
            read(tmp_path / "x.tiff")


def test_an_image_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="it is a folder"):
        data.write_image(torch.zeros(3, 2, 2), tmp_path)
    with pytest.raises(UserError, match="name an image file, as x.png"):
        data.write_image(torch.zeros(3, 2, 2), tmp_path / "x.bin")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; the file that was there is kept"):
        data.write_image(torch.zeros(3, 2, 2), path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize("orientation, turned", [
    (1, RGB), (2, RGB[:, ::-1]), (3, RGB[::-1, ::-1]), (6, np.rot90(RGB, -1)), (8, np.rot90(RGB))])
def test_exif_orientation_is_applied(orientation, turned, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "x.png", exif=exif)
    x, said = read(tmp_path / "x.png")
    assert np.array_equal(x, turned) and said == []


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif", ".gif", ".ppm"])
@pytest.mark.parametrize("keep", [0.0, 0.03, 0.5])
def test_truncated_image_is_named(suffix, keep, tmp_path):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    photo(whole)
    content = whole.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match=f"cut{suffix}") as error:
        data.read_image(path)
    assert "\n" not in str(error.value)


def test_missing_and_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    for path in [tmp_path / "absent.png", tmp_path / "text.png", tmp_path]:
        with pytest.raises(UserError, match=path.name):
            data.read_image(path)


def test_rounding_and_writing(tmp_path):
    x = torch.tensor([-0.1, 0.0, 0.49 / 255, 0.51 / 255, 127.4 / 255, 127.6 / 255, 1.0, 1.7])
    before = x.clone()
    assert data.to_uint8(x).tolist() == [0, 0, 0, 1, 127, 128, 255, 255]
    assert torch.equal(x, before)
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(data.to_uint8(data.to_float(levels)), levels)

    image = x.expand(3, 2, 8).clone().requires_grad_()  # as a model returns it
    data.write_image(image, tmp_path / "new" / "x.png")
    assert torch.equal(data.read_image(tmp_path / "new" / "x.png"), data.to_uint8(image))
    written = photo(tmp_path / "y.png")
    assert torch.equal(data.read_image(tmp_path / "y.png"), written)


def test_image_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in [tmp_path / "x.unknown", tmp_path / "file" / "x.png"]:
        with pytest.raises(UserError, match=path.name):
            data.write_image(torch.zeros(3, 2, 2), path)


def test_batches_group_neighbours_of_equal_size(tmp_path):
    sizes = [(8, 9), (8, 9), (8, 9), (9, 8), (8, 9), (8, 9)]
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    images = [photo(p, *size, seed=i) for i, (p, size) in enumerate(zip(paths, sizes, strict=True))]
    found = list(data.batches(paths, 2))
    assert [len(group) for group, _ in found] == [2, 1, 1, 2]
    assert [p for group, _ in found for p in group] == paths
    for image, read_back in zip(images, (x for _, group in found for x in group), strict=True):
        assert torch.equal(image, read_back)
    assert list(data.batches([], 2)) == []


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
    script = ("from common import data, runs\n"
              "from pathlib import Path\n"
              "def main():\n"
              f"    crops = data.Crops([data.Item(Path({str(items[6].path)!r}))], 45)\n"
              "    next(iter(data.loader(crops, 0, 1, 2, num_workers=1)))\n"
              "runs.cli(main)\n")
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    lines = run.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {items[6].path}: 44x46 is smaller")
