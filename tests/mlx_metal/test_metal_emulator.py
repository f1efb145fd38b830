"""The emulator runs correct kernels right, in every schedule."""

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator as emulator
from tests.metal_emulator import sample_kernels
from tests.metal_emulator.sample_runs import random_array, run_body, run_sum, to_float64
from xkv.checks.tolerances import TOLERANCE, relative_error

pytestmark = pytest.mark.skipif(
    emulator.why_unavailable() is not None, reason=str(emulator.why_unavailable())
)
DTYPES = {name: getattr(mx, name) for name in TOLERANCE}
CHECKED = pytest.param({"checked": True}, id="checked")
FORWARD = pytest.param({"checked": False}, id="forward")
REVERSE = pytest.param({"checked": False, "schedule": "reverse"}, id="reverse")
RANDOM = pytest.param({"checked": False, "schedule": "random", "seed": 7}, id="random")


def assert_close(result: mx.array, reference: np.ndarray) -> None:
    dtype = str(result.dtype).rpartition(".")[2]
    assert relative_error(to_float64(result), reference) < TOLERANCE[dtype]


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
