"""The server in a process of its own, asked over HTTP as clients do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import openai
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

import xkv
from tests.architectures import build
from tests.serving import Server, float32_model
from xkv.backends.mlx_metal.server.budget import PromptCache
from xkv.tiny import Document, make_document

LIMIT_BYTES = 18_000_000
SLACK_BYTES = 1_000_000
"""For what is not a cache: sampling state, constants."""
RANKS = [
    "--rank-k",
    "96",
    "--rank-v",
    "144",
    "--window",
    "32",
    "--max-tail",
    "32",
    "--group-size",
    "4",
]
DOCUMENT = make_document(1, 1200)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float32_model(tmp_path_factory.mktemp("model") / "float32")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with Server("--model", str(model), *RANKS, "--prompt-cache-bytes", str(LIMIT_BYTES)) as running:
        yield running


def question(document: Document, fact: int = 0) -> str:
    return f"{document.text} {document.facts[fact].question}"


def text_of(answer: Any) -> str:
    return answer.choices[0].message.content


def cached_tokens(answer: Any) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


def test_chat_turns_and_other_questions_reuse_the_compressed_prompt(server: Server) -> None:
    first, second = DOCUMENT.facts[:2]
    answer = server.ask(question(DOCUMENT))
    assert text_of(answer) == first.answer
    assert cached_tokens(answer) == 0
    report = server.memory()
    assert report["sequences"] == 1
    assert report["ratio"] > 2
    again = server.ask(question(DOCUMENT))
    assert cached_tokens(again) == again.usage.prompt_tokens - 1
    turn = server.ask(question(DOCUMENT), first.answer, second.question)
    assert text_of(turn) == second.answer
    assert cached_tokens(turn) == answer.usage.total_tokens
    other = server.ask(question(DOCUMENT, 1))
    assert text_of(other) == second.answer
    assert 1200 < cached_tokens(other) < other.usage.prompt_tokens
    both = server.memory()
    assert both["sequences"] == 2
    assert both["dense_bytes"] > 1.9 * report["dense_bytes"]
    assert both["held_bytes"] < 1.5 * report["held_bytes"]


@pytest.mark.parametrize("is_stream", [True, False])
def test_disconnect_in_prefill_drops_the_request(server: Server, is_stream: bool) -> None:
    before = server.memory()
    content = question(make_document(20 + is_stream, 1500))
    body = {"messages": [{"role": "user", "content": content}], "stream": is_stream}
    connection = server.post(json.dumps(body).encode())
    while not server.memory()["reserved_bytes"]:
        time.sleep(0.02)
    connection.close()
    after = server.settled_memory()
    assert after["tokens"] == before["tokens"]
    assert after["active_memory_bytes"] <= before["active_memory_bytes"] + SLACK_BYTES
    assert text_of(server.ask(question(DOCUMENT))) == DOCUMENT.facts[0].answer


def test_prompt_that_is_cached_as_a_whole_is_continued() -> None:
    model = build("qwen3")
    xkv.enable(model, rank_k=8, rank_v=8, group_size=2, window=8, max_tail=8)
    cache, tokens = make_prompt_cache(model), list(range(1, 61))
    list(generate_step(mx.array(tokens), model, max_tokens=0, prompt_cache=cache))
    kept = PromptCache(10)
    kept.insert_cache("model", tokens, cache)
    found, rest = kept.fetch_nearest_cache("model", tokens)
    assert rest == tokens[-1:]
    assert found is not None and found[0].offset == 59
    assert cache[0].offset == 60
    xkv.disable(model)


def test_stream_sends_the_same_answer_and_usage(server: Server) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = server.ask(question(DOCUMENT, 1), **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == DOCUMENT.facts[1].answer
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage.completion_tokens > 4


def test_four_clients_at_once_get_the_answers_they_get_alone(server: Server) -> None:
    documents = [make_document(seed, 500) for seed in range(10, 14)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda x: text_of(server.ask(question(x))), documents))
    assert answers == [document.facts[0].answer for document in documents]


def test_disconnect_in_the_answer_leaves_a_cache_that_can_be_continued(server: Server) -> None:
    content = question(DOCUMENT, 2)
    message = {"role": "user", "content": content}
    body = {"messages": [message], "stream": True, "max_tokens": 300, "logit_bias": {"2": -100}}
    connection = server.post(json.dumps(body).encode())
    with connection.makefile("rb") as lines:
        next(line for line in lines if line.startswith(b"data:"))
    connection.close()
    server.settled_memory()
    answer = server.ask(content)
    assert text_of(answer) == DOCUMENT.facts[2].answer
    assert cached_tokens(answer) == answer.usage.prompt_tokens - 1


BAD_BODIES = {
    "json": b"{",
    "utf8": b"\xff\xfe",
    "list": b"[1]",
    "no-messages": b"{}",
    "messages": b'{"messages": 5}',
    "role": b'{"messages": [{"content": "a"}]}',
    "max_tokens": b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": "x"}',
    "seed": b'{"messages": [{"role": "user", "content": "a"}], "seed": "x"}',
    "stop": b'{"messages": [{"role": "user", "content": "a"}], "stop": 5}',
    "stream_options": b'{"messages": [{"role": "user", "content": "a"}], "stream_options": 5}',
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_request_is_answered_400(server: Server, name: str) -> None:
    with server.post(BAD_BODIES[name]) as connection, connection.makefile("rb") as answer:
        head, body = answer.read().split(b"\r\n\r\n")
    assert b" 400 " in head.splitlines()[0]
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert " " in error["message"]


def test_unknown_paths_and_models_are_answered_404(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="no such path"):
        server.client.embeddings.create(model="default_model", input="a")
    assert len(server.client.models.list().data) == 1
    with pytest.raises(openai.NotFoundError) as raised:
        server.client.completions.create(model="/no/such/directory", prompt="a")
    assert raised.value.code == "model_not_found"
    assert text_of(server.ask(question(DOCUMENT))) == DOCUMENT.facts[0].answer


@pytest.mark.parametrize(("n_tokens", "max_tokens"), [(8000, 12), (100, 100_000)])
def test_request_that_cannot_fit_is_refused_before_prefill(
    server: Server, n_tokens: int, max_tokens: int
) -> None:
    before = server.memory()
    content = question(make_document(30, n_tokens))
    with pytest.raises(
        openai.BadRequestError, match=r"--prompt-cache-bytes allows 18\.0 MB"
    ) as raised:
        server.ask(content, max_tokens=max_tokens)
    assert raised.value.code == "context_length_exceeded"
    after = server.memory()
    # what the request before it left to Python's collector may be freed in between
    assert after.pop("active_memory_bytes") <= before.pop("active_memory_bytes") + SLACK_BYTES
    for report in (before, after):
        for conversation in report["conversations"]:
            del conversation["idle_s"]
    assert after == before


def test_cached_and_active_bytes_stay_under_the_cap(server: Server) -> None:
    for seed in range(40, 48):
        server.ask(question(make_document(seed, 900)), max_tokens=4)
        report = server.memory()
        assert report["held_bytes"] <= LIMIT_BYTES
        beside = report["model_bytes"] + report["basis_bytes"]
        assert report["active_memory_bytes"] - beside < LIMIT_BYTES + SLACK_BYTES
    assert 3 <= report["sequences"] < 8
