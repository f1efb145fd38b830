"""Columns weighed by what attention reads of them."""

from __future__ import annotations

import copy

import mlx.core as mx
import numpy as np
import pytest
import torch

import xkv
from tests.store.test_codec import HEAD_DIM, N_KV_HEADS, SPEC
from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv import InputError, RopeSpec, XKVConfig, load_backend
from xkv.cache.lowrank_cache import LowRankCache
from xkv.store.weighting import column_weights, head_energy, pair_means


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request):
    return load_backend(request.param)


def make_cache(backend, rows: np.ndarray, **options) -> LowRankCache:
    """Keys and values alike, one array a layer ``[1, n_kv_heads, L, head_dim]``, not rotated."""
    config = XKVConfig(attention="dense", sinks=0, window=16, **options)
    cache = LowRankCache(backend, config, [range(len(rows))])
    for layer, x in zip(cache.layers.values(), rows, strict=True):
        layer.append(backend.from_numpy(x), backend.from_numpy(x), None)
    return cache


def errors(cache: LowRankCache, rows: np.ndarray) -> list[float]:
    """Relative error of each layer's values."""
    got = [cache.backend.to_numpy(layer.dense()[1]) for layer in cache.layers.values()]
    return [
        float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(got, rows, strict=True)
    ]


def noise(n_layers: int = 2, n_tokens: int = 300) -> np.ndarray:
    shape = (n_layers, 1, N_KV_HEADS, n_tokens, HEAD_DIM)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_norm_serves_quiet_layers_as_well_as_loud_ones(backend):
    rows = noise()
    rows[1] *= 0.1
    found = {}
    for weighting in ("off", "norm"):
        cache = make_cache(backend, rows, rank_k=64, rank_v=64, weighting=weighting)
        cache.settle()
        found[weighting] = errors(cache, rows)
    assert found["off"][1] > found["off"][0] + 0.1
    assert found["norm"][0] == pytest.approx(found["norm"][1], rel=0.1)


def test_attention_keeps_what_queries_read(backend):
    rows = noise()
    cache = make_cache(backend, rows, rank_k=64, rank_v=64, weighting="attention")
    queries = np.full((1, 4, 20, HEAD_DIM), 0.01, np.float32)
    queries[..., :8] = 3.0
    energy = np.full((N_KV_HEADS, HEAD_DIM), 0.01, np.float32)
    energy[1] = 1.0
    for layer in cache.layers.values():
        layer.watch(backend.from_numpy(queries[:, :, :12]))
        layer.watch(backend.from_numpy(queries[:, :, 12:]))
        layer.rows = layer.rows._replace(output_energy=backend.from_numpy(energy))
    want = 2 * (queries**2).sum((0, 2)).reshape(N_KV_HEADS, 2, HEAD_DIM)[:, 0]
    np.testing.assert_allclose(backend.to_numpy(cache.layers[0].rows.query_energy), want, rtol=1e-5)
    cache.settle()
    lost = []
    for dense in zip(*(layer.dense() for layer in cache.layers.values()), strict=True):
        numbers = np.stack([backend.to_numpy(x) for x in dense])
        lost.append((numbers - rows) ** 2)
    keys, values = lost
    assert keys[..., :8].mean() < 0.02 * keys[..., 8:].mean()
    assert values[:, :, 1].mean() < 0.7 * values[:, :, 0].mean()


def test_rotation_leaves_the_weights_of_keys_alone(backend):
    queries = np.random.default_rng(0).standard_normal((1, 4, 50, HEAD_DIM)).astype(np.float32)
    plain = backend.from_numpy(queries)
    for spec in (SPEC, RopeSpec.standard(32, 1e4, traditional=True)):
        means = [
            backend.to_numpy(pair_means(backend, head_energy(backend, x, N_KV_HEADS), spec))
            for x in (plain, backend.rope(plain, 100, spec))
        ]
        np.testing.assert_allclose(*means, rtol=1e-4)


def test_attention_that_was_not_seen_is_refused(backend):
    rows = backend.from_numpy(np.ones((1, 5, N_KV_HEADS, HEAD_DIM), np.float32))
    with pytest.raises(InputError, match="queries were not seen"):
        column_weights(backend, "attention", "keys", rows, None, SPEC)
    with pytest.raises(InputError, match="no known output projection"):
        column_weights(backend, "attention", "values", rows, None, SPEC)


def test_both_frameworks_see_the_same_weights(tmp_path):
    """A whole model's prompt: queries through the seam, projections by name."""
    import mlx_lm
    from transformers import AutoModelForCausalLM

    folder = str(write_checkpoint(tmp_path, ARCHITECTURES["llama"]))
    options = {"compression": 2, "weighting": "attention", "window": 16, "latent_bits": 16}
    prompt = np.random.default_rng(0).integers(300, 1000, 200).tolist()
    model = mlx_lm.load(folder)[0]
    xkv.enable(model, **options)
    caches = model.make_cache()
    mx.eval(model(mx.array([prompt]), cache=caches))
    mine = [cache.layer for cache in caches]
    theirs_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cache = xkv.torch_cache(theirs_model, **options)
    with torch.inference_mode():
        name = (
            "cache" if "cache" in theirs_model.forward.__code__.co_varnames else "past_key_values"
        )
        theirs_model.model(torch.tensor([prompt]), **{name: cache})
    theirs = [layer.parts[0] for layer in cache.layers]
    xkv.disable(model)
    for ours, other in zip(mine, theirs, strict=True):
        for field in ("query_energy", "output_energy"):
            got, want = (np.array(getattr(x.rows, field)) for x in (ours, other))
            np.testing.assert_allclose(got, want, rtol=2e-3)
    again = copy.deepcopy(mine[0])
    assert again.rows.query_energy is not None
