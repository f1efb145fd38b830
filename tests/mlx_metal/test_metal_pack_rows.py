"""The Metal kernel that packs rows into 8 bits, against its twin and with planted faults."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import pack_rows
from xkv.checks.decode_cases import DTYPES
from xkv.ops.slots import LARGEST

pytest_plugins = ["tests.metal_device"]


def make_rows(metal: MLXBackend, n_rows: int, key_dim: int, value_dim: int, dtype: str) -> list:
    """Views whose features are two numbers apart, NaN between them; one row is zeros."""
    found = []
    for seed, dim in enumerate((key_dim, value_dim)):
        x = metal.normal((2, 3, n_rows, dim), seed) * 4.0 ** metal.normal((2, 3, n_rows, 1), 9)
        x[1, 2, 0] = 0
        wide = mx.full((*x.shape[:3], 2 * dim), mx.nan, getattr(mx, dtype))
        wide[..., ::2] = x.astype(wide.dtype)
        found.append(wide[..., ::2])
    return found


def is_right(metal: MLXBackend, rows: list) -> bool:
    """Whether numbers and scales are those by numpy, the path asserted."""
    numbers, scales = metal.pack_rows(*rows)
    assert metal.kernels.last_path["pack_rows"] == "pack_rows"
    assert (numbers.dtype, scales.dtype) == (mx.int8, mx.float32)
    parts = [metal.to_numpy(x).astype(np.float32) for x in rows]
    want = [np.abs(x).max(-1) / np.float32(LARGEST) for x in parts]
    codes = [
        np.rint(x / np.where(scale > 0, scale, 1)[..., None])
        for x, scale in zip(parts, want, strict=True)
    ]
    same = np.array_equal(np.array(numbers), np.concatenate(codes, axis=-1))
    return same and np.array_equal(np.array(scales), np.stack(want, axis=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (80, 96), (5, 33)])
def test_pack_rows_is_right(metal, dims, dtype):
    assert is_right(metal, make_rows(metal, 7, *dims, dtype))


@pytest.mark.parametrize("n_rows", [1, 31, 32, 33])
def test_pack_rows_takes_any_number_of_rows(metal, n_rows):
    assert is_right(metal, make_rows(metal, n_rows, 64, 64, "float32"))


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_pack_rows_does_not_depend_on_the_schedule(emulated, schedule):
    with emulator.settings(checked=False, schedule=schedule, seed=3):
        assert is_right(emulated, make_rows(emulated, 5, 64, 72, "float16"))


REFUSED = {
    "no-rows": ((0, 64, mx.float16), "no rows"),
    "float64": ((4, 64, mx.int32), "float32, float16, bfloat16, not int32"),
    "few-numbers": ((1, 5, mx.float32), "8 elements or more, not 5"),
}


@pytest.mark.parametrize(("given", "sentence"), REFUSED.values(), ids=REFUSED)
def test_why_not_says_what_the_kernel_does_not_take(given, sentence):
    n_rows, dim, dtype = given
    rows = mx.zeros((1, 1, n_rows, dim), dtype)
    assert sentence in pack_rows.KERNEL.why_not(rows, rows)


def test_one_kernel_takes_all_sizes(emulated):
    with emulator.settings() as launches:
        for dims in ((64, 64), (80, 33)):
            pack_rows.KERNEL(*make_rows(emulated, 5, *dims, "float16"))
    assert len({(launch.name, launch.text) for launch in launches}) == 1


# Name: the text of the source that is replaced, by what.
FAULTS = {
    "values-as-keys": ("? keys + batch", "? values + batch"),
    "first-batch-again": ("batch * keys", "0 * keys"),
    "first-head-again": ("head * keys_", "0 * keys_"),
    "values-of-the-first-head": ("head * values_", "0 * values_"),
    "first-row-again": ("row * keys_", "0 * keys_"),
    "values-of-the-first-row": ("row * values_", "0 * values_"),
    "features-as-if-copied": ("float(from[i * stride]) / divisor", "float(from[i]) / divisor"),
    "negative-largest": ("fabs(float(", "(float("),
    "a-lane's-largest": ("simd_max(largest)", "largest"),
    "largest-of-the-first-lanes": ("i < dim; i += 32) largest", "i < 32; i += 32) largest"),
    "truncated": ("rint(", "("),
    "last-feature-unwritten": ("i < dim; i += 32) to", "i < dim - 1; i += 32) to"),
    "values-over-keys": ("+ part * key_dim;", ";"),
    "scales-of-the-other-part": ("at * 2 + part", "at * 2 + 1 - part"),
    "scales-unwritten": ("lane == 0)", "lane == 32)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(metal, plant, name):
    plant((pack_rows, "SOURCE"), *FAULTS[name])
    metal.kernels.check = lambda *args: None
    try:
        assert not is_right(metal, make_rows(metal, 5, 64, 72, "float32"))
    except emulator.MetalKernelError as found:
        assert found.kind != "compile"
