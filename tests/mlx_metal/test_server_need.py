"""What a request is said to take before it is computed is no less than what it then holds."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import pytest

import xkv
from tests.mlx_metal.enabled_model import EXACT, LOSSY, PROMPT, greedy, new_cache
from xkv.backends.mlx_metal.model.enabled import enabled_state
from xkv.backends.mlx_metal.server.budget import PromptCache, arrays_held
from xkv.backends.mlx_metal.server.need import RequestBytes

CONFIGS: dict[str, dict[str, Any]] = {
    "full-rank": EXACT,
    "ranks": LOSSY,
    "ratio": {"compression": 2, "window": 16, "max_tail": 16, "group_size": 2},
    "ratio-in-16-bits": {"compression": 2, "latent_bits": 16, "window": 16, "group_size": 2},
}


@pytest.mark.parametrize("n_answer", [1, 40])
@pytest.mark.parametrize("n_prompt", [5, 40, 200, 900])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_request_holds_no_more_than_it_was_said_to_need(
    model: nn.Module, name: str, n_prompt: int, n_answer: int
) -> None:
    xkv.enable(model, **CONFIGS[name])
    enabled = enabled_state(model)
    assert enabled is not None
    need = RequestBytes.of(enabled, n_prompt, n_answer, is_layerwise=True)
    cache = new_cache(model)
    greedy(model, cache, (PROMPT * 5)[:n_prompt], n_answer)
    assert sum(arrays_held(cache).values()) <= need.cache


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("n_shared", [100, 700])
def test_what_a_request_shares_and_does_not_use_is_added(
    model: nn.Module, name: str, n_shared: int
) -> None:
    xkv.enable(model, **CONFIGS[name])
    enabled = enabled_state(model)
    assert enabled is not None
    first = PROMPT * 30
    long = new_cache(model)
    tokens = [*first, *greedy(model, long, first, 1)]
    cached, more = PromptCache(10), []
    cached.holds_more = more.append
    cached.insert_cache("m", tokens[: long[0].offset], long)
    # so few more that nothing is stored anew
    prompt = [*first[:n_shared], *PROMPT[:5][::-1]]
    branch, rest = cached.fetch_nearest_cache("m", prompt)
    assert branch is not None and len(rest) == 5
    greedy(model, branch, rest, 1)
    need = RequestBytes.of(enabled, len(prompt), 1, is_layerwise=True)
    held = sum(arrays_held(branch).values())
    assert len(more) == 1 and more[0] > 0
    assert held <= need.cache + more[0]
