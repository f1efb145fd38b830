"""Rotary embeddings: ours against mlx-lm's modules, the inverse, and parity."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import rope_utils

from xkv import InputError, RopeSpec
from xkv.backends.mlx_metal.model.ropes import rope_of
from xkv.checks.tolerances import TOLERANCE, relative_error

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODULES = {
    "plain": nn.RoPE(32, base=500.0),
    "partial": nn.RoPE(16, base=500.0),
    "traditional": nn.RoPE(32, traditional=True, base=500.0),
    "linear": rope_utils.initialize_rope(32, 500.0, False, {"type": "linear", "factor": 4.0}),
    "llama3": rope_utils.initialize_rope(32, 500.0, False, LLAMA3),
    "yarn": rope_utils.YarnRoPE(32, max_position_embeddings=256, scaling_factor=4.0, mscale=0.7),
    "su": rope_utils.SuScaledRoPE(
        16, 500.0, 256, 64, long_factor=[1.0 + i / 4 for i in range(8)], short_factor=1.0
    ),
    "proportional": rope_utils.ProportionalRoPE(32, 16, base=500.0, factor=2.0),
}
if hasattr(rope_utils, "DynamicNTKScalingRoPE"):  # since mlx-lm 0.32
    MODULES["dynamic"] = rope_utils.DynamicNTKScalingRoPE(32, 64, False, 500.0, 2.0)
OFFSET = 90


def rows(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 3, 40, 32)).astype(np.float32)


@pytest.mark.parametrize("name", MODULES)
def test_rope_is_the_modules_rotation(name, mlx_backend):
    x = mx.array(rows())
    spec = rope_of(MODULES[name]).at(OFFSET + 40)
    got = mlx_backend.rope(x, OFFSET, spec)
    want = MODULES[name](x, offset=OFFSET)
    assert relative_error(np.array(got), np.array(want)) < TOLERANCE["float32"]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rope_inverse_undoes_the_module(name, dtype, mlx_backend):
    x = mx.array(rows()).astype(getattr(mx, dtype))
    rotated = MODULES[name](x, offset=OFFSET)
    spec = rope_of(MODULES[name]).at(OFFSET + 40)
    got = mlx_backend.to_numpy(mlx_backend.rope(rotated, OFFSET, spec, inverse=True))
    assert relative_error(got, mlx_backend.to_numpy(x).astype(np.float64)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("inverse", [False, True])
def test_rope_parity_with_the_reference(name, inverse, mlx_backend, reference):
    spec = rope_of(MODULES[name]).at(OFFSET + 40)
    want = reference.rope(reference.from_numpy(rows().astype(np.float64)), OFFSET, spec, inverse)
    for positions in (OFFSET, mx.arange(OFFSET, OFFSET + 40)):
        got = mlx_backend.rope(mx.array(rows()), positions, spec, inverse)
        assert relative_error(np.array(got), want.numpy()) < TOLERANCE["float32"]


def test_rope_shifted_by_one_position_exceeds_the_tolerance_tenfold(mlx_backend, reference):
    spec = rope_of(MODULES["plain"])
    want = reference.rope(reference.from_numpy(rows().astype(np.float64)), OFFSET, spec)
    got = mlx_backend.rope(mx.array(rows()), OFFSET + 1, spec)
    assert relative_error(np.array(got), want.numpy()) > 10 * TOLERANCE["float32"]


@pytest.mark.skipif("dynamic" not in MODULES, reason="mlx-lm has it since 0.32")
def test_dynamic_rope_changes_with_the_length():
    rope = rope_of(MODULES["dynamic"])
    assert rope.at(10) == rope.at(64) != rope.at(65)


def test_unknown_rope_class_is_refused_by_name():
    class SpiralRoPE(nn.Module):
        pass

    with pytest.raises(InputError, match="SpiralRoPE is not known"):
        rope_of(SpiralRoPE())


def test_standard_spec_holds_positions_per_radian():
    assert RopeSpec.standard(4, 100.0, position_scale=0.5).freqs == (2.0, 20.0)
