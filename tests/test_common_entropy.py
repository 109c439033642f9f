"""Symbols to bytes and back."""

from common import UserError
from common.coding import entropy
from common.coding.entropy import Tables, decode, encode

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional

SCALES = torch.exp(torch.linspace(np.log(0.11), np.log(256), 64)).tolist()


@pytest.fixture(scope="module")
def gaussian():
    model = GaussianConditional(None)
    model.update_scale_table(SCALES)
    return model


@pytest.fixture(scope="module")
def bottleneck():
    torch.manual_seed(0)
    model = EntropyBottleneck(192)
    model.update()
    return model


def draw(shape, seed=0, rows=64):
    """Symbols as a Gaussian of their row's scale would give them."""
    rng = np.random.default_rng(seed)
    indexes = rng.integers(0, rows, shape)
    symbols = np.rint(rng.normal(0, 1, shape) * np.array(SCALES)[indexes])
    return torch.tensor(symbols, dtype=torch.int32), torch.tensor(indexes, dtype=torch.int32)


def test_tables_of_the_gaussian(gaussian):
    tables = Tables.of(gaussian)
    assert gaussian._quantized_cdf.shape == (64, 3133)
    assert len(tables) == 64
    assert tables.offsets[0] == -1 and tables.lengths[0] == 5
    assert max(tables.lengths) == 3133


def test_tables_of_a_fresh_bottleneck(bottleneck):
    assert bottleneck._quantized_cdf.shape == (192, 23)
    assert len(Tables.of(bottleneck)) == 192


def test_each_row_is_a_strictly_increasing_distribution(gaussian, bottleneck):
    for model in (gaussian, bottleneck):
        tables = Tables.of(model)
        for row, length in zip(tables.rows, tables.lengths, strict=True):
            assert len(row) == length and row[0] == 0 and row[-1] == 65536
            assert min(np.diff(row)) > 0


def test_tables_are_made_once_and_again_after_update():
    model = EntropyBottleneck(4)
    model.update()
    first = Tables.of(model)
    assert Tables.of(model) is first
    with torch.no_grad():
        model.quantiles[:, 0, 2] += 5
    model.update(force=True)
    second = Tables.of(model)
    assert second is not first and second.lengths[0] == first.lengths[0] + 5
    model._offset += 1  # in place: same tensor, new content
    assert Tables.of(model).offsets[0] == second.offsets[0] + 1


def test_without_update_there_are_no_tables():
    with pytest.raises(UserError, match=r"update\(\)"):
        Tables.of(EntropyBottleneck(4))


@pytest.mark.parametrize("position, value", [(0, 1), (1, 0), (4, 65535), (2, 1 << 20)])
def test_damaged_tables_are_refused(gaussian, position, value):
    cdf = gaussian._quantized_cdf.clone()
    cdf[0, position] = value
    with pytest.raises(UserError, match="damaged"):
        Tables(cdf, gaussian._cdf_length, gaussian._offset)
    with pytest.raises(UserError, match="damaged"):
        Tables(gaussian._quantized_cdf, gaussian._cdf_length + 5000, gaussian._offset)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 255, 1001, 20000])
def test_round_trip(gaussian, n):
    symbols, indexes = draw((2, n), seed=n)
    strings = encode(symbols, indexes, Tables.of(gaussian))
    decoded = decode(strings, indexes, Tables.of(gaussian))
    assert decoded.dtype == torch.int32 and torch.equal(decoded, symbols)


@pytest.mark.parametrize("seed", range(5))
def test_round_trip_with_random_tables(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 40, 300)  # more rows than one byte numbers
    cdf = np.zeros((300, 40), np.int32)
    for row, n in zip(cdf, lengths, strict=True):
        row[1:n] = np.sort(rng.choice(np.arange(1, 65536), n - 1, replace=False))
        row[n - 1] = 65536
    offsets = rng.integers(-300, 300, 300)
    tables = Tables(torch.tensor(cdf), torch.tensor(lengths), torch.tensor(offsets))
    indexes = torch.tensor(rng.integers(0, 300, (3, 7, 11, 5)))
    symbols = torch.tensor(offsets)[indexes] + torch.tensor(rng.integers(-3, 40, (3, 7, 11, 5)))
    strings = encode(symbols, indexes, tables)
    assert torch.equal(decode(strings, indexes, tables), symbols.int())


@pytest.mark.parametrize("n", [1, 2, 3, 50])
def test_symbols_outside_the_table(gaussian, n):
    tables = Tables.of(gaussian)
    values = [100_000, -100_000, entropy.SYMBOL_LIMIT, -entropy.SYMBOL_LIMIT, 0, 2, -2]
    symbols = torch.tensor([(values * 8)[:n]])
    indexes = torch.zeros_like(symbols)
    decoded = decode(encode(symbols, indexes, tables), indexes, tables)
    assert decoded.tolist() == symbols.tolist()


def test_what_cannot_be_coded_is_refused(gaussian):
    tables = Tables.of(gaussian)
    index = torch.zeros(1, 3, dtype=torch.int32)
    for value in (entropy.SYMBOL_LIMIT + 1, -(2**31), 2**40):
        with pytest.raises(ValueError, match="cannot be coded"):
            encode(torch.tensor([[0, value, 0]]), index, tables)
    for row in (-1, 64):
        with pytest.raises(ValueError, match="rows"):
            encode(torch.zeros(1, 3, dtype=torch.int32), index + row, tables)
        with pytest.raises(ValueError, match="rows"):
            decode([bytes(8)], index + row, tables)
    with pytest.raises(ValueError, match="strings"):
        decode([bytes(8), bytes(8)], index, tables)


def test_indexes_broadcast_and_memory_order_does_not_matter(bottleneck):
    tables = Tables.of(bottleneck)
    symbols = torch.randint(-8, 9, (2, 192, 3, 5), generator=torch.Generator().manual_seed(3))
    channels = torch.arange(192).view(1, -1, 1, 1)
    strings = encode(symbols, channels, tables)
    assert strings == encode(
        symbols.contiguous(memory_format=torch.channels_last), channels, tables
    )
    assert torch.equal(decode(strings, channels.expand(2, 192, 3, 5), tables), symbols.int())


def test_the_bytes_are_those_of_compressai(gaussian, bottleneck):
    symbols, indexes = draw((2, 12, 8, 6))
    theirs = gaussian.compress(symbols.float(), indexes)
    assert encode(symbols, indexes, Tables.of(gaussian)) == theirs
    assert torch.equal(decode(theirs, indexes, Tables.of(gaussian)), symbols)

    z = torch.randn(2, 192, 3, 4, generator=torch.Generator().manual_seed(4)) * 20  # with escapes
    medians = bottleneck._get_medians().detach().reshape(1, -1, 1, 1)
    channels = torch.arange(192).view(1, -1, 1, 1)
    ours = encode(torch.round(z - medians).int(), channels, Tables.of(bottleneck))
    assert ours == bottleneck.compress(z)
    z_hat = decode(ours, channels.expand(z.shape), Tables.of(bottleneck)) + medians
    assert torch.equal(z_hat, bottleneck.decompress(ours, (3, 4)))


def test_chunks_do_not_change_the_bytes(gaussian, monkeypatch):
    symbols, indexes = draw((2, 1003))
    symbols[0, 100] = 5000
    whole = encode(symbols, indexes, Tables.of(gaussian))
    for chunk in (1, 2, 17, 1002):
        monkeypatch.setattr(entropy, "CHUNK", chunk)
        assert encode(symbols, indexes, Tables.of(gaussian)) == whole
        assert torch.equal(decode(whole, indexes, Tables.of(gaussian)), symbols)


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_every_truncation_is_noticed(gaussian, n):
    symbols, indexes = draw((1, n), seed=5)
    tables = Tables.of(gaussian)
    (string,) = encode(symbols, indexes, tables)
    for length in range(len(string)):
        with pytest.raises(ValueError):
            decode([string[:length]], indexes, tables)
    for tail in (b"\0", bytes(4), b"abcd"):
        with pytest.raises(ValueError):
            decode([string + tail], indexes, tables)


def test_every_changed_byte_is_noticed(gaussian):
    symbols, indexes = draw((1, 60), seed=6)
    tables = Tables.of(gaussian)
    (string,) = encode(symbols, indexes, tables)
    for position in range(len(string)):
        altered = bytearray(string)
        altered[position] ^= 0x41
        with pytest.raises(ValueError):
            decode([bytes(altered)], indexes, tables)


@pytest.mark.parametrize("byte", [0x00, 0xFF, 0xF0, 0x0F])
def test_hostile_strings_end_in_an_error(gaussian, bottleneck, byte):
    """All ones announce endlessly long symbols: the decoder reads far behind the string."""
    for model in (gaussian, bottleneck):
        tables = Tables.of(model)
        for length in (8, 64, 4000):
            indexes = torch.arange(5000).remainder(len(tables)).view(1, -1)
            with pytest.raises(ValueError):
                decode([bytes([byte]) * length], indexes, tables)


def test_nothing_to_code(gaussian):
    tables = Tables.of(gaussian)
    nothing = torch.zeros(2, 0, 4, dtype=torch.int32)
    assert encode(nothing, nothing, tables) == [b"", b""]
    assert decode([b"", b""], nothing, tables).shape == (2, 0, 4)
    with pytest.raises(ValueError):
        decode([b"", bytes(8)], nothing, tables)
