"""What methods that keep some rows and drop the others have in common."""

from __future__ import annotations

from collections.abc import Sequence

from xkv.errors import InputError
from xkv.evaluation.methods.method import Compressed, compressed_rows
from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.planning.document import Document


def rows_to_keep(document: Document, ratio: float | None, needed: int, what: str) -> int:
    """Rows of each KV head that a ratio leaves.

    Args:
        document: Whose rows are dropped.
        ratio: Dense bytes to bytes held.
        needed: Rows that are kept in any case; there have to be more.
        what: Names them.

    Raises:
        InputError: If there is no ratio, or it leaves too few rows.
    """
    if ratio is None:
        raise InputError("a method that drops rows needs a ratio")
    n_kept = min(int(document.n_tokens / ratio), document.n_tokens)
    if n_kept <= needed:
        raise InputError(
            f"a ratio of {ratio:g} leaves {n_kept} of {document.n_tokens} tokens, not more than "
            f"{what}: ask for a lower ratio or longer documents"
        )
    return n_kept


def keep_rows(document: Document, rows: Sequence[Array]) -> Compressed:
    """Keep rows at their positions: numbers ``[1, 1 or n_kv_heads, S]``, one array a layer."""
    xp = document.backend.xp
    keys, values = (
        [
            xp.take_along_axis(x, chosen[..., None], axis=-2)
            for x, chosen in zip(exact, rows, strict=True)
        ]
        for exact in (document.keys, document.values)
    )
    held = sum(x.nbytes for x in (*keys, *values))
    detail = f"{rows[0].shape[-1]} rows of each head"
    return compressed_rows(document, held, keys, values, detail=detail)


def is_largest(backend: Backend, scores: Array, count: int) -> Array:
    """Which of the last axis are the ``count`` largest, exactly as many even where some tie."""
    ranks = backend.xp.argsort(backend.xp.argsort(-scores, axis=-1), axis=-1)
    return ranks < count
