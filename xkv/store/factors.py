"""The keys, or the values, of one group in factored form."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

from xkv.ops.packed import Packed, group_size_of
from xkv.ops.types import Array
from xkv.store.codec import row_bytes

GROWTH_BITS = 8
"""Bits of columns that are added to quantized factors."""

GROWTH_STEP = 32
"""Such columns come in whole groups of MLX's layout."""


class SharedFactors(NamedTuple):
    """What a group of W layers shares. Immutable: growing makes new factors, old ones stay valid.

    The rows of ``latent`` use the first parts of the bases, so that a basis which has grown does
    not touch them; the rows of ``recent`` use all of them.
    """

    latent: Packed
    """``[B, L, r]`` with r at most R."""
    bases: tuple[Packed, ...]
    """One per layer, ``[B, R, n_kv_heads, head_dim]``."""
    error: float
    """Relative error of the first rows' fit."""
    recent: Packed | None = None
    """``[B, N, R]``: rows folded in later."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedFactors:
        return self

    @property
    def rank(self) -> int:
        """Rows of the basis."""
        return self.bases[0].rank

    @property
    def has_grown(self) -> bool:
        """Whether the basis has rows that ``latent`` does not use."""
        return self.rank > self.latent.rank

    @property
    def arrays(self) -> list[Array]:
        """The latents, without the bases."""
        return self.latent.arrays + ([] if self.recent is None else self.recent.arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of latents and bases."""
        bases = sum(basis.nbytes for basis in self.bases)
        return bases + sum(x.nbytes for x in self.arrays)

    @property
    def growth_bits(self) -> int:
        """Of the columns that are added when the basis grows."""
        can_pack = all(group_size_of(basis.shape[-1]) for basis in self.bases)
        return GROWTH_BITS if can_pack and not self.is_plain else 16

    @property
    def is_plain(self) -> bool:
        """Whether all columns are in the KV dtype."""
        return set(self.latent.bits) == {16}

    def nbytes_with(self, n_recent: int) -> int:
        """Bytes of latents and bases once ``recent`` has so many rows, without growth."""
        latent, bases = self.latent, sum(basis.nbytes for basis in self.bases)
        added = self.bases[0].rank - latent.rank
        row = latent.nbytes / latent.shape[1] + latent.shape[0] * added * self._column_bits / 8
        return bases + latent.nbytes + int(n_recent * row)

    def column_bytes(self, n_recent: int) -> int:
        """Bytes of one more row of the bases and its column of ``recent``."""
        width = sum(math.prod(basis.shape[2:]) for basis in self.bases)
        return int(self.latent.shape[0] * (n_recent + width) * self._column_bits / 8)

    @property
    def _column_bits(self) -> float:
        """Bits of a number in a column that is added."""
        n_bytes = row_bytes(GROWTH_STEP, self.growth_bits, self.latent.item_bytes)
        return 8 * n_bytes / GROWTH_STEP

    def basis(self, layer: int) -> Packed:
        """The basis of the group's layer number ``layer`` for the rows of ``latent``."""
        return self.bases[layer].leading(self.latent.rank)

    def parts(self) -> list[tuple[int, int, int]]:
        """``(columns, bits of the latent, bits of the bases)`` of each run of columns."""
        columns = (
            itertools.chain.from_iterable(map(itertools.repeat, x.bits, x.widths))
            for x in (self.latent, self.basis(0))
        )
        runs = itertools.groupby(zip(*columns, strict=True))
        return [(len(list(run)), *bits) for bits, run in runs]
