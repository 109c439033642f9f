"""Integer symbols and CDF tables to bytes and back, by CompressAI's rANS coder (`compressai.ans`).

The bytes are those of CompressAI's `EntropyModel.compress`; what differs is the road to them.
Tables become Python lists once, each row cut to its length, and not at every call; symbols pass
through arrays and not tensors. The coder's faults are kept away from the caller: it writes outside
its buffer for fewer than three symbols, never returns for symbols beyond +-2^27, and reads past the
end of a truncated string.

    tables = Tables.of(model.gaussian_conditional)
    strings = encode(symbols, indexes, tables)
    symbols = decode(strings, indexes, tables)
"""

import weakref
from array import array

from common import UserError

import numpy as np
import torch
from compressai import entropy_models
from compressai.ans import BufferedRansEncoder, RansDecoder
from torch import Tensor, nn

PRECISION = 16  # probabilities are multiples of 2^-16
CHUNK = 2**20  # symbols that exist as Python integers at a time
SYMBOL_LIMIT = 2**26  # the coder holds 28 bits of a symbol outside its table, sign included
MIN_SYMBOLS = 3  # below, the coder's buffer is shorter than its final state: we fill up
BYTE_BIAS = 128  # coded are symbols + 128: nearly all fit a byte, whose integers Python keeps ready

# Behind every string stands this text. After the last symbol a decoder is in its initial state and
# at the end of the string; symbols decoded from there on must therefore be those that the initial
# state and this text give.
_TRAILER = b"the string ends here: what follows is not part of it"
_PROBE = ([[0, 21845, 43690, 65535, 1 << PRECISION]], [5], [0])  # odd frequencies mix all bits
_PROBE_INDEXES = [0] * 32
_INITIAL_STATE = (1 << 31).to_bytes(8, "little")
_INTACT = RansDecoder().decode_with_indexes(
    _INITIAL_STATE + _TRAILER + bytes(64), _PROBE_INDEXES, *_PROBE
)

_cache: "weakref.WeakKeyDictionary[nn.Module, tuple]" = weakref.WeakKeyDictionary()


class EntropyBottleneck(entropy_models.EntropyBottleneck):
    """CompressAI's density of z, with a forward that does not wait for the GPU.

    Its own reads the order of axes from a tensor there. Results and weights are the same.
    """

    # torch 2.13 compiles it wrongly on CPUs with AVX-512 and AMX: of z with 64 channels and 2x2
    # positions in bfloat16, the likelihoods are NaN. It takes a hundredth of a step's time.
    @torch.compiler.disable
    def forward(self, x: Tensor, training: bool | None = None) -> tuple[Tensor, Tensor]:
        """x (B, C, ...) -> z_hat and its likelihoods, of the same shape."""
        training = self.training if training is None else training
        order = (1, 0, *range(2, x.dim()))
        x = x.permute(*order).contiguous()  # (C, B, ...)
        values = self.quantize(x.reshape(len(x), 1, -1), "noise" if training else "dequantize",
                               self._get_medians())
        likelihoods, _, _ = self._likelihood(values)
        if self.use_likelihood_bound:
            likelihoods = self.likelihood_lower_bound(likelihoods)
        z_hat, likelihoods = (v.reshape(x.shape).permute(*order).contiguous()
                              for v in (values, likelihoods))
        return z_hat, likelihoods


class Tables:
    """CDF rows as the coder wants them: `rows` (lists from 0 to 65536), `lengths`, `offsets`.

    Row i codes the symbols offsets[i] ... offsets[i] + lengths[i] - 3; its last interval announces
    any other symbol.
    """

    def __init__(self, cdf: Tensor, lengths: Tensor, offsets: Tensor):
        """cdf: (rows, longest row); lengths, offsets: (rows,). UserError for broken tables."""
        self.lengths = lengths.reshape(-1).tolist()
        self.offsets = offsets.reshape(-1).tolist()
        if not cdf.dim() == 2 or not len(cdf) == len(self.lengths) == len(self.offsets) > 0:
            raise UserError("the entropy model has no CDF tables: call update() before coding")
        damaged = UserError("the CDF tables are damaged: use an intact checkpoint")
        if not 3 <= min(self.lengths) <= max(self.lengths) <= cdf.shape[1]:
            raise damaged
        rows = [row[:length] for row, length in zip(cdf.cpu().numpy(), self.lengths, strict=True)]
        if any(row[0] != 0 or row[-1] != 1 << PRECISION or np.diff(row).min() <= 0 for row in rows):
            raise damaged
        if max(map(abs, self.offsets)) >= SYMBOL_LIMIT:
            raise damaged
        self.rows = [row.tolist() for row in rows]
        # One row more, for filling up: its only symbol costs 2e-5 bit.
        self.rows.append([0, (1 << PRECISION) - 1, 1 << PRECISION])
        self.lengths.append(3)
        self.offsets.append(0)
        self.biased_offsets = [offset + BYTE_BIAS for offset in self.offsets]

    def __len__(self) -> int:
        return len(self.rows) - 1

    @classmethod
    def of(cls, entropy_model: nn.Module) -> "Tables":
        """Tables of a CompressAI EntropyModel; made again only after its buffers have changed."""
        buffers = (entropy_model._quantized_cdf, entropy_model._cdf_length, entropy_model._offset)
        versions = [b._version for b in buffers]
        if (known := _cache.get(entropy_model)) is not None:
            same = all(a is b for a, b in zip(known[0], buffers, strict=True))
            if same and known[1] == versions:
                return known[2]
        tables = cls(*buffers)
        _cache[entropy_model] = (buffers, versions, tables)
        return tables


def encode(symbols: Tensor, indexes: Tensor, tables: Tables) -> list[bytes]:
    """Code each image's symbols into one string.

    symbols: (B, ...) integers; indexes: the row of `tables` for each, broadcast to their shape.
    Symbols outside their row's range cost more but are coded too, up to +-2^26. Raises ValueError
    for larger ones (a NaN cast to an integer is one) and for indexes outside the tables.
    """
    symbols = symbols.detach().cpu().numpy()
    indexes = _rows(indexes, symbols.shape, tables)
    if symbols.size and not -SYMBOL_LIMIT <= symbols.min() <= symbols.max() <= SYMBOL_LIMIT:
        raise ValueError(
            f"symbols beyond +-{SYMBOL_LIMIT} cannot be coded: the latent is broken (NaN?)"
        )
    symbols = symbols.astype(np.int32, copy=False)
    return [
        _encode_one(s.reshape(-1), i.reshape(-1), tables)
        for s, i in zip(symbols, indexes, strict=True)
    ]


def decode(strings: list[bytes], indexes: Tensor, tables: Tables) -> Tensor:
    """Inverse of `encode`: int32 symbols on the CPU, in the shape of indexes (B, ...).

    Raises ValueError when a string is truncated or is not one of these symbols' (unless by a chance
    of about 2^-50). A change inside the raw bits of a symbol outside its table goes unnoticed here;
    the checksum of the file finds it.
    """
    indexes = _rows(indexes, tuple(indexes.shape), tables)
    if len(strings) != len(indexes):
        raise ValueError(f"{len(strings)} strings for {len(indexes)} images")
    symbols = np.empty(indexes.shape, np.int32)
    for string, i, out in zip(strings, indexes, symbols.reshape(len(strings), -1), strict=True):
        _decode_one(string, i.reshape(-1), tables, out)
    return torch.from_numpy(symbols)


def _rows(indexes: Tensor, shape: tuple, tables: Tables) -> np.ndarray:
    indexes = indexes.detach().cpu().numpy()
    if indexes.size and not 0 <= indexes.min() <= indexes.max() < len(tables):
        raise ValueError(f"indexes outside the {len(tables)} rows of the CDF tables")
    return np.broadcast_to(indexes.astype(np.int32, copy=False), shape)


def _integers(values: np.ndarray) -> bytearray | array:
    """int32 values as the sequence that the coder reads fastest; a list takes longer to make."""
    if values.min() >= 0 and values.max() <= 255:
        return bytearray(values.astype(np.uint8))
    return array("i", values.tobytes())


def _encode_one(symbols: np.ndarray, indexes: np.ndarray, tables: Tables) -> bytes:
    if symbols.size == 0:
        return b""
    coder = BufferedRansEncoder()
    for start in range(0, symbols.size, CHUNK):
        part = slice(start, start + CHUNK)
        values = _integers(symbols[part] + np.int32(BYTE_BIAS))
        coder.encode_with_indexes(
            values, _integers(indexes[part]), tables.rows, tables.lengths, tables.biased_offsets
        )
    if (missing := MIN_SYMBOLS - symbols.size) > 0:
        coder.encode_with_indexes(
            [0] * missing, [len(tables)] * missing, tables.rows, tables.lengths, tables.offsets
        )
    return coder.flush()


def _decode_one(string: bytes, indexes: np.ndarray, tables: Tables, out: np.ndarray) -> None:
    if indexes.size == 0 and string == b"":
        return
    decoder = Decoder(string, indexes.size, tables)
    for start in range(0, indexes.size, CHUNK):
        part = slice(start, start + CHUNK)
        out[part] = decoder.decode(indexes[part])
    decoder.finish()


class Decoder:
    """Decode one string part by part, where the next indexes depend on the symbols before them."""

    def __init__(self, string: bytes, count: int, tables: Tables):
        """count: how many symbols the string holds. ValueError when that cannot be."""
        if count == 0 or len(string) < 8 or len(string) % 4:
            raise ValueError("an entropy-coded string has an impossible length")
        # The decoder does not stop at the end of its string, so zeros follow for all it might read
        # with broken data: 16 bit for a symbol, up to 60 more for one outside the table, 15 bytes
        # for each byte that announces a long one.
        zeros = 2 * count + 8 * min(count, CHUNK) + 16 * len(string) + 1024
        self.count, self.tables = count, tables
        self.decoder = RansDecoder()
        self.decoder.set_stream(string + _TRAILER + bytes(zeros))

    def decode(self, indexes: np.ndarray) -> np.ndarray:
        """The next symbols (n,), as int32; indexes: their rows of the tables (n,), int32."""
        tables, top = self.tables, int(indexes.max()) + 1  # the coder copies all rows it is given
        values = self.decoder.decode_stream(
            _integers(indexes), tables.rows[:top], tables.lengths[:top],
            tables.biased_offsets[:top]
        )
        try:
            symbols = np.frombuffer(bytearray(values), np.uint8).astype(np.int32)
        except ValueError:  # not all within one byte: the slower way
            symbols = np.fromiter(values, np.int32, len(values))
        return symbols - np.int32(BYTE_BIAS)

    def finish(self) -> None:
        """Call after the last symbol; ValueError when the string was not made of such symbols."""
        tables = self.tables
        if (missing := MIN_SYMBOLS - self.count) > 0:
            self.decoder.decode_stream(
                [len(tables)] * missing, tables.rows, tables.lengths, tables.offsets
            )
        if self.decoder.decode_stream(_PROBE_INDEXES, *_PROBE) != _INTACT:
            raise ValueError("an entropy-coded string is truncated, altered or from another model")


class Decoders:
    """`Decoder`s of a batch: one string an image, all of `count` symbols."""

    def __init__(self, strings: list[bytes], count: int, tables: Tables):
        self.decoders = [Decoder(string, count, tables) for string in strings]
        self.tables = tables

    def decode(self, indexes: Tensor) -> Tensor:
        """The next symbols of every image, int32 on the CPU, in the shape of indexes (B, ...)."""
        rows = _rows(indexes, tuple(indexes.shape), self.tables)
        if len(rows) != len(self.decoders):
            raise ValueError(f"{len(self.decoders)} strings for {len(rows)} images")
        parts = [d.decode(r.reshape(-1)) for d, r in zip(self.decoders, rows, strict=True)]
        return torch.from_numpy(np.stack(parts)).view(indexes.shape)

    def finish(self) -> None:
        """Call after the last symbols; ValueError when a string holds something else."""
        for decoder in self.decoders:
            decoder.finish()


# ------------------------------------------ factorized latents (CompressAI's EntropyBottleneck)
def _medians(bottleneck: nn.Module) -> Tensor:
    """(C, 1, 1): the centres of the rounding, one per channel."""
    return bottleneck.quantiles[:, 0, 1].detach()[:, None, None]


def _channels(bottleneck: nn.Module, batch: int, shape: tuple[int, int]) -> Tensor:
    """Channel i is coded with row i: indexes (B, C, h, w)."""
    channels = len(bottleneck.quantiles)
    return torch.arange(channels)[None, :, None, None].expand(batch, channels, *shape)


def encode_bottleneck(bottleneck: nn.Module, z: Tensor) -> list[bytes]:
    """Code z (B, C, h, w), rounded around the channels' medians, with one table per channel."""
    symbols = (z - _medians(bottleneck)).round()
    return encode(symbols, _channels(bottleneck, len(z), z.shape[-2:]), Tables.of(bottleneck))


def decode_bottleneck(
    bottleneck: nn.Module, strings: list[bytes], shape: tuple[int, int]
) -> Tensor:
    """Inverse of `encode_bottleneck`: z_hat (B, C, h, w), equal to `dequantize` of z."""
    indexes = _channels(bottleneck, len(strings), shape)
    medians = _medians(bottleneck)
    return decode(strings, indexes, Tables.of(bottleneck)).to(medians) + medians


def dequantize(bottleneck: nn.Module, z: Tensor) -> Tensor:
    """z_hat = round(z - median) + median, what the decoder will have."""
    medians = _medians(bottleneck)
    return (z - medians).round() + medians
