"""A model that fails in the middle of a call, and all that a call must then leave unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """Ends a forward pass."""


@contextmanager
def failing_model(model: Any, at: int) -> Iterator[None]:
    """The ``at``-th call of a layer's last module raises."""
    left = at // 2

    def hook(*args: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Interrupted

    hooks = [layer.mlp.register_forward_hook(hook) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def state_of(cache: Any) -> list[Any]:
    """Everything that a call changes; tensors that are written into are copied."""
    native = [
        (layer.keys, layer.values, getattr(layer, "cumulative_length", 0))
        for layer in cache.layers
        if layer.keys is not None and layer.keys.numel()
    ]
    rows = [
        (x.keys.rows.clone(), x.values.rows.clone())
        for sequence in cache.sequences
        for group in sequence.groups
        for x in group.layers
        if x.keys.allocated is not None
    ]
    states = [
        layer._replace(keys=None, values=None)
        for sequence in cache.sequences
        for group in sequence.groups
        for layer in group.layers
    ]
    factors = [(g.keys, g.values) for x in cache.sequences for g in x.groups]
    counts = [getattr(layer, "n_rows", None) for layer in cache.layers]
    return [native, rows, states, factors, counts, cache.padding.is_token, len(cache.sequences)]
