"""What the state machine compares after every rule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.cache.settings import Setting
from tests.cache.twin import Pair, attention, row_error
from xkv.cache.rows import LayerRows
from xkv.checks.invariants import broken_invariants
from xkv.ops.backend import Backend
from xkv.ops.working_set import n_sets_of

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
        # a mask is any mask: it is seen to, over every row
        mask = self.backend.from_numpy(seen) if self.random.random() < 0.2 else None
        rows = layer.rows
        if s.is_exact:
            keys, values = pair.keys[layer_idx].copy(), pair.values[layer_idx].copy()
        else:
            keys, values = (np.array(self.backend.to_numpy(x)) for x in layer.dense())
        beside = [x.copy() for x in (keys, values)]
        recent = self.with_recent(rows, *beside)
        with spied_rows(self.backend) as rebuilt:
            got = self.backend.to_numpy(layer.attend(queries, scale, mask))
        attended = np.broadcast_to(seen, (s.batch, s.n_kv_heads, n_queries, offset)).copy()
        if rebuilt:
            keys, values = beside
            chosen = [rebuilt[0], *recent]
            self.check_chosen(layer_idx, rows, chosen, n_queries)
            start, end = rows.start, rows.start + rows.n_segment
            attended[..., start:end] = False
            for at in chosen:
                # a set for each token, or one for all
                sets = at.reshape(s.batch, s.n_kv_heads, -1, at.shape[-1]) + start
                places = np.broadcast_to(sets, (*sets.shape[:2], n_queries, sets.shape[3]))
                np.put_along_axis(attended, places, True, axis=-1)
        want = attention(self.backend.to_numpy(queries), keys, values, attended, scale)
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6)
        assert error <= 2e-3, (error, layer.rows.n_segment)

    def with_recent(self, rows: LayerRows, keys: np.ndarray, values: np.ndarray) -> list[Any]:
        """Numbers of recent rows; they go into all rows as they are held."""
        if rows.recent is None:
            return []
        end = rows.start + rows.n_segment
        places = slice(end - rows.n_recent, end)
        for all_rows, held in ((keys, rows.recent.keys), (values, rows.recent.values)):
            recent = held(self.backend, keys.shape[-1], self.backend.xp.float32)
            all_rows[:, :, places] = self.backend.to_numpy(recent)
        numbers = np.arange(rows.n_segment - rows.n_recent, rows.n_segment)
        return [np.broadcast_to(numbers, (*keys.shape[:2], rows.n_recent))]

    def check_chosen(
        self, layer_idx: int, rows: LayerRows, chosen: list[np.ndarray], n_queries: int
    ) -> None:
        """As many rows as the configuration says, each once."""
        n_rebuilt = self.setting.config.rebuilt_at(rows.n_segment, rows.n_recent, n_queries)
        assert [x.shape[-1] for x in chosen] == [n_rebuilt, rows.n_recent][: len(chosen)]
        n_sets = n_sets_of(n_queries)
        assert chosen[0].shape[1] == self.setting.n_kv_heads * n_sets
        chosen = [chosen[0], *(np.repeat(x, n_sets, axis=1) for x in chosen[1:])]
        for each in np.concatenate(chosen, axis=-1).reshape(-1, n_rebuilt + rows.n_recent):
            assert len(set(each.tolist())) == len(each), (layer_idx, each)
            assert each.min() >= 0 and each.max() < rows.n_segment


@contextlib.contextmanager
def spied_rows(backend: Backend) -> Iterator[list[np.ndarray]]:
    """Inside, the rows that steps rebuild are noted."""
    seen: list[np.ndarray] = []

    def choose(worth: Any, count: int) -> Any:
        rows = type(backend).choose_rows(backend, worth, count)
        seen.append(np.array(backend.to_numpy(rows)))
        return rows

    backend.choose_rows = choose  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del backend.choose_rows
