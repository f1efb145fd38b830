"""What operations take and give, as data: rotations, a compressed run of rows, its landmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

Array = Any
"""An array of the backend's framework."""

Factor = Any
"""An array in its own dtype, or a :class:`xkv.ops.packed.Packed`."""


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


class Segment(NamedTuple):
    """One layer's view of its group's compressed run of tokens.

    Shapes: ``latent_k [B, L, rank_k]``, ``latent_v [B, L, rank_v]`` (both shared by the group),
    ``basis_k [B, rank_k, n_kv_heads, head_dim]``, ``basis_v [B, rank_v, n_kv_heads, value_dim]``.
    """

    latent_k: Factor
    latent_v: Factor
    basis_k: Factor
    basis_v: Factor
    start: int
    """Position of the first row."""
    rope_runs: tuple[RopeRun, ...]
    """How the rows' keys are rotated, in order; together L rows."""
    n_dense: Array | None = None
    """How many of the dense rows beside the segment are in use, an integer ``[1]`` on the device;
    None for all."""


class Landmarks(NamedTuple):
    """Summary keys of one layer's segment, ``C = L // chunk_size`` chunks a KV head. Immutable.

    ``arrays`` is ``([B, n_kv_heads, C, head_dim],)`` in the KV dtype with 16 ``bits``, otherwise
    MLX's affine layout: packed integers, scales and biases, quantized in groups of ``group_size``
    features.
    """

    arrays: tuple[Array, ...]
    bits: int
    group_size: int
    is_outlier: Array
    """Boolean ``[B, n_kv_heads, C]``: chunks whose rows are kept dense, and so never selected."""
    chunk_size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Landmarks:
        return self

    @property
    def held(self) -> tuple[Array, ...]:
        """Every array."""
        return (*self.arrays, self.is_outlier)

    @property
    def n_chunks(self) -> int:
        return self.is_outlier.shape[2]
