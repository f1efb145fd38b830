"""transformers' own cache layers: as the states of mlx-lm's and back, and with fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from xkv.errors import InputError

FULL, ROTATING = "KVCache", "RotatingKVCache"
"""mlx-lm's classes: keys, values and tokens seen; of the second also how many first rows never
leave, the window, and where the next row goes.
"""


def write_native(layer: Any) -> tuple[str, list[torch.Tensor]] | None:
    """mlx-lm's class for a layer and its state; None if there is none."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
        return None
    rows, n_seen = [layer.keys, layer.values], layer.get_seq_length()
    if type(layer) is DynamicLayer:
        return FULL, [*rows, torch.tensor(n_seen)]
    window = layer.sliding_window
    # a layer that records its past holds more, until it is cropped
    rows = [x[..., -window + 1 :, :] for x in rows]
    n_rows = rows[0].shape[-2]
    if n_seen >= window:
        # room for the next row, without which mlx-lm would not begin to rotate
        rows = [torch.cat([x, torch.zeros_like(x[..., :1, :])], dim=-2) for x in rows]
    return ROTATING, [*rows, *(torch.tensor(x) for x in (n_seen, 0, window, n_rows))]


def read_native(layer: Any, name: str, state: Sequence[torch.Tensor]) -> None:
    """Give an empty layer the rows of mlx-lm's.

    Raises:
        InputError: If they are of another kind.
    """
    kinds = {FULL: DynamicLayer, ROTATING: DynamicSlidingWindowLayer}
    keys, values, *numbers = state
    n_seen, n_first, window, place = [int(x) for x in numbers] + [0] * (4 - len(numbers))
    is_rotating = name == ROTATING
    if kinds.get(name) is not type(layer) or (
        is_rotating and (n_first or window != layer.sliding_window)
    ):
        raise InputError(f"rows of mlx-lm's {name} cannot go into a {type(layer).__name__} here")

    def in_order(x: torch.Tensor) -> torch.Tensor:
        if not is_rotating:
            return x[..., :n_seen, :].clone()
        if place < n_seen:
            x = torch.cat([x[..., place:, :], x[..., :place, :]], dim=-2)
        else:
            x = x[..., :place, :]
        return x[..., -min(n_seen, window - 1) :, :].clone()

    layer.update(in_order(keys), in_order(values))
    if is_rotating:
        layer.cumulative_length = n_seen


def crop_native(layer: Any, layer_idx: int, n_seen: int, n_left: int) -> None:
    """Go back from ``n_seen`` tokens to ``n_left``.

    Raises:
        InputError: If the layer has not kept the rows, or the state, that it had then.
    """
    n_removed, records = n_seen - n_left, getattr(layer, "record_past", False)
    if not n_removed and not records:
        return
    if not n_left:
        layer.reset()
        return
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        has_kept = records and layer.is_croppable
    elif isinstance(layer, DynamicSlidingWindowLayer):
        n_rows = 0 if layer.keys is None else layer.keys.shape[-2]
        has_kept = n_rows - n_removed >= min(n_left, layer.sliding_window - 1)
    else:
        has_kept = True
    if not has_kept:
        raise InputError(
            f"crop(-{n_removed}): {type(layer).__name__} of layer {layer_idx} has not kept what it "
            "had before these tokens: call cache.activate_past_recording() before they come, or "
            "begin with a new cache"
        )
    layer.crop(-n_removed)
