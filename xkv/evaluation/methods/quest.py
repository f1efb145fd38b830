"""Quest: pages of rows, of which every decode step reads the most promising."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from xkv.errors import InputError
from xkv.evaluation.methods.eviction import is_largest
from xkv.evaluation.methods.method import Compressed, Method, compressed_rows
from xkv.evaluation.prefix import Prefix
from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.planning.document import Document


@dataclass(frozen=True)
class Quest(Method):
    """The whole cache, of which a step reads ``budget`` tokens; it saves time, not memory.

    A page is ``page_size`` neighbouring rows. The smallest and the largest feature of its keys
    bound what a query can score in it; the pages with the highest bound are read in full. A page
    that is not full is always read, as are the tokens after the document.

    It holds more than the full cache, by the bounds. Pages are chosen per KV head, by the query
    head that wants them most, and in all layers; the paper leaves the first two dense. The
    question's tokens, which come many at once, attend to everything.

    Args:
        budget: Tokens of full pages that a step reads.
        page_size: Tokens of a page.

    Source: Quest, arXiv:2406.10774.
    """

    name = "quest"
    has_free_size = False
    is_stepwise = True

    budget: int = 512
    page_size: int = 16

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.budget < 1 or self.budget % self.page_size:
            raise InputError(
                f"budget={self.budget} must be a multiple of page_size={self.page_size}, "
                "both above 0"
            )

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        n_bounds = 2 * (document.n_tokens // self.page_size)
        held = document.dense_bytes
        held += sum(keys.nbytes // document.n_tokens * n_bounds for keys in document.keys)
        make_prefix = functools.partial(PagedPrefix, budget=self.budget, page_size=self.page_size)
        detail = f"reads {self.budget} of {document.n_tokens} tokens a step"
        return compressed_rows(document, held, document.keys, document.values, make_prefix, detail)


class PagedPrefix(Prefix):
    """A document whose pages are chosen anew in every decode step."""

    def __init__(
        self,
        backend: Backend,
        keys: Array,
        values: Array,
        n_tokens: int,
        budget: int,
        page_size: int,
    ) -> None:
        super().__init__(backend, keys, values, n_tokens)
        self._n_read, self._page_size = budget // page_size, page_size
        xp, n_pages = backend.xp, n_tokens // page_size
        shape = (*keys.shape[:2], n_pages, page_size, keys.shape[-1])
        self._summarize(xp.reshape(keys[..., : n_pages * page_size, :], shape))

    def _summarize(self, pages: Array) -> None:
        """Note what is known of keys ``[1, n_kv_heads, pages, page_size, head_dim]``."""
        xp = self.backend.xp
        self._smallest, self._largest = xp.min(pages, axis=-2), xp.max(pages, axis=-2)

    def _worth(self, grouped: Array, scale: float) -> Array:
        """Of each page to each query ``[B, n_kv_heads, n, head_dim]``."""
        xp = self.backend.xp
        # a positive feature scores at most by the largest, a negative one by the smallest
        bound = xp.where(grouped > 0, grouped, 0.0) @ xp.matrix_transpose(self._largest)
        return bound + xp.where(grouped > 0, 0.0, grouped) @ xp.matrix_transpose(self._smallest)

    def select(self, queries: Array, scale: float) -> Array | None:
        if queries.shape[-2] > 1:
            return None
        xp = self.backend.xp
        batch, n_heads, _, head_dim = queries.shape
        n_kv_heads = self.prefix_keys.shape[1]
        grouped = xp.reshape(queries, (batch, n_kv_heads, n_heads // n_kv_heads, head_dim))
        worth = xp.max(self._worth(grouped, scale), axis=-2)
        is_read, n_pages = is_largest(self.backend, worth, self._n_read), worth.shape[-1]
        rest = xp.ones((batch, n_kv_heads, 1), dtype=is_read.dtype, **self.backend.placement)
        is_read = xp.concat([is_read, rest], axis=-1)[..., None]
        rows = xp.broadcast_to(is_read, (batch, n_kv_heads, n_pages + 1, self._page_size))
        n_rows = self.prefix_keys.shape[-2]
        return xp.reshape(rows, (batch, n_kv_heads, -1))[..., :n_rows]
