"""mlx-lm's quantized cache."""

from __future__ import annotations

from dataclasses import dataclass

from xkv.errors import InputError
from xkv.evaluation.methods.method import Compressed, Method, compressed_rows
from xkv.planning.document import Document


@dataclass(frozen=True)
class Quantized(Method):
    """Every row in few bits, as mlx-lm's ``QuantizedKVCache`` holds it.

    Each token is quantized by itself, in groups of neighbouring features that share a scale and a
    bias in the KV dtype, which take part in the bytes: 4 bits are 4.5 with groups of 64. Nothing is
    dropped, so that the size is what the bits say. mlx-lm's own cache makes room for 3, 5 and 6
    bits at some head sizes only, 64 among them; here the rows are the same at all of them.

    Args:
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: Features that share a scale and a bias: 32, 64 or 128.

    Source: mlx-lm, ``models/cache.py``.
    """

    name = "quantized"
    has_free_size = False

    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 5, 6, 8):
            raise InputError(f"bits={self.bits} must be 2, 3, 4, 5, 6 or 8")
        if self.group_size not in (32, 64, 128):
            raise InputError(f"group_size={self.group_size} must be 32, 64 or 128")

    def compress(self, document: Document, ratio: float | None) -> Compressed:
        backend, held = document.backend, 0
        restored = []
        for rows in (*document.keys, *document.values):
            if rows.shape[-1] % self.group_size:
                raise InputError(
                    f"heads of {rows.shape[-1]} features cannot be quantized in groups of "
                    f"{self.group_size}: choose a group_size that divides them"
                )
            packed = backend.quantize(rows, self.group_size, self.bits)
            held += sum(x.nbytes for x in packed)
            restored.append(backend.dequantize(packed, self.group_size, self.bits))
        n_layers = len(document.keys)
        return compressed_rows(document, held, restored[:n_layers], restored[n_layers:])
