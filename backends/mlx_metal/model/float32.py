"""Models in 16 bits that compute in float32, on a CPU that multiplies 16-bit matrices slowly."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.seam import Patch
from xkv.cli import openblas

mlx_cache = borrowed.module("mlx_lm.models.cache")

_NARROW = (mx.float16, mx.bfloat16)
_row_dtypes: list[mx.Dtype] = []
"""In which the models that were widened make their rows, one entry each."""


def compute_in_float32(model: nn.Module) -> mx.Dtype | None:
    """Widen a model's weights; keys and values are still held, and counted, in its own dtype.

    Caches of every model round the rows they are given, as long as this one lives. States of linear
    attention are held as they are computed.

    Args:
        model: From ``mlx_lm.load``.

    Returns:
        The dtype of its rows; None where it is left as it is: weights of no single 16-bit dtype, or
        of another one than those of a model before it.
    """
    parameters: Any = tree_flatten(model.parameters())
    dtypes = {x.dtype for _, x in parameters} & set(_NARROW)
    if len(dtypes) != 1 or dtypes != dtypes | set(_row_dtypes):
        return None
    dtype = dtypes.pop()
    model.set_dtype(mx.float32)
    for patch in _PATCHES:
        patch.install()
    _row_dtypes.append(dtype)
    weakref.finalize(model, _forget).atexit = False
    return dtype


def speed_up(model: nn.Module) -> str | None:
    """Let a model compute in float32, on a CPU with OpenBLAS.

    Returns:
        A sentence that says so, or what would speed it up; None where there is nothing to say.
    """
    if not openblas.is_wanted() or mx.default_device() != mx.Device(mx.cpu):
        return None
    if not openblas.is_loaded():
        return openblas.ADVICE
    dtype = compute_in_float32(model)
    if dtype is None:
        return None
    name = str(dtype).rpartition(".")[2]
    return (
        f"MLX computes in float32 with OpenBLAS here, and rows are held in {name} "
        f"({openblas.OPT_OUT}=1 turns this off)"
    )


def held_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """In which caches hold rows that a model makes in ``dtype``."""
    return _row_dtypes[0] if _row_dtypes else dtype


def _forget() -> None:
    for patch in _PATCHES:
        patch.remove()
    _row_dtypes.pop()


def _rounding(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_and_fetch(cache: Any, keys: mx.array, values: mx.array, *args: Any) -> Any:
        rows = (x.astype(held_dtype(x.dtype)) for x in (keys, values))
        return original(cache, *rows, *args)

    return update_and_fetch


_PATCHES = tuple(
    Patch(cls, "update_and_fetch", _rounding)
    for cls in (*vars(mlx_cache).values(), XKVCache)
    if isinstance(cls, type)
    and issubclass(cls, mlx_cache._BaseCache)
    and "update_and_fetch" in vars(cls)
)
