"""Requests as clients really send them: each gets an answer or a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from tests.serving import ANSWER, CHAT, MESSAGES, Server, chat, text_of
from xkv.backends.mlx_metal.server.command import flat_tokens
from xkv.backends.mlx_metal.server.errors import RequestError
from xkv.errors import InputError
from xkv.tiny import CHECKPOINT_DIR

TEXT = "/v1/completions"
PARAMETERS = [
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stream",
    "logprobs",
    "top_logprobs",
    "presence_penalty",
    "presence_context_size",
    "frequency_penalty",
    "frequency_context_size",
    "seed",
    "stop",
    "n",
    "best_of",
    "repetition_penalty",
    "repetition_context_size",
    "xtc_probability",
    "xtc_threshold",
    "tools",
    "stream_options",
    "echo",
    "suffix",
    "user",
    "logit_bias",
    "num_draft_tokens",
    "adapters",
    "role_mapping",
    "chat_template_kwargs",
    "response_format",
    "tool_choice",
]
ODD_VALUES: dict[str, Any] = {
    "true": True,
    "text": "x",
    "empty-text": "",
    "surrogate": "\ud800",
    "zero": 0,
    "minus": -1,
    "half": 0.5,
    "tiny": 1e-300,
    "int32": 2**31,
    "int64": 2**63,
    "wide": 10**400,
    "large": 1e300,
    "penalty": -2e9,
    "infinite": float("inf"),
    "nan": float("nan"),
    "list": [],
    "nested": [[1]],
    "object": {},
    "wrong-object": {"x": "y"},
    "token": {"5": 1e9},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # float16, in which low temperatures overflow
    with Server() as running:
        yield running


def refusal(server: Server, path: str, body: Any) -> str:
    """The sentence that a request is refused with."""
    status, answer = server.request(path, body)
    assert status == 400, answer
    assert answer["error"]["type"] == "invalid_request_error"
    return answer["error"]["message"]


@pytest.mark.parametrize("name", [*PARAMETERS, "model", "draft_model"])
def test_null_means_not_given(server: Server, name: str) -> None:
    assert text_of(chat(server, **{name: None})) == ANSWER


@pytest.mark.parametrize("name", PARAMETERS)
def test_odd_values_are_answered_and_the_server_goes_on(server: Server, name: str) -> None:
    for label, value in ODD_VALUES.items():
        body = {"messages": MESSAGES, "max_tokens": 2, name: value}
        connection = server.post(json.dumps(body).encode())
        with connection, connection.makefile("rb") as answer:
            head, _, rest = answer.read().partition(b"\r\n\r\n")
        status = int(head.split()[1])
        assert status in (200, 400, 404), f"{label}: {head!r} {rest!r}"
        assert b'"error"' not in rest or status != 200, f"{label}: {rest!r}"
        if status != 200:
            assert " " in json.loads(rest)["error"]["message"]
    assert text_of(chat(server)) == ANSWER


@pytest.mark.parametrize("token", ["3648", "50256", "100000", "-1", str(2**70)])
def test_bias_beyond_the_vocabulary_is_refused(server: Server, token: str) -> None:
    body = {"messages": MESSAGES, "logit_bias": {token: -100}}
    assert "the vocabulary ends at" in refusal(server, CHAT, body)
    assert text_of(chat(server, logit_bias={"3000": -100})) == ANSWER


@pytest.mark.parametrize("name", ["n", "best_of"])
def test_more_than_one_answer_is_refused(server: Server, name: str) -> None:
    message = refusal(server, CHAT, {"messages": MESSAGES, name: 2})
    assert message == f"{name} must be 1: a request gets one answer"
    assert text_of(chat(server, **{name: 1})) == ANSWER


@pytest.mark.parametrize(("name", "value"), [("echo", True), ("suffix", "x")])
def test_what_mlx_lm_ignores_is_refused(server: Server, name: str, value: Any) -> None:
    assert name in refusal(server, TEXT, {"prompt": "Carl", name: value})


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**64 - 1, 10**30, -(10**30)])
def test_every_seed_draws_the_same_answer_again(server: Server, seed: int) -> None:
    options = {"seed": seed, "temperature": 2.0}
    assert text_of(chat(server, **options)) == text_of(chat(server, **options))


def test_numbers_without_a_point_are_numbers(server: Server) -> None:
    options = {"temperature": 1, "top_p": 1, "min_p": 0, "xtc_probability": 0, "xtc_threshold": 0}
    chat(server, **options)
    assert "integer" in refusal(server, CHAT, {"messages": MESSAGES, "max_tokens": True})


def test_top_k_above_the_vocabulary_limits_nothing(server: Server) -> None:
    options = {"temperature": 2.0, "seed": 3}
    unlimited = text_of(chat(server, **options))
    assert text_of(chat(server, top_k=10**6, **options)) == unlimited
    assert text_of(chat(server, top_k=1, **options)) == ANSWER


def test_xtc_takes_every_special_token(server: Server) -> None:
    chat(server, temperature=1.0, xtc_probability=1.0)
    tokens = flat_tokens(lambda temp, xtc_special_tokens: xtc_special_tokens)
    # as mlx-lm up to 0.31 has it
    assert tokens(1.0, xtc_special_tokens=[2, [5, 6]]) == [2, 5, 6]
    assert tokens(1.0, xtc_special_tokens=[5, 6, 2]) == [5, 6, 2]


def test_text_prompt_may_come_in_a_list_or_as_tokens(server: Server) -> None:
    text = "<|user|>" + MESSAGES[0]["content"] + "<|end|><|assistant|>"
    tokens = load_tokenizer(CHECKPOINT_DIR).encode(text)
    answers = []
    for prompt in (text, [text], tokens, [tokens]):
        status, answer = server.request(TEXT, {"prompt": prompt, "max_tokens": 12})
        assert status == 200, answer
        answers.append(answer["choices"][0]["text"])
    assert answers == [ANSWER] * 4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["a", "b"], "prompt has 2 prompts: send a request for each"),
        ([[1, 2], [3]], "prompt has 2 prompts: send a request for each"),
        ([1, "a"], "prompt must be a string or a list of token ids"),
        ([True], "prompt must be a string or a list of token ids"),
        (5, "prompt must be a string or a list of token ids"),
        ([], "the prompt is empty"),
        ([10**6], "prompt has token 1000000, and the vocabulary ends at 3621"),
        ([-1], "prompt has token -1, and the vocabulary ends at 3621"),
    ],
)
def test_other_prompts_are_refused(server: Server, prompt: Any, message: str) -> None:
    assert refusal(server, TEXT, {"prompt": prompt}) == message


def history(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": arguments}}
    return [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "not executed: invalid arguments"},
        *MESSAGES,
    ]


@pytest.mark.parametrize("calls", [5, "x", [5], ["x"], [[]], [{"function": 5}], {"function": {}}])
def test_calls_that_are_no_objects_are_refused(server: Server, calls: Any) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": calls}, *MESSAGES]
    message = refusal(server, CHAT, {"messages": messages})
    assert message == "tool_calls must be a list of objects, each with a function"


ARGUMENTS = ['{"a": 2', "", " ", "a=2", "[" * 1500, '"text"', "5", None, '{"a": 2}', {"a": 2}]


@pytest.mark.parametrize("number", range(len(ARGUMENTS)))
def test_history_with_any_arguments_is_served(server: Server, number: int) -> None:
    assert text_of(chat(server, messages=history(ARGUMENTS[number])))


TEMPLATE = """{% for m in messages %}{% for call in m.tool_calls or [] %}
{%- for name, value in call.function.arguments.items() %}{{ name }}={{ value }} {% endfor %}
{%- endfor %}{{ m.content }} {% endfor %}"""


@pytest.fixture(scope="module")
def naming_server() -> Iterator[Server]:
    """A server whose chat template lists arguments by name."""
    with Server("--chat-template", TEMPLATE) as running:
        yield running


@pytest.mark.parametrize("number", range(len(ARGUMENTS)))
def test_template_that_lists_arguments_shows_malformed_ones(
    naming_server: Server, number: int
) -> None:
    answer = chat(naming_server, messages=history(ARGUMENTS[number]))
    without = chat(naming_server, messages=history({}))
    shown = answer["usage"]["prompt_tokens"] - without["usage"]["prompt_tokens"]
    assert (shown == 0) == (ARGUMENTS[number] in (None, "", " "))


def test_what_the_model_cannot_do_is_a_bad_request() -> None:
    # mlx-lm calls whatever stops a generation 404
    error = RequestError.of(InputError("leave the draft model out"), 404)
    assert (error.status, str(error)) == (400, "leave the draft model out")
    assert RequestError.of(MemoryError("no room"), 404).status == 500
