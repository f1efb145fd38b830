"""Small launches on the emulator: a sum, and any lines over 32 threads."""

import mlx.core as mx
import numpy as np

from tests import metal_emulator as emulator
from tests.metal_emulator import sample_kernels


def to_float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


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
