"""The low-rank cache: dense while a prompt streams in, then a shared segment and a dense rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xkv.attention import RopeRun, Segment, reconstruct, rope_rows
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.factorize import factorize
from xkv.ranks import CacheShape, RankPlan, buffer_rows, check_ranks, plan_ranks
from xkv.selection import Landmarks, chunk_rows, make_landmarks

if TYPE_CHECKING:
    from xkv.backend import Array, Backend
    from xkv.rope import RopeSpec

DECODE_TOKENS = 16
"""A call of at most this many tokens (one, or a draft to verify) means that the prompt is over."""

FUSED_QUERIES = 32
"""From this many queries on (a later prompt), one fused attention runs over rebuilt rows."""


class RowBuffer:
    """Dense rows ``[B, n_kv_heads, n_rows, dim]`` in a buffer that grows in place."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.allocated: Array | None = None
        """The whole buffer, unused rows included."""
        self.n_rows = 0

    def append(self, rows: Array) -> None:
        """Add rows at the end."""
        end = self.n_rows + rows.shape[-2]
        if self.allocated is None or end > self.allocated.shape[-2]:
            xp = self._backend.xp
            spare = (*rows.shape[:2], buffer_rows(end) - self.n_rows, rows.shape[-1])
            grown = xp.zeros(spare, dtype=rows.dtype, **self._backend.placement)
            kept = [] if self.allocated is None else [self.rows]
            self.allocated = xp.concat([*kept, grown], axis=-2)
        self.allocated[..., self.n_rows : end, :] = rows
        self.n_rows = end

    @property
    def rows(self) -> Array:
        """The rows in use."""
        if self.allocated is None:
            raise InputError("the cache is empty: run the prompt through the model first")
        return self.allocated[..., : self.n_rows, :]

    def replace(self, start: int, end: int, by: Sequence[Array] = ()) -> None:
        """Put other rows in the place of those from ``start`` to ``end``, whose memory is freed."""
        parts = [self.rows[..., :start, :], *by, self.rows[..., end:, :]]
        kept = self._backend.xp.concat(parts, axis=-2)
        self.allocated, self.n_rows = None, 0
        self.append(kept)


class LayerCache:
    """One layer's part of a :class:`LowRankCache`.

    Before compression every row is dense. Afterwards the dense rows are the sinks, copies of the
    outlier chunks' rows in selective attention, then window and tail; in position, the group's
    segment lies between sinks and window.
    """

    def __init__(self, group: GroupCache) -> None:
        self.group = group
        self.keys = RowBuffer(group.backend)
        self.values = RowBuffer(group.backend)
        self.basis_k: Array | None = None
        self.basis_v: Array | None = None
        self.n_segment = 0
        """Rows of the group's segment that this layer still uses; trimming lowers it."""
        self.landmarks: Landmarks | None = None
        """Set where decode selects chunks."""
        self.n_outlier_rows = 0
        self.rope_runs: list[RopeRun] = []
        """How the rows from position 0 on were rotated."""

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return self.n_segment + self.keys.n_rows - self.n_outlier_rows

    @property
    def is_compressed(self) -> bool:
        """Whether some of the rows are in the group's segment."""
        return self.n_segment > 0

    def append(self, keys: Array, values: Array, rope: RopeSpec | None) -> None:
        """Take new tokens; the first few after a prompt (``DECODE_TOKENS``) compress the group.

        Args:
            keys: ``[B, n_kv_heads, L, head_dim]``, rotated.
            values: ``[B, n_kv_heads, L, value_dim]``.
            rope: What rotated the keys, None for no rotary embedding.
        """
        n_tokens = keys.shape[-2]
        is_first = self.keys.allocated is None
        if n_tokens <= DECODE_TOKENS:
            self.group.settle()
        else:
            self.group.is_settled = False
        self.keys.append(keys)
        self.values.append(values)
        if is_first:
            check_ranks(self.group.cache.shape(self), self.group.cache.config)
        if self.rope_runs and self.rope_runs[-1].spec == rope:
            n_tokens += self.rope_runs.pop().n_rows
        self.rope_runs.append(RopeRun(n_tokens, rope))

    def segment(self) -> Segment:
        """The compressed rows, as the backend's operations take them."""
        group, n_rows = self.group, self.n_segment
        latent_k, latent_v = group.latent_k, group.latent_v
        assert latent_k is not None and latent_v is not None
        if n_rows < latent_k.shape[1]:
            latent_k, latent_v = latent_k[:, :n_rows], latent_v[:, :n_rows]
        return Segment(
            latent_k,
            latent_v,
            self.basis_k,
            self.basis_v,
            group.start,
            self.runs_between(group.start, group.start + n_rows),
        )

    def runs_between(self, start: int, end: int) -> tuple[RopeRun, ...]:
        """How the rows from position ``start`` to ``end`` were rotated."""
        runs, row = [], 0
        for n_rows, spec in self.rope_runs:
            inside = min(row + n_rows, end) - max(row, start)
            if inside > 0:
                runs.append(RopeRun(inside, spec))
            row += n_rows
        return tuple(runs)

    def trim(self, n_tokens: int) -> int:
        """Forget the last ``n_tokens`` tokens.

        Returns:
            How many were forgotten: all there are if there are fewer. Rows cut off a segment are no
            longer used, but its latent keeps its size.
        """
        n_tokens = min(n_tokens, self.offset)
        n_sinks = self.group.start if self.is_compressed else 0
        from_tail = min(n_tokens, self.keys.n_rows - self.n_outlier_rows - n_sinks)
        from_segment = min(n_tokens - from_tail, self.n_segment)
        if from_segment:
            self._stop_selecting()
        self.n_segment -= from_segment
        for buffer in (self.keys, self.values):
            buffer.n_rows -= n_tokens - from_segment
        self.rope_runs = list(self.runs_between(0, self.offset))
        return n_tokens

    def dense(self) -> tuple[Array, Array]:
        """All keys and values, ``[B, n_kv_heads, offset, dim]``, rebuilt for this call only."""
        keys, values = self.exact_rows()
        if not self.is_compressed:
            return keys, values
        start, segment = self.group.start, self.segment()

        def join(rows: Array, middle: Array) -> Array:
            parts = [rows[..., :start, :], middle, rows[..., start:, :]]
            return self.group.backend.xp.concat(parts, axis=-2)

        return (
            join(keys, self.group.backend.reconstruct_keys(segment)),
            join(values, reconstruct(self.group.backend, segment.latent_v, segment.basis_v)),
        )

    def exact_rows(self) -> tuple[Array, Array]:
        """Dense keys and values that stand for no row of the segment."""
        keys, values = self.keys.rows, self.values.rows
        if not self.n_outlier_rows:
            return keys, values
        start, end = self.group.start, self.group.start + self.n_outlier_rows

        def leave_out(rows: Array) -> Array:
            return self.group.backend.xp.concat([rows[..., :start, :], rows[..., end:, :]], axis=-2)

        return leave_out(keys), leave_out(values)

    def _stop_selecting(self) -> None:
        """Attend to the whole segment from now on: its landmarks no longer fit a trimmed one."""
        if self.landmarks is not None:
            start, end = self.group.start, self.group.start + self.n_outlier_rows
            for buffer in (self.keys, self.values):
                buffer.replace(start, end)
            self.landmarks, self.n_outlier_rows = None, 0

    def attend(self, queries: Array, scale: float, mask: Array | None) -> Array:
        """Attention of the newest tokens over the whole cache.

        Args:
            queries: ``[B, n_heads, Lq, head_dim]``, rotated; the last Lq tokens of the cache.
            scale: Factor on the scores.
            mask: Boolean ``[..., Lq, offset]`` by position, or None to attend to everything.

        Returns:
            ``[B, n_heads, Lq, value_dim]``.
        """
        group = self.group
        if not self.is_compressed or queries.shape[-2] >= FUSED_QUERIES:
            keys, values = self.dense()
            return group.backend.attention(queries, keys, values, scale, mask)
        if self.landmarks is not None and queries.shape[-2] == 1 and mask is None:
            budget, chunk_size = group.cache.config.budget, self.landmarks.chunk_size
            chunks = group.backend.select_chunks(queries, self.landmarks, budget, scale)
            return group.backend.selected_attention(
                queries,
                self.segment(),
                chunks,
                chunk_size,
                self.keys.rows,
                self.values.rows,
                scale,
            )
        if mask is not None:
            start, end = group.start, group.start + self.n_segment
            parts = [mask[..., start:end], mask[..., :start], mask[..., end:]]
            mask = group.backend.xp.concat(parts, axis=-1)
        keys, values = self.exact_rows()
        return group.backend.lowrank_attention(queries, self.segment(), keys, values, scale, mask)

    def arrays(self) -> list[Array]:
        """The arrays this layer holds, without the latents that its group shares."""
        held = [self.keys.allocated, self.values.allocated, self.basis_k, self.basis_v]
        held += self.landmarks.held if self.landmarks is not None else ()
        return [x for x in held if x is not None]

    @property
    def selection_bytes(self) -> int:
        """The part of the bytes held that selective attention needs: landmarks and outlier rows."""
        if self.landmarks is None:
            return 0
        outliers = self.n_outlier_rows * self.group.cache.shape(self).row_bytes
        return outliers + sum(x.nbytes for x in self.landmarks.held)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same tokens in the full cache."""
        return self.offset and self.offset * self.group.cache.shape(self).row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes held; the group's latents count in its first layer."""
        shared = self.group.arrays() if self is self.group.layers[0] else []
        return sum(x.nbytes for x in (*self.arrays(), *shared))


class GroupCache:
    """The layers that share one latent for keys and one for values."""

    def __init__(self, cache: LowRankCache, n_layers: int) -> None:
        self.cache = cache
        self.backend = cache.backend
        self.layers = [LayerCache(self) for _ in range(n_layers)]
        self.latent_k: Array | None = None
        self.latent_v: Array | None = None
        self.start = 0
        """Position of the segment's first row."""
        self.is_settled = False
        """Whether the last prompt's compression was decided."""

    @property
    def is_compressed(self) -> bool:
        return any(layer.is_compressed for layer in self.layers)

    def settle(self) -> None:
        """After a prompt, factor what the layers hold unless that would gain nothing."""
        n_tokens = self.layers[0].offset
        if self.is_settled or self.is_compressed or n_tokens == 0:
            return
        self.is_settled = True
        plan = self.cache.plan(n_tokens, self.layers[0])
        if plan is not None:
            self._compress(plan)

    def _compress(self, plan: RankPlan) -> None:
        began = time.perf_counter()
        first, layout = self.layers[0], self.cache.config.layout(self.layers[0].offset)
        self.start = self.cache.config.sinks
        end = self.start + layout.n_rows
        rank_k, rank_v = plan.for_group(self.cache.shape(first), len(self.layers), layout.n_rows)
        keys, values = ([getattr(x, name) for x in self.layers] for name in ("keys", "values"))
        runs = [layer.runs_between(self.start, end) for layer in self.layers]
        self.latent_k, bases_k = self._factor(keys, end, rank_k, runs)
        outliers: Sequence[Array | None] = [None] * len(self.layers)
        if layout.is_selective:
            outliers = [self._summarize(layer, end, layout.n_outliers) for layer in self.layers]
        self._keep_dense(keys, end, outliers)
        self.latent_v, bases_v = self._factor(values, end, rank_v)
        self._keep_dense(values, end, outliers)
        for layer, basis_k, basis_v in zip(self.layers, bases_k, bases_v, strict=True):
            layer.basis_k, layer.basis_v, layer.n_segment = basis_k, basis_v, layout.n_rows
        self.cache.factorize_seconds += time.perf_counter() - began

    def _factor(
        self,
        buffers: list[RowBuffer],
        end: int,
        rank: int,
        rope_runs: list[tuple[RopeRun, ...]] | None = None,
    ) -> tuple[Array, list[Array]]:
        """Factor the rows from ``start`` to ``end`` of every layer: the latent and the bases."""
        backend, config = self.backend, self.cache.config
        xp, dtype = backend.xp, buffers[0].rows.dtype
        layers = []
        for i, buffer in enumerate(buffers):
            # float32 before the inverse rotation: 16-bit keys would be rounded twice
            wide = backend.accumulate_dtype(buffer.rows)
            rows = xp.astype(buffer.rows[..., self.start : end, :], wide)
            if rope_runs is not None:
                rows = rope_rows(backend, rows, self.start, rope_runs[i], inverse=True)
            layers.append(xp.permute_dims(rows, (0, 2, 1, 3)))
        latent, bases, _ = factorize(
            backend, layers, rank, power_iterations=config.power_iterations, seed=config.seed
        )
        latent, *held = [xp.astype(x, dtype) for x in (latent, *bases)]
        backend.evaluate(latent, *held)
        self.cache.report_progress()
        return latent, held

    def _summarize(self, layer: LayerCache, end: int, n_outliers: int) -> Array:
        """Make a layer's landmarks from its exact keys; returns the outlier rows' numbers."""
        config = self.cache.config
        layer.landmarks, outliers = make_landmarks(
            self.backend,
            layer.keys.rows[..., self.start : end, :],
            config.chunk_size,
            n_outliers,
            config.landmark_bits,
        )
        self.backend.evaluate(*layer.landmarks.held)
        layer.n_outlier_rows = n_outliers * config.chunk_size
        return chunk_rows(self.backend, outliers, config.chunk_size) + self.start

    def _keep_dense(
        self, buffers: list[RowBuffer], end: int, outliers: Sequence[Array | None]
    ) -> None:
        """Free the segment's rows, but for copies of the outliers."""
        for buffer, rows in zip(buffers, outliers, strict=True):
            kept = []
            if rows is not None:
                kept.append(self.backend.xp.take_along_axis(buffer.rows, rows[..., None], axis=-2))
            buffer.replace(self.start, end, kept)
            self.backend.evaluate(buffer.allocated)

    def arrays(self) -> list[Array]:
        """The latents, counted once for the group."""
        return [x for x in (self.latent_k, self.latent_v) if x is not None]


class LowRankCache:
    """The compressed KV cache of one model for one conversation.

    Args:
        backend: Does the arithmetic.
        config: Ranks and what stays dense.
        groups: Layer indices of each group (:func:`xkv.make_groups`).
        n_dense_layers: Layers in no group, for the byte formula.
        on_progress: Called with (factorizations done, factorizations in all).
    """

    def __init__(
        self,
        backend: Backend,
        config: XKVConfig,
        groups: Sequence[Sequence[int]],
        n_dense_layers: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.backend = backend
        self.config = config
        self.n_dense_layers = n_dense_layers
        self.groups = [GroupCache(self, len(group)) for group in groups]
        self.layers = {
            layer_idx: layer
            for group, indices in zip(self.groups, groups, strict=True)
            for layer_idx, layer in zip(indices, group.layers, strict=True)
        }
        self.on_progress = on_progress
        self.notice: str | None = None
        """What was not done as asked, in a sentence."""
        self.ranks: RankPlan | None = None
        """The ranks that were used."""
        self.factorize_seconds = 0.0
        self._n_factored = 0

    def shape(self, layer: LayerCache) -> CacheShape:
        """What the byte formula needs to know, read off a layer that holds rows."""
        keys, values = layer.keys.rows, layer.values.rows
        return CacheShape(
            tuple(len(group.layers) for group in self.groups),
            keys.shape[1],
            keys.shape[-1],
            values.shape[-1],
            keys.itemsize,
            self.n_dense_layers,
        )

    def plan(self, n_tokens: int, layer: LayerCache) -> RankPlan | None:
        """The ranks for ``n_tokens``, or None (and a notice) where compression gains nothing."""
        plan = plan_ranks(self.shape(layer), self.config, n_tokens)
        if isinstance(plan, str):
            self.notice = plan
            return None
        self.notice, self.ranks = None, plan
        if self.config.attention == "selective" and not self.config.layout(n_tokens).is_selective:
            self.notice = (
                f"attention is dense, which is exact over the factors: budget={self.config.budget} "
                f"covers all that is compressed of {n_tokens} tokens"
            )
        return plan

    def report_progress(self) -> None:
        self._n_factored += 1
        if self.on_progress is not None:
            self.on_progress(self._n_factored, 2 * len(self.groups))

    def dense_bytes(self) -> int:
        """Bytes of the grouped layers' tokens in the full cache."""
        return sum(layer.dense_bytes for layer in self.layers.values())

    def held_bytes(self) -> int:
        """Bytes of every array that the grouped layers hold, shared latents once."""
        return sum(layer.nbytes for layer in self.layers.values())
