"""Telling mlx-lm's and mlx-vlm's models apart."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from xkv.cache.fingerprint import N_VALUES, fingerprint, sampled, stride


def model_name(model: nn.Module) -> str:
    """The model file's name, mlx-vlm's folder's, which is the ``model_type`` for most."""
    names = type(model).__module__.split(".")
    return names[-2] if names[0] == "mlx_vlm" else names[-1]


def model_fingerprint(model: nn.Module) -> str:
    """What a prompt cache says of the model that made its rows."""
    parameters: Any = dict(tree_flatten(model.parameters()))
    for name, module in model.named_modules():
        # a number beside an adapter's parameters, not one of them
        scale = getattr(module, "scale", None) if "lora_a" in module else None
        if isinstance(scale, int | float):
            parameters[f"{name}.scale"] = mx.array(float(scale))

    def few(x: mx.array) -> mx.array:
        values = x.reshape(-1)[:: stride(x.size)][:N_VALUES]
        return values.astype(mx.float32)

    values = {name: few(parameters[name]) for name in sampled(parameters)}
    mx.eval(values)  # at once, not one by one
    return fingerprint(
        ((name, x.shape) for name, x in parameters.items()),
        lambda name, n_values: np.array(values[name]),
    )
