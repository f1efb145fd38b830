"""What operations take and give, as data: rotations, and a compressed run of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

Array = Any
"""An array of the backend's framework."""


@dataclass(frozen=True)
class RopeSpec:
    """One layer's rotary embedding: feature pair i turns by ``position / freqs[i]`` radians.

    Args:
        freqs: Positions per radian of each pair, ``dims // 2`` of them (``mx.fast.rope``'s
            convention).
        traditional: Pairs are neighbouring features; otherwise the halves of the first ``dims``.
        scale: Factor on the rotated features (YaRN and Su-scaled ropes; 1 elsewhere).
    """

    freqs: tuple[float, ...]
    traditional: bool = False
    scale: float = 1.0

    @property
    def dims(self) -> int:
        """Features that are rotated; the rest of a head passes through."""
        return 2 * len(self.freqs)

    def at(self, end: int) -> RopeSpec:
        """The rotation of a call whose rows end at position ``end``: always this one."""
        return self

    @staticmethod
    def standard(
        dims: int, base: float, traditional: bool = False, position_scale: float = 1.0
    ) -> RopeSpec:
        """The rotary embedding with ``base``, positions multiplied by ``position_scale``."""
        freqs = tuple(base ** (2 * i / dims) / position_scale for i in range(dims // 2))
        return RopeSpec(freqs, traditional)


@dataclass(frozen=True)
class DynamicNTKRope:
    """A rotary embedding whose base grows with the context, so that each call has its own.

    Args:
        dims: Features that are rotated.
        base: Base up to ``max_positions``.
        factor: Scaling factor of the model's configuration.
        max_positions: Context that the model was trained for.
        traditional: As in :class:`RopeSpec`.
    """

    dims: int
    base: float
    factor: float
    max_positions: int
    traditional: bool = False

    def at(self, end: int) -> RopeSpec:
        """The rotation of a call whose rows end at position ``end``."""
        length = max(end, self.max_positions)
        stretch = self.factor * length / self.max_positions - (self.factor - 1)
        base = self.base * stretch ** (self.dims / (self.dims - 2))
        return RopeSpec.standard(self.dims, base, self.traditional)


Rope = RopeSpec | DynamicNTKRope


class RopeRun(NamedTuple):
    """``n_rows`` consecutive rows that one spec rotated (all rows, but for dynamic NTK)."""

    n_rows: int
    spec: RopeSpec | None
    """None for a layer without rotary embedding."""


class Stored(NamedTuple):
    """One layer's keys, or values, in what its group stores."""

    latent: Any
    """:class:`xkv.ops.latent.Latent` ``[B, L, r]``, shared by the group."""
    basis: Array
    """``[B or 1, r, n_kv_heads, dim]``"""
    start: int = 0
    """Position of the first row."""
    rope_runs: tuple[RopeRun, ...] = ()
    """How the rows of keys are rotated, in order; none for values."""
    index_rows: Array | None = None
    """:func:`xkv.ops.index.index_basis` of keys, where it is held."""


class Segment(NamedTuple):
    """One layer's view of its group's compressed run of tokens."""

    keys: Stored
    values: Stored
