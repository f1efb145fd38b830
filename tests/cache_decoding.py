"""Decode steps of a whole cache, on any backend."""

from __future__ import annotations

import numpy as np

import xkv
from xkv.cache.lowrank_cache import LowRankCache
from xkv.ops.backend import Backend


def decode_with_cache(backend: Backend, config: xkv.XKVConfig) -> np.ndarray:
    """Two layers' attention of two tokens after a prompt."""
    cache = LowRankCache(backend, config, [[0, 1]])
    spec = xkv.RopeSpec.standard(64, 10_000.0)
    outputs = []
    for step, n_tokens in enumerate([250, 1, 1]):
        for layer_idx, layer in cache.layers.items():
            seed = 10 * step + layer_idx
            keys, values = (backend.normal((2, 2, n_tokens, 64), seed + 100 * i) for i in (1, 2))
            layer.append(keys, values, spec)
            if n_tokens == 1:
                queries = 2 * backend.normal((2, 8, 1, 64), seed + 300)
                outputs.append(backend.to_numpy(layer.attend(queries, 0.125, None)))
    assert all(layer.is_compressed for layer in cache.layers.values())
    return np.stack(outputs)
