"""What image files hold beside their pixels: size, orientation, colour profile, further frames."""

import ast
import io
import random
import struct
import sys
import zlib
from pathlib import Path

import common
from common import UserError, files, image_check, image_io
from common.datasets import Item

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_common_images import DEEP, GRAY, RGB, gray_rgb, png16, read, stored


def chunk(tag, body):
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


# ---------------------------------------------------------------------------- size and orientation
def test_size_is_checked_before_pixels_are_read(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    for width, height in ((60000, 60000), (65536, 1), (16385, 16384)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                         + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
        with monkeypatch.context() as patch, \
                pytest.raises(UserError, match=rf"bomb.png: states {width}x{height} .*cut it"):
            patch.setattr(Image.core, "new", None)  # pixels cannot be allocated
            read(path)
        why = image_check.find_unusable([Item(path)])[0]  # before a training
        assert f"states {width}x{height} pixels" in why


def test_image_that_exceeds_the_memory_is_named(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(stored(Image.fromarray(RGB)))

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(UserError, match="x.png: needs more memory than there is"):
        read(path)


def exif_with(orientation, rng):
    """EXIF data with this orientation among tags of wrong types, sizes and places."""
    order = rng.choice("<>")
    tags = [struct.pack(order + "HHII", rng.choice([0x010F, 0x011A, 0x8769, 0x8825, 0xA005]),
                        rng.choice([*range(1, 14), 0, 77]), rng.choice([0, 1, 2, 70, 2**31]),
                        rng.choice([0, 8, 26, 60, 2**32 - 1])) for _ in range(rng.randrange(6))]
    tags.insert(rng.randrange(len(tags) + 1),
                struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0))
    return (b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*")
            + struct.pack(order + "IH", 8, len(tags)) + b"".join(tags)
            + rng.randbytes(rng.randrange(40)))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_orientation_is_read_whatever_the_other_tags_hold(kind):
    rng = random.Random(0)
    black = np.zeros((16, 24, 3), np.uint8)
    black[:8, :8] = 255  # the upper left corner, and to which rows and columns it goes
    corner = {1: (0, 0), 2: (0, 16), 3: (8, 16), 4: (8, 0), 5: (0, 0), 6: (0, 8), 7: (16, 8),
              8: (16, 0)}
    for k in range(80):
        orientation = k % 8 + 1
        content = stored(Image.fromarray(black), kind, exif=exif_with(orientation, rng))
        x = image_io.read_image(io.BytesIO(content), name="x").permute(1, 2, 0).numpy()
        top, left = corner[orientation]
        expected = np.zeros((16, 24, 3) if orientation < 5 else (24, 16, 3))
        expected[top : top + 8, left : left + 8] = 255
        assert x.shape == expected.shape and np.abs(x - expected).max() < 50


def test_tags_that_are_no_orientation_change_nothing(tmp_path):
    path = tmp_path / "x.png"
    for exif in (b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", bytes(40),
                 exif_with(0, random.Random(1)), exif_with(9, random.Random(2))):
        path.write_bytes(stored(Image.fromarray(RGB), exif=exif))
        assert np.array_equal(read(path)[0], RGB)


# ------------------------------------------------------------------------------------- colours
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped():
    """A profile whose red is sRGB's green, and the other way round."""
    return (SRGB.replace(b"rXYZ", b"tmp.", 1).replace(b"gXYZ", b"rXYZ", 1)
            .replace(b"tmp.", b"gXYZ", 1))


def gray_profile():
    """sRGB's curve ((v + 0.055) / 1.055) ** 2.4 with the exponent 1, for gray values."""
    profile = bytearray(SRGB.replace(b"rTRC", b"kTRC", 1))
    profile[16:20] = b"GRAY"
    curve = profile.index(b"para")
    profile[curve + 12 : curve + 16] = struct.pack(">i", 1 << 16)
    return bytes(profile)


def test_colours_are_converted_to_srgb(tmp_path):
    path, alpha = tmp_path / "x.png", np.full((2, 3, 1), 51, np.uint8)
    green = RGB[..., [1, 0, 2]]
    path.write_bytes(stored(Image.fromarray(RGB), icc_profile=swapped()))
    x, said = read(path)
    assert np.abs(x.astype(int) - green).max() <= 1
    assert len(said) == 1 and "converted to sRGB" in said[0]

    path.write_bytes(stored(Image.fromarray(np.concatenate([RGB, alpha], -1), "RGBA"),
                            icc_profile=swapped()))
    x, said = read(path)
    assert np.abs(x - (0.2 * green + 0.8 * 255)).max() <= 1.5  # converted, then laid on white
    assert "converted to sRGB, transparency laid on white" in said[0]

    path.write_bytes(stored(Image.fromarray(np.full((2, 3), 100, np.uint8)),
                            icc_profile=gray_profile()))
    x, said = read(path)
    linear = (100 / 255 + 0.055) / 1.055
    assert np.abs(x - 255 * (1.055 * linear ** (1 / 2.4) - 0.055)).max() <= 1
    assert "grayscale" in said[0] and "converted to sRGB" in said[0]


def test_name_of_a_profile_does_not_reach_the_terminal_raw(tmp_path):
    path, name = tmp_path / "x.png", "sRGB built-in".encode("utf-16-be")
    assert name in SRGB
    path.write_bytes(stored(Image.fromarray(RGB), icc_profile=swapped().replace(
        name, "s\x1b\nB b\xfcilt-in".encode("utf-16-be"))))
    assert "colour profile 'sB b?ilt-in' converted" in read(path)[1][0]


@pytest.mark.parametrize("content, expected, word", [
    pytest.param(stored(Image.fromarray(RGB), icc_profile=SRGB), RGB, None, id="sRGB"),
    pytest.param(stored(Image.fromarray(RGB), icc_profile=SRGB[:200]), RGB, "cannot be read",
                 id="cut short"),
    pytest.param(stored(Image.fromarray(RGB), icc_profile=gray_profile()), RGB, "is for mode L",
                 id="for gray"),
    pytest.param(stored(Image.new("CMYK", (3, 2)), "TIFF", icc_profile=swapped()),
                 np.full_like(RGB, 255), "is for mode RGB", id="for RGB"),
])
def test_profile_that_is_not_needed_or_not_usable_keeps_the_colours(content, expected, word,
                                                                    tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    x, said = read(path)
    assert np.array_equal(x, expected)
    assert said == [] if word is None else len(said) == 1 and word in said[0]


# ---------------------------------------------------------------------- what 8-bit RGB cannot hold
@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP"])
def test_further_frames_are_mentioned(kind, tmp_path):
    frames = [Image.fromarray(np.full((16, 24, 3), v, np.uint8)) for v in (10, 120, 240)]
    path = tmp_path / "x"
    path.write_bytes(stored(frames[0], kind, save_all=True, append_images=frames[1:]))
    x, said = read(path)
    assert np.abs(x.astype(int) - 10).max() <= 2 and "first of 3 frames" in said[0]


def test_sixteen_bits_and_transparency_are_both_mentioned(tmp_path):
    path = tmp_path / "x.png"
    half = np.full((2, 3, 1), 51 * 257, np.uint16)
    path.write_bytes(png16(np.concatenate([DEEP, half], -1), 6))
    x, said = read(path)
    assert np.abs(x - (0.2 * RGB + 0.8 * 255)).max() <= 1
    assert "16 bits a sample" in said[0] and "transparency laid on white" in said[0]

    def with_clear(samples, colour_type, *levels):
        content = png16(samples, colour_type)
        at = content.index(b"IDAT") - 4
        clear = chunk(b"tRNS", struct.pack(f">{len(levels)}H", *levels))
        return content[:at] + clear + content[at:]

    level = int(DEEP[0, 1, 0])
    path.write_bytes(with_clear(DEEP[..., :1], 0, level))
    x, said = read(path)
    assert np.array_equal(x, gray_rgb(np.where(DEEP[..., 0] == level, 255, GRAY)))
    assert "16-bit grayscale" in said[0] and "transparency laid on white" in said[0]
    path.write_bytes(with_clear(DEEP, 2, *DEEP[0, 0].tolist()))
    x, said = read(path)
    assert np.array_equal(x, RGB) and "16 bits a sample, its transparent colour kept" in said[0]


@pytest.mark.parametrize("white", [1, 255])
def test_float_image_may_exceed_its_range_a_little(white, tmp_path):
    levels = np.array([[0, 0.5, 1], [-0.02, 1.02, 1.2]], np.float32)
    Image.fromarray(levels * white).save(tmp_path / "x.tif")
    x, said = read(tmp_path / "x.tif")
    assert x[..., 0].tolist() == [[0, 128, 255], [0, 255, 255]]
    assert f"0 to {white} taken as black to white, values beyond clipped" in said[0]


def test_reading_an_image_imports_no_library_of_codecs():
    """Neither CompressAI nor timm, which take seconds."""
    for module in (common, files, image_io):
        nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text())))
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
            n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        assert {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} <= {
            "common", "common.files", "common.installed", "numpy", "numpy.typing", "PIL", "torch"}
