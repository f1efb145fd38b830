"""A latent as it is stored: one matrix in the KV dtype, or bands of columns in few bits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xkv.config import BAND
from xkv.ops.protocol import Operations
from xkv.ops.types import Array

WORD_BITS = 32

PIECE = 8
"""Bands that are widened together, at most."""


@functools.cache
def words_of(bits: tuple[int, ...], n_bands: int) -> int:
    """Words of a row's first bands."""
    return sum(bits[:n_bands]) * BAND // WORD_BITS


@functools.cache
def runs_of(bits: tuple[int, ...]) -> list[tuple[int, int]]:
    """Bands, from one to another, that have as many bits and are no more than ``PIECE``."""
    found, start = [], 0
    for _, run in itertools.groupby(bits):
        last = start + len(list(run))
        found += [(x, min(x + PIECE, last)) for x in range(start, last, PIECE)]
        start = last
    return found


@dataclass(frozen=True)
class Latent:
    """Tokens' coordinates in a group's basis, shared by its layers. Immutable.

    Args:
        arrays: The matrix ``[B, L, r]``; or, where ``bits`` are given, MLX's affine layout of
            bands of ``BAND`` columns, each row of them side by side: words ``[B, L, W]``, scales
            and biases ``[B, L, bands]``.
        bits: Of each band.
    """

    arrays: tuple[Array, ...]
    bits: tuple[int, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Latent:
        return self

    @property
    def parts(self) -> Sequence[Latent]:
        """What is one array: all of it."""
        return [self]

    @property
    def sequences(self) -> Sequence[Latent]:
        """Each sequence by itself, ``[1, L, r]``."""
        n = self.shape[0]
        if n == 1:
            return [self]
        return [Latent(tuple(x[i : i + 1] for x in self.arrays), self.bits) for i in range(n)]

    @property
    def is_packed(self) -> bool:
        return bool(self.bits)

    @property
    def rank(self) -> int:
        return BAND * len(self.bits) if self.bits else self.arrays[0].shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.arrays[0].shape[:-1], self.rank)

    @property
    def dtype(self) -> Any:
        """Of the matrix."""
        return self.arrays[-1].dtype

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays)

    def map(self, function: Callable[[Array], Array]) -> Latent:
        """With each array changed along the axes before the last."""
        return Latent(tuple(map(function, self.arrays)), self.bits)

    def rows(self, start: int, end: int) -> Latent:
        """Tokens ``start`` to ``end``."""
        if start == 0 and end == self.shape[1]:
            return self
        return self.map(lambda x: x[:, start:end])

    def own(self, backend: Operations) -> Latent:
        """A copy that shares no memory."""
        return self.map(backend.own)

    def astype(self, backend: Operations, dtype: Any) -> Latent:
        """The same codes with numbers, scales and biases in another dtype."""
        words, numbers = self.arrays[: self.is_packed], self.arrays[self.is_packed :]
        return Latent((*words, *(backend.xp.astype(x, dtype) for x in numbers)), self.bits)

    def bands(self, start: int, end: int) -> Latent:
        """Packed bands ``start`` to ``end``."""
        if (start, end) == (0, len(self.bits)):
            return self
        words, scales, biases = self.arrays
        first, last = words_of(self.bits, start), words_of(self.bits, end)
        cut = words[..., first:last], scales[..., start:end], biases[..., start:end]
        return Latent(cut, self.bits[start:end])

    def pieces(self, backend: Operations) -> list[tuple[slice, Latent]]:
        """Neighbouring columns, and where they are, in pieces that are widened together.

        They have as many bits, and are few: arrays that fit into a cache are widened several times
        as fast on a CPU.
        """
        runs = runs_of(self.bits) if self.is_packed else []
        if len(runs) < 2:
            return [(slice(0, self.rank), self)]
        n_bands = [end - start for start, end in runs]
        n_words = [words_of(self.bits[start:end], end - start) for start, end in runs]
        words, scales, biases = (
            backend.split(x, widths)
            for x, widths in zip(self.arrays, (n_words, n_bands, n_bands), strict=True)
        )
        return [
            (slice(BAND * start, BAND * end), Latent((x, y, z), self.bits[start:end]))
            for (start, end), x, y, z in zip(runs, words, scales, biases, strict=True)
        ]

    def unpack(self, backend: Operations, dtype: Any = None) -> Array:
        """The matrix ``[..., r]``, in another dtype if one is given."""
        dtype = self.dtype if dtype is None else dtype
        if not self.is_packed:
            return backend.xp.astype(self.arrays[0], dtype)
        if 0 in self.shape:
            # no framework unpacks nothing
            return backend.xp.zeros(self.shape, dtype=dtype, **backend.placement)
        parts = [
            backend.dequantize(piece.astype(backend, dtype).arrays, BAND, piece.bits[0])
            for _, piece in self.pieces(backend)
        ]
        return parts[0] if len(parts) == 1 else backend.xp.concat(parts, axis=-1)

    @classmethod
    def joined(cls, backend: Operations, latents: Sequence[Latent]) -> Latent:
        """Latents with the same bands, one after the other."""
        first, *later = latents
        if not later:
            return first
        arrays = zip(*(x.arrays for x in latents), strict=True)
        return cls(tuple(backend.xp.concat(list(each), axis=1) for each in arrays), first.bits)
