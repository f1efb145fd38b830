"""Prefill of a whole prompt through one layer at a time, chunked inside each layer.

A model call with the whole prompt already goes layer by layer. What is missing is that a layer
takes its tokens in chunks, and that a group is factored and freed when its last layer is done. So
every decoder layer's class is replaced by one that does this, and otherwise does what it did.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.native_state import is_native, native_copy
from xkv.cache.lowrank_cache import LowRankCache
from xkv.config import DECODE_TOKENS

_MASKS = ("mask", "attention_mask", "attn_mask", "mamba_mask")

Progress = Callable[[int, int], None]
"""Called with prompt tokens done and in all."""


class CannotChunk(Exception):
    """A layer is called with something that cannot be cut into chunks of tokens."""


def flatten(caches: Sequence[Any]) -> Iterator[Any]:
    """The caches of a prompt cache, those in mlx-lm's ``CacheList`` one by one."""
    for cache in caches:
        yield from flatten(cache.caches) if hasattr(cache, "caches") else [cache]


def mapped(caches: Sequence[Any], replace: Callable[[Any], Any]) -> list[Any]:
    """A prompt cache with others in the place of its caches, in ``CacheList`` too."""
    found = []
    for cache in caches:
        if hasattr(cache, "caches"):
            cache.caches = tuple(mapped(cache.caches, replace))
            found.append(cache)
        else:
            found.append(replace(cache))
    return found


def lowrank_cache(caches: Sequence[Any]) -> LowRankCache | None:
    """The compressed cache behind a prompt cache, None if it has none."""
    return next((x.layer.cache for x in flatten(caches) if isinstance(x, XKVCache)), None)


def held_arrays(caches: Sequence[Any]) -> list[Any]:
    """What a prompt cache holds, to be evaluated."""
    return [x.layer.arrays() if isinstance(x, XKVCache) else x.state for x in flatten(caches)]


def equal_chunks(n_tokens: int, step_size: int) -> Iterator[tuple[int, int]]:
    """First and last of the tokens that are taken at a time.

    Chunks of equal size: a short last one would count as the end of the prompt.
    """
    n_chunks = -(-n_tokens // step_size)
    size = -(-n_tokens // max(n_chunks, 1))
    return ((start, min(start + size, n_tokens)) for start in range(0, n_tokens, max(size, 1)))


def chunks(n_tokens: int, step_size: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """:func:`equal_chunks` between cuts, which are apart from each other and both ends."""
    for first, last in pairwise(sorted({0, *cuts, n_tokens})):
        for start, end in equal_chunks(last - first, step_size):
            yield first + start, first + end


class Prefill:
    """One prompt on its way through the layers.

    Args:
        caches: The prompt cache.
        step_size: Most tokens that a layer takes at a time.
        on_progress: Called after each chunk.
        cuts: After which of the prompt's tokens a chunk ends and native layers are copied.
    """

    is_dry_run = False
    """Whether nothing is to be computed."""

    def __init__(
        self,
        caches: Sequence[Any],
        step_size: int,
        on_progress: Progress = lambda done, total: None,
        cuts: Sequence[int] = (),
    ) -> None:
        self.caches = list(caches)
        self.step_size = step_size
        self.on_progress = on_progress
        self.called: list[int] = []
        """Ids of the caches whose layers were called, in order."""
        self._offset = max((getattr(x, "offset", 0) for x in flatten(caches)), default=0)
        self._cuts = cuts
        self.copies: dict[int, list[dict[str, Any]]] = {self._offset + x: [] for x in cuts}
        """By the tokens seen, what each native layer held then."""
        self._masks: dict[int, tuple[mx.array, type, int, dict[str, Any]]] = {}
        for cache in self.caches:
            for index, part in enumerate(flatten([cache])):
                self._record_masks(part, index)

    def _record_masks(self, cache: Any, index: int) -> None:
        """Remember how a mask was asked for, so that a chunk's can be asked for the same way."""
        if not hasattr(type(cache), "make_mask"):
            return
        original = cache.make_mask

        def make_mask(*args: Any, **kwargs: Any) -> Any:
            mask = original(*args, **kwargs)
            if isinstance(mask, mx.array):
                # the array is kept, so that no other gets its id
                self._masks[id(mask)] = (mask, type(cache), index, kwargs)
            return mask

        cache.make_mask = make_mask

    def close(self) -> None:
        """Give the caches their own masks back."""
        for cache in flatten(self.caches):
            vars(cache).pop("make_mask", None)
        self._masks.clear()

    def run(self, original: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        """Call a layer chunk by chunk.

        Args:
            original: The layer's own call.
            call: Its arguments: the layer, hidden states ``[B, L, D]``, and others by name.

        Raises:
            CannotChunk: If it is given more than hidden states, masks and its own cache.
        """
        _, states, *others = call.arguments
        hidden, given = call.arguments[states], dict(call.arguments)
        cache = given.get("cache")
        if cache is not None:
            self.called.append(id(cache))
        n_tokens = hidden.shape[1]
        for part in flatten([] if cache is None else [cache]):
            if isinstance(part, XKVCache):
                part.layer.reserve(n_tokens)
        outputs = []
        for start, end in chunks(n_tokens, self.step_size, self._cuts):
            call.arguments[states] = hidden[:, start:end]
            for name in others:
                call.arguments[name] = self._cut(name, given[name], cache, start, end)
            output = original(*call.args, **call.kwargs)
            if not isinstance(output, mx.array):
                raise CannotChunk(f"{_layer_name(call)} returns more than hidden states")
            outputs.append(output)
            if not self.is_dry_run:
                mx.eval(output, held_arrays([] if cache is None else [cache]))
                self._report(end, n_tokens)
                if end in self._cuts:
                    self._copy(cache, self._offset + end)
        hidden = mx.concatenate(outputs, axis=1)
        del outputs, output
        if not self.is_dry_run:
            mx.eval(hidden)
            self._finish(cache)
        return hidden

    def _copy(self, cache: Any, n_tokens: int) -> None:
        natives = filter(is_native, flatten([] if cache is None else [cache]))
        copies = [native_copy(x) for x in natives]
        mx.eval(copies)
        self.copies[n_tokens] += copies

    def _report(self, end: int, n_tokens: int) -> None:
        done = (max(len(self.called), 1) - 1) * n_tokens + end
        # mlx-lm counts the last prompt token, which comes alone
        self.on_progress(min(done // len(self.caches), n_tokens), n_tokens + 1)

    def _cut(self, name: str, value: Any, cache: Any, start: int, end: int) -> Any:
        """What of a layer's argument belongs to the tokens from ``start`` to ``end``."""
        if value is None or name == "cache":
            return value
        if name == "offset" and isinstance(value, int) and value == self._offset:
            return value + start
        if name == "attn_scale" and isinstance(value, mx.array):
            return value[start:end]
        if name in _MASKS and isinstance(value, str):
            return value
        if name in _MASKS and isinstance(value, mx.array) and id(value) in self._masks:
            _, kind, index, options = self._masks[id(value)]
            parts = list(flatten([] if cache is None else [cache]))
            if index < len(parts) and type(parts[index]) is kind:
                return kind.make_mask(parts[index], end - start, **options)
        raise CannotChunk(
            "the model makes its attention mask itself"
            if name in _MASKS
            else f"a layer is called with {name} besides hidden states, mask and cache"
        )

    def _finish(self, cache: Any) -> None:
        """Factor and free a group after its last layer."""
        mx.clear_cache()
        for part in flatten([] if cache is None else [cache]):
            if isinstance(part, XKVCache) and part.layer.is_last_of_group:
                part.layer.settle()
                mx.clear_cache()


class LayerwisePrefill:
    """Takes over the decoder layers of one model until :meth:`remove`.

    The layers' classes hold it, so it does not hold the layers.
    """

    def __init__(self, model: nn.Module) -> None:
        listed = [x for x in getattr(model, "layers", []) if isinstance(x, nn.Module)]
        # once each: a model may go through its layers again
        layers = list({id(layer): layer for layer in listed}.values())
        self._classes = [(weakref.ref(layer), type(layer)) for layer in layers]
        self._running: dict[int, Prefill] = {}
        taken = {cls: self._subclass(cls) for _, cls in self._classes}
        for layer in layers:
            layer.__class__ = taken[type(layer)]

    @property
    def is_empty(self) -> bool:
        """Whether the model lists no layers."""
        return not self._classes

    def _subclass(self, cls: type) -> type:
        signature = inspect.signature(cls.__call__)

        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._running:
                bound = signature.bind(layer, *args, **kwargs)
                bound.apply_defaults()
                prefill = self._prefill_of(bound)
                if prefill is not None:
                    return prefill.run(cls.__call__, bound)
            return cls.__call__(layer, *args, **kwargs)

        return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})

    def _prefill_of(self, bound: inspect.BoundArguments) -> Prefill | None:
        """The prompt that a call of a layer belongs to; None for decoding."""
        _, hidden, *_ = bound.arguments.values()
        if hidden.shape[1] <= DECODE_TOKENS:
            return None
        cache = bound.arguments.get("cache")
        if cache is not None:
            return self._running.get(id(cache))
        # a layer without a cache, such as a plain MLP, of the only prompt there is
        prefills = {id(prefill): prefill for prefill in self._running.values()}
        return next(iter(prefills.values())) if len(prefills) == 1 else None

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
        for reference, cls in self._classes:
            layer = reference()
            if layer is not None:
                layer.__class__ = cls


def _layer_name(call: inspect.BoundArguments) -> str:
    return type(next(iter(call.arguments.values()))).__name__
