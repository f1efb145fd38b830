"""What every framework gets for free: plain bodies of the fused operations."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from xkv.ops import index, rope, working_set
from xkv.ops.kernels import KernelDispatch
from xkv.ops.latent import Latent
from xkv.ops.protocol import Operations
from xkv.ops.scores import Dense
from xkv.ops.types import Array, RopeSpec, Stored

MAX_TABLES = 64
"""Tables of angles that are kept for later calls."""


class Backend(Operations):
    """One framework on one device. Instances are explicit, so that two can live in one process.

    Kernels override fused operations, whose bodies here are composed from the rest.
    """

    kernels: KernelDispatch
    """Decides where a kernel runs and where its plain twin."""

    @cached_property
    def _angles(self) -> dict[Any, Array]:
        return {}

    def rope(
        self, x: Array, positions: Array | int, spec: RopeSpec, inverse: bool = False
    ) -> Array:
        """:func:`xkv.ops.rope.rotate`; an int stands for consecutive rows from that position on."""
        if isinstance(positions, int):
            positions = self.positions(positions, x.shape[-2])
        return rope.rotate(self, x, positions, spec, inverse)

    def block_angles(
        self, spec: RopeSpec, start: int, n_blocks: int, has_rest: bool, dtype: Any
    ) -> Array:
        """:func:`xkv.ops.index.block_numbers` of at least so many blocks, kept for later calls."""
        key = spec, start, has_rest, dtype
        if key not in self._angles or self._angles[key].shape[0] < n_blocks:
            # powers of two: a conversation that grows makes few
            size = 1 << (n_blocks - 1).bit_length()
            numbers = self.from_numpy(index.block_numbers(spec, start, size, has_rest))
            if len(self._angles) >= MAX_TABLES:
                # a rope that changes with the length has one for each call
                del self._angles[next(iter(self._angles))]
            self._angles[key] = self.xp.astype(numbers, dtype)
        return self._angles[key]

    def attend_dense(
        self, queries: Array, dense: Dense, sinks: Array | None
    ) -> tuple[Array, Array]:
        """:func:`xkv.ops.working_set.attend_dense`"""
        return working_set.attend_dense(self, queries, dense, sinks)

    def query_terms(self, queries: Array, basis: Array, spec: RopeSpec) -> Array:
        """:func:`xkv.ops.index.query_terms`"""
        return index.query_terms(self, queries, basis, spec)

    def index_scores(
        self, absorbed: Array, latent: Latent, offsets: Array, n_kv_heads: int
    ) -> Array:
        """:func:`xkv.ops.index.index_scores`"""
        return index.index_scores(self, absorbed, latent, offsets, n_kv_heads)

    def choose_rows(self, worth: Array, count: int) -> Array:
        """:func:`xkv.ops.working_set.choose_rows`"""
        return working_set.choose_rows(self, worth, count)

    def key_scores(self, stored: Stored, rows: Array, queries: Array) -> Array:
        """:func:`xkv.ops.working_set.key_scores`"""
        return working_set.key_scores(self, stored, rows, queries)

    def weigh_rows(
        self, latent: Latent, rows: Array, scores: Array, totals: Array, beside: Array
    ) -> tuple[Array, Array]:
        """:func:`xkv.ops.working_set.weigh_rows`"""
        return working_set.weigh_rows(self, latent, rows, scores, totals, beside)
