"""Functions and types of MSL, the text that MLX generates, and the facade's own checks."""

import os
import sys
import tempfile

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator as emulator

pytestmark = pytest.mark.skipif(
    emulator.why_unavailable() is not None, reason=str(emulator.why_unavailable())
)

ONE = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}


def run_lanes(body: str, n_values: int, header: str = "", x: mx.array | None = None) -> np.ndarray:
    """Run lines in which 32 lanes fill `float r[n_values]`; row i of the result is lane i's."""
    stores = f"for (int j = 0; j < {n_values}; j++) out[l * {n_values} + j] = r[j];"
    (result,) = emulator.run(
        f"const uint l = thread_index_in_simdgroup; float r[{n_values}];\n{body}\n{stores}",
        header=header,
        inputs={"x": mx.zeros(32) if x is None else x},
        outputs={"out": ((32, n_values), mx.float32)},
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    return np.array(result)


def test_simd_functions_agree_with_numpy():
    body = """
    const float v = x[l];
    r[0] = simd_sum(v); r[1] = simd_max(v); r[2] = simd_min(v); r[3] = simd_shuffle(v, 31 - l);
    r[4] = simd_shuffle_xor(v, 5); r[5] = simd_shuffle_down(v, 3); r[6] = simd_shuffle_up(v, 3);
    r[7] = simd_broadcast(v, 7); r[8] = simd_prefix_inclusive_sum(v);
    r[9] = simd_prefix_exclusive_sum(v); r[10] = simd_any(v > 2); r[11] = simd_all(v > -9);
    r[12] = simd_shuffle_and_fill_down(v, 9.0f, 4);
    r[13] = popcount(uint(ulong(simd_ballot(v > 0))));
    r[14] = simd_sum(float4(v)).z; r[15] = simd_shuffle_rotate_down(v, 2);
    """
    v, lane = np.random.default_rng(0).standard_normal(32).astype(np.float32), np.arange(32)
    expected = [v.sum(), v.max(), v.min(), v[::-1], v[lane ^ 5]]
    expected += [np.append(v[3:], v[29:]), np.append(v[:3], v[:-3]), v[7], np.cumsum(v)]
    expected += [np.cumsum(v) - v, (v > 2).any(), 1.0, np.append(v[4:], [9] * 4), (v > 0).sum()]
    expected += [v.sum(), np.roll(v, -2)]
    result = run_lanes(body, 16, x=mx.array(v))
    np.testing.assert_allclose(result, np.array([e * np.ones(32) for e in expected]).T, atol=1e-5)


def test_vectors_and_packed_integers():
    body = """
    half4 h = half4(1, 2, 3, 4) * half4(0.5h);
    bfloat4 b = bfloat4(float4(h));
    float4 f = float4(b), g = f.wzyx;
    f.xy += f.zw;
    packed_half4 p = h;
    uint word = 0x7F03A1u;
    uchar4 bytes = as_type<uchar4>(word);
    r[0] = f.x; r[1] = g.x; r[2] = dot(f, float4(1)); r[3] = p[3];
    r[4] = bytes.y; r[5] = float((word >> 4) & 0xF); r[6] = extract_bits(word, 8, 8);
    r[7] = select(1.0f, 2.0f, any(f > 5.0f)); r[8] = as_type<half>(ushort(0x3C00));
    r[9] = precise::exp(metal::log(3.0f)); r[10] = 1.0 / 3.0; r[11] = fast::exp(-INFINITY);
    """
    result = run_lanes(body, 12)
    expected = [2, 2, 8.5, 2, 3, 10, 3, 1, 1, 3, np.float32(1 / 3), 0]
    np.testing.assert_allclose(result, [expected] * 32, rtol=1e-6)


def test_helpers_in_the_header():
    header = """
    constant float table[4] = {1, 2, 3, 4};
    static constant constexpr int WIDTH = 2;
    template <typename P> METAL_FUNC float first(P p) { return float(p[0]); }
    METAL_FUNC void fill(thread float* to, int n) { for (int j = 0; j < n; j++) to[j] = j; }
    METAL_FUNC float peek(threadgroup float* t, uint j) { return t[j]; }
    """
    body = """
    threadgroup float t[WIDTH * 16], last;
    t[l] = l;
    if (l == 31) last = 7;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    fill(r, 3);
    r[0] = table[l % 4]; r[1] = first(x); r[2] += peek(t, 31 - l) + last;
    """
    lane = np.arange(32)
    expected = np.stack([lane % 4 + 1, np.full(32, 5), 2 + 31 - lane + 7], axis=1)
    np.testing.assert_array_equal(run_lanes(body, 3, header, mx.full((4,), 5.0)), expected)


@pytest.mark.parametrize(
    "header",
    [
        "constexpr int N = 3;",
        "void f() { threadgroup float a[3]; a[0] = 1; }",
        "template <typename T> T f(T& x) { return x; }",
        "#include <cmath>",
    ],
)
def test_header_that_metal_refuses_is_named(header):
    with pytest.raises(emulator.MetalKernelError, match=r"kernel\.header:1") as caught:
        run_lanes("r[0] = 0;", 1, header)
    assert caught.value.kind == "compile"


def test_half_arithmetic_rounds_at_each_step():
    assert (run_lanes("half big = 2048; half y = big + half(1); r[0] = y - big;", 1) == 0).all()


@pytest.mark.parametrize("lines", ["out[l] = b * 2.0f;", "out[l] = b + half(1);", "b4 *= 2.0f;"])
def test_bfloat_takes_no_implicit_conversion(lines):
    source = "const uint l = thread_position_in_grid.x; bfloat b = x[l]; bfloat4 b4 = bfloat4(b);"
    with pytest.raises(emulator.MetalKernelError) as caught:
        emulator.run(
            f"{source}\n{lines}\n",
            inputs={"x": mx.zeros(1, mx.bfloat16)},
            outputs={"out": ((1,), mx.bfloat16)},
            **ONE,
        )
    assert caught.value.kind == "compile"


def test_atomic_outputs_count_over_uneven_threadgroups():
    (count,) = emulator.run(
        "atomic_fetch_add_explicit(n, threads_per_threadgroup.x, memory_order_relaxed);",
        inputs={},
        outputs={"n": ((1,), mx.uint32)},
        grid=(70, 1, 1),
        threadgroup=(32, 1, 1),
        init_value=0,
        atomic_outputs=True,
    )
    assert count.item() == 32 * 32 * 2 + 6 * 6


def test_strides_are_passed_on():
    x = mx.arange(48).reshape(6, 8)[::2, ::3]
    (result,) = emulator.run(
        "uint i = thread_position_in_grid.x;"
        "out[i] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)];",
        inputs={"x": x},
        outputs={"out": (x.shape, x.dtype)},
        grid=(9, 1, 1),
        threadgroup=(9, 1, 1),
        ensure_row_contiguous=False,
    )
    assert mx.array_equal(result, x)


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"inputs": []}, "inputs has 0 entries"),
        ({"grid": (2048, 1, 1), "threadgroup": (2048, 1, 1)}, "2048 threads, allowed 1024"),
        ({"grid": (0, 1, 1)}, "grid"),
        ({"stream": mx.cpu}, "run on the GPU"),
        ({"output_dtypes": [mx.complex64]}, "complex64"),
    ],
)
def test_call_is_checked(wrong, text):
    kernel = emulator.metal_kernel("k", ["x"], ["out"], "out[0] = x;")
    call = {"inputs": [1.0], "output_shapes": [()], "output_dtypes": [mx.float32], **ONE}
    assert kernel(**call)[0].item() == 1.0
    with pytest.raises(ValueError, match=text):
        kernel(**{**call, **wrong})


def test_settings_are_checked():
    with (
        pytest.raises(ValueError, match="schedule='backward'"),
        emulator.settings(schedule="backward"),
    ):
        pass
    with pytest.raises(ValueError, match="math_mode"):
        emulator.metal_kernel("k", [], ["out"], "", compile_options={"math_mode": "exact"})


def captured_mlx_text(kernel, inputs, **call) -> str:
    """What MLX itself generates for a call: it prints that while the call is exported."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/out", "w+") as printed:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(
                f"{folder}/call.mlxfn",
                lambda *x: kernel(inputs=list(x), stream=mx.gpu, verbose=True, **call)[0],
                *inputs,
            )
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        printed.seek(0)
        return printed.read().split("```\n", 1)[1].rsplit("\n```", 1)[0]


# name: (inputs, output dtypes, template, source)
SIGNATURES = {
    "everything": (
        {
            "q": mx.zeros((4, 8), mx.float16),
            "rows": mx.zeros((16,), mx.int32),
            "scale": mx.array(1.0),
            "m": mx.zeros(3),
        },
        [mx.bfloat16, mx.float32],
        [("T", mx.bfloat16), ("N", -4), ("F", True)],
        "out0[0] = T(q_shape[0] + rows_strides[0] + m_ndim);\n"
        "out1[0] = N + simdgroup_index_in_threadgroup;",
    ),
    "no-attributes": (
        {"x": mx.zeros((2, 2), mx.bfloat16)},
        [mx.float32, mx.uint8],
        None,
        "out0[0] = 0; out1[0] = 0;",
    ),
    "in-a-comment": (
        {"x": mx.zeros(20, mx.bool_)},
        [mx.int64],
        None,
        "// grid_size x_shape\nout0[0] = x[0];",
    ),
    "part-of-a-name": (
        {"x": mx.zeros(20)},
        [mx.float32],
        None,
        "int max_shape = 1; out0[0] = max_shape;",
    ),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_signature_is_what_mlx_generates(case):
    inputs, dtypes, template, source = SIGNATURES[case]
    outputs = [f"out{i}" for i in range(len(dtypes))]
    build = {"name": "k", "input_names": list(inputs), "output_names": outputs, "source": source}
    call = {"output_shapes": [(4,)] * len(dtypes), "output_dtypes": dtypes, "template": template}
    arrays = list(inputs.values())
    real = mx.fast.metal_kernel(**build, header="// header\n")
    ours = emulator.metal_kernel(**build, header="// header\n")
    with emulator.settings() as launches:
        ours(inputs=arrays, init_value=0, **call, **ONE)
    assert launches[0].text == captured_mlx_text(real, arrays, **call, **ONE)


def test_signature_that_mlx_breaks_is_refused():
    build = {"name": "k", "input_names": ["x"], "output_names": ["a", "b"]}
    call = {"output_shapes": [(1,)] * 2, "output_dtypes": [mx.float32] * 2, **ONE}
    source, x = "a[0] = x_shape[0]; b[0] = 0;", mx.zeros(20)
    real = captured_mlx_text(mx.fast.metal_kernel(**build, source=source), [x], **call)
    assert real.count(") {") == 2, "MLX no longer closes the list twice: follow it in signature.py"
    with pytest.raises(emulator.MetalKernelError, match="use an attribute"):
        emulator.metal_kernel(**build, source=source)(inputs=[x], **call)
