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
from xkv.ops.recent import Recent, packed
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
    end = start + n_rows
    stores: dict[str, Any] = {"keys": None, "values": None}
    for name, basis in zip(stores, bases, strict=False):
        read = state.reader(backend, name, start)
        dtype = state.layers[0].keys.rows.dtype
        stores[name] = store_rows(backend, basis, read, n_rows, dtype, None)
    n_recent = layout.n_recent if len(bases) == 2 else 0
    layers = []
    for layer in state.layers:
        recent = _packed(backend, layer, end - n_recent, end) if n_recent else None
        layer = _without(backend, layer, start, end, list(stores)[: len(bases)])
        layers.append(layer._replace(start=start, n_segment=n_rows, recent=recent))
    return GroupState(tuple(layers), **stores, retry_at=state.retry_at)


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

    They are recent ones then, in the place of the first of these.
    """
    first = state.layers[0]
    start, end = first.n_sinks, first.n_sinks + n_rows
    stored: dict[str, Any] = {}
    for name in ("keys", "values"):
        store = getattr(state, name)
        if store is not None:
            in_use = store._replace(latent=store.latent.rows(0, first.n_segment))
            read = state.reader(backend, name, start)
            dtype = store.latent.dtype
            stored[name] = store_rows(backend, store.basis, read, n_rows, dtype, in_use)
    n_segment = first.n_segment + n_rows
    layers: list[LayerRows] = []
    n_recent = config.layout(first.offset).n_recent if len(stored) == 2 else 0
    for layer in state.layers:
        recent = None
        if n_recent:
            recent = _packed(backend, layer, max(end - n_recent, start), end)
            if layer.recent is not None:
                recent = layer.recent.followed(backend, recent, n_recent)
            backend.evaluate(*recent)
        layer = _without(backend, layer, start, end, list(stored))
        layers.append(layer._replace(n_segment=n_segment, recent=recent))
    return state._replace(layers=tuple(layers), **stored)


def _packed(backend: Backend, layer: LayerRows, start: int, end: int) -> Recent:
    """A layer's dense rows of these numbers, in 8 bits."""
    keys, values = (x.rows[..., start:end, :] for x in (layer.keys, layer.values))
    recent = packed(backend, keys, values)
    backend.evaluate(*recent)
    return recent


def _without(
    backend: Backend, layer: LayerRows, start: int, end: int, names: Sequence[str]
) -> LayerRows:
    """A layer without the dense rows from ``start`` to ``end`` of what was stored."""
    rows: dict[str, Any] = {
        name: getattr(layer, name).without(backend, start, end) for name in names
    }
    backend.evaluate(*(buffer.allocated for buffer in rows.values()))
    return layer._replace(**rows)
