"""One layer of the transformers cache: of a whole batch, or of each of its padded sequences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from xkv.backends.torch_cuda.model.attention import AttendingLayer, causal_attention
from xkv.cache.layer import FUSED_QUERIES
from xkv.cache.lowrank_cache import LayerCache
from xkv.errors import InputError
from xkv.ops.types import Rope


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """Inside, tensors are made that any later call can write into and copy.

    Those of inference mode cannot be written into outside it, and a graph for gradients would keep
    all that ever went into a buffer.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class Padding:
    """Which rows of a batch are tokens; the others are never stored."""

    def __init__(self) -> None:
        self.is_token: torch.Tensor | None = None
        """Boolean ``[B, rows seen]``; None while no row was padding."""
        self.rows: list[torch.Tensor] | None = None
        """Numbers of each sequence's tokens among the rows at hand; None for all."""
        self._call: torch.Tensor | None = None
        self._before: torch.Tensor | None = None

    def begin(self, call: torch.Tensor, n_before: int) -> None:
        """Take the rows ``[B, L]`` of a call, that come after ``n_before`` rows."""
        if self.is_token is None:
            self.is_token = call.new_ones(call.shape[0], n_before)
        self._call, self._before = call, self.is_token
        self.look_at(0, call.shape[1])

    def look_at(self, start: int, end: int) -> None:
        """From now on only these rows of the call are at hand."""
        if self._call is None or self._before is None:
            return
        rows = self._call[:, start:end]
        self.rows = [row.nonzero()[:, 0] for row in rows] if rows.shape[1] > 1 else None
        self.is_token = torch.cat([self._before, self._call[:, :end]], dim=1)

    def spread(self, like: torch.Tensor, parts: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Rows of each sequence, ``[1, n_kv_heads, tokens, dim]``, at their places in the batch."""
        assert self.is_token is not None
        batch, n_heads, _, dim = like.shape
        spread = like.new_zeros(batch, n_heads, self.is_token.shape[1], dim)
        for row, is_token, part in zip(spread, self.is_token, parts, strict=True):
            if part is not None:
                row[:, is_token] = part[0]
        return spread


class XKVLayer(CacheLayerMixin, AttendingLayer):
    """One layer's cache, of a whole batch or, where rows are padding, of each sequence.

    ``update`` returns the layer itself for the attention function.

    Args:
        parts: :class:`xkv.cache.lowrank_cache.LayerCache`, one for the batch or one a sequence.
        rope: What rotates the keys.
        returns_rows: Give the model dense rows, which it does not hand on to its attention (MLA).
        padding: Of the batch.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        parts: Sequence[Any],
        rope: Rope | None,
        returns_rows: bool = False,
        padding: Padding | None = None,
    ) -> None:
        super().__init__()
        self.parts = list(parts)
        self.rope = rope
        self.returns_rows = returns_rows
        self._padding = padding or Padding()
        self.n_rows = self.parts[0].offset
        """Rows seen, padding included."""
        self._value_dim = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take new rows ``[B, n_kv_heads, L, head_dim]``; returns what the model consumes."""
        self.is_initialized = True
        self.n_rows += key_states.shape[-2]
        self._value_dim = value_states.shape[-1]
        for part, keys, values in self._of_each(key_states, value_states):
            rope = None if self.rope is None else self.rope.at(part.offset + keys.shape[-2])
            with storing():
                part.append(keys, values, rope)
        if not self.returns_rows:
            return self, self
        if self._padding.is_token is None:
            return self.parts[0].dense()
        rows = [part.dense() if part.offset else (None, None) for part in self.parts]
        all_keys, all_values = zip(*rows, strict=True)
        return (
            self._padding.spread(key_states, all_keys),
            self._padding.spread(value_states, all_values),
        )

    def _of_each(self, *arrays: torch.Tensor) -> list[tuple[Any, ...]]:
        """Each part with its rows of some arrays ``[B, heads, L, dim]``; parts without are left."""
        if self._padding.is_token is None:
            return [(self.parts[0], *arrays)]
        found = []
        for i, part in enumerate(self.parts):
            mine = [array[i : i + 1] for array in arrays]
            if self._padding.rows is not None:
                mine = [array[..., self._padding.rows[i], :] for array in mine]
            if mine[0].shape[-2]:
                found.append((part, *mine))
        return found

    def attend(self, queries: torch.Tensor, scale: float) -> torch.Tensor:
        if self._padding.is_token is None:
            return _attend(self.parts[0], queries, scale)
        parts = {id(part): _attend(part, mine, scale) for part, mine in self._of_each(queries)}
        outputs = queries.new_zeros(*queries.shape[:-1], self._value_dim)
        for i, part in enumerate(self.parts):
            if id(part) not in parts:
                continue
            rows = slice(None) if self._padding.rows is None else self._padding.rows[i]
            outputs[i, :, rows] = parts[id(part)][0]
        return outputs

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.n_rows + query_length, 0

    def get_seq_length(self) -> int:
        return self.n_rows

    def get_max_length(self) -> int:
        return -1

    def _refused(self, *args: Any, **kwargs: Any) -> None:
        raise InputError(
            "a layer of a compressed cache shares its rows with others: use the methods of the "
            "whole cache"
        )

    reset = offload = prefetch = reorder_cache = _refused
    batch_repeat_interleave = batch_select_indices = _refused

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` rows."""
        end = self.n_rows
        self.n_rows = max(end + tokens_to_remove, 0)
        is_token = self._padding.is_token
        for i, part in enumerate(self.parts):
            n_tokens = end - self.n_rows
            if is_token is not None:
                n_tokens = int(is_token[i, self.n_rows : end].sum())
            part.trim(n_tokens)


def _attend(part: Any, queries: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the newest tokens over one part."""
    n_queries = queries.shape[-2]
    if isinstance(part, LayerCache) and (n_queries >= FUSED_QUERIES or not part.is_compressed):
        keys, values = part.dense()
        return causal_attention(queries, keys, values, scale)
    with storing():
        return part.attend(queries, scale, None)
