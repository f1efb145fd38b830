"""One prompt in mlx-lm's own cache, out of which compressed caches are made too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.enabled import Enabled
from xkv.backends.mlx_metal.model.prefill import Progress, equal_chunks, flatten, held_arrays


def prefill_dense(
    model: nn.Module,
    caches: Sequence[Any],
    tokens: Sequence[int],
    step_size: int,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Take a prompt into mlx-lm's own cache, the same chunks that :func:`compressed_copy` takes.

    Args:
        model: Not enabled.
        caches: Its empty prompt cache.
        tokens: Of the prompt, but for its last one.
        step_size: Most tokens at a time.
        on_progress: Called after each chunk.
    """
    for start, end in equal_chunks(len(tokens), step_size):
        model(mx.array([tokens[start:end]]), cache=caches)
        mx.eval(held_arrays(caches))
        mx.clear_cache()
        on_progress(end, len(tokens))


def compressed_copy(enabled: Enabled, dense: Sequence[Any], step_size: int) -> list[Any]:
    """A prompt cache of an enabled model, compressed, from the same prompt's dense one.

    What is not compressed is copied.

    Args:
        enabled: What makes the model's caches.
        dense: As :func:`prefill_dense` filled it.
        step_size: As there.
    """
    caches = enabled.make_cache()
    for full, mine in zip(flatten(dense), flatten(caches), strict=True):
        if isinstance(mine, XKVCache):
            _take(mine, full, step_size)
        else:
            vars(mine).update(tree_map(_copied, vars(full)))
    return caches


def _take(mine: XKVCache, full: Any, step_size: int) -> None:
    mine.layer.reserve(full.offset)
    for start, end in equal_chunks(full.offset, step_size):
        mine.update_and_fetch(full.keys[..., start:end, :], full.values[..., start:end, :])
    mx.eval(mine.layer.arrays())
    if mine.layer.is_last_of_group:
        mine.layer.settle()


def _copied(value: Any) -> Any:
    # a sum is an array of its own: the two caches' memory is told apart
    return value + mx.zeros_like(value) if isinstance(value, mx.array) else value
