"""Entropy coding of integer symbols with CDF tables, by CompressAI's rANS coder (`compressai.ans`).

The bytes are those of CompressAI's `EntropyModel.compress`, but coding is faster: tables become
Python lists once instead of in each call, with each row cut to its length, and symbols pass through
arrays instead of tensors. Callers are protected from three faults of the coder: it writes outside
its buffer for fewer than three symbols, never returns for symbols beyond +-2^27, and reads past the
end of a truncated string.

    tables = Tables.of(model.gaussian_conditional)
    strings = encode(symbols, indexes, tables)
    symbols = decode(strings, indexes, tables)
"""

import math
from array import array
from collections.abc import Sequence

from common.coding.cdf_tables import (
    BYTE_BIAS,
    EXACTNESS,
    PRECISION,
    STATE_BITS,
    SYMBOL_LIMIT,
    TOO_SHORT,
    Tables,
)
from common.coding.stages import CODING, stage
from common.compiling import not_compiled

import numpy as np
import torch
from compressai import entropy_models
from compressai.ans import BufferedRansEncoder, RansDecoder
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 2**20  # number of symbols that are converted to Python integers at a time
MIN_SYMBOLS = 3  # with fewer, the coder's buffer is too short for its state, so we pad
SUSPICIOUS = 160  # symbols per byte of a string from which the bits are counted while decoding

# The decoder gets this text behind every string. After the last symbol it is in its initial state
# and at the end of the string, so the symbols that it decodes from there on must be those of the
# initial state and this text.
_TRAILER = b"the string ends here: what follows is not part of it"
_PROBE = ([[0, 21845, 43690, 65535, 1 << PRECISION]], [5], [0])  # odd frequencies involve all bits
_PROBE_INDEXES = [0] * 32
_INITIAL_STATE = (1 << 31).to_bytes(8, "little")
_INTACT = RansDecoder().decode_with_indexes(
    _INITIAL_STATE + _TRAILER + bytes(64), _PROBE_INDEXES, *_PROBE
)


class EntropyBottleneck(entropy_models.EntropyBottleneck):
    """CompressAI's density model of z, with a forward that does not synchronise with the GPU.

    CompressAI's forward reads the order of the axes from a tensor on the GPU. Results and weights
    are the same.
    """

    # Not compiled: on CPUs with AVX-512 and AMX, the code of torch 2.13 gives NaN likelihoods for z
    # of 64 channels and 2x2 positions in bfloat16. The forward takes 1 % of the time of a step.
    @not_compiled
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


@stage(CODING)
def encode(symbols: Tensor, indexes: Tensor, tables: Tables) -> list[bytes]:
    """Code each image's symbols into one string.

    symbols: (B, ...) integers; indexes: the row of `tables` for each, broadcast to their shape.
    Symbols outside the range of their row are coded with more bits, up to +-2^26. Raises ValueError
    for larger ones (such as a NaN cast to an integer) and for indexes outside the tables.
    """
    symbols = symbols.float() if symbols.dtype == torch.bfloat16 else symbols  # under autocast
    values = symbols.detach().cpu().numpy()
    rows = _rows(indexes, values.shape, tables)
    if values.size and not -SYMBOL_LIMIT <= values.min() <= values.max() <= SYMBOL_LIMIT:
        raise ValueError(
            f"symbols beyond +-{SYMBOL_LIMIT} cannot be coded: the latent is broken (NaN?)"
        )
    values = values.astype(np.int32, copy=False)
    return [
        _encode_one(s.reshape(-1), i.reshape(-1), tables)
        for s, i in zip(values, rows, strict=True)
    ]


@stage(CODING)
def decode(strings: list[bytes], indexes: Tensor, tables: Tables) -> Tensor:
    """Inverse of `encode`: int32 symbols on the CPU, in the shape of indexes (B, ...).

    Raises ValueError if a string is truncated or does not belong to these indexes and tables (with
    a probability of error of about 2^-50). A change in the raw bits of a symbol outside its table
    is not detected here, but by the checksum of the file.
    """
    rows = _rows(indexes, tuple(indexes.shape), tables)
    if len(strings) != len(rows):
        raise ValueError(f"{len(strings)} strings for {len(rows)} images")
    tables.refuse_impossible(strings, math.prod(rows.shape[1:]))
    symbols = np.empty(rows.shape, np.int32)
    for string, i, out in zip(strings, rows, symbols.reshape(len(strings), -1), strict=True):
        _decode_one(string, i, tables, out)
    return torch.from_numpy(symbols)


def _rows(indexes: Tensor, shape: tuple[int, ...], tables: Tables) -> NDArray[np.int32]:
    """indexes, broadcast to `shape`, without a copy if they are int32 on the CPU."""
    rows = indexes.detach().cpu().numpy()
    once = rows[tuple(slice(None if step else 1) for step in rows.strides)]  # none of them twice
    if rows.size and not 0 <= once.min() <= once.max() < len(tables):
        raise ValueError(f"indexes outside the {len(tables)} rows of the CDF tables")
    return np.broadcast_to(rows.astype(np.int32, copy=False), shape)


def _integers(values: NDArray[np.int32]) -> "bytearray | array[int]":
    """int32 values as the sequence that the coder reads fastest; a list would be slower to make."""
    if values.min() >= 0 and values.max() <= 255:
        return bytearray(values.astype(np.uint8))
    return array("i", values.tobytes())


def _encode_one(symbols: NDArray[np.int32], indexes: NDArray[np.int32], tables: Tables) -> bytes:
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


def _decode_one(string: bytes, indexes: NDArray[np.int32], tables: Tables,
                out: NDArray[np.int32]) -> None:
    if indexes.size == 0 and string == b"":
        return
    decoder = Decoder(string, indexes.size, tables)
    flat = indexes.reshape(-1) if indexes.flags.c_contiguous else indexes.flat  # without a copy
    for start in range(0, indexes.size, CHUNK):
        part = slice(start, start + CHUNK)
        out[part] = decoder.decode(flat[part])
    decoder.finish()


class Decoder:
    """Decode one string in parts, for indexes that depend on symbols decoded before.

    A string of a few bytes can hold any number of symbols if each is nearly certain, so the size in
    a header cannot be refused in advance. But a symbol of probability p takes -log2(p) bits. When
    the symbols have taken more bits than the string has, the rest is not decoded.
    """

    def __init__(self, string: bytes, count: int, tables: Tables):
        """count: number of symbols in the string. ValueError if its length is impossible."""
        if count == 0 or len(string) < 8 or len(string) % 4:
            raise ValueError("an entropy-coded string has an impossible length")
        tables.refuse_impossible([string], count)
        self.count, self.tables = count, tables
        self.bits_left = math.inf
        # The decoder does not stop at the end of its string, so zeros follow for all that it might
        # read from damaged data: 16 bits per symbol, up to 60 more for one outside the table,
        # and 15 bytes for each byte that announces a long one.
        zeros = 2 * count + 8 * min(count, CHUNK) + 16 * len(string) + 1024
        if count > max(CHUNK, SUSPICIOUS * len(string)):
            self.bits_left = 8 * len(string) + STATE_BITS
            # In each call, as above. In calls before, the symbols in the tables have taken no more
            # than the string; those outside take 4 bits at least and less than 128 bytes.
            zeros = 10 * CHUNK + 512 * len(string) + 4096
        self.decoder = RansDecoder()
        self.decoder.set_stream(string + _TRAILER + bytes(zeros))

    def decode(self, indexes: NDArray[np.int32]) -> NDArray[np.int32]:
        """Decode the next symbols (n,), int32; indexes: their rows of the tables (n,), int32."""
        if self.bits_left < math.inf and len(indexes) > CHUNK:
            return np.concatenate([self.decode(indexes[i : i + CHUNK])
                                   for i in range(0, len(indexes), CHUNK)])
        tables, top = self.tables, int(indexes.max()) + 1  # the coder copies all rows
        values = self.decoder.decode_stream(
            _integers(indexes), tables.rows[:top], tables.lengths[:top],
            tables.biased_offsets[:top]
        )
        try:
            symbols = np.frombuffer(bytearray(values), np.uint8).astype(np.int32)
        except ValueError:  # some exceed one byte
            symbols = np.fromiter(values, np.int32, len(values))
        symbols -= np.int32(BYTE_BIAS)
        if self.bits_left < math.inf:
            self._count(symbols, indexes)
        return symbols

    def _count(self, symbols: NDArray[np.int32], indexes: NDArray[np.int32]) -> None:
        """Subtract the bits of decoded symbols; ValueError if the string does not have them."""
        bits = self.tables.bits
        lengths, offsets = (np.asarray(v, np.int64) for v in (
            self.tables.lengths, self.tables.offsets))
        columns = symbols - offsets[indexes]
        outside = (columns < 0) | (columns >= lengths[indexes] - 2)
        columns[outside] = bits.shape[1] - 1
        taken = bits[indexes, columns].sum(dtype=np.float64) + 4 * int(outside.sum())
        self.bits_left -= EXACTNESS * float(taken)
        if self.bits_left < 0:
            raise ValueError(TOO_SHORT)

    def finish(self) -> None:
        """Call after the last symbol; ValueError if the string does not end there."""
        tables = self.tables
        if (missing := MIN_SYMBOLS - self.count) > 0:
            self.decoder.decode_stream(
                [len(tables)] * missing, tables.rows, tables.lengths, tables.offsets
            )
        if self.decoder.decode_stream(_PROBE_INDEXES, *_PROBE) != _INTACT:
            raise ValueError("an entropy-coded string is truncated, altered or from another model")


class Decoders:
    """Decode a batch in parts: one string per image, each of `count` symbols."""

    def __init__(self, strings: list[bytes], count: int, tables: Tables):
        self.decoders = [Decoder(string, count, tables) for string in strings]
        self.tables = tables

    @stage(CODING)
    def decode(self, indexes: Tensor) -> Tensor:
        """Decode the next symbols of all images, int32 on the CPU; indexes: (B, ...)."""
        rows = _rows(indexes, tuple(indexes.shape), self.tables)
        if len(rows) != len(self.decoders):
            raise ValueError(f"{len(self.decoders)} strings for {len(rows)} images")
        parts = [d.decode(r.reshape(-1)) for d, r in zip(self.decoders, rows, strict=True)]
        return torch.from_numpy(np.stack(parts)).view(indexes.shape)

    def finish(self) -> None:
        """Call after the last symbols; ValueError if a string does not end there."""
        for decoder in self.decoders:
            decoder.finish()


# ------------------------------------------ factorized latents (CompressAI's EntropyBottleneck)
def _medians(bottleneck: entropy_models.EntropyBottleneck) -> Tensor:
    """Medians of the channels (C, 1, 1), around which z is rounded."""
    return bottleneck.quantiles[:, 0, 1].detach()[:, None, None]


def _channels(bottleneck: entropy_models.EntropyBottleneck, batch: int, shape: Sequence[int]
              ) -> Tensor:
    """Indexes (B, C, h, w) that code channel i with row i."""
    channels = len(bottleneck.quantiles)
    rows = torch.arange(channels, dtype=torch.int32)  # as `decode` reads them, without a copy
    return rows[None, :, None, None].expand(batch, channels, *shape)


def encode_bottleneck(bottleneck: entropy_models.EntropyBottleneck, z: Tensor) -> list[bytes]:
    """Code z (B, C, h, w), rounded around the medians, with one table per channel."""
    symbols = (z - _medians(bottleneck)).round()
    return encode(symbols, _channels(bottleneck, len(z), z.shape[-2:]), Tables.of(bottleneck))


def decode_bottleneck(
    bottleneck: entropy_models.EntropyBottleneck, strings: list[bytes], shape: Sequence[int]
) -> Tensor:
    """Inverse of `encode_bottleneck`; returns z_hat (B, C, h, w), equal to `dequantize` of z."""
    indexes = _channels(bottleneck, len(strings), shape)
    medians = _medians(bottleneck)
    return decode(strings, indexes, Tables.of(bottleneck)).to(medians) + medians


def dequantize(bottleneck: entropy_models.EntropyBottleneck, z: Tensor) -> Tensor:
    """z_hat = round(z - median) + median, as the decoder obtains it."""
    medians = _medians(bottleneck)
    return (z - medians).round() + medians
