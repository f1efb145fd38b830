"""What a compression method is to the evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xkv.cache.lowrank_cache import LayerCache
from xkv.evaluation.prefix import Prefix
from xkv.ops.types import Array
from xkv.planning.document import Document, PromptLayer


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

    def layers(self, one_by_one: bool) -> Sequence[PromptLayer | LayerCache]:
        """What a text goes on over; where tokens come one by one, the cache of a reply."""
        return self.converse().layers if one_by_one else self.start()


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
