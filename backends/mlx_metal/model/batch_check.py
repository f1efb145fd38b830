"""Whether a model of mlx-lm's takes sequences of unequal lengths in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

_LENGTHS = 64, 9, 2
"""Tokens of the sequences that are tried in a batch."""

_AS_OFTEN = 1, 1, 9
"""How often each is in it: more in all than a model has heads, as a mask for one sequence that all
heads have would seem to fit."""

_AGREE = {mx.float32: 1e-3}
"""Relative error of logits up to which a batch's are those of a sequence alone; 0.1 in 16 bits."""


def why_not_batched(model: Any, make_cache: Callable[[], list[Any]]) -> str | None:
    """Why sequences of unequal lengths cannot be in one call of a model, in a sentence.

    Some models of mlx-lm's make masks, rotate, or count rows as if there were one sequence.
    """
    reason = "sequences of unequal lengths cannot be in one batch of this model"
    alone, last = [], mx.ones((sum(_AS_OFTEN), 1), mx.int32)
    for n_tokens in _LENGTHS:
        alone.append(make_cache())
        model(mx.arange(1, n_tokens)[None], cache=alone[-1])
    try:
        sequences = [x for x, n in zip(alone, _AS_OFTEN, strict=True) for _ in range(n)]
        batch = [layer[0].merge(list(layer)) for layer in zip(*sequences, strict=True)]
        got = model(last, cache=batch)[: len(alone), -1]
        for layer in batch:
            layer.extract(0)
    except (AttributeError, ValueError, TypeError, RuntimeError) as error:
        return f"{reason}: {str(error).strip().splitlines()[0]}"
    want = mx.concatenate([model(last[:1], cache=caches)[:, -1] for caches in alone])
    errors = mx.linalg.norm((got - want).astype(mx.float32), axis=-1)
    allowed = _AGREE.get(want.dtype, 0.1) * mx.linalg.norm(want.astype(mx.float32), axis=-1)
    if (errors > allowed).any().item():
        return f"{reason}: answers are others than those of a sequence alone"
    return None
