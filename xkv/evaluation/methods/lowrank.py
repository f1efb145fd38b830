"""xKV itself: the project's own cache, as it is after a prompt."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from xkv.cache.describe import describe_factors
from xkv.cache.layer import FUSED_QUERIES
from xkv.cache.lowrank_cache import LowRankCache
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.evaluation.methods.method import Compressed, Conversation, Method
from xkv.evaluation.prefix import Prefix
from xkv.ops.backend import Backend
from xkv.ops.scores import grouped_scores, is_past, masked
from xkv.ops.types import Array, Stored
from xkv.ops.working_set import rows_worth
from xkv.planning.document import Document


@dataclass(frozen=True)
class LowRank(Method):
    """A low-rank cache shared by groups of layers (xKV), or by none (single-layer SVD).

    Args:
        name: ``xkv``, or ``svd`` with groups of one layer.
        options: Fields of :class:`xkv.XKVConfig`.

    Source: xKV, arXiv:2503.18893.
    """

    name: str = "xkv"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def has_free_size(self) -> bool:  # type: ignore[override]
        return not {"rank_k", "compression"} & {name for name, _ in self.options}

    @property
    def is_stepwise(self) -> bool:  # type: ignore[override]
        return dict(self.options).get("attention") != "exact"

    def grouped(self, grouping: dict[str, Any]) -> LowRank:
        """With these groups, unless its own options say which layers are grouped."""
        if {"group_size", "first_layer", "last_layer"} & set(dict(self.options)):
            return self
        return replace(self, options=(*self.options, *grouping.items()))

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        options = dict(self.options)
        if ratio is not None:
            options["compression"] = ratio
        cache = compressed_cache(document, XKVConfig(**options))
        held = cache.held_bytes()
        left = [i for i in range(len(document.keys)) if i not in cache.layers]
        held += sum(document.keys[i].nbytes + document.values[i].nbytes for i in left)
        detail = describe_factors(cache)
        _widen(cache, document)

        @functools.cache
        def all_rows() -> list[dict[str, Any]]:
            rows = [_rows(cache, document, index) for index in range(len(document.keys))]
            document.backend.evaluate(*(x for row in rows for x in (row["keys"], row["values"])))
            return rows

        def start() -> list[Prefix]:
            return [_prefix(document, cache, rows) for rows in all_rows()]

        def converse() -> Conversation:
            mine = copy.deepcopy(cache)
            layers = [
                mine.layers.get(index) or _prefix(document, mine, _rows(mine, document, index))
                for index in range(len(document.keys))
            ]

            def bytes_now() -> tuple[int, int]:
                # the widened cache holds the same numbers in more bytes, and codes in as many
                wide = document.widen(document.keys[0]).nbytes / document.keys[0].nbytes
                held = sum(
                    x.nbytes / (wide if x.dtype == document.dtype else 1) for x in mine.arrays()
                )
                n_tokens = layers[0].offset
                alone = sum(document.keys[i].nbytes + document.values[i].nbytes for i in left) * (
                    n_tokens / document.n_tokens
                )
                return n_tokens * document.row_bytes, round(held + alone)

            return Conversation(layers, bytes_now)

        return Compressed(held, start, converse, detail)


def compressed_cache(document: Document, config: XKVConfig) -> LowRankCache:
    """The project's own cache after a document.

    Raises:
        InputError: If the document is too short to be compressed.
    """
    cache = document.make_cache(config)
    for index, layer in cache.layers.items():
        keys, values = document.keys[index], document.values[index]
        begin = 0
        for end, spec in document.rope_runs(index):
            layer.append(keys[..., begin:end, :], values[..., begin:end, :], spec)
            begin = end
    cache.settle()
    if cache.ranks is None:
        raise InputError(cache.notice or "nothing could be compressed")
    return cache


def parse_options(text: dict[str, Any], name: str) -> LowRank:
    """A method from its options' names and values.

    Raises:
        InputError: If an option is unknown or contradicts another.
    """
    known = [field.name for field in fields(XKVConfig)]
    for option in text:
        if option not in known:
            raise InputError(f"{name} has no option {option!r}; its options: {', '.join(known)}")
    XKVConfig(**text)
    return LowRank(name, tuple(text.items()))


class IndexedPrefix(Prefix):
    """A document of whose stored rows each call attends to those that its index finds.

    As in :func:`xkv.ops.working_set.attend_set`, for several questions at once.

    Args:
        stored: Keys of the segment but for recent rows.
        is_dense: Boolean ``[S]``: rows that are not in it.
        n_chosen: Called with the number of a call's queries for that of rows of the segment, for
            each KV head; None for all.
    """

    def __init__(
        self,
        backend: Backend,
        keys: Array,
        values: Array,
        n_tokens: int,
        stored: Stored,
        is_dense: np.ndarray,
        n_chosen: Callable[[int], int | None],
    ) -> None:
        super().__init__(backend, keys, values, n_tokens)
        self._stored, self._n_chosen = stored, n_chosen
        self._dense_rows = backend.from_numpy(np.flatnonzero(is_dense))
        self._is_dense = backend.from_numpy(is_dense)

    def select(self, queries: Array, scale: float) -> Array | None:
        n_chosen = self._n_chosen(queries.shape[-2])
        if queries.shape[-2] >= FUSED_QUERIES or n_chosen is None:
            return None
        backend, xp = self.backend, self.backend.xp
        n_kv_heads, n_rows = self.prefix_keys.shape[1:3]
        dense = xp.take(self.prefix_keys, self._dense_rows, axis=2)
        queries = queries * scale
        beside = grouped_scores(backend, queries, [dense, self.keys])
        if queries.shape[-2] > 1:
            seen = is_past(backend, beside.shape[-1], queries.shape[-2])
            beside = masked(backend, queries, beside, seen)
        totals = xp.reshape(backend.logsumexp(beside), queries.shape[:3])
        worth = rows_worth(backend, queries, totals, self._stored, n_kv_heads)
        chosen = backend.top_indices(worth, n_chosen) + self._stored.start
        marks = xp.zeros((*worth.shape[:2], n_rows), dtype=xp.float32, **backend.placement)
        ones = xp.ones(chosen.shape, dtype=xp.float32, **backend.placement)
        selected = (backend.put_along(marks, chosen, ones) > 0) | self._is_dense
        selected = xp.reshape(selected, (queries.shape[0], n_kv_heads, -1, n_rows))
        if selected.shape[2] == 1:
            return selected
        return xp.concat([selected] * (queries.shape[1] // n_kv_heads), axis=2)


def _widen(cache: LowRankCache, document: Document) -> None:
    """Give a cache's arrays the dtype of the arithmetic, after its bytes were counted."""
    for group in cache.groups:
        wide: dict[str, Any] = {}
        for name in ("keys", "values"):
            store = getattr(group, name)
            if store is not None:
                latent, *layers = (
                    matrix.astype(document.backend, document.dtype)
                    for matrix in (store.latent, *store.basis.layers)
                )
                basis = store.basis._replace(layers=tuple(layers))
                wide[name] = store._replace(latent=latent, basis=basis)
        rows = []
        for layer in group.layers:
            keys, values = (
                buffer._replace(allocated=document.widen(buffer.allocated))
                for buffer in (layer.keys, layer.values)
            )
            rows.append(layer._replace(keys=keys, values=values))
        group.state = group.state._replace(layers=tuple(rows), **wide)


def _prefix(document: Document, cache: LowRankCache, rows: dict[str, Any]) -> Prefix:
    make = IndexedPrefix if "stored" in rows else Prefix
    return make(document.backend, n_tokens=document.n_tokens, **rows)


def _rows(cache: LowRankCache, document: Document, index: int) -> dict[str, Any]:
    """What a :class:`Prefix` or :class:`IndexedPrefix` is made of."""
    if index not in cache.layers:
        return {
            "keys": document.widen(document.keys[index]),
            "values": document.widen(document.values[index]),
        }
    layer = cache.layers[index]
    keys, values = layer.dense()
    found: dict[str, Any] = {"keys": keys, "values": values}
    mine, backend = layer.rows, cache.backend
    n_rebuilt = functools.partial(cache.config.rebuilt_at, mine.n_segment, mine.n_recent)
    if n_rebuilt() is not None:
        positions, end = np.arange(layer.offset), mine.start + mine.n_segment
        first = end - mine.n_recent
        found["is_dense"] = (positions < mine.start) | (positions >= first)
        found["stored"] = layer.view.segment(keys.dtype, mine.n_recent).keys
        found["n_chosen"] = n_rebuilt
        if mine.recent is not None:
            for name, rows in (("keys", keys), ("values", values)):
                recent = getattr(mine.recent, name)(backend, keys.shape[-1], rows.dtype)
                parts = [rows[..., :first, :], recent, rows[..., end:, :]]
                found[name] = backend.xp.concat(parts, axis=-2)
    return found
