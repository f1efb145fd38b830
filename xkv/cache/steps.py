"""How a group's state changes between calls of the model: pure functions from one to the next.

A step that fails has changed nothing: whoever holds the state replaces it with the result, last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from xkv.cache.group import GroupState
from xkv.cache.layer import last_rows
from xkv.cache.rows import LayerRows
from xkv.config import Layout, XKVConfig
from xkv.ops.backend import Backend
from xkv.ops.slots import Slots
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
    # a working set begins with the last rows, which are at hand as they were computed
    n_kept = layout.n_kept if len(bases) == 2 else 0
    layers = []
    for layer in state.layers:
        slots = _last_rows(backend, layer, end, n_kept, n_rows) if n_kept else None
        layer = _without(backend, layer, start, end, list(stores)[: len(bases)])
        layers.append(layer._replace(start=start, n_segment=n_rows, n_kept=n_kept, slots=slots))
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

    Working sets grow with it, up to what is theirs, by rows that were just stored.
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
    wanted = config.layout(first.offset).n_kept if len(stored) == 2 else 0
    n_more = min(max(wanted - first.n_kept, 0), n_rows)
    for layer in state.layers:
        layer = state.view(backend, len(layers)).filled()
        slots = layer.slots
        if n_more:
            entering = _last_rows(backend, layer, end, n_more, n_segment)
            slots = entering if slots is None else slots.joined(backend, entering)
            backend.evaluate(*slots)
        n_kept, layer = layer.n_kept + n_more, _without(backend, layer, start, end, list(stored))
        layers.append(layer._replace(n_segment=n_segment, n_kept=n_kept, slots=slots))
    return state._replace(layers=tuple(layers), **stored)


def _last_rows(backend: Backend, layer: LayerRows, end: int, n_kept: int, n_segment: int) -> Slots:
    """Slots that hold the dense rows before number ``end``, the last of a segment."""
    keys, values = (x.rows[..., end - n_kept : end, :] for x in (layer.keys, layer.values))
    return last_rows(backend, keys, values, n_segment)


def _without(
    backend: Backend, layer: LayerRows, start: int, end: int, names: Sequence[str]
) -> LayerRows:
    """A layer without the dense rows from ``start`` to ``end`` of what was stored."""
    rows: dict[str, Any] = {
        name: getattr(layer, name).without(backend, start, end) for name in names
    }
    backend.evaluate(*(buffer.allocated for buffer in rows.values()))
    return layer._replace(**rows)
