"""The low-rank cache as mlx-lm's functions expect a cache."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_cache
from mlx_lm.models.base import create_causal_mask

from xkv import cache_state
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.seam import AttendingCache
from xkv.config import XKVConfig
from xkv.layer_cache import LayerCache
from xkv.rope import Rope


class XKVCache(mlx_cache._BaseCache, AttendingCache):
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

    def __deepcopy__(self, memo: dict[int, Any]) -> XKVCache:
        return XKVCache(copy.deepcopy(self.layer, memo), self._rope)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take new tokens ``[B, n_kv_heads, L, head_dim]``; returns all tokens' keys and values."""
        rope = None if self._rope is None else self._rope.at(self.offset + keys.shape[-2])
        self.layer.append(keys, values, rope)
        returned = self.layer.dense()
        is_lazy = self.layer.is_compressed
        self._returned = (weakref.ref(returned[0]), weakref.ref(returned[1])) if is_lazy else None
        return returned

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All tokens' keys and values, for layers that look at another layer's."""
        return self.layer.dense()

    def takes(self, keys: Any, values: Any) -> bool:
        if self._returned is None:
            return False
        mine = keys is self._returned[0]() and values is self._returned[1]()
        self._returned = None
        return mine

    def watch(self, queries: mx.array) -> None:
        self.layer.watch(queries)

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

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        return mlx_cache.create_attention_mask(
            N, offset=self.offset, return_array=return_array, window_size=window_size
        )

    @property
    def keys(self) -> mx.array | None:
        """Dense rows, on which a pipelined model hangs its communication (``mx.depends``)."""
        return self.layer.keys.allocated

    @keys.setter
    def keys(self, value: mx.array) -> None:
        self.layer.keys.allocated = value

    @property
    def state(self) -> list[mx.array]:
        """Arrays from which :meth:`from_state` makes the layer's cache again.

        The first tells of the others; a group's latents are in its first layer's state.
        """
        return cache_state.write_layer(self.layer, self._rope)

    @state.setter
    def state(self, value: list[mx.array]) -> None:
        self.__init__(*cache_state.read_layer(value, MLXBackend))  # type: ignore[misc]

    @property
    def meta_state(self) -> str:
        """Part of mlx-lm's contract up to 0.31; everything is in :attr:`state`."""
        return ""

    @classmethod
    def from_state(cls, state: list[mx.array], meta_state: Any = None) -> XKVCache:
        """Make a layer's cache from its state; the first layer of a cache has to come first.

        Raises:
            InputError: If the state is of another version or incomplete.
        """
        cache = cls.__new__(cls)
        cache.state = state
        return cache

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
    """A compressed prompt cache for an mlx-lm model.

    The model's functions see it as they would their own. What :func:`xkv.enable` adds is prefill
    layer by layer and attention from the compressed form; without it (or
    :func:`xkv.backends.mlx_metal.attention_seam`) the cache is right, but slower.

    Args:
        model: From ``mlx_lm.load``.
        config: Defaults to a compression of 4.
        backend: Defaults to a new one.
        on_progress: Called with (factorizations done, factorizations in all) after each.

    Returns:
        One cache a layer, for ``prompt_cache=`` of mlx-lm's functions; layers without a full KV
        cache keep mlx-lm's. Compression happens at the first call of few tokens after a prompt
        (``xkv.layer_cache.DECODE_TOKENS``).

    Raises:
        InputError: If no layer can be compressed, or a rotary embedding is not known, by name.
    """
    from xkv.backends.mlx_metal.enable import plan_cache, planned_caches

    plan = plan_cache(model, config or XKVConfig())
    return planned_caches(model, plan, backend or MLXBackend(), on_progress)
