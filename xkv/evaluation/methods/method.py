"""What a compression method is to the evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xkv.attention import RopeRun, rope_rows
from xkv.errors import InputError
from xkv.evaluation.prefix import Prefix, PromptLayer

if TYPE_CHECKING:
    from xkv.backend import Array, Backend
    from xkv.layer_cache import LayerCache
    from xkv.lowrank_cache import LowRankCache
    from xkv.rope import Rope, RopeSpec


@dataclass(frozen=True)
class Document:
    """A prefilled document: exact rows of every layer, which all methods start from.

    Args:
        backend: Does the arithmetic.
        keys: One a layer, ``[1, n_kv_heads, L, head_dim]``, rotated, in the KV dtype.
        values: One a layer, ``[1, n_kv_heads, L, value_dim]``.
        queries: One a layer, the last queries ``[1, n_heads, N, head_dim]``, rotated.
        ropes: What rotated each layer's keys.
        call_ends: Where each call of the prefill ended; some ropes rotate each call differently.
        scale: Factor on the scores.
        dtype: In which attention is computed.
        seed: For methods that draw random numbers.
        query_energies: One a layer, :func:`xkv.weighting.head_energy` of all queries.
        make_cache: Makes an empty low-rank cache with a configuration's fields.
    """

    backend: Backend
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    queries: tuple[Array, ...]
    ropes: tuple[Rope | None, ...]
    call_ends: tuple[int, ...]
    scale: float
    dtype: object
    seed: int
    query_energies: tuple[Array | None, ...]
    make_cache: Callable[..., LowRankCache]

    @property
    def n_tokens(self) -> int:
        return self.keys[0].shape[-2]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the exact rows."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's exact rows."""
        return self.dense_bytes // self.n_tokens

    def rope_runs(self, layer: int) -> list[tuple[int, RopeSpec | None]]:
        """Where each run of rows that one spec rotated ends, and the spec."""
        rope = self.ropes[layer]
        runs: list[tuple[int, RopeSpec | None]] = []
        for end in self.call_ends:
            spec = None if rope is None else rope.at(end)
            if runs and runs[-1][1] == spec:
                runs.pop()
            runs.append((end, spec))
        return runs

    def plain_rows(self, name: str, layer: int) -> Array:
        """One layer's "keys", un-rotated, or "values": ``[L, n_kv_heads * dim]`` in float32.

        Raises:
            InputError: If they hold NaN or infinity.
        """
        xp, rows = self.backend.xp, getattr(self, name)[layer]
        rows = xp.astype(rows, self.backend.accumulate_dtype(rows))
        if not bool(xp.all(xp.isfinite(rows))):
            raise InputError(f"the {name} of layer {layer} hold NaN or infinity for this prompt")
        if name == "keys":
            ends = self.rope_runs(layer)
            begins = (0, *(end for end, _ in ends))
            runs = [RopeRun(end - start, x) for start, (end, x) in zip(begins, ends, strict=False)]
            rows = rope_rows(self.backend, rows, 0, tuple(runs), inverse=True)
        return xp.reshape(xp.permute_dims(rows[0], (1, 0, 2)), (self.n_tokens, -1))

    def widen(self, rows: Array) -> Array:
        """Rows in the dtype of the arithmetic."""
        return self.backend.xp.astype(rows, self.dtype)


@dataclass(frozen=True)
class Conversation:
    """A document's cache that goes on growing.

    Args:
        layers: One a model layer.
        bytes_now: Called for (dense bytes of all tokens so far, bytes held for them).
    """

    layers: Sequence[PromptLayer | LayerCache]
    bytes_now: Callable[[], tuple[int, int]]


@dataclass(frozen=True)
class Compressed:
    """A document in a method's hands.

    Args:
        held_bytes: Bytes of all that the method has to hold for it between decode steps.
        start: Begins the answers to a batch of questions: returns fresh layers, one a model layer.
        converse: Begins a conversation, whose messages and replies stay in the cache.
        detail: What was chosen, for people.
    """

    held_bytes: int
    start: Callable[[], Sequence[Prefix]]
    converse: Callable[[], Conversation]
    detail: str = ""


class Method(ABC):
    """A way of holding a document's cache.

    A subclass is a frozen dataclass: its fields are the method's options, its docstring says the
    method and its source.
    """

    name: str
    has_free_size = True
    """Whether it can be asked for a ratio; otherwise it holds what its options say."""
    is_query_aware = False
    """Whether it looks at the question before it compresses, which others do not."""
    is_stepwise = False
    """Whether single tokens attend otherwise than many at once do."""

    @abstractmethod
    def compress(self, document: Document, ratio: float | None) -> Compressed:
        """Compress a document.

        Args:
            document: Its exact rows, which are left as they are.
            ratio: Dense bytes to bytes held, at least; None where :attr:`has_free_size` is false.

        Raises:
            InputError: If the ratio cannot be reached for a document of this length.
        """


def compressed_rows(
    document: Document,
    held_bytes: int,
    keys: Sequence[Array],
    values: Sequence[Array],
    make_prefix: type[Prefix] | Callable[..., Prefix] = Prefix,
    detail: str = "",
) -> Compressed:
    """What a method returns that gives rows back; tokens that come later stay as they are.

    Args:
        document: The document.
        held_bytes: As in :class:`Compressed`.
        keys: One a layer, ``[1, n_kv_heads, S, head_dim]``, in any dtype.
        values: One a layer.
        make_prefix: Called as a :class:`Prefix` is made.
        detail: As in :class:`Compressed`.
    """
    wide = [(document.widen(k), document.widen(v)) for k, v in zip(keys, values, strict=True)]
    document.backend.evaluate(*(x for pair in wide for x in pair))

    def start() -> list[Prefix]:
        return [make_prefix(document.backend, k, v, document.n_tokens) for k, v in wide]

    def converse() -> Conversation:
        layers = start()

        def bytes_now() -> tuple[int, int]:
            added = (layers[0].offset - document.n_tokens) * document.row_bytes
            return document.dense_bytes + added, held_bytes + added

        return Conversation(layers, bytes_now)

    return Compressed(held_bytes, start, converse, detail)
