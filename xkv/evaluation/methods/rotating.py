"""mlx-lm's rotating cache: the first tokens and the last ones."""

from __future__ import annotations

from dataclasses import dataclass

from xkv.errors import InputError
from xkv.evaluation.methods.eviction import keep_rows, rows_to_keep
from xkv.evaluation.methods.method import Compressed, Method
from xkv.planning.document import Document


@dataclass(frozen=True)
class Rotating(Method):
    """The first ``sinks`` rows and as many of the last ones as the ratio leaves.

    What lies between is gone, whatever it says. As in mlx-lm's ``RotatingKVCache`` keys keep the
    rotation of their own positions; the paper numbers them anew inside the cache.

    Args:
        sinks: First tokens, kept.

    Source: StreamingLLM, arXiv:2309.17453.
    """

    name = "rotating"

    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise InputError(f"sinks={self.sinks} must not be negative")

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        backend = document.backend
        n_kept = rows_to_keep(document, ratio, self.sinks, f"the {self.sinks} sinks")
        n_last = n_kept - self.sinks
        first = backend.positions(0, self.sinks)
        last = backend.positions(document.n_tokens - n_last, n_last)
        rows = backend.xp.concat([first, last], axis=-1)[None, None]
        return keep_rows(document, [rows] * len(document.keys))
