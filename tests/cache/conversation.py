"""A cache that is fed turn by turn, beside what the full cache would hold."""

from __future__ import annotations

import numpy as np

from xkv import RopeSpec, XKVConfig
from xkv.cache.lowrank_cache import LowRankCache

N_LAYERS, N_KV_HEADS, HEAD_DIM = 2, 2, 32
WIDTH = N_LAYERS * N_KV_HEADS * HEAD_DIM


class Conversation:
    """A cache fed with rows of a given rank, and what the full cache would hold.

    Args:
        topics: Kinds of rows, each with a basis that those of the others do not fit.
        rank: Of each.
        batch: Sequences.
        head_dim: Of keys and values.
        options: Of the configuration.
    """

    def __init__(self, backend, topics=2, rank=12, batch=1, head_dim=HEAD_DIM, **options) -> None:
        options = {"budget": 64, "sinks": 2, "window": 16, "max_tail": 16, **options}
        config = XKVConfig(group_size=2, **options)
        self.backend, self.batch, self.head_dim = backend, batch, head_dim
        self.spec = RopeSpec.standard(head_dim, 10_000.0)
        self.cache = LowRankCache(backend, config, [[0, 1]])
        self.generator = np.random.default_rng(0)
        width = N_LAYERS * N_KV_HEADS * head_dim
        self.bases = self.generator.standard_normal((topics, 2, rank, width))
        empty = np.zeros((batch, N_KV_HEADS, 0, head_dim), np.float32)
        self.rows = [[empty, empty] for _ in range(N_LAYERS)]

    def draw(self, n_tokens: int, topic: int) -> np.ndarray:
        """Keys and values: ``[2, B, n_tokens, N_LAYERS, N_KV_HEADS, head_dim]``."""
        weights = self.generator.standard_normal((2, self.batch * n_tokens, self.bases.shape[2]))
        shape = (2, self.batch, n_tokens, N_LAYERS, N_KV_HEADS, self.head_dim)
        return (weights @ self.bases[topic]).reshape(shape)

    def say(self, n_tokens: int, topic: int = 0) -> None:
        flat = self.draw(n_tokens, topic)
        for layer_idx, layer in self.cache.layers.items():
            keys, values = (
                self.backend.from_numpy(x[:, :, layer_idx].swapaxes(1, 2).astype(np.float32))
                for x in flat
            )
            keys = self.backend.rope(keys, layer.offset, self.spec)
            layer.append(keys, values, self.spec)
            self.rows[layer_idx] = [
                np.concatenate([kept, self.backend.to_numpy(new)], axis=2)
                for kept, new in zip(self.rows[layer_idx], (keys, values), strict=True)
            ]

    def reply(self, n_tokens: int, topic: int = 0) -> None:
        for _ in range(n_tokens):
            self.say(1, topic)

    def trim_to(self, n_tokens: int) -> None:
        """Forget all tokens after the first ones."""
        for layer_idx, layer in self.cache.layers.items():
            layer.trim(layer.offset - n_tokens)
            self.rows[layer_idx] = [x[:, :, :n_tokens] for x in self.rows[layer_idx]]

    def error(self, last: int | None = None) -> float:
        """Largest relative error of the rebuilt keys and values (of the last rows)."""
        errors = []
        for layer_idx, layer in self.cache.layers.items():
            for rows, want in zip(layer.dense(), self.rows[layer_idx], strict=True):
                want, got = want[..., : layer.offset, :], self.backend.to_numpy(rows)
                assert got.shape == want.shape
                first = 0 if last is None else layer.offset - last
                difference = np.linalg.norm((got - want)[..., first:, :])
                errors.append(difference / np.linalg.norm(want[..., first:, :]))
        return max(errors)
