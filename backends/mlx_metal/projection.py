"""Where an mlx-lm layer's attention output goes, for weighting values by it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.weighting import head_energy

_NAMES = ("o_proj", "out_proj", "wo", "c_proj", "dense")


def output_energy(
    backend: MLXBackend, layer: Any, n_kv_heads: int, value_dim: int
) -> mx.array | None:
    """Squares of the output projection's weights by the value feature they read.

    Args:
        backend: Does the arithmetic.
        layer: A decoder layer.
        n_kv_heads: KV heads of its attention.
        value_dim: Features of a value head.

    Returns:
        ``[n_kv_heads, value_dim]`` float32, or None where no projection is known by its name.
    """
    if not isinstance(layer, nn.Module):
        return None
    for path, module in layer.named_modules():
        parent, _, name = path.rpartition(".")
        if name in _NAMES and "att" in parent.lower():
            weight = module.weight
            if isinstance(module, nn.QuantizedLinear):
                weight = mx.dequantize(
                    weight, module.scales, module.biases, module.group_size, module.bits
                )
            n_features = weight.shape[-1]
            if n_features % (n_kv_heads * value_dim) == 0:
                heads = weight.reshape(1, -1, n_features // value_dim, value_dim).swapaxes(1, 2)
                return head_energy(backend, heads, n_kv_heads)
    return None
