"""Where mlx-lm's layers send what they attended to, for weighting values by it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.planning.cache_plan import CachePlan
from xkv.store.weighting import find_projection, output_energy


def output_energies(backend: MLXBackend, model: Any, plan: CachePlan) -> dict[int, mx.array]:
    """:func:`xkv.store.weighting.output_energy` of compressed layers whose projection is known."""
    found: dict[int, mx.array] = {}
    if plan.config.weighting != "attention":
        return found
    layers = getattr(model, "layers", [])
    for index in (i for group in plan.groups for i in group if i < len(layers)):
        layer, shape = layers[index], plan.probe.caches[index].shape
        module = find_projection(layer.named_modules()) if isinstance(layer, nn.Module) else None
        if module is None or shape is None:
            continue
        weight = module.weight
        if isinstance(module, nn.QuantizedLinear):
            options = {"group_size": module.group_size, "bits": module.bits}
            weight = mx.dequantize(weight, module.scales, module.get("biases"), **options)
        energy = output_energy(backend, weight, shape.n_kv_heads, shape.value_dim)
        if energy is not None:
            found[index] = energy
    return found
