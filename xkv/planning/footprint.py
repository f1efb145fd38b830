"""What a model needs in memory, by kind of KV cache, as formulas of the number of tokens n.

The peak while a prompt of n tokens is prefilled in steps of at most ``STEP_TOKENS`` is the weights,
the cache and what lives beside them:

* every cache: the outputs of all linear layers of the widest decoder layer for one step;
* mlx-lm's caches: the largest layer's rows once more, as they grow by copying; quantized ones also
  the scores of one step, ``n_heads * step * n`` elements, as their attention is not fused;
* xKV, layer by layer: the hidden states of the whole prompt and one group, which is first dense
  and then stored chunk by chunk (:meth:`CompressedCache.peak_bytes`). Where a model cannot go layer
  by layer, the prompt streams in: all layers' rows are dense up to the first compression, and later
  steps rebuild one layer's rows.

Attention over 16-bit rows counts as fused, as Metal's is for heads of 64, 80 and 128.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from xkv.config import XKVConfig, buffer_rows
from xkv.store.ranks import WAIT_SHARE, Plan, plan_ranks
from xkv.store.shapes import CacheShape, GroupShape
from xkv.store.store import CHUNK_ROWS

STEP_TOKENS = 2048
"""mlx-lm's default of ``--prefill-step-size``."""
SEARCH_LIMIT = 1 << 24
"""Longest context looked for where the config names none."""
ROW_COPIES = 5
"""float32 arrays as large as a chunk of a group's rows, while it is projected (measured)."""
BASIS_COPIES = 4
"""float32 matrices of the joint width while columns of the model's basis are made (measured)."""
GRAM_COPIES = 9
"""float32 matrices of the joint width while a prompt's own basis is found (measured)."""


def storing_bytes(n_tokens: int, group: GroupShape, has_own_basis: bool) -> int:
    """Workspace while a group's keys, and then its values, go into the store chunk by chunk.

    Args:
        n_tokens: Of the prompt.
        group: The group.
        has_own_basis: Whether the prompt's own basis is found first.
    """
    width = max(group.key_width, group.value_width)
    n_matrices = GRAM_COPIES if has_own_basis else BASIS_COPIES
    return 4 * width * (ROW_COPIES * min(n_tokens, CHUNK_ROWS) + n_matrices * width)


@dataclass(frozen=True)
class CacheBytes:
    """What one of mlx-lm's caches holds.

    Args:
        row_bytes: Bytes of one token.
        max_rows: Most tokens kept (a sliding window's), None for all.
        constant_bytes: Bytes that do not depend on the number of tokens (a recurrent state's).
    """

    row_bytes: int = 0
    max_rows: int | None = None
    constant_bytes: int = 0

    def at(self, n_tokens: int, step: int = 0) -> int:
        """Bytes after ``n_tokens``, or while they come in by steps: a window keeps a step more."""
        max_rows = n_tokens if self.max_rows is None else self.max_rows + max(step - 1, 0)
        return min(n_tokens, max_rows) * self.row_bytes + self.constant_bytes


@dataclass(frozen=True)
class ModelFacts:
    """What a model's config tells about memory.

    Args:
        model_type: mlx-lm's name of the architecture.
        dtype: Of weights that are not quantized, activations and KV cache.
        item_bytes: Bytes of an element of it.
        weight_bytes: Bytes of all parameters.
        hidden_size: Features of a token between layers.
        layer_width: Outputs of all linear layers of the widest decoder layer, for one token.
        n_heads: Query heads.
        max_tokens: Trained context, None if the config names none.
        caches: mlx-lm's caches of the model.
        quantized: The same by bits, or a sentence that says why mlx-lm cannot.
        config: How xKV would compress; the compression is replaced by those asked for.
        shape: The caches that xKV compresses, None if there are none.
        natives: The caches that it leaves to mlx-lm.
        why_not_xkv: Why there is nothing to compress, or None.
        why_not_layerwise: Why prompts stream through all layers, or None.
    """

    model_type: str
    dtype: str
    item_bytes: int
    weight_bytes: int
    hidden_size: int
    layer_width: int
    n_heads: int
    max_tokens: int | None
    caches: tuple[CacheBytes, ...]
    quantized: Mapping[int, tuple[CacheBytes, ...] | str]
    config: XKVConfig
    shape: CacheShape | None = None
    natives: tuple[CacheBytes, ...] = ()
    why_not_xkv: str | None = None
    why_not_layerwise: str | None = None

    def activation_bytes(self, n_tokens: int, step: int) -> int:
        """Bytes of one step's activations in one layer."""
        return min(n_tokens, step) * self.layer_width * self.item_bytes


class NativeCache:
    """mlx-lm's own cache.

    Args:
        facts: The model.
        bits: 4 or 8, None for the full cache.
    """

    def __init__(self, facts: ModelFacts, bits: int | None = None) -> None:
        self.facts, self.bits = facts, bits
        found = facts.caches if bits is None else facts.quantized[bits]
        self.problem = found if isinstance(found, str) else None
        self.caches = () if isinstance(found, str) else found
        self.title = "full" if bits is None else f"{bits} bit"

    def loses(self, n_tokens: int) -> str:
        """What an answer loses, in words."""
        return "nothing: exact" if self.bits is None else "quantization error"

    def flags(self, model: str | None, group_size: int) -> str:
        """The command line that runs this."""
        start = f"mlx_lm.generate --model {model}"
        if model is None:
            start = "python -m xkv.generate --group-size 0"
        return start + (f" --kv-bits {self.bits} --quantized-kv-start 0" if self.bits else "")

    def cache_bytes(self, n_tokens: int) -> int:
        """Bytes held after a prompt of ``n_tokens``."""
        return sum(cache.at(n_tokens) for cache in self.caches)

    def peak_bytes(self, n_tokens: int, step: int = STEP_TOKENS) -> int:
        """Most bytes in use while a prompt is prefilled, weights included."""
        facts = self.facts
        beside = facts.activation_bytes(n_tokens, step)
        beside += max((cache.at(n_tokens, step) for cache in self.caches), default=0)
        beside += self.score_bytes(n_tokens, step)
        return facts.weight_bytes + sum(x.at(n_tokens, step) for x in self.caches) + beside

    def score_bytes(self, n_tokens: int, step: int = STEP_TOKENS) -> int:
        """Bytes of one step's attention scores, which only quantized attention holds."""
        elements = self.facts.n_heads * min(n_tokens, step) * n_tokens
        return elements * self.facts.item_bytes if self.bits and not self.problem else 0


class CompressedCache:
    """xKV's cache.

    Args:
        facts: The model, which has something to compress.
        compression: Target ratio.
    """

    problem = None

    def __init__(self, facts: ModelFacts, compression: float) -> None:
        assert facts.shape is not None
        self.facts, self.shape, self.compression = facts, facts.shape, compression
        self.config = replace(facts.config, compression=compression)
        self.title = f"xKV {compression:g} x"
        self.first = self._first_compressed(1, 0.0)
        """The shortest prompt that is compressed, in tokens."""

    def loses(self, n_tokens: int) -> str:
        """What an answer loses, in words."""
        plan = plan_ranks(self.shape, self.config, n_tokens)
        return plan if isinstance(plan, str) else "low rank"

    def flags(self, model: str | None, group_size: int) -> str:
        """The command line that runs this."""
        parts = ["python -m xkv.generate"] + ([] if model is None else [f"--model {model}"])
        parts.append(f"--compression {self.compression:g}")
        if group_size != XKVConfig.group_size:
            parts.append(f"--group-size {group_size}")
        return " ".join(parts)

    def cache_bytes(self, n_tokens: int) -> int:
        """Bytes held after a prompt of ``n_tokens``."""
        plan = self._plan(n_tokens)
        if plan is None:
            held = self.shape.dense_bytes(n_tokens)
        else:
            held = plan.held_bytes(self.shape, self.config, n_tokens)
        return held + sum(cache.at(n_tokens) for cache in self.facts.natives)

    def peak_bytes(self, n_tokens: int, step: int = STEP_TOKENS) -> int:
        """Most bytes in use while a prompt of up to ``n_tokens`` is prefilled, weights included.

        Beside weights, the model's basis, all that is held in the end and one step's activations,
        the largest of:

        * one group dense with a sixteenth of spare rows, and the hidden states of the prompt before
          the layer, after it, and as chunks: ``3 * n * hidden_size`` elements;
        * two of these, the group dense, and a chunk of its keys or values on the way into the
          store: :func:`storing_bytes`.

        Prompts too short to compress are dense in all groups: the peak of the longest of them
        counts for longer ones too, so that it does not fall with ``n_tokens`` but for the rounding
        of ranks.
        """
        corners = (self.first - 1, n_tokens)
        return max(self._peak_at(n, step) for n in corners if n <= n_tokens)

    @property
    def basis_bytes(self) -> int:
        """Most that the model's own basis takes, once for all prompts; 0 for one of each prompt's.

        A plan holds the columns that it stores rows in, and no more.
        """
        if not self.config.wants_model_basis:
            return 0
        widths = [x for group in self.shape.groups for x in (group.key_width, group.value_width)]
        return sum(width * width for width in widths) * self.shape.item_bytes

    def _peak_at(self, n_tokens: int, step: int) -> int:
        """The peak of prompts of just this length."""
        facts, plan = self.facts, self._plan(n_tokens)
        fixed = facts.weight_bytes + facts.activation_bytes(n_tokens, step)
        hidden = n_tokens * facts.hidden_size * facts.item_bytes
        natives = sum(cache.at(n_tokens, step) for cache in facts.natives)
        if plan is None:
            return fixed + natives + 3 * hidden + self._dense(self.shape.groups, n_tokens)
        held = plan.held_bytes(self.shape, self.config, n_tokens) + self.basis_bytes
        if facts.why_not_layerwise is not None:
            return fixed + natives + self._streaming(held, n_tokens, step)
        beside = 0
        for group in self.shape.groups:
            storing = self._storing(group, n_tokens)
            beside = max(beside, 3 * hidden + self._dense([group], n_tokens), 2 * hidden + storing)
        return fixed + natives + held + beside

    def _streaming(self, held: int, n_tokens: int, step: int) -> int:
        """Rows and workspace of a prompt that streams in, compressed as it comes."""
        first = min(n_tokens, self._first_compressed(step, WAIT_SHARE))
        work = 0
        for group in self.shape.groups:
            freed = self._dense([group], first)
            work = max(work, self._storing(group, first) - freed)
        tail = min(n_tokens, step + self.config.window_at(n_tokens) + self.config.max_tail)
        # a later step attends to a layer's rows rebuilt: as products, rotated, and joined
        rebuilt = 3 * max(group.row_elements for group in self.shape.groups) * n_tokens
        later = held + self._dense(self.shape.groups, tail) + rebuilt * self.shape.item_bytes
        return max(self._dense(self.shape.groups, first) + work, later)

    def _dense(self, groups: Sequence[GroupShape], n_tokens: int) -> int:
        """Bytes of groups that are not compressed yet, spare rows included."""
        elements = sum(group.n_layers * group.row_elements for group in groups)
        return buffer_rows(n_tokens) * elements * self.shape.item_bytes

    def _storing(self, group: GroupShape, n_tokens: int) -> int:
        """Bytes of one group's rows and workspace while its keys, then its values, are stored."""
        # the dense rows stay until both are stored, so that a failure leaves the cache as it was
        dense = self._dense([group], n_tokens)
        return dense + storing_bytes(n_tokens, group, not self.config.wants_model_basis)

    def _plan(self, n_tokens: int) -> Plan | None:
        """The ranks of a prompt, None where it stays dense."""
        plan = plan_ranks(self.shape, self.config, n_tokens)
        return None if isinstance(plan, str) else plan

    def _first_compressed(self, step: int, min_share: float) -> int:
        """The fewest tokens, a multiple of ``step``, that are compressed."""

        def is_compressed(n_steps: int) -> bool:
            plan = plan_ranks(self.shape, self.config, n_steps * step, min_share)
            return not isinstance(plan, str)

        return step * bisect.bisect_left(range(SEARCH_LIMIT // step), True, key=is_compressed)


Cache = NativeCache | CompressedCache


def longest_context(cache: Cache, memory_bytes: int) -> int:
    """Most tokens, up to the trained context, whose prefill stays within ``memory_bytes``.

    Rounded down to a multiple of 256, unless it is the trained context or below 256.
    """
    limit = cache.facts.max_tokens or SEARCH_LIMIT
    found = bisect.bisect_right(range(limit + 1), memory_bytes, key=cache.peak_bytes) - 1
    return found if found == limit else max(found, 0) // 256 * 256 or max(found, 0)
