"""The low-rank cache as mlx-lm's functions expect a cache."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.batch import XKVBatch, refuse_others
from xkv.backends.mlx_metal.model.copies import copied
from xkv.backends.mlx_metal.model.seam import ATTENTION, AttendingCache
from xkv.cache import state as cache_state
from xkv.cache.layer import FUSED_QUERIES
from xkv.cache.lowrank_cache import LayerCache, LowRankCache
from xkv.ops.types import Rope
from xkv.planning.basis_file import basis_of_cache

mlx_cache = borrowed.module("mlx_lm.models.cache")


class XKVCache(mlx_cache._BaseCache, AttendingCache):  # type: ignore[name-defined]
    """One layer's cache, in place of mlx-lm's ``KVCache``.

    ``update_and_fetch`` returns dense keys and values that MLX has not computed yet. Under
    :func:`xkv.backends.mlx_metal.attention_seam` they never are; a model that reaches its attention
    some other way computes them and is still right, only slower. Where it is known that nothing
    but the layer's own attention looks at them, the new tokens' rows stand for all.

    Args:
        layer: The layer's part of a low-rank cache.
        rope: What rotates its keys.
        is_attended_once: See :class:`xkv.planning.cache_plan.CacheProbe`.
    """

    def __init__(
        self, layer: LayerCache, rope: Rope | None, is_attended_once: bool = False
    ) -> None:
        self.layer = layer
        self._rope = rope
        self.is_attended_once = is_attended_once
        # weak: where the seam is not used, these arrays are computed and must not outlive the step
        self._returned: tuple[weakref.ref, weakref.ref] | None = None
        self.is_latent = False

    def __deepcopy__(self, memo: dict[int, Any]) -> XKVCache:
        return self.on(copy.deepcopy(self.layer.cache, memo))

    def on(self, cache: LowRankCache) -> XKVCache:
        """The same layer of another low-rank cache."""
        layer = LayerCache(cache, self.layer.number, self.layer.index)
        return XKVCache(layer, self._rope, self.is_attended_once)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take new tokens ``[B, n_kv_heads, L, head_dim]``; returns all tokens' keys and values."""
        rope = None if self._rope is None else self._rope.at(self.offset + keys.shape[-2])
        self.layer.append(keys, values, rope)
        is_lazy = self.layer.is_compressed
        stands_for_all = is_lazy and self.is_attended_once and ATTENTION.is_installed
        returned = (keys, values) if stands_for_all else self.layer.dense()
        self._returned = (weakref.ref(returned[0]), weakref.ref(returned[1])) if is_lazy else None
        return returned

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """All tokens' keys and values, for layers that look at another layer's."""
        return self.layer.dense()

    def takes(self, keys: Any, values: Any) -> bool:
        if self._returned is None:
            return False
        first, second = (x() for x in self._returned)
        # of an MLA model the latent is keys and values
        self.is_latent = keys is first is values
        self._returned = None
        return self.is_latent or (keys is first and values is second)

    def attend(
        self,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention from the compressed form: :meth:`xkv.cache.layer.LayerView.attend`."""
        n_queries, is_dense = queries.shape[-2], not self.layer.is_compressed
        if self.is_latent and not is_dense:
            return self.layer.view.attend_latent(queries, scale, mask)
        if self.is_latent or (sinks is not None and (is_dense or n_queries >= FUSED_QUERIES)):
            keys, values = self.layer.dense()
            return mx.fast.scaled_dot_product_attention(
                queries,
                keys,
                keys if self.is_latent else values,
                scale=scale,
                mask=mask,
                sinks=sinks,
            )
        if isinstance(mask, str):
            mask = None
        elif mask is None and n_queries > 1:
            mask = mx.ones((n_queries, self.offset), dtype=mx.bool_)
        return self.layer.attend(queries, scale, mask, sinks=sinks)

    def merge(self, caches: Sequence[XKVCache]) -> XKVBatch:
        """The layer's batch of several sequences: copies, which share what does not change."""
        refuse_others(all(isinstance(cache, XKVCache) for cache in caches))
        return XKVBatch([copied(cache) for cache in caches])

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
        return self.layer.rows.keys.allocated

    @keys.setter
    def keys(self, value: mx.array) -> None:
        rows = self.layer.rows
        self.layer.rows = rows._replace(keys=rows.keys._replace(allocated=value))

    @property
    def state(self) -> list[mx.array]:
        """Arrays from which :meth:`from_state` makes the layer's cache again.

        The first tells of the others; a group's latents are in its first layer's state.
        """
        return cache_state.write_layer(self.layer, self._rope)

    @state.setter
    def state(self, value: list[mx.array]) -> None:
        self.__init__(*cache_state.read_layer(value, MLXBackend, basis_of_cache))  # type: ignore[misc]

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
