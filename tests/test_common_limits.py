"""Coding takes no more than a file can hold, and images that are none are refused in one line."""

import importlib
import json
import struct
import tracemalloc
from pathlib import Path

from common import UserError
from common.coding import bitstream, entropy
from common.coding.entropy import Tables
from common.coding.image_file import decode_image, encode_image, encode_images

import numpy as np
import pytest
import torch

from factorized.model import Factorized
from hyperprior.model import Hyperprior


def codec(kind):
    torch.manual_seed(0)
    model = kind(4, 6).eval()
    model.update()
    return model


# ---------------------------------------------------------------------- the bits of decoded symbols
def peaked(share):
    """Tables of one row, whose symbol 0 has `share` of 65536 and -1 and 1 the same of the rest."""
    side = (65536 - share) // 2 - 1
    row = [0, side, side + share, 2 * side + share, 65536]
    return Tables(torch.tensor([row]), torch.tensor([5]), torch.tensor([-1]))


@pytest.mark.parametrize("share", [65528, 60_000, 30_000])
def test_bits_of_symbols_are_those_of_the_string(share, monkeypatch):
    """The bound must hold for every valid string, and be close to it; here are a million symbols,
    some of which are outside the table.
    """
    generator = np.random.default_rng(0)
    tables, count = peaked(share), 1_000_000
    symbols = generator.choice([-1, 0, 1, 9], count, p=[
        (1 - share / 65536) / 2 - 1e-6, share / 65536, (1 - share / 65536) / 2 - 1e-6, 2e-6])
    symbols = torch.from_numpy(symbols)[None].int()
    string, = entropy.encode(symbols, torch.zeros(1, 1, dtype=torch.int32), tables)
    monkeypatch.setattr(entropy, "CHUNK", 1000)
    monkeypatch.setattr(entropy, "SUSPICIOUS", 0)
    decoder = entropy.Decoder(string, count, tables)
    found = decoder.decode(np.zeros(count, np.int32))
    decoder.finish()
    assert np.array_equal(found, symbols[0].numpy())
    assert 0 <= decoder.bits_left < 64 + 2e-4 * 8 * len(string) + 64 * (symbols == 9).sum()


CERTAIN, QUARTERS = [0, 1, 65535, 65536], [0, 16384, 32768, 49152, 65536]  # rows of CDF tables


def test_a_string_of_nearly_certain_symbols_decodes():
    """Two million zeros take 20 bytes here: such a file is not refused, but a larger size is."""
    tables, count = Tables(torch.tensor([CERTAIN]), torch.tensor([4]), torch.tensor([-1])), 2**21
    indexes = torch.zeros(1, dtype=torch.int32).expand(1, count)
    string, = entropy.encode(torch.zeros(1, count, dtype=torch.int32), indexes, tables)
    assert len(string) < 30
    assert not entropy.decode([string], indexes, tables).any()
    with pytest.raises(ValueError, match="too short"):
        entropy.decode([string], torch.zeros(1, dtype=torch.int32).expand(1, 9 * count), tables)


def test_garbage_stops_at_the_first_impossible_part(monkeypatch):
    """Random bytes for two million symbols, half of which take two bits each."""
    monkeypatch.setattr(entropy, "CHUNK", 4096)
    rows = torch.tensor([[*CERTAIN, 0], QUARTERS])
    tables, parts = Tables(rows, torch.tensor([4, 5]), torch.tensor([-1, 0])), []
    decode = entropy.Decoder.decode
    monkeypatch.setattr(entropy.Decoder, "decode", lambda self, rows: (
        parts.append(len(rows)), decode(self, rows))[1])
    string = np.random.default_rng(0).bytes(64)
    indexes = torch.arange(2, dtype=torch.int32)[None, :, None].expand(1, 2, 2**20)
    with pytest.raises(ValueError, match="too short"):
        entropy.decode([string], indexes.transpose(1, 2), tables)
    assert parts == [4096]


@pytest.mark.parametrize("kind", [Factorized, Hyperprior])
def test_a_tiny_file_that_states_a_huge_image(kind):
    """36 bytes, 16384x16384 pixels: refused before memory is taken, or after a part is decoded."""
    model = codec(kind)
    mark, strings = bitstream.fingerprint(model), [bytes(range(8)) for _ in "yz"]
    file = bitstream.pack(model.tag, mark, 16384, 16384, strings[: 1 + (kind is Hyperprior)])
    tracemalloc.start()
    with pytest.raises(UserError, match="does not decode"):
        decode_image(model, file, mark)
    peak = tracemalloc.get_traced_memory()[1]  # of NumPy and Python, with the coder's lists
    tracemalloc.stop()
    assert peak < 2e8 and len(file) < 64


# ------------------------------------------------------------------------------------------- images
GOLDEN = Path(__file__).parent / "golden"
CASES = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in (
    "factorized", "hyperprior", "joint_ar", "checkerboard", "convnextic-v1", "convnextic-v5",
    "qvrf-balle", "qvrf-minnen", "tbtc-conv-charm", "advdnic-base", "advdnic-variant3")}


@pytest.mark.parametrize("name", CASES)
def test_files_are_the_same_under_autocast(name):
    model = importlib.import_module(f"{CASES[name]['paper']}.model").load(GOLDEN / f"{name}.pt")
    x = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    rate = {"lmbda": 0.01} if name == "convnextic-v5" else {}
    file = encode_image(model, x, **rate)
    x_hat = decode_image(model, file)
    with torch.autocast("cpu", torch.bfloat16):
        assert encode_image(model, x, **rate) == file
        assert torch.equal(decode_image(model, file), x_hat)
        coded = model.compress(x, **rate)  # in bfloat16: another y, but it codes
        model.decompress(coded["strings"], coded["shape"], **rate)


@pytest.mark.parametrize("lmbda", [0.0, -1.0, float("inf"), float("nan"), 1e30, 1e-30])
def test_a_header_with_an_impossible_lmbda(lmbda):
    model = importlib.import_module("convnextic.model").load(GOLDEN / "convnextic-v5.pt")
    file = encode_image(model, torch.rand(3, 64, 64), lmbda=0.01)
    parts = bitstream.unpack(file, model.tag)
    forged = bitstream.pack(parts.tag, parts.fingerprint, 64, 64, parts.sections,
                            struct.pack("<f", lmbda))
    with pytest.raises(UserError, match="header states lmbda"):
        decode_image(model, forged)
    for parameters in (b"", bytes(5)):
        forged = bitstream.pack(parts.tag, parts.fingerprint, 64, 64, parts.sections, parameters)
        with pytest.raises(UserError, match="no rate of this model"):
            decode_image(model, forged)


@pytest.mark.parametrize("x, words", [
    (torch.full((3, 8, 8), 2.0), "from 0 to 1, not 2 to 2"),
    (torch.full((3, 8, 8), -0.1), "from 0 to 1"),
    (torch.full((3, 8, 8), float("nan")), "from 0 to 1, not nan"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), "float32, not uint8"),
    (torch.zeros(3, 8, 8, dtype=torch.float64), "float32, not float64"),
    (torch.zeros(1, 8, 8), r"not \(1, 1, 8, 8\)"), (torch.zeros(4, 8, 8), "remove a fourth"),
    (torch.zeros(8, 8, 3), "permute"), (torch.zeros(8, 8), "shape"),
    (torch.zeros(3, 0, 8), "shape"),
    (torch.zeros(2, 3, 8, 8), "one image is expected, not 2"),
    (torch.zeros(1, 1, 1).expand(3, 70_000, 1), "70000"), (np.zeros((3, 8, 8)), "ndarray")])
def test_what_is_no_image_is_refused(x, words):
    with pytest.raises(UserError, match=words) as caught:
        encode_image(codec(Factorized), x)
    assert "\n" not in str(caught.value)


def test_rounding_beyond_the_range_is_accepted():
    model, x = codec(Factorized), torch.rand(3, 16, 16)
    assert encode_image(model, x * 1.0005)
    assert len(encode_images(model, x.expand(2, 3, 16, 16))) == 2


def test_a_picture_with_nan_is_not_returned():
    model = codec(Factorized)
    file = encode_image(model, torch.rand(3, 16, 16))
    mark = bitstream.fingerprint(model)
    model.g_s[0].bias.data[0] = float("nan")  # of weights that were damaged after loading
    with pytest.raises(UserError, match="NaN"):
        decode_image(model, file, mark)
