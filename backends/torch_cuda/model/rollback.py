"""Going back to what a cache was before a call of its model failed."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from xkv.backends.torch_cuda.model.cache_layer import Padding, XKVLayer
from xkv.cache.lowrank_cache import LowRankCache, Snapshot

_REPLACING = (XKVLayer, DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
"""Layers that put other tensors in the place of theirs; the rest write into them."""


class CacheState(NamedTuple):
    """All that a call of the model changes; compressed rows are values, and need no copy."""

    n_rows: int
    """Rows seen, padding included."""
    sequences: tuple[tuple[LowRankCache, Snapshot, bool], ...]
    """Each with its state, and whether it is streaming."""
    layers: tuple[tuple[Any, dict[str, Any] | None], ...]
    """Each with its attributes; None where only a copy would have kept them."""
    padding: tuple[Padding, dict[str, Any]]

    @classmethod
    def of(cls, cache: Any, copies: bool) -> CacheState:
        """The state of an :class:`~xkv.backends.torch_cuda.model.xkv_cache.XKVCache`.

        Args:
            copies: Copy layers that write into their tensors, as those of linear attention do.
        """

        def kept(layer: Any) -> dict[str, Any] | None:
            if type(layer) in _REPLACING:
                return dict(vars(layer))
            return copy.deepcopy(vars(layer)) if copies else None

        return cls(
            cache.get_seq_length(),
            tuple((x, x.snapshot(), x.is_streaming) for x in cache.sequences),
            tuple((layer, kept(layer)) for layer in cache.layers),
            (cache.padding, dict(vars(cache.padding))),
        )

    def put_back(self, cache: Any) -> list[str]:
        """Give a cache this state; returns the layers whose own was not kept."""
        cache.sequences = [x for x, _, _ in self.sequences]
        for sequence, snapshot, is_streaming in self.sequences:
            sequence.restore(snapshot)
            sequence.is_streaming = is_streaming
        cache.layers = [layer for layer, _ in self.layers]
        cache.padding = self.padding[0]
        vars(cache.padding).update(self.padding[1])
        lost = []
        for index, (layer, kept) in enumerate(self.layers):
            if kept is None:
                lost.append(f"{type(layer).__name__} of layer {index}")
                continue
            vars(layer).clear()
            vars(layer).update(kept)
        return lost
