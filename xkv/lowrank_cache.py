"""The low-rank cache: dense while a prompt streams in, then a shared segment and a dense rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xkv.attention import RopeRun, rope_rows
from xkv.config import XKVConfig
from xkv.factorize import factorize
from xkv.layer_cache import LayerCache, RowBuffer
from xkv.ranks import CacheShape, RankPlan, plan_ranks
from xkv.selection import chunk_rows, make_landmarks

if TYPE_CHECKING:
    from xkv.backend import Array, Backend


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
