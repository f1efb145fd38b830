"""The paper's selection: chunks of rows, of which every step reads the most promising."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from xkv.evaluation.methods.method import Compressed, compressed_rows
from xkv.evaluation.methods.quest import PagedPrefix, Quest
from xkv.ops.types import Array
from xkv.planning.document import Document


@dataclass(frozen=True)
class Landmarks(Quest):
    """The whole cache, of which a step reads ``budget`` tokens; it saves time, not memory.

    Each chunk of ``page_size`` rows is known by the mean of its keys. Chunks are chosen per KV
    head, by the largest softmax over its query heads. It holds more than the full cache, by the
    means; the paper's outlier chunks are left out.

    Source: xKV, arXiv:2503.18893, section 4.3, after ShadowKV, arXiv:2410.21465.
    """

    name = "landmarks"

    page_size: int = 8

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        n_means = document.n_tokens // self.page_size
        held = document.dense_bytes
        held += sum(keys.nbytes // document.n_tokens * n_means for keys in document.keys)
        make_prefix = functools.partial(
            SummarizedPrefix, budget=self.budget, page_size=self.page_size
        )
        detail = f"reads {self.budget} of {document.n_tokens} tokens a step"
        return compressed_rows(document, held, document.keys, document.values, make_prefix, detail)


class SummarizedPrefix(PagedPrefix):
    """A document whose chunks are chosen anew in every decode step."""

    def _summarize(self, pages: Array) -> None:
        self._means = self.backend.xp.mean(pages, axis=-2)

    def _worth(self, grouped: Array, scale: float) -> Array:
        xp = self.backend.xp
        return xp.softmax(grouped @ xp.matrix_transpose(self._means) * scale, -1)
