"""SnapKV: rows that a window of queries attends to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from xkv.errors import InputError
from xkv.evaluation.methods.eviction import is_largest, keep_rows, rows_to_keep
from xkv.evaluation.methods.method import Compressed, Method, compressed_rows
from xkv.evaluation.prefix import Prefix
from xkv.ops.attention import grouped_scores
from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.planning.document import N_WATCHED, Document


@dataclass(frozen=True)
class SnapKV(Method):
    """The rows to which the document's last queries attend most, and those queries' own rows.

    Each KV head keeps its own rows. The attention weights of the observation window are summed over
    its queries, averaged over the query heads of a KV head and spread to neighbours by a maximum
    over ``kernel_size`` positions. The window is the end of the *document*: the question is not
    seen, see :class:`SnapKVQuery`.

    Args:
        window: Queries of the observation window, 1 to 32.
        kernel_size: Positions of the maximum, an odd number.

    Source: SnapKV, arXiv:2404.14469.
    """

    name = "snapkv"

    window: int = 32
    kernel_size: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.window <= N_WATCHED:
            raise InputError(f"window={self.window} must be 1 to {N_WATCHED}")
        _check_kernel_size(self.kernel_size)

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        backend, n_tokens = document.backend, document.n_tokens
        what = f"the {self.window} of the window"
        n_kept = rows_to_keep(document, ratio, self.window, what)
        n_before = n_tokens - self.window
        window = backend.positions(n_before, self.window)
        rows = []
        for all_queries, keys in zip(document.queries, document.keys, strict=True):
            queries = all_queries[..., -self.window :, :]
            weights = watched_weights(backend, queries, [document.widen(keys)], document.scale)
            pooled = max_pool(backend, weights[..., :n_before], self.kernel_size)
            top = backend.top_indices(pooled, n_kept - self.window)
            own = backend.xp.broadcast_to(window, (*top.shape[:-1], self.window))
            rows.append(backend.xp.concat([top, backend.xp.astype(own, top.dtype)], axis=-1))
            backend.evaluate(rows[-1])
        return keep_rows(document, rows)


@dataclass(frozen=True)
class SnapKVQuery(Method):
    """:class:`SnapKV` with the question as the window: rows are chosen anew for each question.

    The question's tokens attend to all rows, the answer's to the chosen ones. It needs the question
    before it compresses, so that a cache made by it answers no second one: compare it with methods
    that do not look as an upper bound.

    Args:
        kernel_size: As in :class:`SnapKV`.

    Source: SnapKV, arXiv:2404.14469.
    """

    name = "snapkv-query"
    is_query_aware = True

    kernel_size: int = 7

    def __post_init__(self) -> None:
        _check_kernel_size(self.kernel_size)

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        n_kept = rows_to_keep(document, ratio, 0, "none")
        make_prefix = functools.partial(QuestionPrefix, n_kept=n_kept, kernel_size=self.kernel_size)
        held = document.row_bytes * n_kept
        detail = f"{n_kept} rows of each head"
        return compressed_rows(document, held, document.keys, document.values, make_prefix, detail)


class QuestionPrefix(Prefix):
    """A document of which the first call's queries choose the rows for all later calls."""

    def __init__(
        self,
        backend: Backend,
        keys: Array,
        values: Array,
        n_tokens: int,
        n_kept: int,
        kernel_size: int,
    ) -> None:
        super().__init__(backend, keys, values, n_tokens)
        self._n_kept, self._kernel_size = n_kept, kernel_size
        self._selected: Array | None = None

    def select(self, queries: Array, scale: float) -> Array | None:
        if self._selected is not None:
            return self._selected
        parts = [self.prefix_keys, self.keys]
        weights = watched_weights(self.backend, queries, parts, scale)
        weights = weights[..., : self.prefix_keys.shape[-2]]
        pooled = max_pool(self.backend, weights, self._kernel_size)
        self._selected = is_largest(self.backend, pooled, self._n_kept)
        self.backend.evaluate(self._selected)
        return None


def watched_weights(
    backend: Backend, queries: Array, key_parts: Sequence[Array], scale: float
) -> Array:
    """Attention weights of the newest tokens' queries, summed over them.

    Args:
        queries: ``[B, n_heads, Lq, head_dim]`` of the last Lq rows.
        key_parts: Rows in order, ``[1 or B, n_kv_heads, S, head_dim]`` each.
        scale: Factor on the scores.

    Returns:
        ``[B, n_kv_heads, rows]``, averaged over the query heads of a KV head.
    """
    xp = backend.xp
    scores = grouped_scores(backend, queries * scale, key_parts)
    n_queries, n_rows = queries.shape[-2], scores.shape[-1]
    scores = xp.reshape(scores, (*queries.shape[:2], n_queries, n_rows))
    is_past = backend.positions(n_rows - n_queries, n_queries)[:, None]
    is_past = is_past >= backend.positions(0, n_rows)
    weights = xp.softmax(xp.where(is_past, scores, xp.finfo(scores.dtype).min), -1)
    heads = (queries.shape[0], key_parts[0].shape[1], -1, n_rows)
    return xp.mean(xp.reshape(xp.sum(weights, axis=-2), heads), axis=-2)


def max_pool(backend: Backend, weights: Array, kernel_size: int) -> Array:
    """Largest of the ``kernel_size`` neighbours of each position; weights are not negative."""
    xp, n_rows = backend.xp, weights.shape[-1]
    shape = (*weights.shape[:-1], kernel_size // 2)
    edge = xp.zeros(shape, dtype=weights.dtype, **backend.placement)
    padded = xp.concat([edge, weights, edge], axis=-1)
    return functools.reduce(xp.maximum, [padded[..., i : i + n_rows] for i in range(kernel_size)])


def _check_kernel_size(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"kernel_size={kernel_size} must be an odd number above 0")
