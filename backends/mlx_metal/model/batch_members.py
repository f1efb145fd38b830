"""One sequence's caches out of a batch's, whoever made them, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.batch import XKVBatch

mlx_cache = borrowed.module("mlx_lm.models.cache")


def member_of(cache: Any, number: int, fresh: Any) -> Any:
    """One sequence's cache in a layer's batch: ours itself, of mlx-lm's own a copy.

    Args:
        cache: Of the layer.
        number: Of the sequence.
        fresh: An empty cache of the layer; mlx-lm extracts nothing from an empty batch.
    """
    if hasattr(cache, "caches"):
        pairs = zip(cache.caches, fresh.caches, strict=True)
        return mlx_cache.CacheList(*(member_of(part, number, empty) for part, empty in pairs))
    if isinstance(cache, XKVBatch):
        return cache.members[number]
    return fresh if cache.empty() else cache.extract(number)


def with_members(cache: Any, members: Sequence[Any]) -> Any:
    """A layer's batch after its sequences' caches of :func:`member_of` went on."""
    if isinstance(cache, XKVBatch):
        return cache
    if hasattr(cache, "caches"):
        columns = zip(*(member.caches for member in members), strict=True)
        pairs = zip(cache.caches, columns, strict=True)
        return mlx_cache.CacheList(*(with_members(*pair) for pair in pairs))
    return members[0].merge(members)
