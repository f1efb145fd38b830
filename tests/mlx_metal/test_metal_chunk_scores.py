"""The Metal kernels of the chunks' scores, their real source, against the float64 reference."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import chunk_scores, common
from xkv.backends.mlx_metal.kernels.chunk_scores import TILE, ChunkScores
from xkv.checks.decode_cases import DTYPES
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.types import Landmarks

pytest_plugins = ["tests.metal_device"]

Inputs = tuple[mx.array, Landmarks, float]


def make_inputs(
    n_chunks: int,
    dtype: str = "float32",
    *,
    bits: int = 8,
    group_size: int = 64,
    head_dim: int = 64,
    n_heads: int = 8,
    n_kv_heads: int = 2,
    batch: int = 2,
) -> Inputs:
    """Queries and landmarks with a peaked softmax, every seventh chunk an outlier."""
    random = np.random.default_rng(0)

    def array(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape).astype(np.float32)).astype(getattr(mx, dtype))

    means = array(batch, n_kv_heads, n_chunks, head_dim)
    is_outlier = mx.array(random.permutation(batch * n_kv_heads * n_chunks) % 7 == 3)
    landmarks = Landmarks(
        (means,) if bits == 16 else tuple(mx.quantize(means, group_size=group_size, bits=bits)),
        bits,
        0 if bits == 16 else group_size,
        is_outlier.reshape(batch, n_kv_heads, n_chunks),
        8,
    )
    return array(batch, n_heads, 1, head_dim) * 3, landmarks, head_dim**-0.5


def reference_scores(reference: xkv.ops.backend.Backend, inputs: Inputs) -> np.ndarray:
    """The scores in float64 of the same rounded numbers."""
    queries, landmarks, scale = inputs

    def exact(x: mx.array) -> xkv.ops.types.Array:
        if x.dtype == mx.uint32:
            return reference.from_numpy(np.array(x).view(np.int32))
        return reference.from_numpy(np.array(x.astype(mx.float32)).astype(np.float64))

    same = landmarks._replace(
        arrays=tuple(map(exact, landmarks.arrays)),
        is_outlier=reference.from_numpy(np.array(landmarks.is_outlier)),
    )
    return reference.to_numpy(reference.chunk_scores(exact(queries), same, scale))


def scores_error(got: mx.array, want: np.ndarray) -> float:
    """Relative error of the chunks that are no outliers; the others are -1."""
    assert got.dtype == mx.float32 and got.shape == want.shape
    is_outlier = want == -1
    assert (np.array(got)[is_outlier] == -1).all()
    return relative_error(np.array(got)[~is_outlier], want[~is_outlier])


def kernel_error(metal: MLXBackend, reference: xkv.ops.backend.Backend, inputs: Inputs) -> float:
    """Error of the kernel through the backend, the path asserted."""
    got = metal.chunk_scores(*inputs)
    assert metal.kernels.last_path["chunk_scores"] == ChunkScores.name
    return scores_error(got, reference_scores(reference, inputs))


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_scores_match_the_reference(metal, reference, dtype, bits):
    # the scores are float32 whatever the inputs' dtype, and so is their error
    inputs = make_inputs(150, dtype, bits=bits)
    assert kernel_error(metal, reference, inputs) < TOLERANCE["float32"]


@pytest.mark.parametrize("n_chunks", [1, TILE - 1, TILE, TILE + 1, 33 * TILE + 1])
def test_chunk_scores_at_the_edges_of_tiles(metal, reference, n_chunks):
    inputs = make_inputs(n_chunks, batch=1)
    assert kernel_error(metal, reference, inputs) < TOLERANCE["float32"]


@pytest.mark.parametrize("gqa", [1, 4, 8, 16])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_chunk_scores_take_any_gqa_ratio(metal, reference, head_dim, gqa):
    inputs = make_inputs(70, "float16", bits=4, head_dim=head_dim, n_heads=2 * gqa)
    assert kernel_error(metal, reference, inputs) < TOLERANCE["float32"]


@pytest.mark.parametrize("bits", [8, 4])
def test_chunk_scores_read_small_groups(metal, reference, bits):
    inputs = make_inputs(40, "bfloat16", bits=bits, group_size=32, head_dim=128)
    assert kernel_error(metal, reference, inputs) < TOLERANCE["float32"]


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
def test_chunk_scores_do_not_depend_on_the_order_of_threads(emulated, reference, schedule):
    with emulator.settings(checked=False, schedule=schedule, seed=5):
        error = kernel_error(emulated, reference, make_inputs(300))
    assert error < TOLERANCE["float32"]


def test_chunk_scores_fit_threadgroup_memory_at_their_limits(emulated):
    with emulator.settings(checked=False) as launches:
        chunk_scores.KERNEL(*make_inputs(8, head_dim=256, n_heads=32, bits=16))
    assert [launch.threadgroup_bytes for launch in launches] == [24 * 1024, 128]


def test_selected_chunks_are_those_of_the_plain_operations(metal):
    queries, landmarks, scale = make_inputs(300)
    chosen = [
        np.sort(np.array(backend.select_chunks(queries, landmarks, 160, scale)), axis=-1)
        for backend in (metal, MLXBackend(kernels="off"))
    ]
    assert metal.kernels.last_path["chunk_scores"] == ChunkScores.name
    np.testing.assert_array_equal(*chosen)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (make_inputs(8, head_dim=32, bits=16), "head_dim 64, 128, 256, not 32"),
        (make_inputs(8, n_heads=34), "up to 16 query heads to a KV head, not 17"),
        (make_inputs(8, bits=6), "4, 8 or 16 bits, not 6"),
        (make_inputs(8, group_size=128, head_dim=128), "groups of 32 or 64 features, not 128"),
        (make_inputs(8)[:1] + make_inputs(8, "float16")[1:], "arrays of one dtype"),
    ],
)
def test_chunk_scores_say_why_not(metal, inputs, sentence):
    with pytest.raises(xkv.InputError, match=sentence):
        metal.chunk_scores(*inputs)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
# name: (which source, what is replaced, by what)
FAULTS = {
    "barrier-after-queries-deleted": ("PRODUCTS", BARRIER + "\n\n    for (uint c0", "for (uint c0"),
    "barrier-after-products-deleted": ("PRODUCTS", BARRIER + "\n\n    for (uint h", "for (uint h"),
    "barrier-after-heads-deleted": ("SCORES", BARRIER, ""),
    "last-chunk-dropped": ("PRODUCTS", "n_chunks - first)", "n_chunks - first - 1)"),
    "scale-dropped": ("PRODUCTS", ") * scale;", ");"),
    "another-kv-head": ("PRODUCTS", "ulong(pair) * n_chunks", "ulong(pair ^ 1) * n_chunks"),
    "another-query-head": ("PRODUCTS", "query[h][(j", "query[0][(j"),
    "another-batch": ("PRODUCTS", "queries[pair *", "queries[threadgroup_position_in_grid.y *"),
    "next-row": ("PRODUCTS", "first + min(c, n - 1)", "first + min(c + 1, n - 1)"),
    "bias-dropped": ("PRODUCTS", "step, bias)", "step, 0)"),
    "another-group": ("PRODUCTS", "part * 16 / GROUP", "0"),
    "numbers-out-of-order": ("PRODUCTS", "(i * BITS % 32)", "(32 - BITS - i * BITS % 32)"),
    "last-tile-dropped": ("SCORES", "t < n_tiles", "t < n_tiles - 1"),
    "heads-added": ("SCORES", "best = max(best,", "best = (best +"),
    "outliers-kept": ("SCORES", "? -1.0f : best", "? best : best"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(emulated, reference, monkeypatch, fault):
    name, old, new = FAULTS[fault]
    source = getattr(chunk_scores, name)
    assert old in source
    monkeypatch.setattr(chunk_scores, name, source.replace(old, new))
    common.build.cache_clear()
    inputs = make_inputs(150, head_dim=128)
    want = reference_scores(reference, inputs)
    try:
        got = np.array(chunk_scores.KERNEL(*inputs))
    except emulator.MetalKernelError as error:
        assert error.kind != "compile"
        return
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert not error < 10 * TOLERANCE["float32"], f"{fault} gives an error of {error:.1e} only"
