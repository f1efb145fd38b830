"""Several sequences in one step, each with rows of its own, of which one has more than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xkv.ops.latent import Latent
from xkv.ops.protocol import Operations
from xkv.ops.recent import Recent
from xkv.ops.scores import Dense
from xkv.ops.types import Array


@dataclass(frozen=True)
class Latents:
    """Latents ``[1, L, r]`` of several sequences, with the same bands, each where it is.

    An operation that takes a :class:`xkv.ops.latent.Latent` takes these for one of ``shape``
    ``[B, longest L, r]``.
    """

    parts: tuple[Latent, ...]

    @property
    def sequences(self) -> Sequence[Latent]:
        return self.parts

    @property
    def bits(self) -> tuple[int, ...]:
        return self.parts[0].bits

    @property
    def is_packed(self) -> bool:
        return self.parts[0].is_packed

    @property
    def rank(self) -> int:
        return self.parts[0].rank

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    @property
    def arrays(self) -> tuple[Array, ...]:
        return tuple(x for part in self.parts for x in part.arrays)

    @property
    def lengths(self) -> list[int]:
        """Rows of each sequence."""
        return [part.shape[1] for part in self.parts]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.parts), max(self.lengths), self.rank

    def rows(self, start: int, end: int) -> Latents:
        """Tokens ``start`` to ``end``, of those that a sequence has."""
        pairs = zip(self.parts, self.lengths, strict=True)
        return Latents(tuple(x.rows(min(start, n), min(end, n)) for x, n in pairs))


MOST_TOGETHER = 4
"""Sequences of a step: a kernel takes each one's arrays by themselves, and few in all."""

AnyLatent = Latent | Latents
AnyDense = Dense | Sequence[Dense]


def side_by_side(backend: Operations, parts: Sequence[Array], n_rows: int | None = None) -> Array:
    """Arrays ``[1, ..., L, n]`` of sequences as a batch's, zeros after the rows of shorter ones.

    Args:
        parts: One may be a batch's.
        n_rows: Rows of each in the end; None for as many as the longest has.
    """
    xp, lengths = backend.xp, [x.shape[-2] for x in parts]
    n_rows = max(lengths) if n_rows is None else n_rows
    pieces = []
    for x, length in zip(parts, lengths, strict=True):
        pieces.append(x)
        if length < n_rows:
            missing = (*x.shape[:-2], n_rows - length, x.shape[-1])
            pieces.append(xp.zeros(missing, dtype=x.dtype, **backend.placement))
    joined = pieces[0] if len(pieces) == 1 else xp.concat(pieces, axis=-2)
    if len(parts) == 1:
        return joined
    shape = len(parts), n_rows, joined.shape[-1]
    if joined.ndim == 3:
        return xp.reshape(joined, shape)
    return xp.permute_dims(xp.reshape(joined, (-1, *shape)), (1, 0, 2, 3))


def are_there(backend: Operations, lengths: Sequence[int]) -> Array:
    """Boolean ``[B, longest]``: which rows of :func:`side_by_side` are a sequence's own."""
    counts = backend.xp.asarray(lengths, **backend.placement)
    return backend.positions(0, max(lengths))[None] < counts[:, None]


def dense_together(backend: Operations, each: Sequence[Dense]) -> tuple[Dense, Array | None]:
    """Sequences' rows at hand as those of a batch.

    Args:
        each: All with recent rows, or none; how many rows are in use is known to the host.

    Returns:
        Them, and which of recent and then dense rows are a sequence's own, Boolean ``[B, K + D]``,
        or None for all.
    """
    lengths = [[x.n_rows for x in each]]
    keys = side_by_side(backend, [x.keys[..., : x.n_rows, :] for x in each])
    values = side_by_side(backend, [x.values[..., : x.n_rows, :] for x in each])
    recents = [x.recent for x in each if x.recent is not None]
    recent = None
    if recents:
        pairs = zip(*recents, strict=True)
        recent = Recent(*(side_by_side(backend, x) for x in pairs))
        lengths.insert(0, [x.n_rows for x in recents])
    mask = None
    if any(len(set(x)) > 1 for x in lengths):
        mask = backend.xp.concat([are_there(backend, x) for x in lengths], axis=-1)
    return Dense(keys, values, None, recent), mask
