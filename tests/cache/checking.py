"""What the state machine compares after every rule."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.cache.settings import Setting
from tests.cache.twin import Pair, attention, row_error
from xkv.checks.invariants import broken_invariants
from xkv.ops.backend import Backend

EXACT = 2e-4
"""Relative error of float32 factors of full rank, after many folds."""
LOOSE = 12.0
"""How much worse than factors made at once those that grew turn by turn may be, by their errors."""


class Checking:
    """The comparisons of a machine."""

    backend: Backend
    setting: Setting

    def check(self, pair: Pair) -> None:
        """Invariants, and all rows against the twin's."""
        cache = pair.cache
        assert broken_invariants(cache) == []
        assert {layer.offset for layer in cache.layers.values()} == {pair.n_tokens}
        if not pair.n_tokens:
            return
        for layer_idx in cache.layers:
            for rows, exact in zip(
                cache.layers[layer_idx].dense(), (pair.keys, pair.values), strict=True
            ):
                got, want = self.backend.to_numpy(rows), exact[layer_idx]
                assert got.shape == want.shape and np.isfinite(got).all()
                error, allowed = row_error(got, want), self.allowed(pair)
                assert error <= allowed, (layer_idx, error, allowed, cache.groups[0].layers)

    def allowed(self, pair: Pair) -> float:
        """Relative error of rows that may come back."""
        if self.setting.is_exact:
            return EXACT
        if pair.topics.any():
            # the basis may have no room for a new topic, but it is never worse than nothing
            return 1.0
        errors = [x.error for group in pair.cache.groups for x in group.state.stores]
        return max(EXACT, LOOSE * max(errors, default=0.0), 0.05 * bool(errors))

    def check_attention(self, pair: Pair, layer_idx: int, queries: Any) -> None:
        """What the model is answered: attention over the rows that the layer gives back."""
        layer, s = pair.cache.layers[layer_idx], self.setting
        n_queries, offset = queries.shape[2], layer.offset
        scale = s.head_dim**-0.5
        seen = np.arange(offset - n_queries, offset)[:, None] >= np.arange(offset)
        mask = None if n_queries == 1 else self.backend.from_numpy(seen)
        got = self.backend.to_numpy(layer.attend(queries, scale, mask))
        if s.is_exact:
            keys, values = pair.keys[layer_idx], pair.values[layer_idx]
        else:
            keys, values = (self.backend.to_numpy(x) for x in layer.dense())
        attended = np.broadcast_to(seen, (s.batch, s.n_kv_heads, n_queries, offset))
        if layer.is_compressed and layer.landmarks is not None and n_queries == 1:
            attended = self.selected(pair, layer_idx, queries, scale)
            if not s.is_exact:
                keys, values = self.with_outliers(pair, layer_idx, keys, values)
        want = attention(self.backend.to_numpy(queries), keys, values, attended, scale)
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6)
        assert error <= 2e-3, (error, layer.rows.n_segment)

    def selected(self, pair: Pair, layer_idx: int, queries: Any, scale: float) -> np.ndarray:
        """Which rows a step attends to: all that are dense, and the chosen chunks."""
        layer, backend = pair.cache.layers[layer_idx], self.backend
        rows = layer.rows
        assert rows.landmarks is not None
        size, start = rows.landmarks.chunk_size, rows.start
        # every row of the segment is in a chunk, or nothing could choose it
        assert rows.landmarks.n_chunks * size == rows.n_segment
        chunks = backend.to_numpy(
            backend.select_chunks(queries, rows.landmarks, self.setting.config.budget, scale)
        )
        attended = np.ones((*chunks.shape[:2], 1, layer.offset), bool)
        attended[..., start : start + rows.n_segment] = False
        outliers = backend.to_numpy(rows.landmarks.is_outlier)
        for batch, head in np.ndindex(*chunks.shape[:2]):
            for chunk in (*chunks[batch, head], *np.nonzero(outliers[batch, head])[0]):
                first = start + int(chunk) * size
                attended[batch, head, 0, first : first + size] = True
        return attended

    def with_outliers(
        self, pair: Pair, layer_idx: int, keys: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows with the outlier chunks' exact ones in their places."""
        rows = pair.cache.layers[layer_idx].rows
        assert rows.landmarks is not None
        size, start = rows.landmarks.chunk_size, rows.start
        outliers = self.backend.to_numpy(rows.landmarks.is_outlier)
        keys, values = keys.copy(), values.copy()
        for batch, head, chunk in zip(*np.nonzero(outliers), strict=True):
            at = (batch, head, slice(start + chunk * size, start + (chunk + 1) * size))
            keys[at], values[at] = pair.keys[layer_idx][at], pair.values[layer_idx][at]
        return keys, values
