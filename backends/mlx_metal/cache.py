"""The low-rank cache as mlx-lm's functions expect a cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.base import create_causal_mask

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.ropes import find_rope
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.grouping import make_groups
from xkv.layer_cache import LayerCache
from xkv.lowrank_cache import LowRankCache
from xkv.rope import Rope


class XKVCache(mlx_cache._BaseCache):
    """One layer's cache, in place of mlx-lm's ``KVCache``.

    ``update_and_fetch`` returns dense keys and values that MLX has not computed yet. Under
    :func:`xkv.backends.mlx_metal.attention_seam` they never are; a model that reaches its attention
    some other way computes them and is still right, only slower.
    """

    def __init__(self, layer: LayerCache, rope: Rope | None) -> None:
        self.layer = layer
        self._rope = rope
        # weak: where the seam is not used, these arrays are computed and must not outlive the step
        self._returned: tuple[weakref.ref, weakref.ref] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take new tokens ``[B, n_kv_heads, L, head_dim]``; returns all tokens' keys and values."""
        rope = None if self._rope is None else self._rope.at(self.offset + keys.shape[-2])
        self.layer.append(keys, values, rope)
        returned = self.layer.dense()
        is_lazy = self.layer.is_compressed
        self._returned = (weakref.ref(returned[0]), weakref.ref(returned[1])) if is_lazy else None
        return returned

    def takes(self, keys: Any, values: Any) -> bool:
        """Whether attention over exactly these arrays is this compressed cache's to compute."""
        if self._returned is None:
            return False
        mine = keys is self._returned[0]() and values is self._returned[1]()
        self._returned = None
        return mine

    def attend(self, queries: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
        """Attention from the compressed form, see :meth:`xkv.layer_cache.LayerCache.attend`."""
        n_queries = queries.shape[-2]
        if isinstance(mask, str):
            mask = create_causal_mask(n_queries, self.offset - n_queries)
        return self.layer.attend(queries, scale, mask)

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return self.layer.offset

    def size(self) -> int:
        return self.layer.offset

    def empty(self) -> bool:
        return self.layer.offset == 0

    def make_mask(self, N: int, **kwargs: Any) -> mx.array | str | None:
        return mlx_cache.create_attention_mask(N, offset=self.offset, **kwargs)

    @property
    def state(self) -> list[mx.array]:
        """The arrays that this layer holds, for evaluation."""
        return self.layer.arrays()

    @state.setter
    def state(self, value: Any) -> None:
        raise InputError("an xKV cache cannot be restored from a file yet; run the prompt again")

    @property
    def nbytes(self) -> int:
        """Bytes held; arrays that a group shares count in its first layer."""
        return self.layer.nbytes

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last ``n`` tokens, compressed ones too; returns how many there were."""
        return self.layer.trim(n)


def make_prompt_cache(
    model: nn.Module,
    config: XKVConfig | None = None,
    *,
    backend: MLXBackend | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """A compressed prompt cache for any model whose layers use mlx-lm's plain ``KVCache``.

    Args:
        model: From ``mlx_lm.load``.
        config: Defaults to a compression of 4.
        backend: Defaults to a new one.
        on_progress: Called with (factorizations done, factorizations in all) after each.

    Returns:
        One cache a layer, for ``prompt_cache=`` of mlx-lm's functions. Compression happens at the
        first call of few tokens after a prompt (``xkv.layer_cache.DECODE_TOKENS``).

    Raises:
        InputError: If a layer's cache or rotary embedding is of another kind, by name.
    """
    config = config or XKVConfig()
    native = mlx_cache.make_prompt_cache(model)
    groups = make_groups(config, len(native))
    grouped = sorted(layer for group in groups for layer in group)
    for layer_idx in grouped:
        if type(native[layer_idx]) is not mlx_cache.KVCache:
            raise InputError(
                f"layer {layer_idx} uses {type(native[layer_idx]).__name__}, and only plain "
                "KVCache layers can be compressed; use --group-size 0 to run with the full cache"
            )
    ropes = {layer_idx: find_rope(model.layers[layer_idx]) for layer_idx in grouped}
    cache = LowRankCache(
        backend or MLXBackend(), config, groups, len(native) - len(grouped), on_progress
    )
    return [
        XKVCache(cache.layers[i], ropes[i]) if i in cache.layers else plain
        for i, plain in enumerate(native)
    ]
