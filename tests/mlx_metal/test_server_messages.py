"""Anthropic's paths, asked by its own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from tests.mlx_metal.malformed_messages import ASK, MALFORMED
from tests.serving import ANSWER, LAST_RESORT_S, MESSAGES, Server, chat, float32_model, text_of
from xkv.tiny import make_document

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
DOCUMENT = make_document(1, 500)
TOOL = {"name": "read", "description": "Reads a file.", "input_schema": {"type": "object"}}
CALLING = [{"role": "user", "content": "Greta hid blue candles. What did Greta do?"}]
"""What the model answers by a call; see :func:`calling_model`."""
SAID = {
    "hid": "<start_function_call>",
    "blue": "call:read{path:<escape>né<escape>}",
    "candles": "<end_function_call>",
}
LIMIT_BYTES = 30_000_000


def calling_model(path: Path) -> Path:
    """The bundled model, of which some words read as a call of a tool."""
    path = float32_model(path)
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["decoder"]["decoders"][:0] = [
        {"type": "Replace", "pattern": {"String": "▁" + word}, "content": text}
        for word, text in SAID.items()
    ]
    # mlx-lm up to 0.31 looks for the marks' tokens
    content["normalizer"]["normalizers"] += [
        {"type": "Replace", "pattern": {"String": text}, "content": word}
        for word, text in SAID.items()
    ]
    file.write_text(json.dumps(content))
    file = path / "tokenizer_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"tool_parser_type": "function_gemma"})
    )
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = calling_model(tmp_path_factory.mktemp("model") / "calling")
    with Server("--model", str(path), "--prompt-cache-bytes", str(LIMIT_BYTES)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> anthropic.Anthropic:
    url = f"http://127.0.0.1:{server.port}"
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=LAST_RESORT_S)


def ask(client: anthropic.Anthropic, **options: Any) -> Any:
    return client.messages.create(**{**ASK, **options})


def streamed(client: anthropic.Anthropic, **options: Any) -> Any:
    """The message that a stream's events add up to."""
    with client.messages.stream(**{**ASK, **options}) as stream:
        return stream.get_final_message()


def said(answer: Any) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls of an answer, whose blocks have an order of their own in a stream."""
    text = "".join(x.text for x in answer.content if x.type == "text")
    return text, [(x.name, x.input) for x in answer.content if x.type == "tool_use"]


def n_prompt(answer: Any) -> int:
    return answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def question(fact: int = 0) -> str:
    return f"{DOCUMENT.text} {DOCUMENT.facts[fact].question}"


def test_answer_is_a_message(server: Server, client: anthropic.Anthropic) -> None:
    answer = ask(client)
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "default_model")
    assert answer.id.startswith("msg_")
    assert [x.to_dict() for x in answer.content] == [{"type": "text", "text": ANSWER}]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    other = chat(server)["usage"]
    assert n_prompt(answer) == other["prompt_tokens"]
    assert answer.usage.output_tokens == other["completion_tokens"]


def test_system_and_blocks_make_the_prompt_that_a_chat_makes(
    server: Server, client: anthropic.Anthropic
) -> None:
    block = {"type": "text", "cache_control": {"type": "ephemeral"}}
    bill = {**block, "text": "x-anthropic-billing-header: cch=1;"}
    system = [bill, {**block, "text": "Say it."}, {**block, "text": "Be short."}]
    content = [{**block, "text": MESSAGES[0]["content"]}]
    first = ask(client, system=system, messages=[{"role": "user", "content": content}])
    message = {"role": "system", "content": "Say it.\nBe short."}
    same = chat(server, messages=[message, *MESSAGES])
    assert first.content[0].text == text_of(same)
    assert n_prompt(first) == same["usage"]["prompt_tokens"]
    assert same["usage"]["prompt_tokens_details"]["cached_tokens"] == n_prompt(first) - 1
    again = ask(client, system="Say it.\nBe short.")
    assert again.usage.cache_read_input_tokens == n_prompt(first) - 1


def test_next_turn_reads_the_cache(client: anthropic.Anthropic) -> None:
    first, second = DOCUMENT.facts[:2]
    turns = [{"role": "user", "content": question()}]
    answer = ask(client, messages=turns)
    assert answer.content[0].text == first.answer
    # what all prompts begin with
    assert answer.usage.cache_read_input_tokens < 4
    turns += [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": second.question},
    ]
    turn = ask(client, messages=turns)
    assert turn.content[0].text == second.answer
    assert turn.usage.cache_read_input_tokens == n_prompt(answer) + answer.usage.output_tokens
    assert 0 < turn.usage.input_tokens < 20
    assert turn.usage.cache_creation_input_tokens == 0


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({}, ("end_turn", None)),
        ({"max_tokens": 2}, ("max_tokens", None)),
        ({"stop_sequences": ["never", "poin"]}, ("stop_sequence", "poin")),
        ({"stop_sequences": ["Carl"]}, ("stop_sequence", "Carl")),
        ({"messages": CALLING, "tools": [TOOL]}, ("tool_use", None)),
        ({"extra_body": {"temperature": 1, "top_k": 1, "top_p": 0.9}}, ("end_turn", None)),
    ],
    ids=["plain", "max-tokens", "stop", "stop-at-once", "tool", "sampled"],
)
def test_stream_adds_up_to_the_answer(
    client: anthropic.Anthropic, options: dict[str, Any], ending: tuple[str, str | None]
) -> None:
    answer, sent = ask(client, **options), streamed(client, **options)
    assert (answer.stop_reason, answer.stop_sequence) == ending
    assert (sent.stop_reason, sent.stop_sequence) == ending
    assert n_prompt(sent) == n_prompt(answer)
    assert sent.usage.output_tokens == answer.usage.output_tokens
    assert said(sent) == said(answer)
    if ending[1] is not None:
        assert said(answer) == (ANSWER[: ANSWER.find(ending[1])], [])


def test_events_come_in_anthropics_order(client: anthropic.Anthropic) -> None:
    text = make_document(2, 200).text
    ask(client, messages=[{"role": "user", "content": text}], max_tokens=1)
    messages: Any = [{"role": "user", "content": f"{text} {CALLING[0]['content']}"}]
    http = client.messages.with_raw_response.create(
        **{**ASK, "messages": messages, "tools": [TOOL]}, stream=True
    ).http_response
    lines = http.read().decode().split("\n\n")
    assert http.headers["Content-Type"] == "text/event-stream"
    assert lines.pop() == ""
    events = []
    for line in lines:
        name, data = line.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    names = [x["type"] for x in events]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert names[:2] == ["message_start", "ping"]
    assert [x for x in names if x != "ping"] == [
        "message_start", *block, *block, *block, "message_delta", "message_stop"
    ]  # fmt: skip
    assert [x["index"] for x in events if "index" in x] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    usage, last = events[0]["message"]["usage"], events[-2]["usage"]
    assert usage == {**last, "output_tokens": 0}
    assert usage["cache_read_input_tokens"] > 150


def test_tool_is_called_and_its_result_read(server: Server, client: anthropic.Anthropic) -> None:
    answer = ask(client, messages=CALLING, tools=[TOOL])
    text, call = answer.content
    assert text.text == "Greta."
    assert (call.type, call.name, call.input) == ("tool_use", "read", {"path": "né"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Carl sold ladders."}
    told = {"type": "text", "text": "What did Carl do?"}
    turns: Any = [
        *CALLING,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result, told]},
    ]
    after = ask(client, messages=turns, tools=[TOOL])
    same = chat(
        server,
        messages=[
            *CALLING,
            {"role": "assistant", "content": "Greta."},
            {"role": "tool", "content": "Carl sold ladders."},
            {"role": "user", "content": "What did Carl do?"},
        ],
    )
    assert after.content[0].text == text_of(same)
    assert same["usage"]["prompt_tokens"] == n_prompt(after)
    assert same["usage"]["prompt_tokens_details"]["cached_tokens"] == n_prompt(after) - 1


def test_count_is_the_prompt_of_the_answer(server: Server, client: anthropic.Anthropic) -> None:
    options: Any = {"model": "default_model", "messages": [*MESSAGES], "system": "Count this."}
    before = server.memory()["sequences"]
    count = client.messages.count_tokens(**options).input_tokens
    assert server.memory()["sequences"] == before
    assert n_prompt(ask(client, **options)) == count
    # a prompt that could not be answered can be counted
    content = make_document(3, 20_000).text
    options["messages"] = [{"role": "user", "content": content}]
    assert client.messages.count_tokens(**options).input_tokens > 20_000


def test_prompt_that_does_not_fit_keeps_its_sentence(client: anthropic.Anthropic) -> None:
    for create in (ask, streamed):
        with pytest.raises(
            anthropic.BadRequestError, match=r"--prompt-cache-bytes allows 30\.0 MB"
        ):
            create(client, max_tokens=10**6)


def test_beta_clients_and_unknown_fields_are_served(client: anthropic.Anthropic) -> None:
    answer = client.beta.messages.create(
        **ASK,
        betas=["some-beta"],
        metadata={"user_id": "a"},
        thinking={"type": "adaptive"},
        extra_body={"new_field": {"a": 1}, "system": None, "stop_sequences": None},
    )
    assert answer.content[0].text == ANSWER


def test_model_that_is_not_there_is_not_found(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as raised:
        ask(client, model="/no/such/directory")
    assert raised.value.type == "not_found_error"
    assert ask(client).content[0].text == ANSWER


@pytest.mark.parametrize("is_count", [False, True], ids=["messages", "count"])
def test_malformed_requests_are_told_in_anthropics_form(server: Server, is_count: bool) -> None:
    unneeded = {"empty", "stream"} if is_count else set()
    for name in MALFORMED.keys() - unneeded:
        given, sentence = MALFORMED[name]
        if is_count and "max-tokens" in name:
            continue
        status, answer = server.request(COUNT if is_count else f"{PATH}?beta=true", given)
        assert status == 400, (name, answer)
        assert answer["type"] == "error"
        assert answer["error"]["type"] == "invalid_request_error"
        assert sentence in answer["error"]["message"], name
    assert text_of(chat(server)) == ANSWER


def test_get_is_told_in_anthropics_form(server: Server) -> None:
    status, answer = server.request(PATH)
    assert (status, answer["type"], answer["error"]["type"]) == (404, "error", "not_found_error")
