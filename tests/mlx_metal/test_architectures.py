"""Every architecture of mlx-lm: exact at full rank or refused by name, never silently wrong."""

from __future__ import annotations

from importlib.metadata import version

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from scripts.support_table import TABLE, make_table, rows_of
from tests.architectures import CONFIGS, MODEL_FILES, NOT_BUILT, build
from xkv import InputError, XKVConfig
from xkv.backends.mlx_metal.model.enable import disable, enable
from xkv.backends.mlx_metal.model.enabled import lowrank_cache
from xkv.cache.layer import LayerView

FULL_RANK = XKVConfig(rank_k="full", rank_v="full", group_size=2, sinks=2, window=8, max_tail=8)
PROMPT = np.random.default_rng(0).integers(1, 250, 61).tolist()
IS_TABLES_VERSION = f"mlx-lm {version('mlx-lm')}:" in TABLE.read_text()
TOLERANCE = {"muse_spark": 4e-4}  # its tiny model multiplies in bfloat16


def decode(model) -> tuple[list[int], np.ndarray, list]:
    """Six tokens after a prompt in chunks of 20, their log probabilities, and the cache."""
    cache = make_prompt_cache(model)
    steps = list(
        generate_step(
            mx.array(PROMPT), model, max_tokens=6, prefill_step_size=20, prompt_cache=cache
        )
    )
    logprobs = np.stack([np.array(x.astype(mx.float32)) for _, x in steps])
    return [token for token, _ in steps], logprobs, cache


def test_every_model_file_is_covered():
    assert set(MODEL_FILES) <= set(CONFIGS) | set(NOT_BUILT)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) & set(MODEL_FILES)))
def test_full_rank_equals_the_full_cache(name):
    try:
        model = build(name)
        tokens, logprobs, _ = decode(model)
    except (AttributeError, TypeError, ValueError):
        if IS_TABLES_VERSION:
            raise
        pytest.skip("this version of mlx-lm cannot run the configuration itself")
    try:
        report = enable(model, FULL_RANK)
    except InputError as error:
        reason = "no layer with a full KV cache" if IS_TABLES_VERSION else "--group-size 0"
        assert (name in str(error) or not IS_TABLES_VERSION) and reason in str(error)
        assert decode(model)[0] == tokens
        return
    got_tokens, got, cache = decode(model)
    disable(model)
    layers = lowrank_cache(cache).layers.values()
    assert len(layers) == report.count("compressed") + report.count("bypassed")
    # the 6 replies include a fold: everything but sinks, window and tail is compressed
    assert all(layer.is_compressed for layer in layers)
    assert got_tokens == tokens
    error = np.linalg.norm(got - logprobs) / np.linalg.norm(logprobs)
    assert error <= TOLERANCE.get(name, 5e-6)
    assert decode(model)[0] == tokens
    assert not any(hasattr(layer, "layer") for layer in make_prompt_cache(model))


def test_low_rank_reaches_the_answers():
    """What the test above compares is not blind to the compression."""
    model = build("qwen3")
    _, logprobs, _ = decode(model)
    enable(model, XKVConfig(rank_k=2, rank_v=2, group_size=2, sinks=2, window=8, max_tail=8))
    _, got, _ = decode(model)
    disable(model)
    assert np.linalg.norm(got - logprobs) > 1e-2 * np.linalg.norm(logprobs)


@pytest.mark.skipif(
    not IS_TABLES_VERSION, reason="the table is of another version of mlx-lm than the one installed"
)
def test_support_table_is_current():
    assert TABLE.read_text() == make_table(rows_of(sorted(CONFIGS))), (
        "run: python -m scripts.support_table"
    )


def test_steps_of_an_mla_model_multiply_the_basis_into_queries(monkeypatch):
    model = build("deepseek_v3")
    _, want, _ = decode(model)
    calls, attend = [], LayerView.attend_latent

    def counted(view, queries, scale, bias):
        calls.append(view.index)
        return attend(view, queries, scale, bias)

    monkeypatch.setattr(LayerView, "attend_latent", counted)
    enable(model, FULL_RANK)
    _, got, cache = decode(model)
    disable(model)
    # the first step comes out of the prefill's last call
    assert len(calls) >= 5 * len(lowrank_cache(cache).layers)
    np.testing.assert_allclose(got, want, atol=1e-3)
