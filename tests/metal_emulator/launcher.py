"""Launches a compiled kernel on numpy arrays."""

import ctypes
import math
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .compiler import load_kernel, load_runtime
from .errors import MetalKernelError
from .signature import BufferArgument

SCHEDULES = ("forward", "reverse", "random")
_POISONS = (0xFF, 0xA5)  # 0xFF is NaN in every float format
_lock = threading.Lock()  # the runtime runs one launch at a time


@dataclass(frozen=True)
class Settings:
    """How kernels are run.

    Args:
        checked: Find races and bad accesses exactly; slower.
        schedule: Order of threadgroups, simdgroups and lanes: "forward", "reverse" or "random".
        seed: Of the random schedule.
        timeout_s: CPU seconds.
    """

    checked: bool = True
    schedule: str = "forward"
    seed: int = 0
    timeout_s: int = 60

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule={self.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}"
            )


@dataclass(frozen=True)
class Output:
    """An output to be made. `fill` is its initial value, 0-d, or None for poison."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fill: np.ndarray | None = None


@dataclass(frozen=True)
class Request:
    """One launch. `unit` comes from `compiler.translate`; inputs keep their strides."""

    unit: str
    arguments: Sequence[BufferArgument]
    inputs: Mapping[str, np.ndarray]
    outputs: Sequence[Output]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    settings: Settings


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("is_output", ctypes.c_uint32),
        ("has_values", ctypes.c_uint32),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("n_buffers", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("schedule", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("checked", ctypes.c_uint32),
        ("timeout_s", ctypes.c_uint32),
        ("threadgroup_bytes", ctypes.c_uint32),
        ("error_offset", ctypes.c_uint64),
        ("error", ctypes.c_char * 4096),
    )


@contextmanager
def _guarded(array: np.ndarray) -> Iterator[int]:
    """Copy an array between guard zones, and back at the end."""
    runtime = load_runtime()
    address = runtime.emu_map(max(array.nbytes, 1))
    if not address:
        raise MemoryError(f"no room for a buffer of {array.nbytes} bytes")
    try:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        yield address
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
    finally:
        runtime.emu_unmap(address, max(array.nbytes, 1))


def _flat_span(array: np.ndarray) -> np.ndarray:
    """The elements from the first to the last in memory, strides untouched."""
    if any(stride < 0 for stride in array.strides):
        raise ValueError(
            "an input with negative strides is not supported; use ensure_row_contiguous=True"
        )
    length = 1 + sum(
        (n - 1) * stride // array.itemsize
        for n, stride in zip(array.shape, array.strides, strict=True)
    )
    span = np.lib.stride_tricks.as_strided(array, (length if array.size else 0,), (array.itemsize,))
    return span.copy()


def _input_parts(array: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "data": _flat_span(array),
        "shape": np.array(array.shape, np.int32),
        "strides": np.array([stride // array.itemsize for stride in array.strides], np.int64),
        "ndim": np.array(array.ndim, np.int32),
    }


def _source_line(library: Path, offset: int) -> str:
    """Where in the kernel's own text an instruction comes from, as " at NAME.source:LINE"."""
    command = ["addr2line", "-i", "-e", str(library), hex(offset - 1)]
    try:
        places = subprocess.run(command, capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        return ""
    for place in places:
        found = re.search(r"([^/]+\.(?:source|header):\d+)$", place)
        if found:
            return f" at {found[1]}"
    return ""


def _launch_once(request: Request, poison: int) -> tuple[list[np.ndarray], int]:
    """Run a kernel once; returns its outputs and the bytes of threadgroup memory it used."""
    arguments, outputs, settings = request.arguments, request.outputs, request.settings
    library, path = load_kernel(request.unit, settings.checked)
    arrays: dict[tuple[str, str], np.ndarray] = {}
    for name, array in request.inputs.items():
        arrays.update({(name, part): value for part, value in _input_parts(array).items()})
    made = []
    for output in outputs:
        n_bytes = math.prod(output.shape) * output.dtype.itemsize
        array = np.full(n_bytes, poison, np.uint8).view(output.dtype).reshape(output.shape)
        if output.fill is not None:
            array[...] = output.fill
        arrays[output.name, "output"] = array
        made.append(array)
    filled = {output.name: output.fill is not None for output in outputs}

    with ExitStack() as stack:
        buffers = (_Buffer * len(arguments))()
        for buffer, argument in zip(buffers, arguments, strict=True):
            array = arrays[argument.array, argument.part]
            is_output = argument.part == "output"
            label = (
                argument.array
                if argument.part in ("data", "output")
                else f"{argument.array}_{argument.part}"
            )
            buffer.name = label.encode()
            buffer.data = stack.enter_context(_guarded(array))
            buffer.bytes = array.nbytes
            buffer.is_output = is_output
            buffer.has_values = is_output and filled[argument.array]
        launch = _Launch(
            entry=ctypes.cast(library.emu_kernel, ctypes.c_void_p),
            arguments=(ctypes.c_void_p * len(arguments))(*[buffer.data for buffer in buffers]),
            buffers=buffers,
            n_buffers=len(arguments),
            grid=request.grid,
            threadgroup=request.threadgroup,
            schedule=SCHEDULES.index(settings.schedule),
            seed=settings.seed,
            checked=settings.checked,
            timeout_s=settings.timeout_s,
        )
        load_runtime().emu_launch(ctypes.byref(launch))
    if launch.error:
        kind, _, text = launch.error.decode(errors="replace").partition(": ")
        raise MetalKernelError(
            kind, text + (_source_line(path, launch.error_offset) if launch.error_offset else "")
        )
    return made, launch.threadgroup_bytes


def _element_bytes(array: np.ndarray) -> np.ndarray:
    return (
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(array.size, array.itemsize)
    )


def _poisoned(request: Request, arrays: list[np.ndarray], poison: int) -> list[np.ndarray]:
    """For each output, which elements still hold the poison."""
    return [
        (_element_bytes(array) == poison).all(axis=1) & (output.fill is None)
        for output, array in zip(request.outputs, arrays, strict=True)
    ]


def launch(request: Request) -> tuple[list[np.ndarray], int]:
    """Run a kernel.

    Returns:
        outputs: One array each.
        threadgroup_bytes: Threadgroup memory used.

    Raises:
        MetalKernelError: If the kernel breaks a rule, or leaves an output without fill unwritten.
    """
    with _lock:
        made, threadgroup_bytes = _launch_once(request, _POISONS[0])
        suspects = _poisoned(request, made, _POISONS[0])
        if any(suspect.any() for suspect in suspects):
            # A kernel may write that pattern, -1 for one, but then it does not follow the poison.
            again, _ = _launch_once(request, _POISONS[1])
            both = zip(suspects, _poisoned(request, again, _POISONS[1]), strict=True)
            for output, (first, second) in zip(request.outputs, both, strict=True):
                bad = first & second
                if bad.any():
                    where = f"{bad.sum()} of {bad.size} elements of {output.name}"
                    where += f", the first at {bad.argmax()}"
                    raise MetalKernelError("unwritten-output", f"{where}; pass init_value if meant")
    return made, threadgroup_bytes
