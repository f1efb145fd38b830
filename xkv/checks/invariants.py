"""What holds of a cache between calls of its model, whatever was done to it before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from xkv.cache.group import GroupState
from xkv.cache.layer import LayerView
from xkv.cache.lowrank_cache import LowRankCache
from xkv.cache.rows import LayerRows
from xkv.ops.backend import Backend
from xkv.ops.types import Array

SLACK = 2.0
"""Squared distances of a recent row to its stored form, beside those to other rows' forms; and its
error, beside that of all rows."""

NEAR = 0.05
"""Squared distance to its stored form, beside its own length, at which a row may be as near to
another's: a first layer's values are the same wherever a token is."""


def broken_invariants(cache: LowRankCache) -> list[str]:
    """Sentences that name what does not hold; none if all is well.

    * all layers have seen the same tokens, in one order of rotations;
    * store and dense rows are as many as the tokens, in keys and in values;
    * recent rows are the last of the segment;
    * the bytes that are counted are those of the arrays.
    """
    found = []
    offsets = {i: layer.offset for i, layer in cache.layers.items()}
    if len(set(offsets.values())) != 1:
        found.append(f"layers are at different offsets: {offsets}")
    for number, group in enumerate(cache.groups):
        found += [f"group {number}: {x}" for x in _of_group(group.state, group.has_dense_values)]
        for index in range(len(group.layers)):
            view = group.state.view(cache.backend, index)
            found += [f"group {number}, layer {index}: {x}" for x in _of_recent(view)]
    ids = {id(x): x.nbytes for x in cache.arrays()}
    counted = cache.held_bytes(), sum(layer.nbytes for layer in cache.layers.values())
    if set(counted) != {sum(ids.values())}:
        found.append(f"{counted} bytes are counted, and the arrays take {sum(ids.values())}")
    return found


def _of_group(state: GroupState, has_dense_values: bool) -> Iterator[str]:
    for index, layer in enumerate(state.layers):
        yield from (f"layer {index}: {x}" for x in _of_layer(layer, has_dense_values))
        if not layer.is_compressed:
            continue
        for name in ("keys", "values"):
            store = getattr(state, name)
            if store is None:
                if name == "keys" or not has_dense_values:
                    yield f"layer {index} is compressed, and the group has no {name}"
                continue
            if store.latent.shape[1] < layer.n_segment:
                yield f"the latent of the {name} has fewer rows than layer {index} uses"
    for store in state.stores:
        ranks = {basis.rank for basis in store.basis.layers}
        if ranks != {store.latent.rank} or len(store.basis.layers) != len(state.layers):
            yield f"bases of ranks {ranks} for {len(state.layers)} layers"
        if store.latent.bits != store.basis.bits:
            yield "a latent is not in the bits of its basis"
        if not 0 <= store.lost <= store.total:
            yield f"{store.lost} of {store.total} was lost"


def _of_layer(layer: LayerRows, has_dense_values: bool) -> Iterator[str]:
    if min(layer.n_segment, layer.n_tail) < 0:
        yield f"a number of rows is negative: {layer.n_segment}, {layer.n_tail}"
    n_values = layer.offset if has_dense_values else layer.keys.n_rows
    if layer.values.n_rows != n_values:
        yield f"{layer.values.n_rows} rows of values where {n_values} belong to the keys"
    n_rotated = sum(run.n_rows for run in layer.rope_runs)
    if n_rotated != layer.offset:
        yield f"{n_rotated} rows have a rotation, and there are {layer.offset}"
    for buffer in (layer.keys, layer.values):
        if buffer.n_rows and (buffer.allocated is None or buffer.n_rows > buffer.rows.shape[-2]):
            yield f"{buffer.n_rows} rows are counted, and the buffer has fewer"


def _of_recent(view: LayerView) -> Iterator[str]:
    layer, backend = view.rows, view.backend
    if layer.recent is None:
        return
    if len({x.shape[2] for x in layer.recent}) > 1 or not 0 < layer.n_recent <= layer.n_segment:
        found = [x.shape[2] for x in layer.recent]
        yield f"{found} recent numbers and scales of {layer.n_segment} stored rows"
        return
    head_dim, end = layer.keys.rows.shape[-1], layer.start + layer.n_segment
    for name, rows in zip(("keys", "values"), view.dense(), strict=True):
        stored = _numbers(backend, rows)[..., layer.start : end, :]
        held = _numbers(backend, getattr(layer.recent, name)(backend, head_dim, backend.xp.float32))
        # they are as they were computed, and no other stored row is closer
        products = held @ stored.swapaxes(-1, -2)
        apart = (stored**2).sum(-1)[..., None, :] - 2 * products + (held**2).sum(-1)[..., None]
        its_own = np.diagonal(apart, layer.n_segment - layer.n_recent, -2, -1)
        store = view.keys if name == "keys" else view.values
        lost = 0.0 if store is None else store.error
        allowed = max((SLACK * lost) ** 2, NEAR) * (held**2).sum(-1)
        if (its_own > SLACK * apart.min(-1) + allowed).any():
            yield f"recent {name} are those of other rows"


def _numbers(backend: Backend, x: Array) -> np.ndarray:
    return backend.to_numpy(x).astype(np.float64)
