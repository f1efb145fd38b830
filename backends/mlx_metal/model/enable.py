"""Making every mlx-lm function use the compressed cache of one model, until it is disabled."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_cache

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.model import seam
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.prefill import LayerwisePrefill, Prefill, flatten
from xkv.backends.mlx_metal.model.probe import probe_model
from xkv.backends.mlx_metal.model.projection import output_energies
from xkv.cache.fingerprint import fingerprint
from xkv.cache.lowrank_cache import LowRankCache
from xkv.cache.state import check_config
from xkv.config import DECODE_TOKENS, XKVConfig
from xkv.errors import InputError
from xkv.planning.cache_plan import CachePlan
from xkv.planning.profile import ModelIdentity
from xkv.planning.report import Report

_log = logging.getLogger("xkv")
_ATTRIBUTE = "_xkv"


def plan_cache(model: nn.Module, config: XKVConfig) -> CachePlan:
    """Look at a model, and decide what becomes of each of its caches.

    Raises:
        InputError: If nothing of it can be compressed, with the reason.
    """
    enabled = enabled_state(model)
    if enabled is not None:
        return CachePlan.of_probe(model_name(model), config, enabled.plan.probe)
    layers = LayerwisePrefill(model)
    try:
        return CachePlan.of_probe(model_name(model), config, probe_model(model, layers))
    finally:
        layers.remove()


def planned_caches(
    model: nn.Module,
    plan: CachePlan,
    backend: MLXBackend,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """A new prompt cache for a model."""
    energies = output_energies(backend, model, plan)
    cache = plan.lowrank_cache(backend, on_progress, energies)
    ropes = [probe.rope for probe in plan.probe.caches]
    numbers = iter(range(len(ropes)))

    def compressed(native: Any) -> Any:
        if hasattr(native, "caches"):
            native.caches = tuple(compressed(part) for part in native.caches)
            return native
        i = next(numbers)
        return XKVCache(cache.layers[i], ropes[i]) if i in cache.layers else native

    return [compressed(native) for native in native_caches(model)]


def make_prompt_cache(
    model: nn.Module,
    config: XKVConfig | None = None,
    *,
    backend: MLXBackend | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """A compressed prompt cache for an mlx-lm model.

    The model's functions see it as they would their own. What :func:`xkv.enable` adds is prefill
    layer by layer and attention from the compressed form; without it (or
    :func:`xkv.backends.mlx_metal.attention_seam`) the cache is right, but slower.

    Args:
        model: From ``mlx_lm.load``.
        config: Defaults to a compression of 4.
        backend: Defaults to a new one.
        on_progress: Called with (factorizations done, factorizations in all) after each.

    Returns:
        One cache a layer, for ``prompt_cache=`` of mlx-lm's functions; layers without a full KV
        cache keep mlx-lm's. Compression happens at the first call of few tokens after a prompt
        (``xkv.config.DECODE_TOKENS``).

    Raises:
        InputError: If no layer can be compressed, or a rotary embedding is not known, by name.
    """
    plan = plan_cache(model, config or XKVConfig())
    return planned_caches(model, plan, backend or MLXBackend(), on_progress)


def identity_of(model: nn.Module, config: XKVConfig) -> ModelIdentity:
    """What a profile of a model agrees with; heads are those of the first grouped layer."""
    plan = plan_cache(model, config)
    shape = plan.probe.caches[plan.groups[0][0]].shape
    assert shape is not None
    # several types of mlx-lm's share a model file
    model_type = getattr(getattr(model, "args", None), "model_type", model_name(model))
    heads = shape.n_kv_heads, shape.key_dim, shape.value_dim
    return ModelIdentity(model_type, len(plan.probe.caches), *heads)


class Enabled:
    """A model whose prompt caches are ours."""

    def __init__(self, model: nn.Module, config: XKVConfig, backend: MLXBackend) -> None:
        self.model = model
        self.backend = backend
        self.on_factor: Callable[[int, int], None] | None = None
        """Called with (factorizations done, factorizations in all)."""
        self.layers = LayerwisePrefill(model)
        try:
            probe = probe_model(model, self.layers)
            self.plan = CachePlan.of_probe(model_name(model), config, probe)
        except BaseException:
            self.layers.remove()
            raise
        self.fingerprint = _fingerprint(model)
        for patch in _PATCHES:
            patch.install()
        setattr(mlx_cache, XKVCache.__name__, XKVCache)
        model.make_cache = self.make_cache
        setattr(model, _ATTRIBUTE, self)

    def remove(self) -> None:
        """Give the model its own cache back."""
        delattr(self.model, _ATTRIBUTE)
        del self.model.make_cache
        self.layers.remove()
        for patch in _PATCHES:
            patch.remove()
        if not seam_in_use():
            delattr(mlx_cache, XKVCache.__name__)

    def make_cache(self) -> list[Any]:
        """What mlx-lm calls to make a prompt cache."""
        caches = planned_caches(self.model, self.plan, self.backend, self.on_factor)
        cache = lowrank_cache(caches)
        assert cache is not None
        cache.fingerprint = self.fingerprint
        cache.is_streaming = self.plan.probe.why_not_layerwise is not None
        return caches

    def check(self, caches: Sequence[Any]) -> None:
        """Refuse a cache of another model or configuration, as one from a file may be.

        Raises:
            InputError: With what differs.
        """
        cache = lowrank_cache(caches)
        if cache is None:
            return
        if len(list(flatten(caches))) != len(self.plan.probe.caches) or (
            cache.fingerprint is not None and cache.fingerprint != self.fingerprint
        ):
            raise InputError("the prompt cache was made by another model than the one it is for")
        check_config(self.plan.config, cache.config)

    def generate(
        self, original: Callable[..., Iterator[Any]], prompt: mx.array, args: Any, kwargs: Any
    ) -> Iterator[Any]:
        """``mlx_lm.generate.generate_step`` with the prompt going through layer by layer."""
        for name, flag in (("kv_bits", "--kv-bits"), ("max_kv_size", "--max-kv-size")):
            if kwargs.get(name) is not None:
                raise InputError(
                    f"{flag} changes mlx-lm's own cache, which xKV replaces: leave it out, or "
                    "run without xKV"
                )
        if kwargs.get("prompt_cache") is None:
            kwargs["prompt_cache"] = self.make_cache()
        caches = kwargs["prompt_cache"]
        self.check(caches)
        embeddings = kwargs.get("input_embeddings")
        n_tokens = len(prompt if embeddings is None else embeddings)
        is_layerwise = self.plan.probe.why_not_layerwise is None
        if lowrank_cache(caches) is None or not is_layerwise or n_tokens <= DECODE_TOKENS + 1:
            yield from original(prompt, self.model, *args, **kwargs)
            return
        step_size = kwargs.get("prefill_step_size", DEFAULT_STEP_SIZE)
        progress = kwargs.get("prompt_progress_callback") or (lambda done, total: None)
        kwargs["prefill_step_size"] = n_tokens
        prefill = Prefill(caches, max(step_size, DECODE_TOKENS + 1), progress)
        self.layers.start(prefill)
        try:
            steps = original(prompt, self.model, *args, **kwargs)
            first = next(steps, None)
        finally:
            self.layers.stop(prefill)
        if first is not None:
            yield first
            yield from steps


DEFAULT_STEP_SIZE = 2048
"""mlx-lm's default of ``prefill_step_size``."""


def _generate_step_of(original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @functools.wraps(original)
    def generate_step(prompt: mx.array, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        enabled = enabled_state(model)
        if enabled is None:
            return original(prompt, model, *args, **kwargs)
        return enabled.generate(original, prompt, args, kwargs)

    return generate_step


_GENERATE = seam.module("mlx_lm.generate")
_PATCHES = (seam.ATTENTION, seam.Patch(_GENERATE, "generate_step", _generate_step_of))


def seam_in_use() -> bool:
    """Whether a model is enabled."""
    return _PATCHES[1].is_installed


def enable(
    model: nn.Module, config: XKVConfig | None = None, *, backend: MLXBackend | None = None
) -> Report:
    """Give a model compressed prompt caches; see :func:`xkv.enable`."""
    if enabled_state(model) is not None:
        disable(model)
    enabled = Enabled(model, config or XKVConfig(), backend or MLXBackend())
    report = enabled.plan.report()
    for sentence in report.warnings():
        _log.warning(sentence)
    return report


def disable(model: nn.Module) -> None:
    """Give an enabled model its own cache back; see :func:`xkv.disable`."""
    enabled = enabled_state(model)
    if enabled is None:
        raise InputError("this model is not enabled")
    enabled.remove()


def enabled_state(model: nn.Module) -> Enabled | None:
    """What :func:`enable` left on a model."""
    return vars(model).get(_ATTRIBUTE)


def native_caches(model: nn.Module) -> list[Any]:
    """mlx-lm's own prompt cache, of an enabled model too."""
    mine = vars(model).pop("make_cache", None)
    try:
        return mlx_cache.make_prompt_cache(model)
    finally:
        if mine is not None:
            model.make_cache = mine


def lowrank_cache(caches: Sequence[Any]) -> LowRankCache | None:
    """The compressed cache behind a prompt cache, None if it has none."""
    return next((x.layer.cache for x in flatten(caches) if isinstance(x, XKVCache)), None)


def model_name(model: nn.Module) -> str:
    """The model file's name, which is the ``model_type`` for most."""
    return type(model).__module__.rsplit(".", 1)[-1]


def _fingerprint(model: nn.Module) -> str:
    parameters: Any = dict(tree_flatten(model.parameters()))

    def values(name: str, n_values: int) -> np.ndarray:
        return np.array(parameters[name].reshape(-1)[:n_values].astype(mx.float32))

    return fingerprint(((name, x.shape) for name, x in parameters.items()), values)
