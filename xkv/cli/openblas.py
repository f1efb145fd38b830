"""A faster BLAS for MLX on Linux, whose wheel brings the reference one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from xkv.ops.loading import load_backend_module

LIBRARY = "libopenblas.so.0"
"""As Debian's ``libopenblas0-pthread`` and others call it."""

KERNELS = "OPENBLAS_CORETYPE"
"""Environment variable that names the kernels it takes."""

INSTRUCTIONS = {
    "SKYLAKEX": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "HASWELL": {"avx2", "fma"},
}
"""What kernels need of a CPU, widest first."""

OPT_OUT = "XKV_NO_OPENBLAS"
"""Environment variable that keeps MLX's own."""

ADVICE = (
    "MLX multiplies with its slow built-in BLAS here: with OpenBLAS (on Debian and Ubuntu: apt "
    "install libopenblas0-pthread) a prompt is several times as fast"
)


def is_wanted() -> bool:
    """Whether MLX should use it here."""
    return sys.platform == "linux" and not os.environ.get(OPT_OUT)


def is_loaded() -> bool:
    """Whether this process has it where MLX finds it."""
    return hasattr(ctypes.CDLL(None), "openblas_get_config")


class OneThread:
    """OpenBLAS computes in one thread while anyone is inside: faster for a decode step's products.

    They are small, and threads that wait for each other take a core from what else a step does.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._n_inside = self._n_threads = 0

    @property
    def _is_there(self) -> bool:
        return hasattr(self._library, "openblas_set_num_threads")

    def __enter__(self) -> None:
        if self._is_there and not self._n_inside:
            self._n_threads = self._library.openblas_get_num_threads()
            self._library.openblas_set_num_threads(1)
        self._n_inside += 1

    def __exit__(self, *_: object) -> None:
        self._n_inside -= 1
        if self._is_there and not self._n_inside:
            self._library.openblas_set_num_threads(self._n_threads)


ONE_THREAD = OneThread()


def cpu_info() -> str:
    """What Linux says of this machine's CPU."""
    return Path("/proc/cpuinfo").read_text()


def kernels_for(info: str) -> str | None:
    """Kernels for a CPU, by :func:`cpu_info`; None leaves the choice to OpenBLAS.

    A CPU that is newer than the library is taken for one of 2004: a fifth of the speed.
    """
    line = next((x for x in info.splitlines() if x.startswith("flags")), "")
    return next((x for x, needed in INSTRUCTIONS.items() if needed <= set(line.split())), None)


def load_mlx() -> Any:
    """The MLX backend for a command; on Linux it multiplies float32 by OpenBLAS if there is one.

    A library that is loaded first gives the symbols. Programs are left as they are: PyTorch's own
    threads and OpenBLAS's wait for each other.
    """
    if is_wanted() and not {"mlx.core", "torch"} & set(sys.modules):
        with contextlib.suppress(OSError):
            kernels = kernels_for(cpu_info())
            if kernels is not None:
                os.environ.setdefault(KERNELS, kernels)
            ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    return load_backend_module("mlx")
