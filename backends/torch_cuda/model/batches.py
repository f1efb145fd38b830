"""Other sequences in a batch: a selection of those that a group holds, some of them repeatedly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xkv.cache.group import GroupState
from xkv.cache.rows import LayerRows
from xkv.errors import InputError
from xkv.store.store import Store

Pick = Callable[[torch.Tensor], torch.Tensor]


def row_numbers(indices: Any, batch: int) -> list[int]:
    """Numbers of sequences out of whatever indexes an axis of a tensor.

    Raises:
        InputError: If one is out of range, or none is left.
    """
    numbers = torch.as_tensor(indices).cpu()
    try:
        found = torch.arange(batch)[numbers].reshape(-1).tolist() if numbers.numel() else []
    except IndexError as error:
        raise InputError(f"the cache holds {batch} sequences, numbered from 0: {error}") from error
    if not found:
        raise InputError("none of the sequences would be left: use cache.reset()")
    return found


def selected(state: GroupState, indices: torch.Tensor) -> GroupState:
    """A group's state with these sequences; what is of the whole batch stays."""

    def pick(x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, indices)

    layers = tuple(_layer(layer, pick) for layer in state.layers)
    return state._replace(
        layers=layers, keys=_picked(state.keys, pick), values=_picked(state.values, pick)
    )


def _layer(layer: LayerRows, pick: Pick) -> LayerRows:
    keys, values = (
        x if x.allocated is None else x._replace(allocated=pick(x.allocated))
        for x in (layer.keys, layer.values)
    )
    recent = None if layer.recent is None else layer.recent.map(pick)
    return layer._replace(keys=keys, values=values, recent=recent)


def _picked(store: Store | None, pick: Pick) -> Store | None:
    if store is None:
        return None
    basis = store.basis
    if not basis.is_shared:
        basis = basis._replace(layers=tuple(layer.map(pick) for layer in basis.layers))
    return store._replace(basis=basis, latent=store.latent.map(pick))
