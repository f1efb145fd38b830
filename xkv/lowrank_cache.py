"""The low-rank cache of a model: its groups, their plan, and what it holds."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.group_cache import GroupCache
from xkv.layer_cache import LayerCache
from xkv.ranks import CacheShape, Plan, check_ranks, plan_ranks

if TYPE_CHECKING:
    from xkv.backend import Backend


class LowRankCache:
    """The compressed KV cache of one model for one conversation.

    Args:
        backend: Does the arithmetic.
        config: Ranks and what stays dense.
        groups: Layer indices of each group (:func:`xkv.make_groups`).
        n_dense_layers: Layers in no group, for the byte formula.
        on_progress: Called with (factorizations done, factorizations in all).
        shape: What the groups look like; None if all layers are alike, which the first rows show.
    """

    def __init__(
        self,
        backend: Backend,
        config: XKVConfig,
        groups: Sequence[Sequence[int]],
        n_dense_layers: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
        shape: CacheShape | None = None,
    ) -> None:
        self.backend = backend
        self.config = config
        self.n_dense_layers = n_dense_layers
        has_dense = [False] * len(groups)
        if shape is not None:
            has_dense = [group.has_dense_values for group in shape.groups]
        self.groups = [
            GroupCache(self, len(group), dense)
            for group, dense in zip(groups, has_dense, strict=True)
        ]
        self.layers = {
            layer_idx: layer
            for group, indices in zip(self.groups, groups, strict=True)
            for layer_idx, layer in zip(indices, group.layers, strict=True)
        }
        self.indices = tuple(tuple(group) for group in groups)
        """Layer indices of each group."""
        self.uid = uuid.uuid4().hex
        """Names the cache whose layers a file keeps apart."""
        self.fingerprint: str | None = None
        """Names the model that made the rows, where it is known."""
        self.on_progress = on_progress
        self.is_streaming = False
        """Whether a prompt is compressed while it streams in, so that parts of it are approximate
        for the rest; otherwise only when it is complete.
        """
        self.notice: str | None = None
        """What was not done as asked, in a sentence."""
        self.ranks: Plan | None = None
        """The plan of the first compression."""
        self.unspent = 0
        """Bytes that the groups so far left of theirs, for the next one."""
        self.factorize_seconds = 0.0
        self._shape = shape
        self._n_factored = 0

    @property
    def shape(self) -> CacheShape:
        """What the byte formula needs to know."""
        if self._shape is None:
            raise InputError("the cache is empty: run the prompt through the model first")
        return self._shape

    def observe(self, layer: LayerCache) -> None:
        """Take the shape of a model whose layers are all alike from a layer that holds rows."""
        if self._shape is None:
            keys, values = layer.keys.rows, layer.values.rows
            self._shape = CacheShape.uniform(
                [len(group.layers) for group in self.groups],
                keys.shape[1],
                keys.shape[-1],
                values.shape[-1],
                keys.itemsize,
                self.n_dense_layers,
            )
        check_ranks(self._shape, self.config)

    def plan(self, n_tokens: int, min_share: float = 0.0) -> Plan | None:
        """How large factors may be at ``n_tokens``, None (and a notice) where nothing is gained."""
        plan = plan_ranks(self.shape, self.config, n_tokens, min_share)
        if isinstance(plan, str):
            self.notice = plan
            return None
        self.notice, self.ranks = None, plan
        if self.config.attention == "selective" and not self.config.layout(n_tokens).is_selective:
            self.notice = (
                f"attention is dense, which is exact over the factors: budget={self.config.budget} "
                f"covers all that is compressed of {n_tokens} tokens"
            )
        return plan

    def fresh_bytes(self, group: GroupCache, n_rows: int) -> int:
        """Bytes of a group's factors if the tokens held were compressed afresh."""
        plan = plan_ranks(self.shape, self.config, group.layers[0].offset)
        if isinstance(plan, str):
            return 0
        return plan.factor_bytes(self.shape, self.config, group.index, n_rows)

    def report_progress(self) -> None:
        self._n_factored += 1
        if self.on_progress is not None:
            n_factors = sum(1 if group.has_dense_values else 2 for group in self.groups)
            self.on_progress(self._n_factored, n_factors)

    def dense_bytes(self) -> int:
        """Bytes of the grouped layers' tokens in the full cache."""
        return sum(layer.dense_bytes for layer in self.layers.values())

    def held_bytes(self) -> int:
        """Bytes of every array that the grouped layers hold, shared latents once."""
        return sum(layer.nbytes for layer in self.layers.values())
