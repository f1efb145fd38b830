"""A latent as it is stored: one matrix in the KV dtype, or bands of columns in few bits."""

from __future__ import annotations

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
        words, scales, biases = self.arrays
        first, last = (sum(self.bits[:n]) * BAND // WORD_BITS for n in (start, end))
        cut = words[..., first:last], scales[..., start:end], biases[..., start:end]
        return Latent(cut, self.bits[start:end])

    def pieces(self) -> list[tuple[slice, Latent]]:
        """Neighbouring columns, and where they are, in pieces that are widened together.

        They have as many bits, and are few: arrays that fit into a cache are widened several times
        as fast on a CPU.
        """
        if not self.is_packed:
            return [(slice(0, self.rank), self)]
        found, start = [], 0
        for _, run in itertools.groupby(self.bits):
            last = start + len(list(run))
            while start < last:
                end = min(start + PIECE, last)
                found.append((slice(BAND * start, BAND * end), self.bands(start, end)))
                start = end
        return found

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
            for _, piece in self.pieces()
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
