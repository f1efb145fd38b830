"""What a model asks of its cache, read off a forward pass that is never computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_cache

from xkv.backends.mlx_metal.prefill import CannotChunk, LayerwisePrefill, Prefill
from xkv.backends.mlx_metal.ropes import find_rope
from xkv.backends.mlx_metal.seam import AttendingCache, attention_seam
from xkv.errors import InputError
from xkv.ranks import CacheShape, GroupShape
from xkv.rope import Rope

PROBE_TOKENS, PROBE_STEP = 40, 20


@dataclass(frozen=True)
class KVShape:
    """Rows of one layer's cache: layers with equal shapes can share a latent.

    Args:
        n_kv_heads: KV heads.
        key_dim: Features of a key head (of the latent, for MLA).
        value_dim: Features of a value head (of the rotary key, for MLA).
        item_bytes: Bytes of an element.
        is_mla: The cache holds a latent and a rotary key instead of keys and values.
    """

    n_kv_heads: int
    key_dim: int
    value_dim: int
    item_bytes: int
    is_mla: bool = False

    @property
    def row_bytes(self) -> int:
        """Dense bytes of one token."""
        return self.n_kv_heads * (self.key_dim + self.value_dim) * self.item_bytes


@dataclass(frozen=True)
class CacheProbe:
    """One entry of a model's prompt cache.

    Args:
        cache_type: mlx-lm's class.
        shape: Its rows; None unless it is a plain ``KVCache`` that was filled once.
        rope: What rotates its keys.
        reaches_seam: Whether its layer's attention goes through ``scaled_dot_product_attention``
            with just what the cache returned.
        reason: Why it is not compressed; None if it can be.
    """

    cache_type: str
    shape: KVShape | None = None
    rope: Rope | None = None
    reaches_seam: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class ModelProbe:
    """A model's prompt cache, and whether whole prompts can go through layer by layer.

    Args:
        caches: One entry for each of the model's caches.
        why_not_layerwise: A sentence, or None.
    """

    caches: tuple[CacheProbe, ...]
    why_not_layerwise: str | None

    def cache_shape(self, groups: tuple[tuple[int, ...], ...]) -> CacheShape:
        """What the byte formula needs to know for these groups of caches."""
        shapes = []
        for group in groups:
            shape = self.caches[group[0]].shape
            assert shape is not None
            shapes.append(
                GroupShape(
                    len(group), shape.n_kv_heads, shape.key_dim, shape.value_dim, shape.is_mla
                )
            )
        first = self.caches[groups[0][0]].shape
        grouped = {index for group in groups for index in group}
        dense = sum(
            probe.shape.row_bytes
            for index, probe in enumerate(self.caches)
            if probe.shape is not None and index not in grouped
        )
        assert first is not None
        return CacheShape(tuple(shapes), first.item_bytes, dense)


class _ProbeCache(mlx_cache.KVCache, AttendingCache):
    """A plain cache that notes what it is given."""

    def __init__(self, layers: LayerwisePrefill) -> None:
        super().__init__()
        self._layers = layers
        self.rows: list[tuple[mx.array, mx.array]] = []
        self.layer: nn.Module | None = None
        self.returned: list[tuple[Any, Any]] = []
        self.attended: list[tuple[bool, bool]] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.layer = self._layers.current
        self.rows.append((keys, values))
        self.returned.append(super().update_and_fetch(keys, values))
        return self.returned[-1]

    def takes(self, keys: Any, values: Any) -> bool:
        if self.returned:
            mine = self.returned[-1]
            self.attended.append((keys is mine[0], values is mine[1]))
        return False


def probe_model(model: nn.Module, layers: LayerwisePrefill) -> ModelProbe:
    """Run a model lazily over a few tokens, chunked inside each layer, and note what happens.

    Args:
        model: From ``mlx_lm.load``, before its ``make_cache`` is replaced.
        layers: Its decoder layers, taken over.
    """
    reason = _dry_run(model, layers, _probe_caches(model, layers), PROBE_STEP)
    # the same without chunks: what a cache is asked for in one call of the model
    caches = _probe_caches(model, layers)
    problem = _dry_run(model, layers, caches, PROBE_TOKENS)
    if problem is not None:
        raise InputError(f"{type(model).__module__.split('.')[-1]}: {problem}")
    return ModelProbe(tuple(_describe(cache) for cache in caches), reason)


def _probe_caches(model: nn.Module, layers: LayerwisePrefill) -> list[Any]:
    return [
        _ProbeCache(layers) if type(cache) is mlx_cache.KVCache else cache
        for cache in mlx_cache.make_prompt_cache(model)
    ]


def _dry_run(model: Any, layers: LayerwisePrefill, caches: list[Any], step: int) -> str | None:
    """Build the graph of a forward pass; returns why layers cannot be chunked, or None."""
    if not layers.layers:
        return "the model does not list its layers"
    prefill = Prefill(caches, step, len(layers.layers))
    prefill.is_dry_run = True
    layers.start(prefill)
    try:
        with attention_seam():
            model(mx.zeros((1, PROBE_TOKENS), dtype=mx.int32), cache=caches)
    except CannotChunk as error:
        return str(error)
    finally:
        layers.stop(prefill)
    if step < PROBE_TOKENS and prefill.n_calls != len(layers.layers):
        n_other = len(layers.layers) - prefill.n_calls
        return f"{n_other} of {len(layers.layers)} layers are not called with a cache of their own"
    return None


def _describe(cache: Any) -> CacheProbe:
    name = type(cache).__name__
    if not isinstance(cache, _ProbeCache):
        return CacheProbe(name, reason=f"keeps its own {name}")
    if len(cache.rows) != 1:
        return CacheProbe("KVCache", reason=f"is filled {len(cache.rows)} times in one call")
    keys, values = cache.rows[0]
    _, n_kv_heads, _, key_dim = keys.shape
    value_dim = values.shape[-1]
    if values.shape[:3] != keys.shape[:3]:
        return CacheProbe("KVCache", reason="has keys and values of different heads or lengths")
    reaches_seam = (True, True) in cache.attended
    # MLA: the cache returns a latent and a rotary key, and attention never gets the latter
    is_mla = not reaches_seam and bool(cache.attended) and n_kv_heads == 1 and key_dim > value_dim
    shape = KVShape(n_kv_heads, key_dim, value_dim, keys.itemsize, is_mla)
    rope = None if is_mla or cache.layer is None else find_rope(cache.layer)
    return CacheProbe("KVCache", shape, rope, reaches_seam)
