"""Copies of a prompt cache that is taken layer by layer."""

from __future__ import annotations

import copy
import weakref
from typing import Any, NamedTuple

from xkv.cache.group import GroupState
from xkv.cache.lowrank_cache import LowRankCache


class _Copy(NamedTuple):
    """A copy of a cache, of which some layers were handed out."""

    cache: weakref.ref[LowRankCache]
    states: tuple[GroupState, ...]
    """Of the original, when it was copied."""
    taken: set[tuple[int, int]]


_COPIES: weakref.WeakKeyDictionary[LowRankCache, list[_Copy]] = weakref.WeakKeyDictionary()
"""By the original: mlx-lm copies a prompt cache layer by layer, and layers share groups."""


def copied(cache: Any) -> Any:
    """A layer's cache in a copy of all of them; the other layers' come from the same copy."""
    layer = cache.layer
    original, name = layer.cache, (layer.number, layer.index)
    states = tuple(group.state for group in original.groups)
    begun = [
        (found, known)
        for known in _COPIES.get(original, [])
        if all(a is b for a, b in zip(states, known.states, strict=True))
        and (found := known.cache()) is not None
    ]
    mine = next((x for x in begun if name not in x[1].taken), None)
    if mine is None:
        found = copy.deepcopy(original)
        mine = found, _Copy(weakref.ref(found), states, set())
        begun.append(mine)
    mine[1].taken.add(name)
    n_layers = sum(map(len, original.indices))
    _COPIES[original] = [known for _, known in begun if len(known.taken) < n_layers]
    return cache.on(mine[0])
