"""Documents of random rows, questions about them, and what plain attention answers."""

from __future__ import annotations

from typing import Any

import numpy as np

import xkv
from xkv.cache.lowrank_cache import LowRankCache
from xkv.checks.tolerances import TOLERANCE
from xkv.evaluation.methods import Document
from xkv.evaluation.prefix import Prefix
from xkv.ops.types import RopeSpec
from xkv.planning.grouping import make_groups

N_HEADS, N_KV_HEADS, N_WATCHED = 4, 2, 32
EXACT = TOLERANCE["float32"]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def make_document(
    backend: xkv.ops.backend.Backend,
    n_tokens: int,
    n_layers: int = 4,
    head_dim: int = 32,
    dtype: str = "float32",
    keys: list[np.ndarray] | None = None,
    values: list[np.ndarray] | None = None,
    queries: list[np.ndarray] | None = None,
) -> Document:
    """Rows of a document, random where none are given."""
    xp = backend.xp

    def layers(given: list[np.ndarray] | None, heads: int, rows: int, kind: Any) -> tuple:
        arrays = given or [
            normal(1, heads, rows, head_dim, seed=100 * heads + rows + layer)
            for layer in range(n_layers)
        ]
        return tuple(xp.astype(backend.from_numpy(x), kind) for x in arrays)

    def make_cache(config: xkv.XKVConfig) -> LowRankCache:
        groups = make_groups(config, n_layers)
        return LowRankCache(backend, config, groups, n_layers - sum(map(len, groups)))

    kind = getattr(xp, dtype)
    # the values' seeds differ from the keys'
    values = values or [normal(1, N_KV_HEADS, n_tokens, head_dim, seed=i) for i in range(n_layers)]
    return Document(
        backend,
        layers(keys, N_KV_HEADS, n_tokens, kind),
        layers(values, N_KV_HEADS, n_tokens, kind),
        layers(queries, N_HEADS, N_WATCHED, xp.float32),
        (RopeSpec.standard(head_dim, 10_000.0),) * n_layers,
        (n_tokens,),
        head_dim**-0.5,
        xp.float32,
        3,
        make_cache,
    )


def numpy_rows(document: Document, name: str) -> list[np.ndarray]:
    return [document.backend.to_numpy(x) for x in getattr(document, name)]


def causal_weights(queries: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """Attention weights ``[n_heads, Lq, S]`` of the last Lq rows, in float64."""
    queries, keys = (x.astype(np.float64) for x in (queries, keys))
    keys = np.repeat(keys, len(queries) // len(keys), axis=0)
    scores = queries @ keys.swapaxes(-1, -2) * scale
    n_queries, n_rows = scores.shape[-2:]
    scores[:, ~np.tri(n_queries, n_rows, n_rows - n_queries, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def plain_attention(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float
) -> np.ndarray:
    weights = causal_weights(queries, keys, scale)
    return weights @ np.repeat(values, len(queries) // len(values), axis=0)


class Asked:
    """A batch of questions to one layer, and what plain attention would answer."""

    def __init__(self, document: Document, prefix: Prefix, batch: int, layer: int = 0) -> None:
        self.document, self.prefix, self.batch = document, prefix, batch
        self.rows = {name: numpy_rows(document, name)[layer][0] for name in ("keys", "values")}
        shape = (batch, N_KV_HEADS, 0, self.rows["keys"].shape[-1])
        self.since = {name: np.zeros(shape, np.float32) for name in ("keys", "values")}

    def attend(self, queries: np.ndarray, seed: int) -> np.ndarray:
        """Take as many new tokens as queries, with random rows."""
        backend = self.document.backend
        shape = (self.batch, N_KV_HEADS, queries.shape[-2], queries.shape[-1])
        new = {name: normal(*shape, seed=seed + i) for i, name in enumerate(self.since)}
        for name, rows in new.items():
            self.since[name] = np.concatenate([self.since[name], rows], axis=-2)
        self.prefix.append(*map(backend.from_numpy, new.values()), None)
        output = self.prefix.attend(backend.from_numpy(queries), self.document.scale, None)
        return backend.to_numpy(output)

    def plain(self, queries: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """Over all rows of the document, or those ``chosen [B, n_kv_heads, S]``."""
        n_rows = self.rows["keys"].shape[-2]
        if chosen is None:
            chosen = np.broadcast_to(np.arange(n_rows), (self.batch, N_KV_HEADS, n_rows))
        outputs = []
        for b in range(self.batch):
            keys, values = (
                np.concatenate(
                    [
                        np.take_along_axis(self.rows[name], chosen[b][..., None], -2),
                        self.since[name][b],
                    ],
                    axis=-2,
                )
                for name in ("keys", "values")
            )
            outputs.append(plain_attention(queries[b], keys, values, self.document.scale))
        return np.stack(outputs)


def kept_rows(document: Document, prefix: Prefix, layer: int, head: int) -> list[int]:
    """Numbers of the document's rows that a prefix holds, each row's key and value checked."""
    backend, found = document.backend, []
    for name, rows in (("keys", prefix.prefix_keys), ("values", prefix.prefix_values)):
        exact = numpy_rows(document, name)[layer][0, head].astype(np.float32)
        same = (backend.to_numpy(rows)[0, head][:, None] == exact).all(-1)
        assert (same.sum(-1) == 1).all(), "a row that the document does not have"
        found.append(same.argmax(-1).tolist())
    assert found[0] == found[1]
    return found[0]


def planted(places: np.ndarray, n_tokens: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Keys of one layer and the queries that they match.

    Args:
        places: Row for each question and KV head, ``[B, n_kv_heads]``.

    Returns:
        The keys, and a direction for each question and head, ``[B, n_heads, 32]``.
    """
    keys = normal(1, N_KV_HEADS, n_tokens, 32, seed=7)
    directions = normal(*places.shape, 32, seed=8)
    for (b, head), place in np.ndenumerate(places):
        keys[0, head, place] = 3 * directions[b, head]
    return [keys], np.repeat(directions, N_HEADS // N_KV_HEADS, axis=1)
