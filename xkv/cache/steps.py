"""How a group's state changes between calls of the model: pure functions from one to the next.

A step that fails has changed nothing: whoever holds the state replaces it with the result, last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from xkv.cache.group import GroupState
from xkv.cache.rows import LayerRows
from xkv.config import Layout, XKVConfig
from xkv.ops.backend import Backend
from xkv.ops.selection import chunk_rows, make_landmarks
from xkv.ops.types import Array
from xkv.store.factorization import Factorization, factor_rows, pack_together
from xkv.store.factors import SharedFactors
from xkv.store.growth import fold_rows, merge_rows
from xkv.store.weighting import column_weights


def compress(
    backend: Backend,
    config: XKVConfig,
    state: GroupState,
    layout: Layout,
    ranks: Sequence[int],
    budget_bytes: int | None,
    on_factored: Callable[[], None] = lambda: None,
) -> GroupState:
    """Factor everything but sinks and window.

    Args:
        state: Layers with only dense rows.
        layout: Of these rows.
        ranks: Columns of keys, and of values where they are factored.
        budget_bytes: What the factors may take, in the bits that lose least; None holds them in the
            KV dtype.
        on_factored: Called after the keys and after the values.
    """
    start = config.sinks
    end = start + layout.n_rows
    names = ("keys", "values")[: len(ranks)]
    landmarks: list[LayerRows] = []
    outliers: list[Array | None] = []
    for layer in state.layers:
        summarized, rows = _summarized(backend, config, layer, start, end, layout)
        landmarks.append(summarized)
        outliers.append(rows)
    factored = []
    for name, rank in zip(names, ranks, strict=True):
        factored.append(_factored(backend, config, state, name, start, end, rank))
        on_factored()
    if budget_bytes is None:
        stored = [each.plain() for each in factored]
    else:
        stored = pack_together(backend, factored, budget_bytes, config.min_rank)
    layers = []
    for layer, rows in zip(landmarks, outliers, strict=True):
        buffers = {}
        for name in names:
            buffer, kept = getattr(layer, name), []
            if rows is not None:
                kept.append(backend.xp.take_along_axis(buffer.rows, rows[..., None], axis=-2))
            buffers[name] = buffer.replaced(backend, start, end, kept)
            backend.evaluate(buffers[name].allocated)
        n_outlier_rows = 0 if rows is None else rows.shape[-1]
        layers.append(
            layer._replace(
                start=start, n_segment=layout.n_rows, n_outlier_rows=n_outlier_rows, **buffers
            )
        )
    values = stored[1] if len(stored) > 1 else None
    return GroupState(tuple(layers), stored[0], values, state.retry_at)


def _summarized(
    backend: Backend, config: XKVConfig, layer: LayerRows, start: int, end: int, layout: Layout
) -> tuple[LayerRows, Array | None]:
    """A layer with landmarks of its exact keys, and the outlier rows' numbers."""
    if not layout.is_selective:
        return layer, None
    landmarks, outliers = make_landmarks(
        backend,
        layer.keys.rows[..., start:end, :],
        config.chunk_size,
        layout.n_outliers,
        config.landmark_bits,
    )
    backend.evaluate(*landmarks.held)
    rows = chunk_rows(backend, outliers, config.chunk_size) + start
    return layer._replace(landmarks=landmarks), rows


def _factored(
    backend: Backend,
    config: XKVConfig,
    state: GroupState,
    name: str,
    start: int,
    end: int,
    rank: int,
) -> Factorization:
    """Factor the "keys" or the "values" from ``start`` to ``end``."""
    plain = [
        state.view(backend, index).plain_rows(name, start, end)
        for index in range(len(state.layers))
    ]
    weights = None
    if config.weighting != "off":
        weights = [
            column_weights(
                backend,
                config.weighting,
                name,
                rows,
                layer.query_energy if name == "keys" else layer.output_energy,
                layer.rope_runs[0].spec if layer.rope_runs else None,
            )
            for rows, layer in zip(plain, state.layers, strict=True)
        ]
    return factor_rows(
        backend,
        plain,
        rank,
        state.layers[0].keys.rows.dtype,
        weights=weights,
        is_rotated=config.chooses_bits,
        power_iterations=config.power_iterations,
        seed=config.seed,
    )


def fold(
    backend: Backend, config: XKVConfig, state: GroupState, n_rows: int, limits: Sequence[int]
) -> GroupState:
    """Move the first dense rows after the compressed ones into it, as recent rows.

    Args:
        n_rows: How many.
        limits: Rows that the bases of keys, and of values, may grow by.
    """
    first = state.layers[0]
    start = first.n_sinks + first.n_outlier_rows
    end = start + n_rows
    factored = [name for name in ("keys", "values") if getattr(state, name) is not None]
    folded: dict[str, Any] = {}
    for name, limit in zip(factored, limits, strict=True):
        folded[name] = fold_rows(
            backend,
            getattr(state, name),
            [state.view(backend, i).plain_rows(name, start, end) for i in range(len(state.layers))],
            first.n_recent,
            limit,
            power_iterations=config.power_iterations,
            seed=config.seed,
        )
    layers = []
    for layer in state.layers:
        buffers = {name: getattr(layer, name).replaced(backend, start, end) for name in factored}
        backend.evaluate(*(buffer.allocated for buffer in buffers.values()))
        layers.append(layer._replace(n_recent=first.n_recent + n_rows, **buffers))
    return state._replace(layers=tuple(layers), **folded)


def merge(backend: Backend, config: XKVConfig, state: GroupState) -> GroupState:
    """Make recent rows part of the segment, whose landmarks grow with it."""
    first = state.layers[0]
    n_segment, n_recent = first.n_segment, first.n_recent
    n_rows, layers = n_segment + n_recent, list(state.layers)
    if first.landmarks is not None or config.layout(first.offset).is_selective:
        n_rows -= n_rows % config.chunk_size
        layers = [
            state.view(backend, i).extended_landmarks(
                n_rows, config.chunk_size, config.landmark_bits
            )
            for i in range(len(layers))
        ]
    keys, values = (
        factors and merge_rows(backend, factors, n_segment, n_recent, n_rows - n_segment)
        for factors in (state.keys, state.values)
    )
    n_left = n_segment + n_recent - n_rows
    layers = [layer._replace(n_segment=n_rows, n_recent=n_left) for layer in layers]
    return state._replace(layers=tuple(layers), keys=keys, values=values)


def released(backend: Backend, state: GroupState) -> GroupState:
    """A copy of what is left of a latent that was trimmed to less than half, which frees it."""
    n_rows = state.layers[0].n_segment

    def short(factors: SharedFactors | None) -> SharedFactors | None:
        if factors is None or 2 * n_rows >= factors.latent.shape[1]:
            return factors
        return factors._replace(latent=factors.latent.rows(0, n_rows).own(backend))

    keys, values = short(state.keys), short(state.values)
    is_same = keys is state.keys and values is state.values
    return state if is_same else state._replace(keys=keys, values=values)
