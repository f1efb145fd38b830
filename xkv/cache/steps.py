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
from xkv.store.prompt_basis import Spectrum, measure, packed_bases, plain_basis
from xkv.store.store import Basis, store_rows


def prompt_bases(
    backend: Backend,
    config: XKVConfig,
    state: GroupState,
    n_rows: int,
    ranks: Sequence[int],
    budget_bytes: int | None,
    on_factored: Callable[[], None] = lambda: None,
) -> list[Basis]:
    """Bases of a prompt's own for keys, and for values where they are factored.

    Args:
        state: Layers with only dense rows.
        n_rows: Of them, after the sinks, that are compressed.
        ranks: Columns of keys, and of values.
        budget_bytes: What bases and latents may take, in the bits that lose least; None holds them
            in the KV dtype.
        on_factored: Called after the keys and after the values.
    """
    dtype = state.layers[0].keys.rows.dtype
    spectra: list[Spectrum] = []
    for name, rank in zip(("keys", "values"), ranks, strict=False):
        read = state.reader(backend, name, config.sinks)
        spectra.append(
            measure(
                backend,
                read,
                n_rows,
                rank,
                dtype,
                power_iterations=config.power_iterations,
                seed=config.seed,
            )
        )
        on_factored()
    if budget_bytes is None:
        return [plain_basis(backend, spectrum, dtype) for spectrum in spectra]
    return packed_bases(backend, spectra, n_rows, budget_bytes, dtype)


def compress(
    backend: Backend, config: XKVConfig, state: GroupState, layout: Layout, bases: Sequence[Basis]
) -> GroupState:
    """Store everything but sinks and window.

    Args:
        state: Layers with only dense rows.
        layout: Of these rows.
        bases: Of keys, and of values where they are factored.
    """
    start, n_rows = config.sinks, layout.n_rows
    summarized = [
        _summarized(backend, config, layer, start, start + n_rows, layout) for layer in state.layers
    ]
    stores: dict[str, Any] = {"keys": None, "values": None}
    for name, basis in zip(stores, bases, strict=False):
        read = state.reader(backend, name, start)
        dtype = state.layers[0].keys.rows.dtype
        stores[name] = store_rows(backend, basis, read, n_rows, dtype, None)
    layers = []
    for layer, outliers in summarized:
        buffers = {}
        for name in list(stores)[: len(bases)]:
            buffer, kept = getattr(layer, name), []
            if outliers is not None:
                kept.append(backend.xp.take_along_axis(buffer.rows, outliers[..., None], axis=-2))
            buffers[name] = buffer.replaced(backend, start, start + n_rows, kept)
            backend.evaluate(buffers[name].allocated)
        n_outlier_rows = 0 if outliers is None else outliers.shape[-1]
        layers.append(
            layer._replace(start=start, n_segment=n_rows, n_outlier_rows=n_outlier_rows, **buffers)
        )
    return GroupState(tuple(layers), **stores, retry_at=state.retry_at)


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


def released(backend: Backend, state: GroupState) -> GroupState:
    """A copy of what is left of a latent that was trimmed to less than half, which frees it."""
    n_rows = state.layers[0].n_segment
    short: dict[str, Any] = {
        name: store._replace(latent=store.latent.rows(0, n_rows).own(backend))
        for name, store in (("keys", state.keys), ("values", state.values))
        if store is not None and 2 * n_rows < store.latent.shape[1]
    }
    return state._replace(**short) if short else state


def fold(backend: Backend, config: XKVConfig, state: GroupState, n_rows: int) -> GroupState:
    """Move the first dense rows after the stored ones into the store.

    Args:
        n_rows: How many; of a group that selects chunks, so that they are whole ones together.
    """
    first = state.layers[0]
    start = first.n_sinks + first.n_outlier_rows
    stored: dict[str, Any] = {}
    for name in ("keys", "values"):
        store = getattr(state, name)
        if store is not None:
            in_use = store._replace(latent=store.latent.rows(0, first.n_segment))
            read = state.reader(backend, name, start)
            stored[name] = store_rows(
                backend, store.basis, read, n_rows, store.latent.dtype, in_use
            )
    n_segment, layers = first.n_segment + n_rows, list(state.layers)
    if first.landmarks is not None or config.layout(first.offset).is_selective:
        layers = [
            state.view(backend, i).extended_landmarks(
                n_segment, config.chunk_size, config.landmark_bits
            )
            for i in range(len(layers))
        ]
    for i, layer in enumerate(layers):
        buffers = {
            name: getattr(layer, name).replaced(backend, start, start + n_rows) for name in stored
        }
        backend.evaluate(*(buffer.allocated for buffer in buffers.values()))
        layers[i] = layer._replace(n_segment=n_segment, **buffers)
    return state._replace(layers=tuple(layers), **stored)
