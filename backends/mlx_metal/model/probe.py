"""What a model asks of its cache, read off a forward pass that is never computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from xkv.backends.mlx_metal.model import borrowed, vlm
from xkv.backends.mlx_metal.model.float32 import held_dtype
from xkv.backends.mlx_metal.model.identity import model_name
from xkv.backends.mlx_metal.model.prefill import (
    CannotChunk,
    LayerwisePrefill,
    Prefill,
    flatten,
    mapped,
)
from xkv.backends.mlx_metal.model.ropes import is_rope_name, rope_of
from xkv.backends.mlx_metal.model.seam import WATCHERS, AttendingCache, attention_seam
from xkv.errors import InputError
from xkv.planning.cache_plan import CacheProbe, KVShape, ModelProbe

mlx_cache = borrowed.module("mlx_lm.models.cache")

PROBE_TOKENS, PROBE_STEP = 40, 20


class _ProbeCache(mlx_cache._BaseCache, AttendingCache):  # type: ignore[name-defined]
    """A plain cache that notes what it is asked for."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = watch
        self.offset = 0
        self.shape: KVShape | None = None
        self.n_updates = 0
        self.rope: nn.Module | None = None
        self.is_touched = False
        """Whether the model reads or writes the arrays other than by the cache's methods."""
        self.reaches_seam = False
        self.n_attended = 0
        """Attentions over its rows."""
        self.n_mine = 0
        """Of its own layer."""
        self._n_open_reads = 0
        self._rows: tuple[Any, Any] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.n_updates += 1
        self.rope = self._watch.rope_of(keys)
        n_kv_heads, key_dim, item_bytes = keys.shape[1], keys.shape[-1], held_dtype(keys.dtype).size
        self.shape = KVShape(n_kv_heads, key_dim, values.shape[-1], item_bytes)
        if values.shape[:3] != keys.shape[:3] or not values.shape[-1]:
            self.shape = None
        if self._rows is not None:
            keys = mx.concatenate([self._rows[0], keys], axis=2)
            values = mx.concatenate([self._rows[1], values], axis=2)
        self._rows = keys, values
        self.offset = keys.shape[2]
        return self._rows

    def keys_and_values(self) -> Any:
        return self._rows

    @property
    def keys(self) -> Any:
        self._n_open_reads += 1
        return None if self._rows is None else self._rows[0]

    @keys.setter
    def keys(self, value: mx.array) -> None:
        # a pipeline hangs its communication on the keys: keys = mx.depends(keys, sent)
        self._n_open_reads -= 1

    def __getattr__(self, name: str) -> Any:
        if name == "values":
            self.is_touched = True
            return None if self._rows is None else self._rows[1]
        raise AttributeError(name)

    def make_mask(self, N: int, **kwargs: Any) -> Any:
        return mlx_cache.create_attention_mask(N, offset=self.offset, **kwargs)

    def takes(self, keys: Any, values: Any) -> bool:
        if self._rows is not None:
            self.reaches_seam = keys is self._rows[0] and values is self._rows[1]
        return False

    def watch(self, keys: Any, cache: Any) -> None:
        """Note an attention, of whatever layer."""
        if self._rows is not None and keys is self._rows[0]:
            self.n_attended += 1
            self.n_mine += cache is self

    def describe(self) -> CacheProbe:
        name = "KVCache"
        if self.is_touched or self._n_open_reads or "values" in vars(self):
            return CacheProbe(name, reason="keeps its own KVCache, whose arrays the model reads")
        if self.n_updates != 1 or self.shape is None:
            return CacheProbe(name, reason="keeps its own KVCache, which holds no keys and values")
        shape = self.shape
        # MLA: the cache returns a latent and a rotary key, and attention never gets the latter
        is_mla = (
            not self.reaches_seam
            and shape.n_kv_heads == 1
            and self.rope is None
            and shape.key_dim > shape.value_dim
        )
        rope = None if self.rope is None else rope_of(self.rope)
        is_attended_once = self.n_attended == self.n_mine == 1
        shape = replace(shape, is_mla=is_mla)
        return CacheProbe(name, shape, rope, self.reaches_seam, is_attended_once)


class _Watch:
    """Which of a model's rope modules made an array."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [x for name, x in model.named_modules() if is_rope_name(name)]
        self.outputs: list[tuple[nn.Module, mx.array]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        modules = list({id(module): module for module in self.modules}.values())
        classes = [type(module) for module in modules]
        taken = {cls: self._subclass(cls) for cls in set(classes)}
        try:
            for module in modules:
                module.__class__ = taken[type(module)]
            yield
        finally:
            for module, cls in zip(modules, classes, strict=True):
                module.__class__ = cls
            self.outputs.clear()

    def _subclass(self, cls: type) -> type:
        outputs = self.outputs  # not the watch, which holds the modules

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = cls.__call__(module, *args, **kwargs)
            if isinstance(output, mx.array):
                outputs.append((module, output))
            return output

        return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})

    def rope_of(self, keys: mx.array) -> nn.Module | None:
        """The module that rotated keys, as far as their layer has one; None if none did.

        Keys of another shape than any rotated array are put together from rotated and other parts,
        which no rotation of ours undoes.
        """
        same = [module for module, output in self.outputs if output.shape == keys.shape]
        exact = [module for module, output in self.outputs if output is keys]
        self.outputs.clear()
        candidates = exact or same
        return candidates[-1] if candidates else None


def probe_model(model: nn.Module, layers: LayerwisePrefill) -> ModelProbe:
    """Run a model lazily over a few tokens and note what happens.

    Args:
        model: From ``mlx_lm.load``, or of mlx-vlm, before its ``make_cache`` is replaced.
        layers: Its decoder layers, taken over.
    """
    watch = _Watch(model)
    caches = _probe_caches(model, watch)
    with watch.watching():
        try:
            _call(model, caches)
        # whatever a model's code can run into when a cache lacks what it asks for
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{model_name(model)} uses its cache in a way that is not known here ({error}); "
                "use --group-size 0 to run it as mlx-lm does"
            ) from error
    is_vlm = vlm.is_vlm(model)
    why_not_layerwise = vlm.WHY_NOT if is_vlm else _try_layerwise(model, layers, watch)
    probes = tuple(
        x.describe()
        if isinstance(x, _ProbeCache)
        else CacheProbe(type(x).__name__, reason=f"keeps its own {type(x).__name__}")
        for x in flatten(caches)
    )
    return ModelProbe(_vlm_probes(model, probes) if is_vlm else probes, why_not_layerwise)


def _vlm_probes(model: Any, probes: tuple[CacheProbe, ...]) -> tuple[CacheProbe, ...]:
    """What the watch does not see of mlx-vlm's models, that rotate keys by positions of their own.

    They also read the shape of what the cache returned, so that it has to be all rows.
    """
    found = []
    for probe, module in zip(probes, vlm.ropes(model, len(probes)), strict=True):
        rope = probe.rope if module is None else rope_of(module)
        found.append(replace(probe, rope=rope, is_attended_once=False))
    return tuple(found)


def _probe_caches(model: nn.Module, watch: _Watch) -> list[Any]:
    def probe(cache: Any) -> Any:
        return _ProbeCache(watch) if type(cache) in plain else cache

    plain = (mlx_cache.KVCache, *vlm.plain_caches(model))
    return mapped(mlx_cache.make_prompt_cache(model), probe)


def _call(model: Any, caches: list[Any]) -> None:
    watchers = [x.watch for x in flatten(caches) if isinstance(x, _ProbeCache)]
    WATCHERS.extend(watchers)
    try:
        with attention_seam(), vlm.probing(model):
            model(mx.zeros((1, PROBE_TOKENS), dtype=mx.int32), cache=caches)
    finally:
        for watch in watchers:
            WATCHERS.remove(watch)


def _try_layerwise(model: nn.Module, layers: LayerwisePrefill, watch: _Watch) -> str | None:
    """Why whole prompts cannot go through layer by layer, or None."""
    if layers.is_empty:
        return "the model does not list its layers"
    caches = _probe_caches(model, watch)
    prefill = Prefill(caches, PROBE_STEP)
    prefill.is_dry_run = True
    layers.start(prefill)
    try:
        _call(model, caches)
    except CannotChunk as error:
        return str(error)
    finally:
        layers.stop(prefill)
    if sorted(prefill.called) != sorted(id(cache) for cache in caches):
        return "not every layer is called once with a cache of its own"
    return None
