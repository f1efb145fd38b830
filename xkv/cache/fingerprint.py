"""Telling models apart, the same way on every framework."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable

import numpy as np

_SHARED = re.compile(r"(embed_tokens|layers\.\d+\.self_attn\.(q|k|v|o|qkv)_proj)\.weight$")
"""Parameters that mlx-lm and transformers name and lay out alike."""

N_PARAMETERS, N_VALUES = 16, 16


def fingerprint(
    parameters: Iterable[tuple[str, tuple[int, ...]]], values: Callable[[str, int], np.ndarray]
) -> str:
    """A code of a model's shapes and a few of its weights.

    Args:
        parameters: Names and shapes.
        values: Gives the first values of a parameter, by name and number.

    Returns:
        Eight hexadecimal digits, equal for the same checkpoint in float32 or 16 bits.
    """
    named = {name: shape for name, shape in parameters}
    shared = {match[0]: name for name in named if (match := _SHARED.search(name))}
    chosen = sorted((shared or dict(zip(named, named, strict=True))).items())
    code = 0
    for suffix, name in chosen[:: max(1, len(chosen) // N_PARAMETERS)]:
        few = np.asarray(values(name, N_VALUES), dtype=np.float32)
        # to bfloat16's bits, rounded to even: a model in 16 bits is the same model
        bits = few.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        code = zlib.crc32(f"{suffix} {tuple(named[name])} {rounded.tolist()}".encode(), code)
    return f"{code:08x}"
