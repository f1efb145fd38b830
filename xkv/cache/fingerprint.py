"""Telling models apart, the same way on every framework."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable

import numpy as np

_SHARED = re.compile(
    r"(embed_tokens|layers\.\d+\.(self_attn\.(q|k|v|o|qkv)|mlp\.(gate|up|down|gate_up))_proj)"
    r"\.weight$"
)
"""Parameters that mlx-lm and transformers name and lay out alike."""

_ADAPTER = re.compile(r"(.+)\.lora_a(\.|$)", re.IGNORECASE)
"""A parameter of a module with an adapter."""

N_VALUES = 16
"""Numbers of each parameter that count."""


def stride(size: int) -> int:
    """From which to which number of a parameter, so that :data:`N_VALUES` cover all of it.

    Odd, so that not all are of one column.
    """
    return max(1, size // N_VALUES - 1) | 1


def sampled(names: Iterable[str]) -> list[str]:
    """The parameters whose numbers count: every layer's matrices, and adapters."""
    names = list(names)
    adapted = {match[1] for name in names if (match := _ADAPTER.match(name))}
    chosen = [name for name in names if _SHARED.search(name) or _prefixes(name) & adapted]
    return sorted(chosen or names, key=_shared_name)


def _shared_name(name: str) -> str:
    """What a parameter is called on every framework, if it is one of those."""
    match = _SHARED.search(name)
    return match[0] if match else name


def _prefixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def fingerprint(
    parameters: Iterable[tuple[str, tuple[int, ...]]], values: Callable[[str, int], np.ndarray]
) -> str:
    """A code of a model's shapes and of some numbers of its weights, adapters included.

    Args:
        parameters: Names and shapes.
        values: Gives that many numbers of a parameter by name, spread over it by :func:`stride`.

    Returns:
        Eight hexadecimal digits, equal for the same checkpoint in float32 or 16 bits.
    """
    shapes = dict(parameters)
    code = 0
    for name in sampled(shapes):
        few = np.asarray(values(name, N_VALUES), dtype=np.float32)
        # to bfloat16's bits, rounded to even: a model in 16 bits is the same model
        bits = few.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        about = f"{_shared_name(name)} {tuple(shapes[name])} {rounded.tolist()}"
        code = zlib.crc32(about.encode(), code)
    return f"{code:08x}"
