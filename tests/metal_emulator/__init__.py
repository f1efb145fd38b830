"""Runs the real source of `mx.fast.metal_kernel` kernels on Linux, without Metal.

The body and header of a kernel, in the Metal Shading Language (MSL), are compiled by g++ against
headers that supply the language's types and functions, with the signature that MLX generates around
them. Each Metal thread is a fibre, so barriers and simdgroup functions work, and misuse is found.

In a test:

    from tests import metal_emulator as emulator

    def test_scale(monkeypatch):
        monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
        with emulator.settings(schedule="random", seed=3) as launches:
            result = scale_rows(x)  # builds and launches its kernel through mx.fast.metal_kernel
        assert [launch.name for launch in launches] == ["scale_rows"]

`checked=True`, the default, finds races, uninitialised memory and access out of bounds exactly.
With `checked=False` a race shows only as results that differ between schedules, at up to four
times the speed: run both.

Not found: pointers passed between address spaces, limits and rounding of Apple's compiler, its
order of summation, and speed.
"""

from .compiler import why_unavailable
from .errors import MetalKernelError
from .facade import Launch, metal_kernel, run, settings
from .launcher import SCHEDULES, Settings

__all__ = [
    "SCHEDULES",
    "Launch",
    "MetalKernelError",
    "Settings",
    "metal_kernel",
    "run",
    "settings",
    "why_unavailable",
]
