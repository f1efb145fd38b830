"""Making every mlx-lm function use the compressed cache of one model, until it is disabled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.model.enabled import (
    Enabled,
    enabled_state,
    plan_cache,
    planned_caches,
)
from xkv.backends.mlx_metal.model.generation import patch_for
from xkv.backends.mlx_metal.model.identity import model_fingerprint, model_name
from xkv.backends.mlx_metal.model.vlm import is_vlm, text_model
from xkv.backends.mlx_metal.model.vlm_generation import patch_for_vlm
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.basis_file import find_basis
from xkv.planning.profile import ModelIdentity
from xkv.planning.report import Report

_log = logging.getLogger("xkv")


def enable(
    model: nn.Module, config: XKVConfig | None = None, *, backend: MLXBackend | None = None
) -> Report:
    """Give a model compressed prompt caches; see :func:`xkv.enable`."""
    model = text_model(model)
    if enabled_state(model) is not None:
        disable(model)
    enabled = Enabled(model, config or XKVConfig(), backend or MLXBackend())
    enabled.unpatch = (patch_for_vlm if is_vlm(model) else patch_for)(enabled)
    report = enabled.plan.report()
    for sentence in report.warnings():
        _log.warning(sentence)
    return report


def disable(model: nn.Module) -> None:
    """Give an enabled model its own cache back; see :func:`xkv.disable`."""
    enabled = enabled_state(text_model(model))
    if enabled is None:
        raise InputError("this model is not enabled")
    enabled.remove()


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
        model: From ``mlx_lm.load``, or of mlx-vlm.
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
    model = text_model(model)
    plan, backend = plan_cache(model, config or XKVConfig()), backend or MLXBackend()
    basis = find_basis(model_fingerprint(model), plan.groups, plan.config, backend)
    return planned_caches(model, plan, plan.lowrank_cache(backend, on_progress, basis))


def identity_of(model: nn.Module, config: XKVConfig) -> ModelIdentity:
    """What a profile of a model agrees with; heads are those of the first grouped layer."""
    plan = plan_cache(model, config)
    shape = plan.probe.caches[plan.groups[0][0]].shape
    assert shape is not None
    # several types of mlx-lm's share a model file
    model_type = getattr(getattr(model, "args", None), "model_type", model_name(model))
    heads = shape.n_kv_heads, shape.key_dim, shape.value_dim
    return ModelIdentity(model_type, len(plan.probe.caches), *heads)
