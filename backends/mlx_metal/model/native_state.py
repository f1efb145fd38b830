"""Copies of mlx-lm's own caches, which cannot be trimmed as ours can."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.cache import XKVCache

mlx_cache = borrowed.module("mlx_lm.models.cache")


def is_native(cache: Any) -> bool:
    """Whether going back needs a copy of a layer's cache: a state, a window, chunks."""
    return not isinstance(cache, XKVCache | mlx_cache.KVCache)


def row_size(native: Any) -> tuple[int, int]:
    """Bytes of a row of a cache that holds some, and most rows; of a state it is one row."""
    rows = getattr(native, "keys", None)
    limit = getattr(native, "max_size", None) or getattr(native, "chunk_size", None)
    if rows is None or limit is None:
        return native.nbytes, 1
    return native.nbytes // rows.shape[2], limit


def native_copy(native: Any) -> dict[str, Any]:
    """What one of mlx-lm's caches holds now, without rows that have left its window."""
    # a prefill hangs its own make_mask on the cache
    held = {name: x for name, x in vars(native).items() if name != "make_mask"}
    if isinstance(native, mlx_cache.RotatingKVCache) and native.keys is not None:
        # a prompt's last chunk is there with the window before it, in the order of the tokens
        extra = native.keys.shape[2] - native.max_size
        if extra > 0:
            for name in ("keys", "values"):
                rows = held[name]
                kept = [rows[..., : native.keep, :], rows[..., native.keep + extra :, :]]
                held[name] = mx.concatenate(kept, axis=2)
            held["_idx"] = native.max_size
    return tree_map(lambda x: mx.contiguous(x) if isinstance(x, mx.array) else x, held)


class NativeState:
    """A prompt cache's native layers after some of its tokens; copies of the cache share it.

    Args:
        n_tokens: Seen by then.
        parts: :func:`native_copy` of each, in the order of the layers.
    """

    def __init__(self, n_tokens: int, parts: Sequence[dict[str, Any]]) -> None:
        self.n_tokens = n_tokens
        self.parts = tuple(parts)
        leaves: Any = tree_flatten(list(parts))
        self.arrays = [x for _, x in leaves if isinstance(x, mx.array)]

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeState:
        return self

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays)

    def put_back(self, natives: Sequence[Any]) -> None:
        """Let the layers' caches be as they were."""
        for native, part in zip(natives, self.parts, strict=True):
            vars(native).clear()
            # arrays of its own: mlx-lm writes into them
            vars(native).update(copy.deepcopy(part))
