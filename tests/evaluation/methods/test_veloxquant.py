"""VeloxQuant, by the bytes that stay alive."""

from __future__ import annotations

import sys
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

import xkv
from tests.evaluation.methods.documents import (
    make_document,
    numpy_rows,
)
from xkv import InputError
from xkv.evaluation.methods import parse_method


class HoardingCache(KVCache):
    """Gives rows back halved and keeps the exact ones as well."""

    compressed_key_bytes = compressed_value_bytes = 10

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.exact = keys
        return super().update_and_fetch(keys / 2, values / 2)


def test_veloxquant_counts_what_stays_alive(monkeypatch):
    base = ModuleType("veloxquant_mlx.cache.base")
    base.KVCacheConfig = lambda **options: options
    base.KVCacheBuilder = type(
        "KVCacheBuilder",
        (),
        {"for_model": staticmethod(lambda model, _: [HoardingCache() for _ in model.layers])},
    )
    for name in ("veloxquant_mlx", "veloxquant_mlx.cache"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "veloxquant_mlx.cache.base", base)
    backend = xkv.load_backend("mlx")
    document = make_document(backend, 1024, n_layers=2, head_dim=64, dtype="float16")
    compressed = parse_method("veloxquant").compress(document, None)
    assert compressed.held_bytes == pytest.approx(1.5 * document.dense_bytes, rel=0.02)
    assert compressed.detail.startswith("40 bytes")
    for i, prefix in enumerate(compressed.start()):
        for name in ("keys", "values"):
            got = backend.to_numpy(getattr(prefix, f"prefix_{name}"))
            np.testing.assert_array_equal(got, numpy_rows(document, name)[i] / 2)


def test_veloxquant_is_refused_where_it_cannot_run(monkeypatch, reference, mlx_backend):
    with pytest.raises(InputError, match="runs on MLX only"):
        parse_method("veloxquant").compress(make_document(reference, 50), None)
    monkeypatch.setitem(sys.modules, "veloxquant_mlx", None)
    with pytest.raises(InputError, match="pip install veloxquant-mlx"):
        parse_method("veloxquant").compress(make_document(mlx_backend, 50), None)
