"""Caches of ours for transformers' models: what becomes of each layer, and whose rows they are."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from xkv.backends.torch_cuda.backend import TorchBackend
from xkv.backends.torch_cuda.model.attention import install
from xkv.backends.torch_cuda.model.calls import watch_calls
from xkv.backends.torch_cuda.model.fingerprint import model_fingerprint
from xkv.backends.torch_cuda.model.probe import probe_model
from xkv.backends.torch_cuda.model.xkv_cache import XKVCache
from xkv.config import XKVConfig
from xkv.planning.basis_file import find_basis
from xkv.planning.cache_plan import CachePlan
from xkv.planning.profile import ModelIdentity
from xkv.store.model_basis import ModelBasis

logger = logging.getLogger("xkv")

_BASES: weakref.WeakKeyDictionary[PreTrainedModel, dict[Any, ModelBasis]] = (
    weakref.WeakKeyDictionary()
)
"""What was read of a model, as long as it lives."""


def identity_of(model: PreTrainedModel) -> ModelIdentity:
    """What a profile of a model agrees with."""
    config = model.config.get_text_config()
    n_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return ModelIdentity(
        model.config.model_type,
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim,
        head_dim,
    )


def torch_cache(
    model: PreTrainedModel,
    config: XKVConfig | None = None,
    *,
    backend: TorchBackend | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> XKVCache:
    """An empty compressed cache for a model; see :func:`xkv.torch_cache`.

    Args:
        model: A decoder of transformers.
        config: Defaults to a compression of 4.
        backend: Defaults to one on the model's device.
        on_progress: Called with (factorizations done, factorizations in all) after each.

    Raises:
        InputError: If nothing of the model can be compressed, or its attention not be replaced.
    """
    plan = plan_cache(model, config or XKVConfig())
    for sentence in plan.report().warnings():
        logger.warning(sentence)
    install(model)
    watch_calls(model)
    backend = backend or TorchBackend(model.device)
    basis = model_basis(model, plan, backend)
    cache = XKVCache(model.config, plan, backend, on_progress, basis=basis)
    cache.sequences[0].fingerprint = model_fingerprint(model)
    return cache


def model_basis(
    model: PreTrainedModel,
    plan: CachePlan,
    backend: TorchBackend,
) -> ModelBasis | None:
    """The model's own basis, None where it has none or none is wanted.

    Args:
        model: A decoder of transformers.
        plan: Says which of its layers share a basis.
        backend: On the model's device.
    """
    held = _BASES.setdefault(model, {})
    if plan.groups not in held or not plan.config.wants_model_basis:
        found = find_basis(model_fingerprint(model), plan.groups, plan.config, backend)
        if found is None:
            return None
        held[plan.groups] = found
    return held[plan.groups]


def plan_cache(model: PreTrainedModel, config: XKVConfig) -> CachePlan:
    """Look at a model, and decide what becomes of each of its layers' caches."""
    return CachePlan.of_probe(type(model).__name__, config, probe_model(model))
