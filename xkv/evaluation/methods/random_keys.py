"""A broken method, which a sound evaluation has to tell from the others."""

from __future__ import annotations

from dataclasses import dataclass

from xkv.evaluation.methods.method import Compressed, Method, compressed_rows
from xkv.planning.document import Document


@dataclass(frozen=True)
class RandomKeys(Method):
    """Normal numbers in place of the keys, the values as they are: attention to anything.

    It saves nothing. A task that it solves does not need its document.
    """

    name = "random"
    has_free_size = False

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        n_layers = len(document.keys)
        keys = [
            document.backend.normal(tuple(exact.shape), document.seed * n_layers + i)
            for i, exact in enumerate(document.keys)
        ]
        return compressed_rows(document, document.dense_bytes, keys, document.values)
