"""The low-rank cache of a model: its groups, their plan, and the one place where they change."""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from xkv.cache import settling
from xkv.cache.group import GroupCache, GroupState
from xkv.cache.layer import LayerView
from xkv.cache.rows import LayerRows
from xkv.config import DECODE_TOKENS, XKVConfig
from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.types import Array, RopeSpec
from xkv.store.model_basis import ModelBasis
from xkv.store.ranks import Plan, check_ranks
from xkv.store.shapes import CacheShape

Snapshot = tuple[tuple[GroupState, ...], dict[str, Any]]
"""What :meth:`LowRankCache.restore` goes back to."""

_KEPT = ("notice", "ranks", "unspent", "is_streaming", "known_shape", "beside", "_n_factored")
"""What a cache notes beside its groups' states."""


class LowRankCache:
    """The compressed KV cache of one model for one conversation.

    Args:
        backend: Does the arithmetic.
        config: Ranks and what stays dense.
        groups: Layer indices of each group (:func:`xkv.make_groups`).
        n_dense_layers: Layers in no group, for the byte formula.
        on_progress: Called with (factorizations done, factorizations in all).
        shape: What the groups look like; None if all layers are alike, which the first rows show.
        basis: The model's own, of the same groups; None factors each prompt.
    """

    def __init__(
        self,
        backend: Backend,
        config: XKVConfig,
        groups: Sequence[Sequence[int]],
        n_dense_layers: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
        shape: CacheShape | None = None,
        basis: ModelBasis | None = None,
    ) -> None:
        self.basis = basis if config.wants_model_basis else None
        self.backend = backend
        self.config = config
        self.n_dense_layers = n_dense_layers
        has_dense = [False] * len(groups)
        if shape is not None:
            has_dense = [group.has_dense_values for group in shape.groups]
        self.groups = [
            GroupCache(len(group), dense) for group, dense in zip(groups, has_dense, strict=True)
        ]
        self.indices = tuple(tuple(group) for group in groups)
        """Layer indices of each group."""
        self.uid = uuid.uuid4().hex
        """Names the cache whose layers a file keeps apart."""
        self.fingerprint: str | None = None
        """Names the model that made the rows."""
        self.on_progress = on_progress
        self.is_streaming = False
        """Whether a prompt is compressed while it streams in: later parts see approximate rows."""
        self.notice: str | None = None
        """What was not done as asked, in a sentence."""
        self.ranks: Plan | None = None
        """The plan of the first compression."""
        self.unspent = 0
        """Bytes that the groups so far left of theirs, for the next one."""
        self.factorize_seconds = 0.0
        self.known_shape = shape
        """None until the first rows have come."""
        self.beside: tuple[Any, ...] = ()
        """What a framework keeps of its own layers, to go back to."""
        self._n_factored = 0
        self._first = min(map(min, self.indices))
        """The layer that a model calls first."""

    @property
    def layers(self) -> dict[int, LayerCache]:
        """Handles of the layers, in the order of the groups."""
        return {
            layer_idx: LayerCache(self, number, index)
            for number, indices in enumerate(self.indices)
            for index, layer_idx in enumerate(indices)
        }

    @property
    def shape(self) -> CacheShape:
        """What the byte formula needs to know."""
        if self.known_shape is None:
            raise InputError("the cache is empty: run the prompt through the model first")
        return self.known_shape

    def snapshot(self) -> Snapshot:
        """The state as it is now; it costs no memory but for what is replaced from then on."""
        kept = {name: vars(self)[name] for name in _KEPT}
        return tuple(group.state for group in self.groups), kept

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache."""
        states, kept = snapshot
        vars(self).update(kept)
        for group, state in zip(self.groups, states, strict=True):
            group.state = state

    def append(
        self, number: int, index: int, keys: Array, values: Array, rope: RopeSpec | None
    ) -> None:
        """Take new tokens of one layer; the first few after a prompt compress all groups before.

        Args:
            number: Of the group.
            index: Of the layer in it.
            keys: ``[B, n_kv_heads, L, head_dim]``, rotated.
            values: ``[B, n_kv_heads, L, value_dim]``.
            rope: What rotated the keys, None for no rotary embedding.

        Raises:
            InputError: If the rows are not like those that the cache holds, or a rank is too large.
        """
        is_first = self.indices[number][index] == self._first
        if is_first and (keys.shape[-2] <= DECODE_TOKENS or self.is_streaming):
            self.settle()
        group = self.groups[number]
        rows = group.layers[index]
        if rows.keys.allocated is None:
            self._observe(keys, values)
        added = rows.appended(self.backend, keys, values, rope)
        group.state = group.state.with_layer(index, added)

    def _observe(self, keys: Array, values: Array) -> None:
        """Take the shape of a model whose layers are all alike from the first rows."""
        shape = self.known_shape or CacheShape.uniform(
            [len(group.layers) for group in self.groups],
            keys.shape[1],
            keys.shape[-1],
            values.shape[-1],
            keys.itemsize,
            self.n_dense_layers,
        )
        check_ranks(shape, self.config)
        self.known_shape = shape

    def tokens_until_due(self, n_tokens: int) -> int:
        """After which of a call's tokens, one by one, rows would be stored; else all of them."""
        states = (group.state for group in self.groups)
        return min(settling.tokens_until_due(self.config, x, n_tokens) for x in states)

    def settle(self) -> None:
        """Between calls of the model, store what has grown too long to stay dense."""
        for number in range(len(self.groups)):
            self.settle_group(number)

    def settle_group(self, number: int) -> None:
        """:meth:`settle` for one group; nothing changes where it fails."""
        group = self.groups[number]
        if not group.state.is_in_step:
            return
        began = time.perf_counter()
        if group.is_compressed:
            group.state, notice = settling.continued(self.backend, self.config, group.state)
            self.notice = notice or self.notice
        else:
            about = self.backend, self.config, self.shape, self.basis, number, group.state
            settled = settling.compressed(
                *about, self.unspent, self.is_streaming, self._report_progress
            )
            if settled is not None:
                group.state, plan, self.unspent, self.notice = settled
                self.ranks = plan or self.ranks
        self.factorize_seconds += time.perf_counter() - began

    def _report_progress(self) -> None:
        self._n_factored += 1
        if self.on_progress is not None:
            n_factors = sum(1 if group.has_dense_values else 2 for group in self.groups)
            self.on_progress(self._n_factored, n_factors)

    def dense_bytes(self) -> int:
        """Bytes of the grouped layers' tokens in the full cache."""
        return sum(layer.dense_bytes for layer in self.layers.values())

    def arrays(self) -> list[Array]:
        """Every array that the grouped layers hold."""
        held = [x for group in self.groups for x in group.state.arrays]
        return held + [x for layer in self.layers.values() for x in layer.arrays()]

    def held_bytes(self) -> int:
        """Bytes of every array that the grouped layers hold, shared latents once."""
        return sum(x.nbytes for x in self.arrays())


class LayerCache:
    """A handle on one layer of a cache, as a model's cache classes hold it.

    It points down at the cache; nothing in the cache points at it.

    Args:
        number: Of the group in the cache.
        index: Of the layer in the group.
    """

    def __init__(self, cache: LowRankCache, number: int, index: int) -> None:
        self.cache, self.number, self.index = cache, number, index

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerCache:
        return LayerCache(copy.deepcopy(self.cache, memo), self.number, self.index)

    @property
    def group(self) -> GroupCache:
        return self.cache.groups[self.number]

    @property
    def rows(self) -> LayerRows:
        """What the layer holds by itself."""
        return self.group.state.layers[self.index]

    @rows.setter
    def rows(self, rows: LayerRows) -> None:
        group = self.group
        group.state = group.state.with_layer(self.index, rows)

    @property
    def view(self) -> LayerView:
        """The layer, to read."""
        return self.group.state.view(self.cache.backend, self.index)

    @property
    def is_last_of_group(self) -> bool:
        return self.index == len(self.group.layers) - 1

    @property
    def offset(self) -> int:
        """Tokens seen."""
        return self.rows.offset

    @property
    def is_compressed(self) -> bool:
        return self.rows.is_compressed

    def append(self, keys: Array, values: Array, rope: RopeSpec | None) -> None:
        """:meth:`LowRankCache.append`"""
        self.cache.append(self.number, self.index, keys, values, rope)

    def settle(self) -> None:
        """:meth:`LowRankCache.settle_group` for the layer's group."""
        self.cache.settle_group(self.number)

    def count_step(self, rope: RopeSpec | None) -> None:
        """Count one row that a step of constant shapes wrote behind the others."""
        self.rows = self.rows.without_last(-1).rotated(1, rope)

    def reserve(self, n_tokens: int) -> None:
        """Make room for ``n_tokens`` more, so that a long prompt does not grow in steps."""
        self.rows = self.rows.reserving(n_tokens)

    def trim(self, n_tokens: int) -> int:
        """Forget the last ``n_tokens`` tokens, or all; returns how many there were."""
        n_tokens = min(n_tokens, self.offset)
        self.rows = self.view.trimmed(n_tokens, self.group.has_dense_values)
        return n_tokens

    def dense(self) -> tuple[Array, Array]:
        """:meth:`xkv.cache.layer.LayerView.dense`"""
        return self.view.dense()

    def attend(self, queries: Array, scale: float, mask: Array | None, **more: Any) -> Array:
        """:meth:`xkv.cache.layer.LayerView.attend`"""
        return self.view.attend(queries, scale, mask, self.cache.config, **more)

    def arrays(self) -> list[Array]:
        """The arrays this layer holds, without the latents that its group shares."""
        return self.group.state.layer_arrays(self.index)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the same tokens in the full cache."""
        return self.offset * self.rows.row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes held; the group's latents count in its first layer."""
        shared = self.group.arrays() if self.index == 0 else []
        return sum(x.nbytes for x in (*self.arrays(), *shared))
