"""A faster BLAS for MLX on Linux, whose wheel brings the reference one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Any

from xkv.ops.loading import load_backend_module

LIBRARY = "libopenblas.so.0"
"""As Debian's ``libopenblas0-pthread`` and others call it."""

OPT_OUT = "XKV_NO_OPENBLAS"
"""Environment variable that keeps MLX's own."""


def load_mlx() -> Any:
    """The MLX backend for a command; on Linux it multiplies float32 by OpenBLAS if there is one.

    A library that is loaded first gives the symbols. Programs are left as they are: PyTorch's own
    threads and OpenBLAS's wait for each other.
    """
    is_wanted = sys.platform == "linux" and not os.environ.get(OPT_OUT)
    if is_wanted and not {"mlx.core", "torch"} & set(sys.modules):
        with contextlib.suppress(OSError):
            ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    return load_backend_module("mlx")
