"""The full cache, which every method is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from xkv.evaluation.methods.method import Compressed, Method, compressed_rows
from xkv.planning.document import Document


@dataclass(frozen=True)
class Full(Method):
    """Every row as it is."""

    name = "full"
    has_free_size = False

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        return compressed_rows(document, document.dense_bytes, document.keys, document.values)
