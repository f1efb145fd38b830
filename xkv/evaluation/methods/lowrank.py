"""xKV itself: the project's own cache, as it is after a prompt."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, fields, replace
from typing import Any

from xkv.cache.describe import describe_factors
from xkv.cache.lowrank_cache import LowRankCache
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.evaluation.methods.method import Compressed, Conversation, Method
from xkv.evaluation.prefix import Prefix
from xkv.ops.backend import Backend
from xkv.ops.selection import select_chunks
from xkv.ops.types import Array, Landmarks
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
        return dict(self.options).get("attention") == "selective"

    def grouped(self, grouping: dict[str, Any]) -> LowRank:
        """With these groups, unless its own options say which layers are grouped."""
        if {"group_size", "first_layer", "last_layer"} & set(dict(self.options)):
            return self
        return replace(self, options=(*self.options, *grouping.items()))

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        options: dict[str, Any] = {"attention": "dense", **dict(self.options)}
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


class SelectedPrefix(Prefix):
    """A document whose chunks are selected anew in every decode step."""

    def __init__(
        self,
        backend: Backend,
        keys: Array,
        values: Array,
        n_tokens: int,
        exact: tuple[Array, Array],
        is_dense: Array,
        landmarks: Landmarks,
        start: int,
        budget: int,
    ) -> None:
        super().__init__(backend, keys, values, n_tokens)
        self._approximate, self._exact = (keys, values), exact
        self._is_dense, self._landmarks = is_dense, landmarks
        self._start, self._budget = start, budget

    def select(self, queries: Array, scale: float) -> Array | None:
        """As :meth:`xkv.cache.lowrank_cache.LayerCache.attend` does: single tokens only."""
        if queries.shape[-2] > 1:
            self.prefix_keys, self.prefix_values = self._approximate
            return None
        self.prefix_keys, self.prefix_values = self._exact
        xp, landmarks = self.backend.xp, self._landmarks
        chunks = select_chunks(self.backend, queries, landmarks, self._budget, scale)
        ids = self.backend.positions(0, landmarks.n_chunks)
        is_chosen = xp.any(chunks[..., None] == ids, axis=-2)
        n_tokens = self.prefix_keys.shape[-2]
        rows = _rows_of(self.backend, is_chosen, landmarks.chunk_size, self._start, n_tokens)
        return rows | self._is_dense


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
    backend, n_tokens = document.backend, document.n_tokens
    if "landmarks" in rows:
        return SelectedPrefix(backend, n_tokens=n_tokens, budget=cache.config.budget, **rows)
    return Prefix(backend, n_tokens=n_tokens, **rows)


def _rows(cache: LowRankCache, document: Document, index: int) -> dict[str, Any]:
    """What a :class:`Prefix` or :class:`SelectedPrefix` is made of."""
    if index not in cache.layers:
        return {
            "keys": document.widen(document.keys[index]),
            "values": document.widen(document.values[index]),
        }
    layer = cache.layers[index]
    keys, values = layer.dense()
    if layer.landmarks is None:
        return {"keys": keys, "values": values}
    backend, landmarks = layer.cache.backend, layer.landmarks
    start = layer.group.start
    positions = backend.positions(0, layer.offset)
    is_dense = (positions < start) | (positions >= start + layer.rows.n_segment)
    is_outlier = _rows_of(backend, landmarks.is_outlier, landmarks.chunk_size, start, layer.offset)
    exact = tuple(
        backend.xp.where(is_outlier[..., None], document.widen(rows[index]), approximate)
        for rows, approximate in ((document.keys, keys), (document.values, values))
    )
    if landmarks.bits != 16:
        wide = backend.dequantize(landmarks.arrays, landmarks.group_size, landmarks.bits)
        landmarks = landmarks._replace(arrays=(document.widen(wide),), bits=16)
    return {
        "keys": keys,
        "values": values,
        "exact": exact,
        "is_dense": is_dense | is_outlier,
        "landmarks": landmarks,
        "start": start,
    }


def _rows_of(
    backend: Backend, is_chosen: Array, chunk_size: int, start: int, n_tokens: int
) -> Array:
    """Rows of chosen chunks: ``[B, n_kv_heads, C]`` -> ``[B, n_kv_heads, n_tokens]``."""
    xp = backend.xp
    shape = (*is_chosen.shape, chunk_size)
    rows = xp.reshape(xp.broadcast_to(is_chosen[..., None], shape), (*is_chosen.shape[:2], -1))
    before, after = (
        xp.zeros((*rows.shape[:2], n), dtype=rows.dtype, **backend.placement)
        for n in (start, n_tokens - start - rows.shape[-1])
    )
    return xp.concat([before, rows, after], axis=-1)
