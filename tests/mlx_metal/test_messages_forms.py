"""Anthropic's form of requests and answers, without a model."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from tests.mlx_metal.malformed_messages import ASK
from xkv.backends.mlx_metal.server.errors import RequestError
from xkv.backends.mlx_metal.server.messages import MessagesHandler
from xkv.backends.mlx_metal.server.messages_answer import Events, error_of, message_of
from xkv.backends.mlx_metal.server.messages_request import chat_of
from xkv.backends.mlx_metal.server.traffic import Traffic

USE = {"type": "tool_use", "id": "a", "name": "read", "input": {"path": "é"}}
CALL = {
    "id": "a",
    "type": "function",
    "function": {"name": "read", "arguments": json.dumps({"path": "é"})},
}
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 4,
    "prompt_tokens_details": {"cached_tokens": 6},
}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def said(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def result(**fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "a", **fields}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "a", "content": content}


START = {"role": "user", "content": "q"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
HISTORIES: dict[str, tuple[list[Any], list[Any]]] = {
    "call": ([said(USE), user(result(content="r"))], [CALLED, tool("r")]),
    "text-and-call": (
        [said(text("t"), USE), user(result(content="r"))],
        [{**CALLED, "content": "t"}, tool("r")],
    ),
    "two-calls": (
        [said(USE, USE), user(result(content="r"), result(content="s"))],
        [{**CALLED, "tool_calls": [CALL, CALL]}, tool("r"), tool("s")],
    ),
    "result-then-text": (
        [said(USE), user(result(content="r"), text("t"), text("u"))],
        [CALLED, tool("r"), {"role": "user", "content": "t\nu"}],
    ),
    "result-of-blocks": (
        [said(USE), user(result(content=[text("r"), text("s")]))],
        [CALLED, tool("r\ns")],
    ),
    "no-result": ([said(USE), user(result())], [CALLED, tool("")]),
    "failed": ([said(USE), user(result(content="r", is_error=True))], [CALLED, tool("Error:\nr")]),
    "thought": (
        [said({"type": "thinking", "thinking": "h", "signature": ""}, text("t")), user(text("u"))],
        [
            {"role": "assistant", "content": "t", "reasoning_content": "h"},
            {"role": "user", "content": "u"},
        ],
    ),
    "empty-answer": (
        [said(), user(text("u"))],
        [{"role": "assistant", "content": ""}, {"role": "user", "content": "u"}],
    ),
    "system-later": (
        [said(text("t")), {"role": "system", "content": "s"}],
        [{"role": "assistant", "content": "t"}, {"role": "system", "content": "s"}],
    ),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_history_is_that_of_a_chat(name: str) -> None:
    given, expected = HISTORIES[name]
    assert chat_of({**ASK, "messages": [START, *given]})["messages"] == [START, *expected]


def test_users_messages_in_a_row_are_one() -> None:
    chat = chat_of({**ASK, "messages": [START, START], "system": "s"})
    assert chat["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q\nq"},
    ]


@pytest.mark.parametrize("rest", ["s", "s\nt"])
def test_bill_is_left_out_of_the_system_prompt(rest: str) -> None:
    bill = "x-anthropic-billing-header: cc_version=1; cch=2;"
    for system in (f"{bill}\n{rest}", [text(bill), text(rest)]):
        chat = chat_of({**ASK, "system": system})
        assert chat["messages"][0] == {"role": "system", "content": rest}


def test_tools_are_functions_and_may_be_left_out() -> None:
    given = {"name": "read", "input_schema": {"type": "object"}}
    function = {"name": "read", "description": "", "parameters": {"type": "object"}}
    for choice in ({}, {"tool_choice": {"type": "auto"}}):
        tools = chat_of({**ASK, "tools": [given], **choice})["tools"]
        assert tools == [{"type": "function", "function": function}]
    assert chat_of({**ASK, "tools": [given], "tool_choice": {"type": "none"}})["tools"] == []


@pytest.mark.parametrize(("kind", "thinks"), [("enabled", True), ("disabled", False)])
def test_thinking_is_the_chat_templates(kind: str, thinks: bool) -> None:
    chat = chat_of({**ASK, "thinking": {"type": kind, "budget_tokens": 1024}})
    assert chat["chat_template_kwargs"] == {"enable_thinking": thinks}
    assert "chat_template_kwargs" not in chat_of(ASK)


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "a", "function": {"name": "read", "arguments": json.dumps(arguments)}}


def block(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


DELTAS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "text": ([{"content": "a "}, {"content": "b"}, {}], [block("text", text="a b")]),
    "nothing": ([{}], []),
    "blank": ([{"content": "\n"}, {"content": "\n"}], []),
    "blank-first": ([{"content": "\n"}, {"content": "\na"}], [block("text", text="\n\na")]),
    "call": ([{"tool_calls": [call({"b": "é"})]}], [{**USE, "input": {"b": "é"}}]),
    "odd-arguments": ([{"tool_calls": [call("x")]}], [{**USE, "input": {"arguments": "x"}}]),
    "thought-text-call": (
        [
            {"reasoning": "h"},
            {"reasoning": "i"},
            {"content": "\n\n"},
            {"content": "t"},
            {"tool_calls": [call({}), call({})]},
        ],
        [
            block("thinking", thinking="hi", signature=""),
            block("text", text="\n\nt"),
            {**USE, "input": {}},
            {**USE, "input": {}},
        ],
    ),
    "thought-call": (
        [{"reasoning": "h"}, {"content": "\n\n"}, {"tool_calls": [call({})]}],
        [block("thinking", thinking="h", signature=""), {**USE, "input": {}}],
    ),
}


def added_up(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content blocks of events, each of which must come in its place."""
    blocks: list[dict[str, Any]] = []
    is_open, json_text = False, ""
    for event in events:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            is_open, json_text = True, ""
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta":
            assert is_open and event["index"] == len(blocks) - 1
            delta = dict(event["delta"])
            kind = delta.pop("type")
            if kind == "input_json_delta":
                json_text += delta["partial_json"]
            else:
                name = kind.removesuffix("_delta")
                blocks[-1][name] += delta[name]
        elif event["type"] == "content_block_stop":
            assert is_open
            is_open = False
            if json_text:
                blocks[-1]["input"] = json.loads(json_text)
    assert not is_open
    return blocks


@pytest.mark.parametrize("name", DELTAS)
def test_chunks_become_blocks_as_whole_answers_do(name: str) -> None:
    deltas, expected = DELTAS[name]
    events, sent = Events(lambda: {}, lambda: None), []
    for delta in deltas:
        sent += events.add({"choices": [{"delta": delta, "finish_reason": None}]})
    sent += events.add({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    sent += events.add({"choices": [], "usage": USAGE})
    sent += events.end()
    assert added_up(sent) == expected
    assert sent[-2]["delta"]["stop_reason"] == "end_turn"
    assert sent[-2]["usage"]["cache_read_input_tokens"] == 6
    joined = {
        name: "".join(x.get(name, "") for x in deltas) for name in ("reasoning", "content")
    } | {"tool_calls": [y for x in deltas for y in x.get("tool_calls", [])]}
    choice = {"message": joined, "finish_reason": "stop"}
    response = {"id": "chatcmpl-1", "model": "m", "usage": USAGE, "choices": [choice]}
    assert message_of(response)["content"] == expected


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (411, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_errors_are_named_by_their_status(status: int, kind: str) -> None:
    error = {"type": kind, "message": "why not"}
    assert error_of(RequestError(status, "why not")) == {"type": "error", "error": error}


class Failing:
    """A generator that fails once an answer has begun."""

    def __init__(self) -> None:
        self.cli_args: Any = SimpleNamespace(
            allowed_origins="*",
            max_tokens=9,
            num_draft_tokens=3,
            temp=0.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            api_key=None,
            max_body_bytes=10**6,
            request_timeout=60,
        )

    def generate(self, request: Any, args: Any, progress: Any) -> Any:
        state = SimpleNamespace(make_state=lambda initial: None)
        context = SimpleNamespace(
            prompt=[1, 2, 3], prompt_cache_count=1, tool_parser=None, text_sm=state
        )
        context.initial_state, context.stop = "normal", lambda: None

        def answers() -> Any:
            progress(1, 2)
            raise MemoryError("no room")
            yield

        return context, answers()


def test_failure_in_the_middle_is_an_event() -> None:
    ours, theirs = socket.socketpair()
    body = json.dumps({**ASK, "stream": True}).encode()
    ours.sendall(b"POST /v1/messages HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    with ours, theirs:
        server = Mock(traffic=Traffic())
        MessagesHandler(Failing(), theirs, ("", 0), server, system_fingerprint="")
        theirs.shutdown(socket.SHUT_WR)
        with ours.makefile("rb") as file:
            head, *events = file.read().decode().split("\r\n\r\n")
    assert " 200 " in head.splitlines()[0]
    start, ping, error = events[0].strip().split("\n\n")
    assert start.startswith("event: message_start\n")
    assert ping == 'event: ping\ndata: {"type": "ping"}'
    name, data = error.split("\n")
    assert name == "event: error"
    told = {"type": "api_error", "message": "MemoryError: no room"}
    assert json.loads(data.removeprefix("data: ")) == {"type": "error", "error": told}
