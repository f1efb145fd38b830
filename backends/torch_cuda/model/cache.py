"""Caches of ours for transformers' models: what becomes of each layer, and whose rows they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from xkv.backends.torch_cuda.backend import TorchBackend
from xkv.backends.torch_cuda.model.attention import install
from xkv.backends.torch_cuda.model.calls import watch_calls
from xkv.backends.torch_cuda.model.probe import base_model, probe_model
from xkv.backends.torch_cuda.model.xkv_cache import XKVCache
from xkv.cache.fingerprint import fingerprint, stride
from xkv.config import XKVConfig
from xkv.planning.cache_plan import CachePlan
from xkv.planning.profile import ModelIdentity
from xkv.store.weighting import find_projection, output_energy

logger = logging.getLogger("xkv")


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
    energies = output_energies(backend, model, plan)
    cache = XKVCache(model.config, plan, backend, on_progress, output_energies=energies)
    cache.sequences[0].fingerprint = model_fingerprint(model)
    return cache


def output_energies(
    backend: TorchBackend, model: PreTrainedModel, plan: CachePlan
) -> dict[int, torch.Tensor]:
    """:func:`xkv.store.weighting.output_energy` of compressed layers whose projection is known."""
    found: dict[int, torch.Tensor] = {}
    if plan.config.weighting != "attention":
        return found
    layers = getattr(base_model(model), "layers", [])
    for index in (i for group in plan.groups for i in group if i < len(layers)):
        module, shape = (
            find_projection(layers[index].named_modules()),
            plan.probe.caches[index].shape,
        )
        if module is not None and shape is not None:
            weight = getattr(module.weight, "to_local", lambda w=module.weight: w)().detach()
            energy = output_energy(backend, weight, shape.n_kv_heads, shape.value_dim)
            if energy is not None:
                found[index] = energy
    return found


def model_fingerprint(model: PreTrainedModel) -> str:
    """What a file says of the model that made its rows; of a sharded one, its rank's shard."""
    parameters = {
        name: getattr(x, "to_local", lambda x=x: x)().detach()
        for name, x in model.named_parameters()
    }
    for name, module in model.named_modules():
        # numbers beside an adapter's parameters, not among them
        scales = getattr(module, "scaling", None) if hasattr(module, "lora_A") else None
        for key, scale in scales.items() if isinstance(scales, dict) else ():
            parameters[f"{name}.scale.{key}"] = torch.tensor(float(scale))

    def few(name: str, n_values: int) -> Any:
        x = parameters[name]
        return x.reshape(-1)[:: stride(x.numel())][:n_values].float().cpu().numpy()

    return fingerprint(((name, tuple(x.shape)) for name, x in parameters.items()), few)


def plan_cache(model: PreTrainedModel, config: XKVConfig) -> CachePlan:
    """Look at a model, and decide what becomes of each of its layers' caches."""
    return CachePlan.of_probe(type(model).__name__, config, probe_model(model))
