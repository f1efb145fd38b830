"""What enabling leaves on a model: how its prompt caches are made and checked."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.batch_check import why_not_batched
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.going_back import (
    MAX_STATES,
    SHARE,
    cuts,
    has_natives,
    keep_state,
    keep_states,
)
from xkv.backends.mlx_metal.model.identity import model_fingerprint, model_name
from xkv.backends.mlx_metal.model.native_state import is_native, row_size
from xkv.backends.mlx_metal.model.prefill import (
    LayerwisePrefill,
    Prefill,
    Progress,
    chunks,
    flatten,
    held_arrays,
    lowrank_cache,
    mapped,
)
from xkv.backends.mlx_metal.model.probe import probe_model
from xkv.cache.lowrank_cache import LowRankCache
from xkv.cache.state import check_config
from xkv.config import DECODE_TOKENS, XKVConfig
from xkv.errors import InputError
from xkv.planning.basis_file import find_basis
from xkv.planning.cache_plan import CachePlan

mlx_cache = borrowed.module("mlx_lm.models.cache")

_ATTRIBUTE = "_xkv"


class Enabled:
    """A model whose prompt caches are ours. The model holds it, and not the other way round.

    Args:
        model: From ``mlx_lm.load``, not enabled.
        config: How to compress.
        backend: Does the arithmetic of its caches.

    Raises:
        InputError: If nothing of the model can be compressed, with the reason.
    """

    def __init__(self, model: nn.Module, config: XKVConfig, backend: MLXBackend) -> None:
        self._model = weakref.ref(model)
        self.backend = backend
        self.on_factor: Callable[[int, int], None] | None = None
        """Called with (factorizations done, factorizations in all)."""
        self.unpatch: Callable[[], Any] = lambda: None
        """Called when the model is disabled."""
        self.boundaries: frozenset[int] | None = None
        """Tokens that messages begin with, where prompt caches can go back to; None for nowhere."""
        self.layers = LayerwisePrefill(model)
        try:
            probe = probe_model(model, self.layers)
            self.plan = CachePlan.of_probe(model_name(model), config, probe)
            self.fingerprint = model_fingerprint(model)
            self.basis = find_basis(self.fingerprint, self.plan.groups, config, backend)
        except BaseException:
            self.layers.remove()
            raise
        model.make_cache = self.make_cache
        setattr(model, _ATTRIBUTE, self)

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise InputError("the model was deleted")
        return model

    def remove(self) -> None:
        """Give the model its own cache back."""
        delattr(self.model, _ATTRIBUTE)
        if vars(self.model).get("make_cache") == self.make_cache:
            del self.model.make_cache
        self.layers.remove()
        self.unpatch()

    def make_cache(self) -> list[Any]:
        """What mlx-lm calls to make a prompt cache."""
        cache = self.plan.lowrank_cache(self.backend, self.on_factor, self.basis)
        caches = planned_caches(self.model, self.plan, cache)
        cache.fingerprint = self.fingerprint
        cache.is_streaming = self.plan.probe.why_not_layerwise is not None
        return caches

    @functools.cached_property
    def why_not_batched(self) -> str | None:
        """:func:`xkv.backends.mlx_metal.model.batch_check.why_not_batched` of the model."""
        return why_not_batched(self.model, self.make_cache)

    def check(self, caches: Sequence[Any]) -> None:
        """Take a cache, or refuse one of another model or configuration, as from a file.

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
        cache.backend = self.backend
        for part, probe in zip(flatten(caches), self.plan.probe.caches, strict=True):
            if isinstance(part, XKVCache):
                # a file does not tell
                part.is_attended_once = probe.is_attended_once

    def is_layerwise(self, caches: Sequence[Any], n_tokens: int) -> bool:
        """Whether a prompt of ``n_tokens`` goes into a cache layer by layer."""
        return (
            lowrank_cache(caches) is not None
            and self.plan.probe.why_not_layerwise is None
            and n_tokens > DECODE_TOKENS
        )

    @contextlib.contextmanager
    def layerwise(
        self,
        caches: Sequence[Any],
        step_size: int,
        on_progress: Progress = lambda done, total: None,
        tokens: Sequence[int] = (),
    ) -> Iterator[None]:
        """Calls of the model inside take a prompt layer by layer.

        Args:
            caches: The prompt cache.
            step_size: Most tokens that a layer takes at a time.
            on_progress: Called with tokens done and in all.
            tokens: The prompt's, to find messages in.
        """
        step_size = max(step_size, DECODE_TOKENS + 1)
        prefill = Prefill(caches, step_size, on_progress, self.cuts(caches, tokens))
        self.layers.start(prefill)
        try:
            yield
            keep_states(caches, prefill.copies)
        finally:
            self.layers.stop(prefill)

    def keep_state(self, caches: Sequence[Any]) -> None:
        """Let a cache be able to go back to where it is now."""
        if self.boundaries is not None:
            keep_state(caches)

    def native_bytes(self, n_tokens: int) -> tuple[int, int]:
        """What the native layers hold after ``n_tokens`` tokens, and their copies at most."""
        native = sum(size * min(n_tokens, limit) for size, limit in self._native_sizes)
        shape = self.plan.probe.cache_shape(self.plan.groups)
        limit = SHARE * (shape.dense_bytes(n_tokens) + native)
        return native, 0 if self.boundaries is None else int(min(MAX_STATES * native, limit))

    @functools.cached_property
    def _native_sizes(self) -> list[tuple[int, int]]:
        """Of each native layer: bytes of a row and most rows, or of a state, which is one."""
        caches = native_caches(self.model)
        # a call that is never computed
        self.model(mx.zeros((1, 1), mx.int32), cache=caches)
        return [row_size(x) for x in flatten(caches) if is_native(x)]

    def cuts(self, caches: Sequence[Any], tokens: Sequence[int]) -> list[int]:
        """After which tokens of a prompt its prefill stops for a copy of the native layers."""
        if self.boundaries is None or not tokens or not has_natives(caches):
            return []
        return cuts(len(tokens), [i for i, x in enumerate(tokens) if x in self.boundaries])


def enabled_state(model: nn.Module) -> Enabled | None:
    """What :func:`xkv.enable` left on a model."""
    return vars(model).get(_ATTRIBUTE)


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


def planned_caches(model: nn.Module, plan: CachePlan, cache: LowRankCache) -> list[Any]:
    """A new prompt cache for a model, whose compressed layers are those of ``cache``."""
    probes = plan.probe.caches
    numbers = iter(range(len(probes)))

    def compressed(native: Any) -> Any:
        i = next(numbers)
        if i not in cache.layers:
            return native
        return XKVCache(cache.layers[i], probes[i].rope, probes[i].is_attended_once)

    return mapped(native_caches(model), compressed)


def native_caches(model: nn.Module) -> list[Any]:
    """mlx-lm's own prompt cache, of an enabled model too."""
    mine = vars(model).pop("make_cache", None)
    try:
        return mlx_cache.make_prompt_cache(model)
    finally:
        if mine is not None:
            model.make_cache = mine


def prefill_prompt(
    model: nn.Module,
    caches: Sequence[Any],
    tokens: mx.array,
    step_size: int,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Take tokens ``[L]`` into a prompt cache, layer by layer if the model is enabled.

    Args:
        model: Enabled or not.
        caches: Its prompt cache.
        tokens: Of the prompt, but for its last one.
        step_size: Most tokens that the model, or a layer, takes at a time.
        on_progress: Called with tokens done and in all.
    """
    enabled, caches = enabled_state(model), list(caches)
    ids: Any = tokens.tolist()
    if enabled is not None:
        enabled.keep_state(caches)
    if enabled is not None and enabled.is_layerwise(caches, len(tokens)):
        with enabled.layerwise(caches, step_size, on_progress, ids):
            model(tokens[None], cache=caches)
        return
    points = [] if enabled is None else enabled.cuts(caches, ids)
    for start, end in chunks(len(tokens), step_size, points):
        model(tokens[None, start:end], cache=caches)
        mx.eval(held_arrays(caches))
        if enabled is not None and end in points:
            enabled.keep_state(caches)
        mx.clear_cache()
        on_progress(end, len(tokens) + 1)


def prefill_to_cut(
    enabled: Enabled, caches: Sequence[Any], prompt: mx.array, step_size: int
) -> int:
    """Take what of a prompt comes before the last copy of native layers; returns its tokens."""
    ids: Any = prompt[:-1].tolist()
    n_tokens = max(enabled.cuts(caches, ids), default=0)
    if n_tokens:
        prefill_prompt(enabled.model, caches, prompt[:n_tokens], step_size)
        enabled.keep_state(caches)
    return n_tokens
