"""The file format: overhead, checks, the fingerprint of the weights."""

import copy
import struct
import zlib

from common import UserError
from common.coding import bitstream, exact
from common.files import read_file

import pytest
import torch
from helpers import FactorizedPrior, ScaleHyperprior

TAG, WEIGHTS = b"test", bytes(range(8))


def resealed(body: bytes) -> bytes:
    """A file with a correct checksum over whatever `body` says."""
    return body + struct.pack("<I", zlib.crc32(body))


def header(height: bytes, width: bytes, rest: bytes) -> bytes:
    fixed = bitstream.MAGIC + bytes([bitstream.VERSION]) + TAG + WEIGHTS
    return resealed(fixed + height + width + rest)


def error(data: bytes, tag: bytes = TAG, fingerprint: bytes = WEIGHTS) -> str:
    with pytest.raises(UserError) as raised:
        bitstream.unpack(data, tag, fingerprint)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("parameters", [b"", b"\x03", bytes(300)])
@pytest.mark.parametrize("sections", [[b""], [b"abc"], [b"", b""], [bytes(70_000), b"xyz", b"\0"]])
def test_unpack_gives_what_was_packed(sections, parameters):
    data = bitstream.pack(TAG, WEIGHTS, 333, 70, sections, parameters)
    file = bitstream.unpack(data, TAG, WEIGHTS)
    assert (file.tag, file.fingerprint) == (TAG, WEIGHTS)
    assert (file.height, file.width) == (333, 70)
    assert (file.parameters, file.sections) == (parameters, sections)


@pytest.mark.parametrize(("side", "length", "overhead"), [
    (1, 0, 25), (512, 5_000, 28), (16383, 2_000_000, 29)])
def test_overhead(side, length, overhead):
    data = bitstream.pack(TAG, WEIGHTS, side, side, [bytes(length)] * 2)
    assert len(data) - 2 * length == overhead <= 32


def test_every_changed_byte_is_noticed():
    data = bitstream.pack(TAG, WEIGHTS, 40, 300, [b"some payload", b"and more"], b"\x05")
    for position in range(len(data)):
        for change in range(1, 256):
            damaged = bytearray(data)
            damaged[position] ^= change
            error(bytes(damaged))


def test_every_truncation_is_noticed():
    data = bitstream.pack(TAG, WEIGHTS, 40, 300, [b"some payload", b"and more"])
    for length in range(len(data)):
        error(data[:length])
    error(data + b"\0")


def test_each_error_has_its_own_message():
    good = bitstream.pack(TAG, WEIGHTS, 40, 300, [b"some payload", b"and more"])
    newer = resealed(good[:3] + b"\x09" + good[4:-4])
    lengths = header(b"\x28", b"\x28", b"\x00" + b"\x02\x7f" + b"short")
    messages = [
        error(b""),
        error(b"\x89PNG\r\n\x1a\n" + bytes(100)),
        error(good[:-1]),
        error(newer),
        error(good, tag=b"othr"),
        error(good, fingerprint=bytes(8)),
        error(header(b"\x00", b"\x28", b"\x00\x01payload")),
        error(lengths),
    ]
    assert len(set(messages)) == len(messages)
    for message, part in zip(messages, [
            "empty", "not one of our", "damaged", "version 9", "'test'", "--checkpoint", "pixels",
            "do not add up"], strict=True):
        assert part in message
    assert "'othr'" in messages[4]
    assert WEIGHTS.hex() in messages[5] and bytes(8).hex() in messages[5]


@pytest.mark.parametrize(("height", "width"), [
    (b"\x00", b"\x01"), (b"\x01", b"\x00"),
    (b"\x80\x80\x04", b"\x01"),  # 65536
    (b"\xff\xff\x03", b"\xff\xff\x03"),  # 65535 x 65535: more than 2^28 pixels
])
def test_impossible_sizes_are_refused(height, width):
    assert "pixels" in error(header(height, width, b"\x00\x01payload"))


@pytest.mark.parametrize("rest", [
    b"",  # ends before the parameters
    b"\x7f",  # parameters longer than the file
    b"\x00\x00",  # no section
    b"\x00\xff\xff\xff\x7f",  # more sections than bytes
    b"\x00\x03\x01\x01x",  # sections longer than the file
    b"\x00\x02\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a number without end
])
def test_lengths_that_do_not_add_up(rest):
    assert "do not add up" in error(header(b"\x28", b"\x28", rest))


def test_pack_refuses_what_unpack_would():
    with pytest.raises(UserError, match="70000x1 pixels"):
        bitstream.pack(TAG, WEIGHTS, 1, 70000, [b""])


def test_read_names_the_file(tmp_path):
    with pytest.raises(UserError, match="nothing.bin: No such file"):
        read_file(tmp_path / "nothing.bin")
    with pytest.raises(UserError, match="cannot read"):
        read_file(tmp_path)


def test_fingerprint_follows_weights_and_tables():
    torch.manual_seed(0)
    model = FactorizedPrior(8, 12).eval()
    before_update = bitstream.fingerprint(model)
    model.update()
    original = bitstream.fingerprint(model)
    assert len(original) == 8 and original != before_update
    for name in ("g_s.6.bias", "entropy_bottleneck._quantized_cdf"):
        changed = copy.deepcopy(model)
        values = changed.state_dict()[name].view(-1)
        values[1] += 1 if not values.is_floating_point() else 1e-6
        assert bitstream.fingerprint(changed) != original
    assert bitstream.fingerprint(model) == original


def test_fingerprint_ignores_layout_and_order():
    model = FactorizedPrior(8, 12).eval()
    original = bitstream.fingerprint(model)
    moved = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert not moved.g_a[2].weight.is_contiguous()
    assert bitstream.fingerprint(moved) == original
    moved.double()
    assert bitstream.fingerprint(moved) == original
    reordered = copy.deepcopy(model)
    reordered._modules = dict(reversed(list(reordered._modules.items())))
    assert bitstream.fingerprint(reordered) == original


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fingerprint_ignores_the_device():
    model = FactorizedPrior(8, 12).eval()
    original = bitstream.fingerprint(model)
    assert bitstream.fingerprint(model.cuda()) == original


def test_fingerprint_follows_fixed_point_settings():

    model = ScaleHyperprior(8, 12).eval()
    model.exact_parts = ("h_s",)
    original = bitstream.fingerprint(model)
    spec = exact.spec(model.h_s)
    spec["shifts"][0] -= 1
    exact.restore(model.h_s, spec)
    assert bitstream.fingerprint(model) != original
