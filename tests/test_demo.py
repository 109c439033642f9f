"""The page of `make demo`: what is behind it, its errors, and the page in a headless Chromium."""

import importlib.util
import io
import re
import signal
import socket
import struct
import time
import zlib
from pathlib import Path

from common import UserError, cli, data
from common.coding import bitstream, codecs, stages
from common.demo import __main__ as demo
from common.demo import coding, pictures, report

import browser
import forks
import pytest
import torch
from demo_page import (
    choose,
    download,
    encode,
    shown,
    upload,
    wait_for_change,
    wait_until_ready,
)
from PIL import Image

PAPERS = list(coding.choices())
VARIABLE = ("qvrf", "balle")
needs_browser = pytest.mark.skipif(not browser.program(),
                                   reason="needs Chromium (apt-get install chromium)")
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None,
                                  reason="needs gradio (make demo)")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A crop of 96x112 pixels, of which no side is a multiple of 64."""
    path = tmp_path_factory.mktemp("demo") / "photo.png"
    x = data.read_image(data.KODAK / "kodim23.png")
    data.write_image(x[:, 100:196, 420:532], path)
    return path


def png_header(width, height):
    """A PNG file that states its size, and ends where its pixels would begin."""
    fields = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + fields
            + struct.pack(">I", zlib.crc32(fields)) + struct.pack(">I", 1000) + b"IDAT")


# ------------------------------------------------------------------------------ behind the page
@pytest.mark.parametrize("paper", PAPERS)
def test_what_is_shown_is_what_the_file_holds(paper, photo):
    weights = coding.default_weights(paper)
    done = []
    result = coding.code(photo, paper, weights, 0.5, lambda share, text: done.append(share))
    model = coding.load(paper, weights).model
    assert torch.equal(result.decoded, data.to_uint8(codecs.decode(result.file, model, "cpu")))
    assert torch.equal(result.original, data.read_image(photo))
    assert done == sorted(done) and 0 <= done[0] < done[-1] < 1
    bits, size = result.bits, len(result.file)
    named = sum(value for name, value in bits.items() if name not in ("y", "step", "map"))
    assert named + sum(bits["y"]) == pytest.approx(size, abs=0.05 * (len(bits) + len(bits["y"])))
    assert result.latents.shape[-2:] == (bits["map"]["height"], bits["map"]["width"])
    for name, parts in (("compress", result.compress), ("decompress", result.decompress)):
        assert 0 < sum(parts.values()) <= result.seconds[name]
    assert {"g_a", "entropy coding"} <= {*result.compress}
    assert {"g_s", "entropy coding"} <= {*result.decompress}
    rates = model.rate_range()
    assert bool(result.rate) == bool(rates)
    if rates:
        assert rates.at(0) == pytest.approx(rates.low) and rates.at(1) == pytest.approx(rates.high)
        assert rates.at(0.5) == pytest.approx((rates.low * rates.high) ** 0.5)
        assert result.rate == f"{rates.name} {rates.at(0.5):.4g}"


def test_latents_are_those_that_the_synthesis_receives(photo):
    result = coding.code(photo, "hyperprior", "0.013")
    assert torch.equal(result.latents, result.latents.round()) and result.latents.any()
    shown = pictures.latent_channels(result.latents)
    spread = result.latents.flatten(1).var(1)
    assert shown[0][1].startswith(f"{int(spread.argmax())}: ")
    picture = pictures.bits_map(result.bits)
    most = torch.tensor(result.bits["map"]["bits"]).argmax()
    row, column = divmod(int(most), result.bits["map"]["width"])
    side = picture.width // result.bits["map"]["width"]
    assert picture.getpixel((column * side, row * side)) == (252, 254, 164)  # the last of inferno


def test_a_variable_rate_is_in_the_file_and_rises_with_the_slider(photo):
    model = coding.load(*VARIABLE).model
    files = [coding.code(photo, *VARIABLE, position).file for position in (0.0, 0.5, 1.0)]
    assert len(files[0]) < len(files[1]) < len(files[2])
    stated = [model.read_parameters(bitstream.unpack(file, model.tag).parameters) for file in files]
    assert stated == [coding.rate_at(model, position) for position in (0.0, 0.5, 1.0)]


def test_models_used_last_are_kept():
    first = coding.load("factorized", "0.0035")
    assert coding.load("factorized", "0.0035") is first
    for paper, weights in (("factorized", "0.013"), ("hyperprior", "0.0035"),
                           ("hyperprior", "0.013")):
        coding.load(paper, weights)
    assert coding.load("factorized", "0.0035") is not first


BAD = {
    "notes.txt": (b"this is no image", "notes.txt: is not an image in a known format"),
    "empty.png": (b"", "empty.png: is not an image in a known format"),
    "broken.png": (png_header(64, 64), "broken.png: not a readable image"),
    "huge.png": (png_header(12_000, 9_000), "huge.png: has 12000x9000 pixels, which are 108 million"
                 "; this page codes images of up to 16 million: scale it down"),
    "line.png": (png_header(70_000, 1), "line.png: states 70000x1 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_get_a_sentence(name, tmp_path):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        coding.code(tmp_path / name, "factorized", "0.0035")
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_papers_without_weights_are_named(monkeypatch, tmp_path):
    folder = codecs.weights_folder
    monkeypatch.setattr(codecs, "weights_folder",
                        lambda paper: tmp_path if paper == "qvrf" else folder(paper))
    assert coding.without_weights() == ["qvrf"] and "qvrf" not in coding.choices()
    with pytest.raises(UserError, match="qvrf has no bundled weights: .* `make weights-qvrf`"):
        coding.load("qvrf", "balle")
    with pytest.raises(UserError, match="no paper 'other': choose"):
        coding.load("other", "balle")


def test_large_images_are_coded_without_maps(monkeypatch, photo):
    monkeypatch.setattr(coding, "LIMIT", 96 * 112 - 1)
    result = coding.code(photo, "factorized", "0.0035")
    assert result.bits is None and result.latents is None
    assert "the maps" in result.notices[0]
    assert "compress" in report.times(result)


def test_notices_of_the_reader_are_shown(tmp_path):
    path = tmp_path / "gray.png"
    Image.linear_gradient("L").crop((0, 0, 64, 64)).save(path)
    result = coding.code(path, "factorized", "0.0035")
    assert result.notices == ["gray.png: grayscale, coded as 8-bit RGB"]
    assert "needs 161 pixels" in report.numbers(result)


def test_stages_inside_others_count_once():
    @stages.stage("inner")
    def inner():
        time.sleep(0.02)

    @stages.stage("outer")
    def outer():
        inner()
        time.sleep(0.01)

    outer()  # outside of `measure`, nothing is kept
    start = time.perf_counter()
    with stages.measure(torch.nn.Module()) as seconds:
        outer()
        inner()
    whole = time.perf_counter() - start
    assert seconds["inner"] >= 0.04 and seconds["outer"] >= 0.01
    assert sum(seconds.values()) <= whole
    with stages.measure(torch.nn.Module()) as seconds:
        pass
    assert seconds == {}


def test_steps_are_added_up_in_groups():
    assert report.steps([5.0], "pass") == [("y", 5.0)]
    assert report.steps([1.0, 2.0], "slice") == [("y, slice 1", 1.0), ("y, slice 2", 2.0)]
    rows = report.steps([1.0] * 141, "wave")
    assert len(rows) == report.MANY and sum(value for _, value in rows) == 141
    assert rows[0][0] == "y, waves 1 to 11" and rows[-1][0].endswith("to 141")


def test_names_of_files_are_text_in_the_page():
    assert "<script>" not in report.message("<script>.png: is broken", "error")
    assert "&lt;script&gt;.png" in report.message("<script>.png: is broken", "error")


# ----------------------------------------------------------------------------------- the command
@needs_gradio
def test_a_port_in_use_is_an_error_of_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _, errors = forks.run("-m", "common.demo", "--no-browser", "--port", str(port), status=2,
                              cwd=forks.ROOT)
    assert errors == (f"error: --port {port}: is in use or reserved; give another one, or leave it "
                      "out to take a free one\n")


def test_without_a_port_the_next_free_one_is_taken(monkeypatch, capsys):
    monkeypatch.setattr(demo, "_is_free", lambda port: port == demo.PORT + 2)
    assert demo.free_port(None) == demo.PORT + 2
    note = f"port {demo.PORT} is in use, so the page gets {demo.PORT + 2}"
    assert note in capsys.readouterr().out
    monkeypatch.setattr(demo, "_is_free", lambda port: False)
    with pytest.raises(UserError, match="are in use: give another one with --port"):
        demo.free_port(None)
    with pytest.raises(UserError, match="--port 70000: there are ports up to 65535"):
        demo.free_port(70_000)


def test_without_gradio_one_line_says_what_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: demo.main(["--no-browser"]))
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.count("\n") == 1
    assert "has no gradio: run `make demo`" in errors


# -------------------------------------------------------------------------------------- the page
@pytest.fixture(scope="module")
def server():
    """The command in a process of its own: its address, and at the end nothing is left of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = forks.start("-m", "common.demo", "--no-browser", "--port", str(port), "--threads",
                          "1", cwd=forks.ROOT)
    address = re.search(r"http://127\.0\.0\.1:\d+", process.first_line(300))[0]
    yield address
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def started(server):
    with browser.Browser(server) as page:
        yield page


@pytest.fixture
def opened(server, started):
    """The page as it is at first; whatever a test does on it must not raise an error."""
    started.call("Page.navigate", url="about:blank")
    started.call("Page.navigate", url=server)
    wait_until_ready(started)
    yield started
    assert started.errors == []
    assert [url for url in started.requests
            if not url.startswith((server, "data:", "blob:", "about:"))] == []


def decoded_by_codec(paper, file, folder):
    """The pixels that the paper's codec.py decodes from the content of a file."""
    Path(folder, "file.bin").write_bytes(file)
    forks.run("codec.py", "decode", str(Path(folder, "file.bin")), "-o",
              str(Path(folder, "out.png")), cwd=forks.ROOT / paper)
    return data.read_image(Path(folder, "out.png"))


@needs_browser
@needs_gradio
def test_files_of_the_page_decode_to_what_it_shows(opened, photo, tmp_path):
    upload(opened, photo)
    choose(opened, "paper", "hyperprior")
    numbers = encode(opened)
    file = download(opened, tmp_path, "file", "photo.bin")
    png = download(opened, tmp_path, "png", "photo.decoded.png")
    assert f"{len(file):,} bytes" in numbers and f"{8 * len(file) / (96 * 112):.4f} bpp" in numbers
    decoded = decoded_by_codec("hyperprior", file, tmp_path)
    assert torch.equal(decoded, data.read_image(io.BytesIO(png), name="png"))
    sizes = opened.run("""['original', 'decoded', 'bits'].map((name) => {
        const image = document.querySelector(`#${name} img`);
        return [image.naturalWidth, image.naturalHeight];
    })""")
    assert sizes[:2] == [[112, 96], [112, 96]] and min(sizes[2]) > 6
    assert opened.run("document.querySelectorAll('#latents img').length") == pictures.SHOWN
    text = opened.run("document.querySelector('#bytes').textContent")
    assert all(word in text for word in ("header and checksum", "z", "y"))
    assert "g_a" in opened.run("document.querySelector('#times').textContent")


@needs_browser
@needs_gradio
def test_the_slider_of_a_variable_rate_codes_again(opened, photo, tmp_path):
    upload(opened, photo)
    assert opened.run("document.querySelector('#rate')") is None  # of weights with one rate
    choose(opened, "paper", VARIABLE[0])
    opened.wait("document.querySelector('#rate input[type=range]') !== null")
    assert opened.run("document.querySelector('#weights input').value") == VARIABLE[1]
    middle = encode(opened)
    opened.run("""(() => {
        const slider = document.querySelector('#rate input[type=range]');
        slider.value = 90;
        slider.dispatchEvent(new Event('input', {bubbles: true}));
        slider.dispatchEvent(new PointerEvent('pointerup', {bubbles: true}));
    })()""")
    numbers = wait_for_change(opened, middle)
    model = coding.load(*VARIABLE).model
    rate = coding.describe_rate(model, 0.9)
    opened.wait(f"document.querySelector('#rate-text').textContent.includes('{rate}')")
    file = download(opened, tmp_path, "file", "photo.bin")
    png = download(opened, tmp_path, "png", "photo.decoded.png")
    assert f"{len(file):,} bytes" in numbers and rate.split()[1] in numbers
    assert file == coding.code(photo, *VARIABLE, 0.9).file
    assert torch.equal(decoded_by_codec(VARIABLE[0], file, tmp_path),
                       data.read_image(io.BytesIO(png), name="png"))


@needs_browser
@needs_gradio
def test_errors_are_sentences_in_the_page(opened, tmp_path):
    alert = "document.querySelector('#message [role=alert]')?.textContent ?? ''"
    opened.run("document.querySelector('#encode').click()")
    opened.wait(f"({alert}).includes('There is no image yet')")
    for name in ("notes.txt", "huge.png"):
        content, words = BAD[name]
        (tmp_path / name).write_bytes(content)
        if opened.run("document.querySelector('#image button[aria-label=\"Clear\"]') !== null"):
            opened.run("document.querySelector('#image button[aria-label=\"Clear\"]').click()")
            opened.wait("document.querySelector('#image input[type=file]') !== null")
        upload(opened, tmp_path / name)
        opened.run("document.querySelector('#encode').click()")
        opened.wait(f"({alert}).startsWith({words!r})")
        assert shown(opened) == ""
