"""The emulator runs correct kernels right, and names what is wrong with planted faults."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator as emulator
from tests.metal_emulator import sample_kernels
from xkv.checks.tolerances import TOLERANCE, relative_error

pytestmark = pytest.mark.skipif(
    emulator.why_unavailable() is not None, reason=str(emulator.why_unavailable())
)

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
DTYPES = {name: getattr(mx, name) for name in TOLERANCE}
CHECKED = pytest.param({"checked": True}, id="checked")
FORWARD = pytest.param({"checked": False}, id="forward")
REVERSE = pytest.param({"checked": False, "schedule": "reverse"}, id="reverse")
RANDOM = pytest.param({"checked": False, "schedule": "random", "seed": 7}, id="random")


def to_float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def assert_close(result: mx.array, reference: np.ndarray) -> None:
    dtype = str(result.dtype).rpartition(".")[2]
    assert relative_error(to_float64(result), reference) < TOLERANCE[dtype]


def random_array(shape, dtype=mx.float32, seed=0) -> mx.array:
    values = np.random.default_rng(seed).standard_normal(shape)
    return mx.array(values.astype(np.float32)).astype(dtype)


def run_sum(source: str = sample_kernels.SUM) -> mx.array:
    return emulator.run(
        source,
        inputs={"x": random_array((1000,))},
        outputs={"out": ((1,), mx.float32)},
        grid=(256, 1, 1),
        threadgroup=(256, 1, 1),
    )[0]


def run_body(body: str, dtype=mx.float32, out_dtype=None, **keywords) -> mx.array:
    """Run lines in which each of 32 threads knows its index i, x[32] and out[32]."""
    return emulator.run(
        f"const uint i = thread_position_in_grid.x;\n{body}",
        inputs={"x": random_array((32,), dtype)},
        outputs={"out": ((32,), out_dtype or dtype)},
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        **keywords,
    )[0]


@pytest.mark.parametrize("mode", [CHECKED, FORWARD, REVERSE, RANDOM])
def test_sum_is_right(mode):
    with emulator.settings(**mode) as launches:
        result = run_sum()
    assert_close(result, to_float64(random_array((1000,))).sum(keepdims=True))
    assert [launch.threadgroup_bytes for launch in launches] == [128]


@pytest.mark.parametrize("mode", [CHECKED, RANDOM])
def test_softmax_with_half_vectors_is_right(mode):
    x = random_array((3, 256), mx.float16) * 4
    with emulator.settings(**mode):
        (result,) = emulator.run(
            sample_kernels.SOFTMAX,
            inputs={"x": x},
            outputs={"out": (x.shape, x.dtype)},
            grid=(32, 3, 1),
            threadgroup=(32, 1, 1),
            template={"N": 256},
        )
    weights = np.exp(to_float64(x))
    assert_close(result, weights / weights.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("mode", [CHECKED, REVERSE])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_simdgroup_matrix_gemm_is_right(dtype, mode):
    a, b = random_array((64, 24), dtype), random_array((24, 32), dtype, seed=1)
    with emulator.settings(**mode):
        (result,) = emulator.run(
            sample_kernels.GEMM,
            inputs={"a": a, "b": b},
            outputs={"out": ((64, 32), dtype)},
            grid=(256, 2, 1),
            threadgroup=(128, 1, 1),
            template={"T": dtype, "K": 24, "N": 32},
        )
    assert_close(result, to_float64(a) @ to_float64(b))


@pytest.mark.parametrize("mode", [CHECKED, RANDOM])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_online_softmax_attention_through_mx_fast_is_right(dtype, mode, monkeypatch):
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    kernel = mx.fast.metal_kernel(
        name="attention",
        input_names=["q", "k", "v", "scale"],
        output_names=["out"],
        source=sample_kernels.ATTENTION,
    )
    shapes = [(4, 64), (2, 37, 64), (2, 37, 64)]
    q, k, v = (random_array(shape, dtype, seed) for seed, shape in enumerate(shapes))
    with emulator.settings(**mode):
        (result,) = kernel(
            inputs=[q, k, v, 0.3],
            template=[("T", dtype), ("D", 64), ("GQA", 2)],
            grid=(128, 4, 1),
            threadgroup=(128, 1, 1),
            output_shapes=[q.shape],
            output_dtypes=[dtype],
            stream=mx.gpu,
        )
    keys, values = (np.repeat(to_float64(x), 2, axis=0) for x in (k, v))
    weights = np.exp(np.einsum("hd,hld->hl", to_float64(q), keys) * 0.3)
    reference = np.einsum("hl,hld->hd", weights / weights.sum(axis=1, keepdims=True), values)
    assert_close(result, reference)


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


def test_poison_pattern_may_be_written():
    assert (np.array(run_body("out[i] = -1;", out_dtype=mx.int8)) == -1).all()


def test_init_value_fills_outputs():
    result = run_body("if (i == 3) out[i] += 1;", dtype=mx.bfloat16, init_value=2.0)
    assert to_float64(result).tolist() == [2.0] * 3 + [3.0] + [2.0] * 28


def test_processes_share_the_cache(tmp_path):
    code = (
        "from tests import metal_emulator as e; import mlx.core as mx\n"
        "outputs = {'out': ((1,), mx.float32)}\n"
        "print(e.run('out[0] = 5;', inputs={}, outputs=outputs, grid=(1,) * 3,"
        " threadgroup=(1,) * 3)[0].item())"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": root}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in processes] == ["5.0", "5.0"]
    cached = [path.suffix for path in (tmp_path / "xkv-metal-emulator").iterdir()]
    assert cached == [".so", ".so"]
