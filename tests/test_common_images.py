"""Reading an image of any mode, writing one, and mistakes with single images."""

import io
import struct
import zlib

from common import UserError, data, files

import numpy as np
import pytest
import torch
from helpers import photo
from PIL import Image

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


def read(path):
    """The pixels as (H, W, 3) and what was said."""
    said = []
    x = data.read_image(path, said.append)
    assert x.dtype == torch.uint8 and x.is_contiguous()
    return x.permute(1, 2, 0).numpy(), said


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
