"""What every framework gets for free: plain bodies of the fused operations."""

from __future__ import annotations

from xkv.ops import attention, rope, selection
from xkv.ops.kernels import KernelDispatch
from xkv.ops.protocol import Operations
from xkv.ops.types import Array, Landmarks, RopeSpec, Segment


class Backend(Operations):
    """One framework on one device. Instances are explicit, so that two can live in one process.

    Kernels override fused operations, whose bodies here are composed from the rest.
    """

    kernels: KernelDispatch
    """Decides where a kernel runs and where its plain twin."""

    def rope(
        self, x: Array, positions: Array | int, spec: RopeSpec, inverse: bool = False
    ) -> Array:
        """:func:`xkv.ops.rope.rotate`; an int stands for consecutive rows from that position on."""
        if isinstance(positions, int):
            positions = self.positions(positions, x.shape[-2])
        return rope.rotate(self, x, positions, spec, inverse)

    def rotate_runs(self, x: Array, starts: Array, run_length: int, spec: RopeSpec) -> Array:
        """:func:`xkv.ops.rope.rotate_runs`"""
        return rope.rotate_runs(self, x, starts, run_length, spec)

    def reconstruct_keys(self, segment: Segment) -> Array:
        """:func:`xkv.ops.attention.reconstruct_keys`"""
        return attention.reconstruct_keys(self, segment)

    def lowrank_attention(
        self,
        queries: Array,
        segment: Segment,
        keys: Array,
        values: Array,
        scale: float,
        mask: Array | None = None,
    ) -> Array:
        """:func:`xkv.ops.attention.lowrank_attention`"""
        return attention.lowrank_attention(self, queries, segment, keys, values, scale, mask)

    def reconstruct_rows(self, segment: Segment, rows: Array) -> Array:
        """:func:`xkv.ops.selection.reconstruct_rows`"""
        return selection.reconstruct_rows(self, segment, rows)

    def chunk_scores(self, queries: Array, landmarks: Landmarks, scale: float) -> Array:
        """:func:`xkv.ops.selection.chunk_scores`"""
        return selection.chunk_scores(self, queries, landmarks, scale)

    def select_chunks(
        self, queries: Array, landmarks: Landmarks, budget: int, scale: float
    ) -> Array:
        """:func:`xkv.ops.selection.select_chunks`"""
        return selection.select_chunks(self, queries, landmarks, budget, scale)

    def selected_attention(
        self,
        queries: Array,
        segment: Segment,
        chunks: Array,
        chunk_size: int,
        keys: Array,
        values: Array,
        scale: float,
    ) -> Array:
        """:func:`xkv.ops.selection.selected_attention`"""
        return selection.selected_attention(
            self, queries, segment, chunks, chunk_size, keys, values, scale
        )
