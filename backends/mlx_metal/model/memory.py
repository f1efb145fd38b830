"""What a prompt cache takes, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.prefill import flatten, lowrank_cache
from xkv.cli.terminal import size_text

mlx_cache = borrowed.module("mlx_lm.models.cache")


def dense_bytes(cache: Any) -> int:
    """What a cache's tokens take in full caches without spare rows."""
    return sum(map(_dense_bytes, flatten([cache])))


def _dense_bytes(layer: Any) -> int:
    if isinstance(layer, XKVCache):
        return layer.layer.dense_bytes
    if type(layer) is mlx_cache.KVCache and layer.keys is not None:
        return layer.nbytes * layer.offset // layer.keys.shape[-2]
    return layer.nbytes


def cache_text(caches: Sequence[Any]) -> str:
    """One line on a prompt cache, for people."""
    layers = list(flatten(caches))
    cache = lowrank_cache(caches)
    kept = layers if cache is None else [*layers, *cache.beside]
    dense, held = sum(map(dense_bytes, layers)), sum(x.nbytes for x in kept)
    tokens = max((x.offset for x in layers if hasattr(x, "offset")), default=0)
    return (
        f"KV cache: {tokens} tokens, {size_text(dense)} dense, {size_text(held)} held "
        f"({dense / max(held, 1):.2f} x)"
    )
