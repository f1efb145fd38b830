"""MiniCache: neighbouring layers share the direction of their rows."""

from __future__ import annotations

from dataclasses import dataclass

from xkv.errors import InputError
from xkv.evaluation.methods.eviction import is_largest
from xkv.evaluation.methods.method import Compressed, Method, compressed_rows
from xkv.ops.types import Array
from xkv.planning.document import Document


@dataclass(frozen=True)
class MiniCache(Method):
    """Pairs of layers hold one direction for both, each its own magnitudes.

    Per token and KV head the two layers' rows become the unit vector half way between them (SLERP
    with t = 0.5) and two norms. Rows whose directions differ most stay as they are in both layers.
    Keys are merged as cached, after the rotation, and values alike. The first layers, and a last
    one without a partner, are held whole. Merging two layers into one halves them at best, so that
    all layers together shrink by less than 4/3 with the default start.

    The paper keeps the tokens whose distance is above a threshold between the smallest and the
    largest; here a fixed share of each KV head, so that the size does not depend on the text.

    Args:
        start_share: Layers before this share of them are not merged.
        retained_share: Tokens of each KV head that stay exact.

    Source: MiniCache, arXiv:2405.14366.
    """

    name = "minicache"
    has_free_size = False

    start_share: float = 0.5
    retained_share: float = 0.05

    def __post_init__(self) -> None:
        for name in ("start_share", "retained_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} must be 0 to 1")

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        n_layers = len(document.keys)
        firsts = range(int(n_layers * self.start_share), n_layers - 1, 2)
        if not firsts:
            raise InputError(
                f"start_share={self.start_share:g} leaves none of {n_layers} layers a partner: "
                "lower it"
            )
        held, tensors = 0, []
        for exact in (document.keys, document.values):
            rows = list(exact)
            for i in firsts:
                rows[i], rows[i + 1], n_bytes = self._merge(document, exact[i], exact[i + 1])
                held += n_bytes
            merged = {layer for i in firsts for layer in (i, i + 1)}
            held += sum(x.nbytes for i, x in enumerate(exact) if i not in merged)
            tensors.append(rows)
        detail = f"{len(firsts)} pairs of {n_layers} layers"
        return compressed_rows(document, held, tensors[0], tensors[1], detail=detail)

    def _merge(self, document: Document, upper: Array, lower: Array) -> tuple[Array, Array, int]:
        """Two layers' rows as they come back, and the bytes that hold them."""
        backend, xp = document.backend, document.backend.xp
        both = [xp.astype(x, backend.accumulate_dtype(x)) for x in (upper, lower)]
        norms = [_norms(document, x) for x in both]
        units = [x / (norm + 1e-30) for x, norm in zip(both, norms, strict=True)]
        # between unit vectors SLERP's middle is the direction of their sum
        total = units[0] + units[1]
        shared = xp.astype(total / (_norms(document, total) + 1e-30), upper.dtype)
        n_retained = round(self.retained_share * document.n_tokens)
        cosines = xp.sum(units[0] * units[1], axis=-1)
        is_retained = is_largest(backend, -cosines, n_retained)[..., None]
        restored, held = [], shared.nbytes
        for exact, norm in zip((upper, lower), norms, strict=True):
            norm = xp.astype(norm, exact.dtype)
            approximate = document.widen(norm) * document.widen(shared)
            restored.append(xp.where(is_retained, document.widen(exact), approximate))
            held += norm.nbytes + exact.nbytes // document.n_tokens * n_retained
        index_bytes = 4 * upper.shape[1] * n_retained
        return restored[0], restored[1], held + index_bytes


def _norms(document: Document, rows: Array) -> Array:
    xp = document.backend.xp
    return xp.sqrt(xp.sum(rows * rows, axis=-1, keepdims=True))
