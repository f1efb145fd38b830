"""Several conversations in one batch of mlx-lm's, each with its own compressed rows."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.copies import copied
from xkv.backends.mlx_metal.model.seam import ATTENTION, AttendingCache
from xkv.cache.layer import alike, attend_together
from xkv.errors import InputError

mlx_cache = borrowed.module("mlx_lm.models.cache")


_MASKS: weakref.WeakValueDictionary[int, mx.array] = weakref.WeakValueDictionary()
"""Those that hide nothing but padding; models make one for all their layers."""


class _Call(NamedTuple):
    """One call of a layer, of as many tokens for each sequence."""

    n_tokens: int
    own: tuple[slice, ...]
    """Which of them are a sequence's own; the others are padding."""
    left: tuple[int, ...]
    """Columns of padding before each sequence's rows, where all end together."""
    n_rows: tuple[int, ...]
    """Each sequence's rows, these among them."""


class XKVBatch(mlx_cache._BaseCache, AttendingCache):  # type: ignore[name-defined]
    """One layer's caches of several sequences, in place of mlx-lm's ``BatchKVCache``.

    Sequences keep their own rows, latents and plans: nothing of one is as long as another's, and
    those that join or leave copy nothing of those that stay. What attention reads is each one's own
    too; everything else of a model runs once for all.

    Args:
        members: One :class:`xkv.backends.mlx_metal.model.cache.XKVCache` a sequence.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self.members = list(members)
        self._lead = [0] * len(self.members)
        """Tokens of padding that still come first."""
        self._expected: list[int] | None = None
        """Tokens that still come before padding does, None for no end."""
        self._call: _Call | None = None
        self._returned: tuple[weakref.ref, weakref.ref] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> XKVBatch:
        return XKVBatch(copy.deepcopy(self.members, memo))

    def _next_call(self, n_tokens: int) -> _Call:
        lengths = [member.offset for member in self.members]
        longest, own, left, n_rows = max(lengths), [], [], []
        for number, length in enumerate(lengths):
            lead = min(self._lead[number], n_tokens)
            end = n_tokens
            if self._expected is not None:
                end = min(end, lead + self._expected[number])
            own.append(slice(lead, end))
            left.append(longest - length + lead)
            n_rows.append(length + end - lead)
        return _Call(n_tokens, tuple(own), tuple(left), tuple(n_rows))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take each sequence's new tokens ``[B, n_kv_heads, L, head_dim]``.

        Returns:
            All tokens' keys and values, the last ones side by side, as attention takes them; or,
            where only this batch looks at them, the new ones.
        """
        n_tokens = keys.shape[-2]
        call = self._call = self._next_call(n_tokens)
        found: list[list[mx.array]] = [[], []]
        for number, (member, own) in enumerate(zip(self.members, call.own, strict=True)):
            if own.start < own.stop:
                rows = (x[number : number + 1, :, own] for x in (keys, values))
                fetched: Any = member.update_and_fetch(*rows)
            else:
                fetched = [x[number : number + 1, :, :0] for x in (keys, values)]
                if member.offset:
                    fetched = member.keys_and_values()
            for parts, rows in zip(found, fetched, strict=True):
                parts.append(rows)
        self._count(n_tokens, call)
        if ATTENTION.is_installed and all(x.is_attended_once for x in self.members):
            returned = keys, values
        else:
            returned = _side_by_side(found[0], call), _side_by_side(found[1], call)
        self._returned = (weakref.ref(returned[0]), weakref.ref(returned[1]))
        return returned

    def _count(self, n_tokens: int, call: _Call) -> None:
        self._lead = [max(lead - n_tokens, 0) for lead in self._lead]
        if self._expected is not None:
            taken = (own.stop - own.start for own in call.own)
            self._expected = [n - done for n, done in zip(self._expected, taken, strict=True)]

    def keys_and_values(self) -> tuple[mx.array, ...]:
        """All tokens' keys and values, for layers that look at another layer's."""
        assert self._call is not None
        pairs = zip(*(member.keys_and_values() for member in self.members), strict=True)
        return tuple(_side_by_side(parts, self._call) for parts in pairs)

    def takes(self, keys: Any, values: Any) -> bool:
        if self._returned is None:
            return False
        first, second = (x() for x in self._returned)
        self._returned = None
        is_latent = keys is first is values
        for member in self.members:
            member.is_latent = is_latent
        return is_latent or (keys is first and values is second)

    def attend(
        self,
        queries: mx.array,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention of each sequence's newest tokens over its own rows."""
        is_mine = isinstance(mask, mx.array) and _MASKS.get(id(mask)) is mask
        given = None if is_mine or isinstance(mask, str) else mask
        members, outputs = self.members, [queries] * len(self.members)
        views = [x.layer.view for x in members]
        configs = [x.layer.cache.config for x in members]
        is_alone = queries.shape[-2] > 1 or given is not None or not self._are_attending
        alone = [[number] for number in range(len(members))]
        for numbers in alone if is_alone else alike(views, configs):
            if len(numbers) == 1:
                outputs[numbers[0]] = self._attend_one(numbers[0], queries, scale, given, sinks)
                continue
            is_all = len(numbers) == len(members)
            theirs = queries if is_all else queries[mx.array(numbers)]
            together, config = [views[x] for x in numbers], configs[numbers[0]]
            found = attend_together(together, theirs, scale, config, sinks)
            if is_all:
                return found
            for i, number in enumerate(numbers):
                outputs[number] = found[i : i + 1]
        return mx.concatenate(outputs, axis=0)

    @property
    def _are_attending(self) -> bool:
        """Whether the last call had a token of each, of keys and values."""
        assert self._call is not None
        have_tokens = all(own.start < own.stop for own in self._call.own)
        return have_tokens and not any(member.is_latent for member in self.members)

    def _attend_one(
        self,
        number: int,
        queries: mx.array,
        scale: float,
        mask: mx.array | None,
        sinks: mx.array | None,
    ) -> mx.array:
        assert self._call is not None
        own, left = self._call.own[number], self._call.left[number]
        if own.start == own.stop:
            return mx.zeros_like(queries[number : number + 1])
        given: Any = "causal"
        if mask is not None:
            every = mask[(None,) * (4 - mask.ndim)]
            every = mx.broadcast_to(every, (len(self.members), *every.shape[1:]))
            end = left + self._call.n_rows[number]
            given = every[number : number + 1, :, own, left:end]
        mine = queries[number : number + 1, :, own]
        output = self.members[number].attend(mine, scale, given, sinks)
        around = [(0, 0), (0, 0), (own.start, queries.shape[-2] - own.stop), (0, 0)]
        return mx.pad(output, around) if any(around[2]) else output

    @property
    def offset(self) -> mx.array:
        """Position of each sequence's next token ``[B]``; padding before it counts down to it."""
        pairs = zip(self.members, self._lead, strict=True)
        return _numbers(tuple(member.offset - lead for member, lead in pairs))

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """``[B, 1, N, longest + N]``, but for sequences of one length that need none."""
        call = self._next_call(N)
        longest = max(member.offset for member in self.members)
        if not any(call.left):
            return mlx_cache.create_attention_mask(
                N, offset=longest, return_array=return_array, window_size=window_size
            )
        mask = mlx_cache.create_causal_mask(
            N, offset=longest, left_padding=mx.array(call.left), window_size=window_size
        )
        if window_size is None:
            _MASKS[id(mask)] = mask
        return mask

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Say which of the tokens that come next are padding."""
        if left_padding is not None:
            if not self.empty():
                raise InputError("a batch that holds tokens cannot be padded on the left")
            self._lead = [a + b for a, b in zip(self._lead, left_padding, strict=True)]
        if lengths is not None and right_padding is not None:
            self._expected = list(lengths)

    def finalize(self) -> None:
        """No more padding comes; none was kept."""
        self._expected = None

    def filter(self, batch_indices: Any) -> None:
        """Keep these sequences, in this order."""
        is_array = isinstance(batch_indices, mx.array)
        kept: list[int] = batch_indices.tolist() if is_array else batch_indices
        self.members = [self.members[number] for number in kept]
        self._lead = [self._lead[number] for number in kept]
        if self._expected is not None:
            self._expected = [self._expected[number] for number in kept]

    def extend(self, other: XKVBatch) -> None:
        """Take another batch's sequences behind these."""
        refuse_others(isinstance(other, XKVBatch))
        self.members += other.members
        self._lead += other._lead

    def extract(self, idx: int) -> Any:
        """A copy of one sequence's cache."""
        return copied(self.members[idx])

    @property
    def keys(self) -> mx.array | None:
        """Of the first sequence, for models that hang on them what is to be computed with them."""
        return self.members[0].keys

    @keys.setter
    def keys(self, value: mx.array) -> None:
        self.members[0].keys = value

    @property
    def state(self) -> list[mx.array]:
        """Every array of the layer, to be evaluated."""
        return [x for member in self.members for x in member.layer.arrays()]

    @property
    def nbytes(self) -> int:
        """Bytes held; arrays that sequences share count in each."""
        return sum(member.nbytes for member in self.members)

    def size(self) -> int:
        """Tokens of the longest sequence."""
        return max(member.offset for member in self.members)

    def empty(self) -> bool:
        return self.size() == 0

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget each sequence's last ``n`` tokens."""
        return max(member.trim(n) for member in self.members)


@functools.lru_cache(maxsize=8)
def _numbers(numbers: tuple[int, ...]) -> mx.array:
    """An array that all layers of a step ask for."""
    return mx.array(numbers)


def refuse_others(are_all_ours: bool) -> None:
    """Raise if caches that are to be one batch are not all compressed."""
    if not are_all_ours:
        raise InputError(
            "compressed and uncompressed prompt caches cannot be in one batch: make all with the "
            "enabled model"
        )


def _side_by_side(parts: Sequence[mx.array], call: _Call) -> mx.array:
    """Sequences' rows ``[1, n_kv_heads, L, dim]`` as a batch's, all of which end together."""
    padded = []
    for rows, left, own in zip(parts, call.left, call.own, strict=True):
        padded.append(mx.pad(rows, [(0, 0), (0, 0), (left, call.n_tokens - own.stop), (0, 0)]))
    return mx.concatenate(padded, axis=0)
