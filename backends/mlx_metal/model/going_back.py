"""To which of its tokens a prompt cache can go back, and how.

Compressed layers and full ones are trimmed to any token. The state of a linear attention and a full
window are not: copies of them are taken on the way, few enough to be worth their memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.memory import dense_bytes
from xkv.backends.mlx_metal.model.native_state import NativeState, is_native, native_copy
from xkv.backends.mlx_metal.model.prefill import flatten, lowrank_cache
from xkv.config import DECODE_TOKENS

mlx_cache = borrowed.module("mlx_lm.models.cache")

MAX_STATES = 8
"""Most copies that a prompt cache keeps."""

SHARE = 0.5
"""Of the full cache's bytes, which they take at most."""

_APART = DECODE_TOKENS + 1
"""Tokens between two copies: fewer would count as the end of the prompt, and are soon computed."""


def has_natives(caches: Sequence[Any]) -> bool:
    """Whether some layers cannot go back by themselves."""
    return any(map(is_native, flatten(caches)))


def cuts(n_tokens: int, boundaries: Sequence[int]) -> list[int]:
    """After which tokens of a prompt its prefill stops for a copy.

    Args:
        n_tokens: Of the prompt.
        boundaries: Where messages begin in it, in order; if none does near the prompt's end, that
            is one.

    Returns:
        The first and the last few; at most :data:`MAX_STATES`, apart from each other and both ends.
    """
    points = [0]
    if not boundaries or boundaries[-1] <= n_tokens - _APART:
        boundaries = [*boundaries, n_tokens]
    for boundary in boundaries:
        point = boundary if boundary == n_tokens else min(boundary, n_tokens - _APART)
        if point - points[-1] >= _APART:
            points.append(point)
    return points[1:2] + points[2:][1 - MAX_STATES :]


def keep_states(caches: Sequence[Any], copies: dict[int, list[dict[str, Any]]]) -> None:
    """Keep copies of the native layers beside the compressed ones, as many as there may be.

    The first, which is mostly the end of the system prompt, is the last to go.

    Args:
        caches: The prompt cache.
        copies: By the tokens seen, :func:`native_copy` of each native layer.
    """
    cache = lowrank_cache(caches)
    if cache is None or not copies:
        return
    found = [NativeState(n_tokens, parts) for n_tokens, parts in copies.items() if parts]
    states = sorted([*cache.beside, *found], key=lambda state: state.n_tokens)
    limit = SHARE * sum(map(dense_bytes, caches))
    while states and (len(states) > MAX_STATES or sum(x.nbytes for x in states) > limit):
        del states[min(1, len(states) - 1)]
    cache.beside = tuple(states)


def keep_state(caches: Sequence[Any]) -> None:
    """Keep the native layers as they are before a prompt goes on, unless a copy is near."""
    natives = list(filter(is_native, flatten(caches)))
    n_tokens = max(getattr(x, "offset", 0) for x in flatten(caches))
    nearest = max((state.n_tokens for state in states_of(caches)), default=0)
    if natives and n_tokens - nearest >= _APART:
        keep_states(caches, {n_tokens: [native_copy(x) for x in natives]})


def reach(caches: Sequence[Any], n_held: int, n_tokens: int) -> int:
    """The longest beginning that a prompt cache can go back to.

    Args:
        caches: The prompt cache.
        n_held: Tokens that it has seen.
        n_tokens: Most tokens of the beginning.

    Returns:
        Tokens of it, 0 for none.
    """
    if n_tokens >= n_held:
        return n_held
    if all(_can_trim(x, n_tokens) for x in flatten(caches)):
        return n_tokens
    return max((x.n_tokens for x in states_of(caches) if x.n_tokens <= n_tokens), default=0)


def go_back(caches: Sequence[Any], n_held: int, n_tokens: int) -> None:
    """Let a prompt cache be as it was after the ``n_tokens`` of :func:`reach`."""
    if n_tokens == n_held:
        return
    layers = list(flatten(caches))
    states = states_of(caches)
    if not all(_can_trim(x, n_tokens) for x in layers):
        state = next(x for x in states if x.n_tokens == n_tokens)
        state.put_back([x for x in layers if is_native(x)])
    for layer in layers:
        # states count no tokens
        layer_tokens = getattr(layer, "offset", n_tokens)
        if layer_tokens > n_tokens:
            layer.trim(layer_tokens - n_tokens)
    cache = lowrank_cache(caches)
    if cache is not None:
        cache.beside = tuple(x for x in states if x.n_tokens <= n_tokens)


def states_of(caches: Sequence[Any]) -> tuple[NativeState, ...]:
    """The copies that a prompt cache keeps."""
    cache = lowrank_cache(caches)
    return () if cache is None else cache.beside


def _can_trim(cache: Any, n_tokens: int) -> bool:
    """Whether a layer's cache can be cut to ``n_tokens`` tokens.

    A chunked one may have dropped tokens of the chunk that it would go back to.
    """
    if isinstance(cache, mlx_cache.ChunkedKVCache):
        return cache.start_position <= n_tokens // cache.chunk_size * cache.chunk_size
    return cache.is_trimmable()
