"""The cache of the layers that share one latent: dense while a prompt streams in, then factored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xkv.attention import rope_rows
from xkv.draft import Draft, factor_rows, pack_together
from xkv.growth import fold_rows, merge_rows
from xkv.layer_cache import LayerCache
from xkv.ranks import BitPlan, Plan
from xkv.selection import chunk_rows, make_landmarks
from xkv.shared_factors import SharedFactors
from xkv.weighting import column_weights

if TYPE_CHECKING:
    from xkv.backend import Array, Backend
    from xkv.lowrank_cache import LowRankCache

WAIT_SHARE = 0.5
"""A conversation that was too short for compression waits for ranks of this share of a very long
one's: in the README's table of answers, those below lose most of them.
"""


class GroupCache:
    """The layers that share one latent for keys and one for values.

    By position: sinks (dense), the segment, recent rows (both factored), window and tail (dense).
    """

    def __init__(self, cache: LowRankCache, n_layers: int, has_dense_values: bool = False) -> None:
        self.cache = cache
        self.has_dense_values = has_dense_values
        self.layers = [LayerCache(self, index) for index in range(n_layers)]
        self.keys: SharedFactors | None = None
        self.values: SharedFactors | None = None
        """None where values are not factored."""
        self.start = 0
        """Position of the segment's first row."""
        self._retry_at = 0
        """Tokens from which on compression is worth another look."""

    @property
    def backend(self) -> Backend:
        return self.cache.backend

    @property
    def index(self) -> int:
        """Number of the group in its cache."""
        return self.cache.groups.index(self)

    @property
    def is_compressed(self) -> bool:
        return self.layers[0].is_compressed

    def settle(self) -> None:
        """Between calls of the model, factor what has grown too long to stay dense."""
        first = self.layers[0]
        if any(layer.offset != first.offset for layer in self.layers) or first.offset == 0:
            return
        began = time.perf_counter()
        if not self.is_compressed:
            self.keys = self.values = None
            if first.offset >= self._retry_at:
                self._compress()
        else:
            self._release()
            config = self.cache.config
            n_rows = first.n_tail - config.window_at(first.offset)
            if n_rows >= config.max_tail:
                self._fold(n_rows // config.chunk_size * config.chunk_size)
        self.cache.factorize_seconds += time.perf_counter() - began

    def _compress(self) -> None:
        """Factor everything but sinks and window, unless that would gain nothing."""
        cache, first = self.cache, self.layers[0]
        is_first = self._retry_at == 0 and not cache.is_streaming
        plan = cache.plan(first.offset, 0.0 if is_first else WAIT_SHARE)
        if plan is None:
            self._retry_at = first.offset + cache.config.max_tail
            return
        layout = cache.config.layout(first.offset)
        self.start = cache.config.sinks
        end = self.start + layout.n_rows
        outliers: list[Array | None] = [None] * len(self.layers)
        if layout.is_selective:
            outliers = [self._summarize(layer, end, layout.n_outliers) for layer in self.layers]
        self._factor(plan, end, outliers)
        for layer, rows in zip(self.layers, outliers, strict=True):
            layer.n_segment = layout.n_rows
            layer.n_outlier_rows = 0 if rows is None else rows.shape[-1]

    def _factor(self, plan: Plan, end: int, outliers: Sequence[Array | None]) -> None:
        """Factor keys and values, and store them in the bits that the plan's bytes allow."""
        cache, config, n_rows = self.cache, self.cache.config, end - self.start
        ranks = plan.for_group(cache.shape, config, self.index, n_rows)
        names = ("keys",) if self.has_dense_values else ("keys", "values")
        drafts = [
            self._draft(name, end, rank, outliers) for name, rank in zip(names, ranks, strict=False)
        ]
        if isinstance(plan, BitPlan):
            budget = plan.factor_bytes(cache.shape, config, self.index, n_rows) + cache.unspent
            stored = pack_together(self.backend, drafts, budget, config.min_rank)
            cache.unspent = budget - sum(factors.nbytes for factors in stored)
        else:
            stored = [draft.plain() for draft in drafts]
        self.keys, self.values = stored[0], None if self.has_dense_values else stored[1]

    def _fold(self, n_rows: int) -> None:
        """Move the first rows after the compressed part into it."""
        config, first = self.cache.config, self.layers[0]
        start, n_recent = first.n_sinks + first.n_outlier_rows, first.n_recent
        limits = self._growth_limits(n_recent + n_rows)
        folded: list[SharedFactors | None] = []
        for name, factors, limit in zip(
            ("keys", "values"), (self.keys, self.values), limits, strict=True
        ):
            if factors is None:
                folded.append(None)
                continue
            rows = [self._rows(layer, name, start, start + n_rows) for layer in self.layers]
            folded.append(
                fold_rows(
                    self.backend,
                    factors,
                    rows,
                    n_recent,
                    limit,
                    power_iterations=config.power_iterations,
                    seed=config.seed,
                )
            )
        self.keys, self.values = folded
        for layer in self.layers:
            for buffer in (layer.keys, *([] if self.has_dense_values else [layer.values])):
                buffer.replace(start, start + n_rows)
                self.backend.evaluate(buffer.allocated)
            layer.n_recent = n_recent + n_rows
        if first.n_recent > config.budget:
            self._merge()

    def _merge(self) -> None:
        """Make recent rows part of the segment, whose landmarks grow with it."""
        config, first = self.cache.config, self.layers[0]
        n_segment, n_recent = first.n_segment, first.n_recent
        n_rows = n_segment + n_recent
        if config.layout(first.offset).is_selective:
            n_rows -= n_rows % config.chunk_size
            for layer in self.layers:
                layer.extend_landmarks(n_rows)
        self.keys, self.values = (
            factors and merge_rows(self.backend, factors, n_segment, n_recent, n_rows - n_segment)
            for factors in (self.keys, self.values)
        )
        for layer in self.layers:
            layer.n_segment, layer.n_recent = n_rows, n_segment + n_recent - n_rows

    def _growth_limits(self, n_recent: int) -> list[int]:
        """Rows that the bases may grow by: up to as many as there are, where ranks were given, or
        as a fresh compression of the same tokens would take more bytes.
        """
        kept = [factors for factors in (self.keys, self.values) if factors]
        if self.cache.config.compression is None:
            limits = [2 * factors.latent.rank - factors.rank for factors in kept]
        else:
            n_rows = self.layers[0].n_segment + n_recent
            spare = self.cache.fresh_bytes(self, n_rows) - sum(
                factors.nbytes_with(n_recent) for factors in kept
            )
            limits = [int(spare / len(kept) // factors.column_bytes(n_recent)) for factors in kept]
        return [max(limit, 0) for limit in limits] + [0] * (2 - len(limits))

    def _release(self) -> None:
        """Copy what is left of a latent that was trimmed to less than half, so that it is freed."""
        n_rows = self.layers[0].n_segment

        def short(factors: SharedFactors | None) -> SharedFactors | None:
            if factors is None or 2 * n_rows >= factors.latent.shape[1]:
                return factors
            return factors._replace(latent=factors.latent.rows(0, n_rows).own(self.backend))

        self.keys, self.values = short(self.keys), short(self.values)

    def _rows(self, layer: LayerCache, name: str, start: int, end: int) -> Array:
        """Dense rows of a layer, keys un-rotated: ``[B, L, n_kv_heads, dim]`` in float32."""
        xp = self.backend.xp
        rows = getattr(layer, name).rows[..., start:end, :]
        # float32 before the inverse rotation: 16-bit keys would be rounded twice
        rows = xp.astype(rows, self.backend.accumulate_dtype(rows))
        if name == "keys":
            position = start - layer.n_outlier_rows + layer.n_segment + layer.n_recent
            runs = layer.runs_between(position, position + end - start)
            rows = rope_rows(self.backend, rows, position, runs, inverse=True)
        rows = self.backend.own(xp.permute_dims(rows, (0, 2, 1, 3)))
        self.backend.evaluate(rows)
        return rows

    def _draft(self, name: str, end: int, rank: int, outliers: Sequence[Array | None]) -> Draft:
        """Factor the rows from ``start`` to ``end``, which are freed layer by layer on the way."""
        config, dtype = self.cache.config, self.layers[0].keys.rows.dtype
        layers, weights = [], []
        for layer, outlier_rows in zip(self.layers, outliers, strict=True):
            layers.append(self._rows(layer, name, self.start, end))
            weights.append(column_weights(layer, name, layers[-1]))
            buffer, kept = getattr(layer, name), []
            if outlier_rows is not None:
                rows = outlier_rows[..., None]
                kept.append(self.backend.xp.take_along_axis(buffer.rows, rows, axis=-2))
            buffer.replace(self.start, end, kept)
            self.backend.evaluate(buffer.allocated)
        draft = factor_rows(
            self.backend,
            layers,
            rank,
            dtype,
            weights=None if config.weighting == "off" else weights,
            is_rotated=config.chooses_bits,
            power_iterations=config.power_iterations,
            seed=config.seed,
        )
        self.cache.report_progress()
        return draft

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
        return chunk_rows(self.backend, outliers, config.chunk_size) + self.start

    def arrays(self) -> list[Array]:
        """The latents, counted once for the group."""
        return [x for factors in (self.keys, self.values) if factors for x in factors.arrays]
