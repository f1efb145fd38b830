"""How much an error in each column of keys or values counts when a group is factored."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.types import Array, RopeSpec
from xkv.store.linear_algebra import energy as energy_of

PROJECTIONS = ("o_proj", "out_proj", "wo", "c_proj", "dense")
"""What models call the linear layer after attention."""

FLOOR = 1e-3
"""Weights below this share of a layer's mean count as much: their columns are kept too."""


def column_weights(
    backend: Backend,
    weighting: str,
    name: str,
    rows: Array,
    energy: Array | None,
    spec: RopeSpec | None,
) -> Array:
    """Weights of one layer's columns, ``[n_kv_heads, dim]``.

    ``norm`` makes layers equally loud. ``attention`` weighs a key's frequency pair by the second
    moment of the prompt's queries there, averaged over the query heads that share the KV head,
    which no rotation changes; and a value's feature by the energy of the output projection's
    columns that read it.

    Args:
        weighting: "norm" or "attention".
        name: "keys" or "values".
        rows: ``[B, L, n_kv_heads, dim]`` in float32 or wider, keys un-rotated.
        energy: ``[n_kv_heads, dim]``: of the queries for keys, of the output projection for values;
            None where it is not known.
        spec: What rotates the keys.

    Raises:
        InputError: If attention was not watched, or the output projection is not known.
    """
    xp = backend.xp
    if weighting == "norm":
        size = (energy_of(backend, rows) / math.prod(rows.shape)) ** 0.5 + 1e-30
        return xp.ones(rows.shape[2:], dtype=rows.dtype, **backend.placement) / size
    if energy is None:
        missing = (
            "its queries were not seen" if name == "keys" else "has no known output projection"
        )
        raise InputError(
            f"weighting=attention cannot weigh the {name} of a layer: {missing}; use weighting=norm"
        )
    energy = xp.astype(energy, rows.dtype)
    if name == "keys" and spec is not None:
        energy = pair_means(backend, energy, spec)
    return xp.sqrt(xp.clip(energy / (xp.mean(energy) + 1e-30), FLOOR**2, None))


def pair_means(backend: Backend, energy: Array, spec: RopeSpec) -> Array:
    """The mean over the two features of each pair that ``spec`` rotates, ``[n_kv_heads, dim]``."""
    xp = backend.xp
    turned, rest = energy[..., : spec.dims], energy[..., spec.dims :]
    half = spec.dims // 2
    if spec.traditional:
        pairs = xp.mean(xp.reshape(turned, (*turned.shape[:-1], half, 2)), axis=-1)
        means = xp.reshape(xp.stack([pairs, pairs], axis=-1), turned.shape)
    else:
        pairs = (turned[..., :half] + turned[..., half:]) / 2
        means = xp.concat([pairs, pairs], axis=-1)
    return xp.concat([means, rest], axis=-1)


def head_energy(backend: Backend, x: Array, n_kv_heads: int) -> Array:
    """Squares summed over all but the KV head and the feature.

    Args:
        x: ``[B, n_heads, L, dim]``: queries, or an output projection as ``[1, n_heads, hidden,
            dim]``.
        n_kv_heads: Query heads next to each other share one.

    Returns:
        ``[n_kv_heads, dim]`` in float32 or wider.
    """
    xp = backend.xp
    wide = xp.astype(x, backend.accumulate_dtype(x))
    by_head = xp.sum(wide * wide, axis=(0, 2))
    return xp.sum(xp.reshape(by_head, (n_kv_heads, -1, x.shape[-1])), axis=1)


def find_projection(modules: Iterable[tuple[str, Any]]) -> Any | None:
    """The linear layer after attention, among a decoder layer's modules by their paths."""
    for path, module in modules:
        parent, _, name = path.rpartition(".")
        if name in PROJECTIONS and "att" in parent.lower():
            return module
    return None


def output_energy(backend: Backend, weight: Array, n_kv_heads: int, value_dim: int) -> Array | None:
    """Squares of an output projection's weights by the value feature they read.

    Args:
        weight: ``[hidden, n_heads * value_dim]``.

    Returns:
        ``[n_kv_heads, value_dim]``, or None if the weight is of another form.
    """
    n_features = weight.shape[-1]
    if n_features % (n_kv_heads * value_dim):
        return None
    heads = backend.xp.reshape(weight, (1, -1, n_features // value_dim, value_dim))
    return head_energy(backend, backend.xp.permute_dims(heads, (0, 2, 1, 3)), n_kv_heads)
