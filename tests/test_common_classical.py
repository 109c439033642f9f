"""Classical codecs: every one decodes what it has coded, and its rate parameter does what it says.

HEVC, VVC and JPEG XL are tested where their optional packages are installed.
"""

import dataclasses
import io
import json

from common import UserError, data, metrics
from common.comparison import deltas, gather, measured
from common.evaluation import classical, image_sets, intra_video
from common.evaluation.classical import CODECS

import pytest
import torch
from PIL import Image

FAST = [name for name in CODECS if name != "vvc"]  # which takes a second for each tiny image


def installed(name):
    if need := CODECS[name].missing():
        pytest.skip(f"{CODECS[name].name} needs {need}")
    return CODECS[name]


@pytest.mark.parametrize("name", FAST)
def test_more_bits_give_a_better_image_of_the_same_size(name, tiny_image):
    codec, points = installed(name), []
    for value in (codec.values[0], codec.values[-2]):
        file, decoded, *_ = codec.code(tiny_image, value)
        assert decoded.shape == tiny_image.shape and decoded.dtype == torch.uint8
        points.append((len(file), metrics.psnr(tiny_image, decoded)))
    (small, low), (large, high) = points
    assert small < large and low + 3 < high


@pytest.mark.parametrize("name", ["hevc", "vvc"])
def test_sides_that_are_no_multiple_of_eight(name, tiny_image):
    codec, x = installed(name), tiny_image[:, :41, :51].contiguous()
    file, decoded, *_ = codec.code(x, codec.values[-1])
    assert decoded.shape == x.shape and metrics.psnr(x, decoded) > 30


@pytest.mark.parametrize("name", [n for n in CODECS if CODECS[n].suffix])
def test_files_that_the_page_shows_are_those_of_pillow(name, tiny_image):
    file, decoded, *_ = installed(name).code(tiny_image, CODECS[name].values[-1])
    with Image.open(io.BytesIO(file)) as image:
        assert Image.registered_extensions()[CODECS[name].suffix] == image.format
        assert torch.equal(data.read_image(io.BytesIO(file)), decoded)


def test_ycbcr_is_that_of_bt709(tiny_image):
    """By hand: white, and pure blue, whose Cb is 1/2 and whose luma is 0.0722."""
    x = torch.tensor([[255, 0], [255, 0], [255, 255]], dtype=torch.uint8)[:, None]
    y, cb, cr = intra_video.to_ycbcr(x)[:, 0]
    assert y.tolist() == pytest.approx([1, 0.0722]) and cb.tolist() == pytest.approx([0, 0.5])
    assert cr[1] == pytest.approx(-0.0722 / (2 - 2 * 0.2126))
    assert torch.equal(intra_video.to_rgb(intra_video.to_ycbcr(tiny_image)), tiny_image)


@pytest.mark.parametrize("bits, subsample, least", [(8, False, 50), (10, False, 60),
                                                    (10, True, 30)])
def test_planes_are_rounded_once(bits, subsample, least, tiny_image):
    planes = intra_video.to_planes(tiny_image, bits, subsample)
    assert len(planes) == 48 * 64 * (1.5 if subsample else 3) * (2 if bits > 8 else 1)
    found = intra_video.from_planes(planes, (48, 64), bits, subsample)
    assert metrics.psnr(tiny_image, found) > least


def test_a_codec_that_is_not_installed_is_named(monkeypatch, tmp_path, tiny_image):
    data.write_image(tiny_image, tmp_path / "a.png")
    missing = classical.Classical("NEW", "", "quality", (1,), classical.pillow("NEW"),
                                  package=("a-new-codec", "no_such_module"))
    monkeypatch.setitem(CODECS, "new", missing)
    with pytest.raises(UserError, match="NEW is not installed; it needs: pip install a-new-codec"):
        classical.measure("new", [tmp_path / "a.png"])
    problems = []
    images = {tmp_path / "a.png": "x"}
    found = measured.measure_all(images, tmp_path, ["new", "webp"], problems, jobs=1)
    assert list(found) == ["webp"]
    assert problems == ["NEW is left out: it needs pip install a-new-codec"]


def test_an_ffmpeg_without_the_encoder_is_named():
    codec = installed("hevc")
    assert intra_video.has_encoder("libx265") and not intra_video.has_encoder("libx26")
    missing = dataclasses.replace(codec, encoder="libx999")
    assert missing.missing() == "libx999 in ffmpeg: pip install 'imageio-ffmpeg>=0.8'"


def test_what_was_measured_is_not_measured_again(monkeypatch, tmp_path, tiny_image):
    """An interrupted file is; and an image under another name is the same image."""
    for name in "ab":
        data.write_image(tiny_image if name == "a" else tiny_image.flip(-1),
                         tmp_path / f"{name}.png")
    images = {path: image_sets.image_digest(data.read_image(path))
              for path in sorted(tmp_path.glob("*.png"))}
    calls = []
    code_image = classical.code_image
    monkeypatch.setattr(classical, "code_image", lambda codec, path, **further: (
        calls.append(path.stem), code_image(codec, path, **further))[1])
    first = measured.measure_all(images, tmp_path, ["jpeg"], [], jobs=1)
    assert calls == ["a", "b"]
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    images = {path.with_stem("c") if path.stem == "a" else path: d for path, d in images.items()}
    again = measured.measure_all(images, tmp_path, ["jpeg"], [], jobs=1)
    assert calls == ["a", "b"]
    assert again["jpeg"]["results"]["bpp"] == first["jpeg"]["results"]["bpp"]
    assert [row["image"] for row in again["jpeg"]["per_image"][0]] == ["c", "b"]
    file = next(tmp_path.glob("classical/jpeg-*/*.json"))
    file.write_text(file.read_text()[:-5])
    measured.measure_all(images, tmp_path, ["jpeg"], [], jobs=1)
    assert len(calls) == 3
    assert json.loads(file.read_text())["rows"]


@pytest.mark.slow
def test_jpeg_is_within_three_percent_of_the_published_curve():
    """Same 24 images, same encoder: what is left is another version of Pillow and of libjpeg."""
    curves = gather.published(gather.ROOT, image_sets.KNOWN["Kodak"], [])
    theirs = gather.find(curves, gather.same_codecs()["JPEG"][0])
    paths = data.list_images(data.KODAK)
    ours = gather.Curve("ours", "classical", classical.jpeg(paths, (10, 30, 50, 70, 90), False))
    found = deltas.delta(theirs, ours)
    assert abs(found.rate) < 3 and found.high - found.low > 10
