"""Prefill of a whole prompt through one layer at a time, chunked inside each layer.

A model call with the whole prompt already goes layer by layer. What is missing is that a layer
takes its tokens in chunks, and that a group is factored and freed when its last layer is done. So
every decoder layer's class is replaced by one that does this, and otherwise does what it did.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from xkv.backends.mlx_metal.cache import XKVCache
from xkv.layer_cache import DECODE_TOKENS

_MASKS = ("mask", "attention_mask", "attn_mask", "mamba_mask")

Progress = Callable[[int, int], None]
"""Called with prompt tokens done and in all."""


class CannotChunk(Exception):
    """A layer is called with something that cannot be cut into chunks of tokens."""


class Prefill:
    """One prompt on its way through the layers.

    Args:
        caches: One a layer that has one, all at the same offset.
        step_size: Most tokens that a layer takes at a time.
        n_layers: Decoder layers, for the progress.
        on_progress: Called after each chunk.
    """

    def __init__(
        self,
        caches: Sequence[Any],
        step_size: int,
        n_layers: int,
        on_progress: Progress = lambda done, total: None,
    ) -> None:
        self.caches = list(caches)
        self.step_size = step_size
        self.n_layers = n_layers
        self.on_progress = on_progress
        self.is_dry_run = False
        self.n_calls = 0
        self._masks: dict[int, tuple[mx.array, dict[str, Any]]] = {}
        for cache in self.caches:
            self._record_masks(cache)

    def _record_masks(self, cache: Any) -> None:
        """Remember how a mask was asked for, so that a chunk's can be asked for the same way."""
        if not hasattr(type(cache), "make_mask"):
            return
        original = cache.make_mask

        def make_mask(*args: Any, **kwargs: Any) -> Any:
            mask = original(*args, **kwargs)
            if isinstance(mask, mx.array):
                # the array is kept, so that no other gets its id
                self._masks[id(mask)] = (mask, kwargs)
            return mask

        cache.make_mask = make_mask

    def close(self) -> None:
        """Give the caches their own masks back."""
        for cache in self.caches:
            vars(cache).pop("make_mask", None)
        self._masks.clear()

    def run(self, original: Callable[..., Any], layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Call a layer chunk by chunk.

        Raises:
            CannotChunk: If it is given more than hidden states, a mask and its own cache.
        """
        bound = inspect.signature(original).bind(layer, *args, **kwargs)
        bound.apply_defaults()
        _, states, *others = bound.arguments
        hidden = bound.arguments[states]
        self.n_calls += 1
        for name in others:
            given = bound.arguments[name]
            if name not in (*_MASKS, "cache") and given is not None:
                raise CannotChunk(f"{type(layer).__name__} takes {name} besides mask and cache")
        cache = bound.arguments.get("cache")
        if cache is None:
            raise CannotChunk(f"{type(layer).__name__} is called without a cache of its own")
        n_tokens = hidden.shape[1]
        # chunks of equal size: a short last one would count as the end of the prompt
        n_chunks = -(-n_tokens // self.step_size)
        chunk_size = -(-n_tokens // n_chunks)
        if isinstance(cache, XKVCache):
            cache.layer.reserve(n_tokens)
        outputs = []
        for start in range(0, n_tokens, chunk_size):
            bound.arguments[states] = hidden[:, start : start + chunk_size]
            masks = {name: bound.arguments[name] for name in _MASKS if name in others}
            for name, mask in masks.items():
                bound.arguments[name] = self._chunk_mask(mask, cache, bound.arguments[states])
            output = original(*bound.args, **bound.kwargs)
            bound.arguments.update(masks)
            if not isinstance(output, mx.array):
                raise CannotChunk(f"{type(layer).__name__} returns more than hidden states")
            outputs.append(output)
            if not self.is_dry_run:
                mx.eval(output, _held(cache))
                done = (self.n_calls - 1) * n_tokens + min(start + chunk_size, n_tokens)
                self.on_progress(min(done // self.n_layers, n_tokens - 1), n_tokens)
        hidden = mx.concatenate(outputs, axis=1)
        del outputs, output
        if not self.is_dry_run:
            mx.eval(hidden)
            self._finish(cache)
        return hidden

    def _chunk_mask(self, mask: Any, cache: Any, hidden: mx.array) -> Any:
        if not isinstance(mask, mx.array):
            return mask
        if id(mask) not in self._masks or not hasattr(type(cache), "make_mask"):
            raise CannotChunk("the model makes its attention mask itself")
        _, options = self._masks[id(mask)]
        return type(cache).make_mask(cache, hidden.shape[1], **options)

    def _finish(self, cache: Any) -> None:
        """Factor and free a group after its last layer."""
        if isinstance(cache, XKVCache) and cache.layer is cache.layer.group.layers[-1]:
            cache.layer.group.settle()
        mx.clear_cache()


class LayerwisePrefill:
    """Takes over the decoder layers of one model until :meth:`remove`."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [x for x in getattr(model, "layers", []) if isinstance(x, nn.Module)]
        self._running: dict[int, Prefill] = {}
        self.current: nn.Module | None = None
        """The layer that is being called, in a dry run."""
        self._classes = [type(layer) for layer in self.layers]
        taken = {cls: self._subclass(cls) for cls in set(self._classes)}
        for layer in self.layers:
            layer.__class__ = taken[type(layer)]

    def _subclass(self, cls: type) -> type:
        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.current = layer
            for value in (*args, *kwargs.values()):
                prefill = self._running.get(id(value))
                if prefill is not None and args and args[0].shape[1] > DECODE_TOKENS:
                    return prefill.run(cls.__call__, layer, args, kwargs)
            return cls.__call__(layer, *args, **kwargs)

        return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})

    def start(self, prefill: Prefill) -> None:
        """From now on calls of a prompt with these caches go chunk by chunk."""
        self._running.update((id(cache), prefill) for cache in prefill.caches)

    def stop(self, prefill: Prefill) -> None:
        """Forget a prefill."""
        prefill.close()
        for cache in prefill.caches:
            self._running.pop(id(cache), None)

    def remove(self) -> None:
        """Give the layers their own classes back."""
        for layer, cls in zip(self.layers, self._classes, strict=True):
            layer.__class__ = cls


def _held(cache: Any) -> Any:
    """Arrays to evaluate after a chunk."""
    return cache.layer.arrays() if isinstance(cache, XKVCache) else cache.state
