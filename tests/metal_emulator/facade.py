"""A stand-in for `mx.fast.metal_kernel` that runs the kernel in the emulator."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .compiler import translate
from .launcher import Output, Request, Settings, launch
from .signature import METAL_TYPES, build_text

Scalar = bool | int | float
TemplateValue = bool | int | mx.Dtype
MAX_THREADS = 1024
_MATH_MODES = ("safe", "relaxed", "fast")


@dataclass(frozen=True)
class Launch:
    """One launch, as `settings` records it."""

    name: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    threadgroup_bytes: int
    text: str


_settings: ContextVar[Settings] = ContextVar("settings", default=Settings())  # noqa: B039 (frozen)
_launches: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)


@contextlib.contextmanager
def settings(**changes: Any) -> Iterator[list[Launch]]:
    """Run the kernels launched inside with other settings.

    Args:
        changes: Fields of `Settings`: checked, schedule, seed, timeout_s.

    Yields:
        The launches made inside so far.
    """
    launches: list[Launch] = []
    tokens = _settings.set(replace(_settings.get(), **changes)), _launches.set(launches)
    try:
        yield launches
    finally:
        _settings.reset(tokens[0])
        _launches.reset(tokens[1])


def _dtype_name(dtype: mx.Dtype) -> str:
    name = str(dtype).rpartition(".")[2].rstrip("_")
    if name not in METAL_TYPES:
        raise ValueError(
            f"dtype {name} is not supported by the emulator; allowed: {', '.join(METAL_TYPES)}"
        )
    return name


def _storage(dtype: mx.Dtype) -> np.dtype:
    # numpy has no bfloat16: its bits travel as uint16.
    name = _dtype_name(dtype)
    return np.dtype(np.uint16 if name == "bfloat16" else name)


def _to_numpy(array: mx.array, ensure_row_contiguous: bool) -> np.ndarray:
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    values = np.array(bits, copy=False)
    return np.ascontiguousarray(values).reshape(array.shape) if ensure_row_contiguous else values


def _to_mlx(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def _fill(value: float | None, dtype: mx.Dtype) -> np.ndarray | None:
    if value is None:
        return None
    return _to_numpy(mx.array(value).astype(dtype), True)


def _triple(name: str, values: Sequence[int]) -> tuple[int, int, int]:
    if len(values) != 3 or any(v < 1 for v in values):
        raise ValueError(f"{name}={tuple(values)} must be three positive numbers")
    return int(values[0]), int(values[1]), int(values[2])


@dataclass(frozen=True)
class _Kernel:
    """What `metal_kernel` returns."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    ensure_row_contiguous: bool
    atomic_outputs: bool
    overrides: Mapping[str, Any]

    def __call__(
        self,
        *,
        inputs: Sequence[Scalar | mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, TemplateValue]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: mx.Stream | mx.Device | None = None,
    ) -> list[mx.array]:
        self._check_call(inputs, output_shapes, output_dtypes, stream)
        grid, threadgroup = _triple("grid", grid), _triple("threadgroup", threadgroup)
        threads = math.prod(min(t, g) for t, g in zip(threadgroup, grid, strict=True))
        if threads > MAX_THREADS:
            raise ValueError(
                f"threadgroup={threadgroup} has {threads} threads, allowed {MAX_THREADS}"
            )

        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        text = build_text(
            self.name,
            self.source,
            self.header,
            [
                (n, _dtype_name(a.dtype), tuple(a.shape))
                for n, a in zip(self.input_names, arrays, strict=True)
            ],
            [(n, _dtype_name(d)) for n, d in zip(self.output_names, output_dtypes, strict=True)],
            [(n, v if isinstance(v, (bool, int)) else _dtype_name(v)) for n, v in template or ()],
            self.atomic_outputs,
        )
        if verbose:
            print(f"Generated source code for `{text.function}`:\n```\n{text.text}\n```")
        values = {
            n: _to_numpy(a, self.ensure_row_contiguous)
            for n, a in zip(self.input_names, arrays, strict=True)
        }
        outputs = [
            Output(n, tuple(s), _storage(d), _fill(init_value, d))
            for n, s, d in zip(self.output_names, output_shapes, output_dtypes, strict=True)
        ]
        request = Request(
            unit=translate(text, self.name),
            arguments=text.arguments,
            inputs=values,
            outputs=outputs,
            grid=grid,
            threadgroup=threadgroup,
            settings=replace(_settings.get(), **self.overrides),
        )
        made, threadgroup_bytes = launch(request)
        launches = _launches.get()
        if launches is not None:
            launches.append(Launch(self.name, grid, threadgroup, threadgroup_bytes, text.text))
        return [_to_mlx(array, dtype) for array, dtype in zip(made, output_dtypes, strict=True)]

    def _check_call(
        self,
        inputs: Sequence[Scalar | mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        stream: mx.Stream | mx.Device | None,
    ) -> None:
        for what, got, names in (
            ("inputs", inputs, self.input_names),
            ("output_shapes", output_shapes, self.output_names),
            ("output_dtypes", output_dtypes, self.output_names),
        ):
            if len(got) != len(names):
                raise ValueError(
                    f"{self.name}: {what} has {len(got)} entries but the kernel names {len(names)}"
                )
        device = getattr(stream, "device", stream)
        if device is not None and device == mx.Device(mx.cpu):
            raise ValueError(
                f"{self.name}: Metal kernels run on the GPU; leave out stream or pass mx.gpu"
            )


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: Mapping[str, str] | None = None,
    **overrides: Any,
) -> Callable[..., list[mx.array]]:
    """Make a kernel as `mx.fast.metal_kernel` does; calling it runs at once, on the CPU.

    Args:
        compile_options: Checked, but every math mode computes the same here.
        overrides: Fields of `Settings` that this kernel always uses.

    Returns:
        A callable with the keywords of MLX's.
    """
    for option, value in (compile_options or {}).items():
        if option != "math_mode" or value not in _MATH_MODES:
            raise ValueError(
                f"compile_options {option}={value!r}; allowed: math_mode in {_MATH_MODES}"
            )
    replace(Settings(), **overrides)  # raises now rather than at the first call
    return _Kernel(
        name,
        tuple(input_names),
        tuple(output_names),
        source,
        header,
        ensure_row_contiguous,
        atomic_outputs,
        overrides,
    )


def run(
    source: str,
    *,
    inputs: Mapping[str, Scalar | mx.array],
    outputs: Mapping[str, tuple[Sequence[int], mx.Dtype]],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    name: str = "kernel",
    header: str = "",
    template: Mapping[str, TemplateValue] | None = None,
    init_value: float | None = None,
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
) -> list[mx.array]:
    """Make a kernel and run it once.

    Args:
        inputs: Arrays and numbers by name.
        outputs: (shape, dtype) by name.

    Returns:
        One array per output.
    """
    kernel = metal_kernel(
        name, tuple(inputs), tuple(outputs), source, header, ensure_row_contiguous, atomic_outputs
    )
    return kernel(
        inputs=list(inputs.values()),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        grid=grid,
        threadgroup=threadgroup,
        template=list((template or {}).items()),
        init_value=init_value,
    )
