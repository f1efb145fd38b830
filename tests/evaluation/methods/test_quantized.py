"""The quantized cache beside mlx-lm's own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import QuantizedKVCache

import xkv
from tests.evaluation.methods.documents import (
    N_KV_HEADS,
    make_document,
)
from xkv import InputError
from xkv.evaluation.methods import parse_method


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_rows_are_those_of_mlx(backend, bits, dtype):
    document = make_document(backend, 50, n_layers=2, head_dim=128, dtype=dtype)
    compressed = parse_method(f"quantized:bits={bits}").compress(document, None)
    exact = make_document(xkv.load_backend("mlx"), 50, n_layers=2, head_dim=128, dtype=dtype)
    for i, prefix in enumerate(compressed.start()):
        for rows, got in ((exact.keys, prefix.prefix_keys), (exact.values, prefix.prefix_values)):
            packed = mx.quantize(rows[i], group_size=64, bits=bits)
            want = mx.dequantize(*packed, group_size=64, bits=bits).astype(mx.float32)
            np.testing.assert_array_equal(backend.to_numpy(got), np.array(want))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_bytes_are_those_of_mlx_lm(backend, bits):
    document = make_document(backend, 512, n_layers=2, head_dim=64, dtype="float16")
    cache = QuantizedKVCache(group_size=64, bits=bits)
    cache.update_and_fetch(*[mx.zeros((1, N_KV_HEADS, 512, 64), mx.float16)] * 2)
    held = parse_method(f"quantized:bits={bits}").compress(document, None).held_bytes
    assert held == 2 * cache.nbytes


def test_quantized_refuses_heads_that_are_no_multiple_of_a_group(reference):
    with pytest.raises(InputError, match="heads of 32 features"):
        parse_method("quantized").compress(make_document(reference, 50), None)
