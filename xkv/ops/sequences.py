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


def side_by_side(
    backend: Operations, parts: Sequence[Array], n_rows: int | None = None, axis: int = -2
) -> Array:
    """Arrays of sequences as that of a batch, zeros after the rows of those that have fewer.

    Args:
        n_rows: Along the axis, in the end; None for as many as the longest has.
    """
    longest = max(x.shape[axis] for x in parts)
    n_rows = longest if n_rows is None else n_rows
    if len(parts) == 1 and n_rows == longest:
        return parts[0]
    xp, first = backend.xp, parts[0]
    if all(x.shape[axis] == n_rows for x in parts):
        return xp.concat(list(parts))
    shape = list(first.shape)
    shape[0], shape[axis] = sum(x.shape[0] for x in parts), n_rows
    together = xp.zeros(tuple(shape), dtype=first.dtype, **backend.placement)
    number = 0
    for x in parts:
        place = [slice(None)] * x.ndim
        place[0], place[axis] = slice(number, number + x.shape[0]), slice(0, x.shape[axis])
        together[tuple(place)] = x
        number += x.shape[0]
    return together


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
