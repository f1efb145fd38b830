"""The choice between a kernel and its plain twin, made in one place and told once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np

from xkv.errors import InputError
from xkv.ops.protocol import Operations

logger = logging.getLogger("xkv")

KernelMode = Literal["auto", "on", "off"]

CHECK_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
"""Relative L2 error that the first-use check allows: a wrong kernel is wrong by far more."""


class Kernel(Protocol):
    """A fused operation in a device language. Arguments are those of the backend's method."""

    name: str

    def why_not(self, *args: Any) -> str | None:
        """A sentence that says why the kernel cannot take these arguments here, or None."""

    def sample(self, backend: Operations, *args: Any) -> tuple[Any, ...]:
        """A small input of the same dtype and head_dim as ``args``, for the first-use check."""

    def check_key(self, *args: Any) -> tuple[Any, ...]:
        """What makes a new compilation: dtype name first, then head_dim and the like."""

    def __call__(self, *args: Any) -> Any:
        """Launch: an array, or several."""


class KernelDispatch:
    """Runs a kernel where it can and its twin elsewhere.

    Args:
        backend: Whose operations these are.
        mode: ``auto`` logs once why a kernel does not run; ``on`` raises with that sentence;
            ``off`` never runs a kernel.
        device_problem: A sentence that says why no kernel at all can run here, or None; asked
            before any kernel, so that it is told once for all of them.
    """

    def __init__(
        self,
        backend: Operations,
        mode: KernelMode = "auto",
        device_problem: Callable[[], str | None] = lambda: None,
    ) -> None:
        if mode not in ("auto", "on", "off"):
            raise InputError(f"kernels={mode!r} must be 'auto', 'on' or 'off'")
        self._backend = backend
        self.device_problem = device_problem
        self.mode = mode
        self.last_path: dict[str, str] = {}
        """What ran last, by operation: the kernel's name or "plain"."""
        self._verdicts: dict[tuple[Any, ...], str | None] = {}
        self._told: set[str] = set()

    def run(self, operation: str, kernel: Kernel, twin: Callable[..., Any], *args: Any) -> Any:
        """``kernel(*args)``, or ``twin(*args)`` with the reason told once.

        Raises:
            InputError: In mode ``on``, if the kernel cannot run.
        """
        if self.mode != "off":
            why_not = (
                self.device_problem() or kernel.why_not(*args) or self._verdict(kernel, twin, *args)
            )
            if why_not is None:
                self.last_path[operation] = kernel.name
                return kernel(*args)
            if self.mode == "on":
                raise InputError(f"kernel {kernel.name} cannot run: {why_not}")
            if why_not not in self._told:
                self._told.add(why_not)
                logger.warning("plain operations run (first in %s): %s", operation, why_not)
        self.last_path[operation] = "plain"
        return twin(*args)

    def _verdict(self, kernel: Kernel, twin: Callable[..., Any], *args: Any) -> str | None:
        """Check a kernel against its twin once for each compilation."""
        key = (kernel.name, *kernel.check_key(*args))
        if key not in self._verdicts:
            self._verdicts[key] = self.check(kernel, twin, *args)
        return self._verdicts[key]

    def check(self, kernel: Kernel, twin: Callable[..., Any], *args: Any) -> str | None:
        """Compare a kernel with its twin on its sample; a sentence on failure, else None."""
        sample = kernel.sample(self._backend, *args)
        try:
            got = self._numbers(kernel(*sample))
        except (RuntimeError, ValueError) as error:  # MLX and Triton, at compile or launch
            return f"kernel {kernel.name} failed: {error}"
        want = self._numbers(twin(*sample))
        errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(got, want, strict=True)]
        # numpy's, of which NaN is the largest
        error_size = np.max(errors)
        allowed = CHECK_TOLERANCE[kernel.check_key(*args)[0]]
        if not error_size <= allowed:
            return (
                f"kernel {kernel.name} disagrees with its plain twin on this device "
                f"(relative error {error_size:.1e}, allowed {allowed:.0e})"
            )
        return None

    def _numbers(self, found: Any) -> list[np.ndarray]:
        arrays = found if isinstance(found, tuple) else (found,)
        made = [x for x in arrays if x is not None]
        return [self._backend.to_numpy(x).astype(np.float64) for x in made]
