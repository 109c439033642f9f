"""CDF tables of entropy models in the form of CompressAI's rANS coder, and what symbols cost."""

from __future__ import annotations

import functools
import math
import weakref

from common import UserError

import numpy as np
from compressai import entropy_models
from numpy.typing import NDArray
from torch import Tensor, nn

PRECISION = 16  # probabilities are multiples of 2^-16
SYMBOL_LIMIT = 2**26  # the coder stores symbols outside its table with 28 bits, sign included
STATE_BITS = 64  # which the coder writes first; a string cannot hold more bits than 8 a byte
EXACTNESS = 1 - 1e-4  # the coder rounds: a symbol takes its bits, or 5e-5 of them less or more
TOO_SHORT = "an entropy-coded string is too short for the size in the header"
BYTE_BIAS = 128  # symbols + 128 are coded: most fit a byte, and Python caches such integers

# The buffers of an entropy model, their versions, and the tables made of them.
_cache: weakref.WeakKeyDictionary[
    nn.Module, tuple[tuple[Tensor, ...], list[int], Tables]] = weakref.WeakKeyDictionary()


class Tables:
    """CDF tables in the form of the coder: `rows` (lists from 0 to 65536), `lengths`, `offsets`.

    Row i codes the symbols offsets[i], ..., offsets[i] + lengths[i] - 3; its last interval is the
    escape code of all other symbols.
    """

    def __init__(self, cdf: Tensor, lengths: Tensor, offsets: Tensor):
        """cdf: (rows, longest row); lengths, offsets: (rows,). UserError for invalid tables."""
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
        self.cheapest = PRECISION - math.log2(max(int(np.diff(row).max()) for row in rows))  # bits
        if max(map(abs, self.offsets)) >= SYMBOL_LIMIT:
            raise damaged
        self.rows = [row.tolist() for row in rows]
        # An additional row for padding; its symbol 0 takes 2e-5 bits.
        self.rows.append([0, (1 << PRECISION) - 1, 1 << PRECISION])
        self.lengths.append(3)
        self.offsets.append(0)
        self.biased_offsets = [offset + BYTE_BIAS for offset in self.offsets]

    def __len__(self) -> int:
        return len(self.rows) - 1

    @functools.cached_property
    def bits(self) -> NDArray[np.float32]:
        """Bits (rows, longest row - 1) of each symbol; those of the escape code in the rest."""
        costs = [PRECISION - np.log2(np.diff(row)) for row in self.rows[:-1]]
        longest = max(map(len, costs))
        return np.stack([np.pad(c, (0, longest - len(c)), constant_values=c[-1])
                         for c in costs]).astype(np.float32)

    def refuse_impossible(self, strings: list[bytes], count: int) -> None:
        """ValueError if a string is too short for `count` symbols, even the cheapest of all.

        Called for y before z is decoded, it refuses sizes that take much memory in between.
        """
        for string in strings:
            if count * self.cheapest * EXACTNESS > 8 * len(string) + STATE_BITS:
                raise ValueError(TOO_SHORT)

    @classmethod
    def of(cls, entropy_model: entropy_models.EntropyModel) -> Tables:
        """Tables of a CompressAI EntropyModel, cached until its buffers change."""
        buffers: tuple[Tensor, Tensor, Tensor] = (
            entropy_model.quantized_cdf, entropy_model.cdf_length, entropy_model.offset)
        versions = [b._version for b in buffers]
        if (known := _cache.get(entropy_model)) is not None:
            same = all(a is b for a, b in zip(known[0], buffers, strict=True))
            if same and known[1] == versions:
                return known[2]
        tables = cls(*buffers)
        _cache[entropy_model] = (buffers, versions, tables)
        return tables
