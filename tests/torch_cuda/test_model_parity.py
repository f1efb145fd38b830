"""The whole method on the bundled model: MLX in float32 against PyTorch in float64."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
import transformers
from mlx_lm.models.cache import make_prompt_cache as make_native_cache

from xkv import XKVConfig, load_backend
from xkv.backends.mlx_metal import attention_seam, make_prompt_cache
from xkv.backends.torch_cuda.model.attention import xkv_attention
from xkv.backends.torch_cuda.model.cache import torch_cache
from xkv.checks.tolerances import relative_error
from xkv.tiny import CHECKPOINT_DIR, make_document

N_STEPS = 4
RANKS = {"window": 24, "group_size": 8, "rank_k": 48, "rank_v": 72}
CONFIGS = {
    "full rank": XKVConfig(rank_k="full", rank_v="full", window=24, attention="exact"),
    # ranks, as bytes of float64 are others, and no few bits: codes flip with the last digit of the
    # frameworks' arithmetic
    "ranks": XKVConfig(**RANKS),
    "ranks with a working set": XKVConfig(budget=128, **RANKS),
}
LOGITS_TOLERANCE = 1e-4
"""Eight layers in float32 measured 1e-6 to 1.5e-5; compression itself changes logits by 3e-2."""


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    document = make_document(seed=5, n_tokens=400)
    message = {"role": "user", "content": f"{document.text} {document.facts[1].question}"}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def mlx_model():
    model, _ = mlx_lm.load(str(CHECKPOINT_DIR))
    model.set_dtype(mx.float32)
    return model


@pytest.fixture(scope="module")
def torch_model():
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT_DIR, dtype=torch.float64)
    return model.eval()


def mlx_steps(model, tokens, config) -> np.ndarray:
    """Logits of the greedy steps after the prompt, ``[N_STEPS, vocabulary]``."""
    backend = load_backend("mlx", kernels="off")
    cache = make_native_cache(model)
    if config is not None:
        cache = make_prompt_cache(model, config, backend=backend)
    logits = []
    with attention_seam():
        model(mx.array([tokens[:-1]]), cache=cache)
        token = tokens[-1]
        for _ in range(N_STEPS):
            logits.append(np.array(model(mx.array([[token]]), cache=cache)[0, -1]))
            token = int(logits[-1].argmax())
    return np.stack(logits)


@torch.inference_mode()
def torch_steps(model, tokens, config) -> np.ndarray:
    cache = transformers.DynamicCache(config=model.config)
    if config is not None:
        cache = torch_cache(model, config, backend=load_backend("torch", device="cpu"))
    logits = []
    with xkv_attention(model):
        model(torch.tensor([tokens[:-1]]), cache=cache)
        token = tokens[-1]
        for _ in range(N_STEPS):
            step = model(torch.tensor([[token]]), cache=cache)
            logits.append(step.logits[0, -1].numpy())
            token = int(logits[-1].argmax())
    return np.stack(logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_agree_across_backends(tokens, mlx_model, torch_model, name):
    got = mlx_steps(mlx_model, tokens, CONFIGS[name])
    want = torch_steps(torch_model, tokens, CONFIGS[name])
    assert relative_error(got, want) < LOGITS_TOLERANCE
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("steps", [mlx_steps, torch_steps])
def test_full_rank_logits_are_those_of_the_full_cache(request, tokens, steps):
    model = request.getfixturevalue("mlx_model" if steps is mlx_steps else "torch_model")
    want = steps(model, tokens, None)
    tolerance = LOGITS_TOLERANCE if steps is mlx_steps else 1e-9
    assert relative_error(steps(model, tokens, CONFIGS["full rank"]), want) < tolerance
    # the compressed form must differ, or the comparison shows nothing
    assert relative_error(steps(model, tokens, CONFIGS["ranks"]), want) > 10 * tolerance
