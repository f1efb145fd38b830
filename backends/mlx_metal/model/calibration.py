"""A model of mlx-lm as calibration uses it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.model.enable import enable
from xkv.backends.mlx_metal.model.enabled import (
    Enabled,
    enabled_state,
    native_caches,
    planned_caches,
    prefill_prompt,
)
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.cache.lowrank_cache import LowRankCache
from xkv.cli.first_use import calibrate_at_first_use
from xkv.config import XKVConfig

STEP_SIZE = 512


class MLXSubject:
    """See :class:`xkv.planning.calibration.Subject`.

    Args:
        model: From ``mlx_lm.load``, enabled.
        enabled: What that left on it.
    """

    def __init__(self, model: nn.Module, enabled: Enabled) -> None:
        self.model, self.plan = model, enabled.plan
        self.backend: MLXBackend = enabled.backend
        self.fingerprint = enabled.fingerprint

    @classmethod
    def of(cls, model: nn.Module, config: XKVConfig, backend: MLXBackend) -> MLXSubject:
        """A model, which is enabled from then on if it was not."""
        enabled = enabled_state(model)
        if enabled is None:
            enable(model, config, backend=backend)
            enabled = enabled_state(model)
            assert enabled is not None
        return cls(model, enabled)

    def at_full_speed(self) -> AbstractContextManager[None]:
        # commands widen the model where that is faster, and keep it so
        return contextlib.nullcontext()

    def fill(self, cache: LowRankCache, tokens: Sequence[int]) -> list[Any]:
        caches = planned_caches(self.model, self.plan, cache)
        prefill_prompt(self.model, caches, mx.array(list(tokens)), STEP_SIZE)
        return caches

    def log_probabilities(self, caches: list[Any], tokens: Sequence[int]) -> np.ndarray:
        logits = self.model(mx.array([list(tokens)]), cache=copy.deepcopy(caches))[0]
        logits = logits.astype(mx.float32)
        return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def gradients(
        self, tokens: Sequence[int], n_context: int, seed: int
    ) -> dict[int, tuple[mx.array, mx.array]]:
        caches = native_caches(self.model)
        for start in range(0, n_context, STEP_SIZE):
            end = min(start + STEP_SIZE, n_context)
            self.model(mx.array([list(tokens[start:end])]), cache=caches)
            mx.eval([x.state for x in flatten(caches)])
        by_layer = dict(enumerate(flatten(caches)))
        layers = {i: by_layer[i] for group in self.plan.groups for i in group}
        rows = [
            [x[..., :n_context, :] for x in (layer.keys, layer.values)] for layer in layers.values()
        ]
        following = mx.array([list(tokens[n_context:])])
        random = np.random.default_rng(seed)

        def total(rows: list[list[mx.array]]) -> mx.array:
            for layer, pair in zip(layers.values(), rows, strict=True):
                layer.keys, layer.values = pair
                layer.offset = n_context
            logits = self.model(following, cache=caches)[0].astype(mx.float32)
            return _sampled(logits, random)

        found = mx.grad(total)(rows)
        mx.eval(found)
        return {i: (keys, values) for i, (keys, values) in zip(layers, found, strict=True)}


def _sampled(logits: mx.array, random: np.random.Generator) -> mx.array:
    """Log probabilities of tokens drawn from their own distribution, summed with random signs.

    The squares of its gradient are, in the mean, the diagonal of the Fisher information.
    """
    noise = mx.array(random.gumbel(size=logits.shape).astype(np.float32))
    signs = mx.array(random.choice([-1.0, 1.0], size=logits.shape[0]).astype(np.float32))
    drawn = mx.argmax(mx.stop_gradient(logits) + noise, axis=-1, keepdims=True)
    log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return (mx.take_along_axis(log_probabilities, drawn, axis=-1)[:, 0] * signs).sum()


def calibrate_enabled(
    model: nn.Module, tokenizer: Any, config: XKVConfig, is_off: bool = False
) -> None:
    """:func:`xkv.cli.first_use.calibrate_at_first_use` for an enabled model."""
    enabled = enabled_state(model)
    assert enabled is not None
    found = calibrate_at_first_use(lambda: MLXSubject(model, enabled), tokenizer, config, is_off)
    enabled.basis = found or enabled.basis
