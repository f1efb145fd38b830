"""A served model with states that cannot be trimmed: retries, edits and branches are cached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mlx_lm.utils import load_tokenizer

from tests.architecture_configs import CONFIGS
from tests.serving import CHAT, Server
from tests.tiny_models import write_checkpoint
from xkv.tiny import CHECKPOINT_DIR, make_document

RULES, LAST, OTHER = (make_document(seed, 200).text for seed in range(3))


@pytest.fixture(scope="module", params=["qwen3_next", "gemma3_text"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    # random logits are of tokens that the tokenizer has
    n_tokens = len(load_tokenizer(CHECKPOINT_DIR).get_vocab())
    config = CONFIGS[request.param] | {"vocab_size": n_tokens}
    path = write_checkpoint(tmp_path_factory.mktemp("model") / request.param, config)
    exact = ["--rank-k", "full", "--rank-v", "full", "--window", "24", "--no-calibration"]
    with Server("--model", str(path), *exact) as running:
        yield running


def ask(server: Server, *texts: str) -> tuple[str, int, int]:
    """The answer to rules, questions and answers in turn; tokens of the prompt, and cached ones."""
    roles = ["system", *["user", "assistant"] * len(texts)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    status, answer = server.request(CHAT, {"messages": messages, "max_tokens": 8})
    assert status == 200, answer
    usage = answer["usage"]
    text = answer["choices"][0]["message"]["content"] or ""
    return text, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def test_what_two_prompts_share_is_cached(server: Server) -> None:
    text, n_prompt, n_cached = ask(server, RULES, LAST)
    assert n_cached < 20
    again, _, n_cached = ask(server, RULES, LAST)
    assert again == text and n_prompt - 20 <= n_cached < n_prompt
    # a branch, and the same from nothing
    text, n_branch, n_cached = ask(server, RULES, OTHER)
    n_rules = n_cached
    assert n_branch // 3 < n_rules < n_branch
    # the last message of a longer conversation is edited
    answered = RULES, OTHER, "Yes."
    ask(server, *answered, "And then?")
    _, _, n_cached = ask(server, *answered, "And what else was there, if anything?")
    assert n_branch - 20 <= n_cached
    _, _, n_cached = ask(server, RULES, "Well?")
    assert n_cached == n_rules
