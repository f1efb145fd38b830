"""What holds of a cache between calls of its model, whatever was done to it before."""

from __future__ import annotations

from collections.abc import Iterator

from xkv.cache.group import GroupState
from xkv.cache.lowrank_cache import LowRankCache
from xkv.cache.rows import LayerRows


def broken_invariants(cache: LowRankCache) -> list[str]:
    """Sentences that name what does not hold; none if all is well.

    * all layers have seen the same tokens, in one order of rotations;
    * store and dense rows are as many as the tokens, in keys and in values;
    * what summarizes rows covers exactly the rows of the segment;
    * the bytes that are counted are those of the arrays.
    """
    found = []
    offsets = {i: layer.offset for i, layer in cache.layers.items()}
    if len(set(offsets.values())) != 1:
        found.append(f"layers are at different offsets: {offsets}")
    for number, group in enumerate(cache.groups):
        found += [f"group {number}: {x}" for x in _of_group(group.state, group.has_dense_values)]
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
        if (store.latent.widths, store.latent.bits) != (store.basis.widths, store.basis.bits):
            yield "a latent is not in the columns and bits of its basis"
        if not 0 <= store.lost <= store.total:
            yield f"{store.lost} of {store.total} was lost"


def _of_layer(layer: LayerRows, has_dense_values: bool) -> Iterator[str]:
    n_dense = layer.keys.n_rows - layer.n_outlier_rows
    if min(layer.n_segment, layer.n_outlier_rows, layer.n_tail) < 0:
        yield f"a number of rows is negative: {layer.n_segment}, {layer.n_tail}"
    n_values = layer.offset if has_dense_values else layer.keys.n_rows
    if layer.values.n_rows != n_values:
        yield f"{layer.values.n_rows} rows of values where {n_values} belong to the keys"
    if layer.n_segment + n_dense != layer.offset:
        yield f"{layer.n_segment} stored and {n_dense} dense rows for {layer.offset} tokens"
    n_rotated = sum(run.n_rows for run in layer.rope_runs)
    if n_rotated != layer.offset:
        yield f"{n_rotated} rows have a rotation, and there are {layer.offset}"
    for buffer in (layer.keys, layer.values):
        if buffer.n_rows and (buffer.allocated is None or buffer.n_rows > buffer.rows.shape[-2]):
            yield f"{buffer.n_rows} rows are counted, and the buffer has fewer"
    landmarks = layer.landmarks
    if landmarks is None:
        if layer.n_outlier_rows:
            yield f"{layer.n_outlier_rows} outlier rows without landmarks"
        return
    n_covered = landmarks.n_chunks * landmarks.chunk_size
    if n_covered != layer.n_segment:
        yield f"landmarks cover {n_covered} rows of a segment of {layer.n_segment}"
    if any(x.shape[2] != landmarks.n_chunks for x in landmarks.held):
        yield "landmarks are not all of the same chunks"
