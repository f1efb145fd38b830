"""The emulator names what is wrong with planted faults."""

import mlx.core as mx
import pytest

from tests import metal_emulator as emulator
from tests.metal_emulator import sample_kernels
from tests.metal_emulator.sample_runs import run_body, run_sum

pytestmark = pytest.mark.skipif(
    emulator.why_unavailable() is not None, reason=str(emulator.why_unavailable())
)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


SHARED = f"threadgroup float t[32]; t[i] = x[i]; {BARRIER} "
MATRIX = "simdgroup_float8x8 m; simdgroup_load(m, x, 0); "
# name: (body, kind of error in checked mode, what the message names)
FAULTS = {
    "barrier-missing": (
        SHARED.replace(BARRIER, "") + "out[i] = t[31 - i];",
        "uninitialised",
        "byte 124 of t",
    ),
    "barrier-missing-before-reuse": (
        SHARED + "out[i] = t[31 - i]; t[i] = 0;",
        "data-race",
        "thread 16 reads byte 60 of t that thread 15 wrote",
    ),
    "barrier-with-wrong-flags": (
        SHARED.replace("mem_threadgroup)", "mem_device)") + "out[i] = t[31 - i];",
        "data-race",
        "of t",
    ),
    "barrier-in-branch": (
        f"if (i < 16) {{ {BARRIER} }} out[i] = 0;",
        "divergent-barrier",
        "16 threads returned",
    ),
    "barriers-in-both-branches": (
        f"if (i < 16) {{ {BARRIER} }} else {{\n{BARRIER} }} out[i] = 0;",
        "divergent-barrier",
        "source:2.*source:3",
    ),
    "return-before-barrier": (
        f"out[i] = 0; if (i == 5) return; {BARRIER}",
        "divergent-barrier",
        r"1 threads returned \(first: 5\)",
    ),
    "return-before-simd-function": (
        "out[i] = 0; if (i == 5) return;\nout[i] = simd_sum(x[i]);",
        "divergent-simd",
        "simd_sum .*source:3",
    ),
    "simd-function-in-branch": (
        "float s = 0; if (i < 16) s = simd_max(x[i]); out[i] = s;",
        "divergent-simd",
        "16 threads at simd_max",
    ),
    "shuffle-outside-simdgroup": (
        "out[i] = simd_shuffle(x[i], i + 1);",
        "inactive-lane",
        "lane 32",
    ),
    "broadcast-lane-differs": (
        "out[i] = simd_broadcast(x[i], i);",
        "non-uniform",
        "simd_broadcast",
    ),
    "matrix-pointer-differs": (
        MATRIX.replace("x,", "x + i,") + "out[i] = m.thread_elements()[0];",
        "non-uniform",
        "simdgroup_load",
    ),
    "race-in-threadgroup-memory": (
        "threadgroup float t[1]; t[0] = x[i]; out[i] = 0;",
        "data-race",
        "byte 0 of t that thread 0 wrote",
    ),
    "race-in-output": ("out[0] = x[i]; out[i] = x[i];", "data-race", "byte 0 of out"),
    "threadgroup-memory-unset": (
        f"threadgroup float t[32]; if (i < 31) t[i] = 0; {BARRIER} out[i] = t[i];",
        "uninitialised",
        "byte 124 of t",
    ),
    "output-read": ("out[i] += x[i];", "uninitialised", "byte 0 of out"),
    "read-past-input": ("out[i] = x[i + 1];", "out-of-bounds", "read of 4 bytes at byte 128 of x"),
    "read-before-input": ("out[i] = x[int(i) - 1];", "out-of-bounds", "byte -4 of x"),
    "write-past-output": (
        "out[i + 1] = x[i];",
        "out-of-bounds",
        "write of 4 bytes at byte 128 of out",
    ),
    "write-past-threadgroup-array": (
        SHARED + "t[i + 1] = 0; out[i] = 0;",
        "out-of-bounds",
        r"index 32 of type 'float \[32\]'",
    ),
    "write-past-threadgroup-pointer": (
        SHARED + "threadgroup float* p = t + 1; p[i] = 0; out[i] = 0;",
        "out-of-bounds",
        "byte 128 of threadgroup variable t",
    ),
    "read-past-private-array": (
        "float r[4] = {0}; out[i] = r[i];",
        "out-of-bounds",
        r"index 4 of type 'float \[4\]'",
    ),
    "misaligned-vector": (
        "out[i] = ((const device float4*)(x + 1))[0].x;",
        "misaligned",
        "16-byte",
    ),
    "too-much-threadgroup-memory": (
        "threadgroup float t[8193]; t[i] = 0; out[i] = 0;",
        "threadgroup-memory",
        "variable t, the limit is 32768",
    ),
    "output-unwritten": (
        "if (i != 7) out[i] = 0;",
        "unwritten-output",
        "1 of 32 elements of out, the first at 7",
    ),
    "division-by-zero": ("out[i] = float(7 / int(i));", "undefined", "division"),
    "shift-too-far": ("out[i] = float(1 << (i + 8));", "undefined", "shift by 32"),
    "double": ("double d = x[i]; out[i] = d;", "compile", "source:2: `double`"),
    "std": ("out[i] = std::exp(x[i]);", "compile", "source:2: `std::`"),
    "pointer-without-address-space": (
        "const float* p = x; out[i] = p[i];",
        "compile",
        "source:2: .*address space",
    ),
    "threadgroup-initialiser": ("threadgroup float t = 0; out[i] = t;", "compile", "initialiser"),
    "ambiguous-max": ("out[i] = max(half(1), x[i]);", "compile", "ambiguous"),
    "variable-unset": ("float s; s += x[i]; out[i] = s;", "compile", "uninitialized"),
    "write-to-input": ("x[i] = 0; out[i] = 0;", "compile", "read-only"),
    "unknown-function": ("out[i] = metal::gelu(x[i]);", "compile", "gelu"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named(name):
    body, kind, text = FAULTS[name]
    with pytest.raises(emulator.MetalKernelError, match=f"(?s){text}") as caught:
        run_body(body)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "name",
    [
        "barriers-in-both-branches",
        "return-before-barrier",
        "simd-function-in-branch",
        "too-much-threadgroup-memory",
        "output-unwritten",
    ],
)
def test_fault_is_named_without_checks(name):
    body, kind, text = FAULTS[name]
    with (
        emulator.settings(checked=False, schedule="random"),
        pytest.raises(emulator.MetalKernelError, match=f"(?s){text.split(' ')[0]}") as caught,
    ):
        run_body(body)
    assert caught.value.kind == kind


def test_missing_barrier_without_checks_depends_on_the_schedule():
    body = sample_kernels.SUM.replace(BARRIER, "")
    results = []
    for schedule in ("forward", "reverse"):
        with emulator.settings(checked=False, schedule=schedule):
            results.append(run_sum(body).item())
    assert results[0] != results[1]


def test_access_far_outside_every_buffer_is_named_without_checks():
    with (
        emulator.settings(checked=False),
        pytest.raises(emulator.MetalKernelError, match="byte 400000 of x") as caught,
    ):
        run_body("out[i] = x[i + 100000];")
    assert caught.value.kind == "out-of-bounds"


def test_accumulator_that_nobody_set_is_nan():
    body = MATRIX + "simdgroup_float8x8 c; simdgroup_multiply_accumulate(c, m, m, c); "
    assert mx.isnan(run_body(body + "out[i] = c.thread_elements()[0];")).all()


def test_endless_kernel_is_stopped():
    body = "while (out[0] != 1) simdgroup_barrier(mem_flags::mem_none); out[i] = 0;"
    with (
        emulator.settings(checked=False, timeout_s=1),
        pytest.raises(emulator.MetalKernelError, match="1 seconds") as caught,
    ):
        run_body(body)
    assert caught.value.kind == "timeout"


def test_error_names_the_line_of_the_source():
    with pytest.raises(emulator.MetalKernelError, match=r"kernel\.source:4"):
        run_body("float s = 0;\n\ns = x[i + 64]; out[i] = s;")
