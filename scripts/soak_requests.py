"""What the clients of :mod:`scripts.soak_server` ask: conversations that agents have."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

from scripts.fuzz_messages import COUNT, MESSAGE
from scripts.fuzz_requests import TEXT
from tests.serving import CHAT, LAST_RESORT_S
from xkv.tiny import make_document

Chat = list[dict[str, Any]]
"""Messages in OpenAI's form, whatever path they take."""
N_SYSTEMS = 3
"""System prompts that all clients share."""
TOOLS = ("read_file", "write_file", "run")
NO_END = {"2": -100}
"""A bias that keeps an answer from ending."""


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    text: str
    n_prompt: int = 0
    n_cached: int = 0


class BrokenOffError(Exception):
    """An answer began, and did not come to its end."""


class Writer:
    """Makes up conversations.

    Args:
        random: What to draw from.
        scale: Of the lengths of all texts.
    """

    def __init__(self, random: Random, scale: float) -> None:
        self.random, self.scale = random, scale

    def text(self, n_tokens: int, seed: int | None = None) -> str:
        drawn = self.random.randrange(10**6) if seed is None else seed
        return make_document(drawn, max(round(n_tokens * self.scale), 12)).text

    def system(self) -> dict[str, Any]:
        return {"role": "system", "content": self.text(300, self.random.randrange(N_SYSTEMS))}

    def question(self, n_tokens: int) -> dict[str, Any]:
        n_tokens = max(round(n_tokens * self.scale), 12)
        document = make_document(self.random.randrange(10**6), n_tokens, 1)
        return {"role": "user", "content": f"{document.text} {document.facts[0].question}"}

    def tool_turn(self) -> Chat:
        """A question, a call of a tool, whose arguments may be malformed, and its result."""
        arguments = self.random.choice(['{"path": "notes"}', '{"path": "notes'])
        function = {"name": TOOLS[0], "arguments": arguments}
        call = {"id": "1", "type": "function", "function": function}
        return [
            self.question(20),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": self.text(200)},
        ]


def body_of(path: str, chat: Chat, has_tools: bool, **options: Any) -> dict[str, Any]:
    """The body of a conversation's next request."""
    body: dict[str, Any] = {"max_tokens": 12, "temperature": 0, **options}
    schema = {"type": "object"}
    if path == TEXT:
        return body | {"prompt": "\n".join(x["content"] or "" for x in chat)}
    if path == CHAT:
        tools = [{"type": "function", "function": {"name": x, "parameters": schema}} for x in TOOLS]
        body |= {"messages": chat, "user": None}
    else:
        tools = [{"name": x, "input_schema": schema} for x in TOOLS]
        body["system"] = [
            {"type": "text", "text": x["content"]} for x in chat if x["role"] == "system"
        ]
        body["messages"] = [_message(x) for x in chat if x["role"] != "system"]
    return body | ({"tools": tools} if has_tools else {})


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message in Anthropic's form."""
    if message["role"] == "tool":
        result = {"tool_use_id": message["tool_call_id"], "content": message["content"]}
        return {"role": "user", "content": [{"type": "tool_result", **result}]}
    calls = [
        {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}}
        for call in message.get("tool_calls", ())
    ]
    return {"role": message["role"], "content": calls or message["content"]}


def exchange(port: int, path: str, body: dict[str, Any]) -> Reply:
    """Ask, and read the answer to its end.

    Raises:
        BrokenOffError: If it has begun and does not come to one.
        OSError: If there is none.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LAST_RESORT_S)
    try:
        connection.request("POST", path, json.dumps(body))
        answer = connection.getresponse()
        try:
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise BrokenOffError(f"status {answer.status}, then {error!r}") from error
    except http.client.HTTPException as error:
        raise ConnectionError(f"{error!r}") from error
    finally:
        connection.close()
    if answer.status != 200:
        return Reply(answer.status, content.decode(errors="replace"))
    return streamed(path, content) if body.get("stream") else whole(path, json.loads(content))


def whole(path: str, answer: dict[str, Any]) -> Reply:
    """An answer that came at once."""
    if path == COUNT:
        return Reply(200, str(answer["input_tokens"]))
    if path == MESSAGE:
        texts = [x["text"] for x in answer["content"] if x["type"] == "text"]
        return Reply(200, "".join(texts), *_tokens(answer["usage"]))
    (choice,) = answer["choices"]
    text = choice["text"] if path == TEXT else choice["message"]["content"]
    return Reply(200, text or "", *_tokens(answer["usage"]))


def streamed(path: str, content: bytes) -> Reply:
    """An answer that came bit by bit.

    Raises:
        BrokenOffError: If its end is missing.
    """
    text, usage = "", None
    last = b"event: message_stop" if path == MESSAGE else b"data: [DONE]"
    for event in _events(content):
        if event.get("error"):
            raise BrokenOffError(f"an error in the stream: {event['error']}")
        usage = event.get("usage") or usage
        if path == MESSAGE:
            text += event.get("delta", {}).get("text", "")
        else:
            for choice in event["choices"]:
                text += choice["text"] if path == TEXT else choice["delta"].get("content") or ""
    if last not in content or usage is None:
        raise BrokenOffError(f"a stream without an end: {content[-300:]!r}")
    return Reply(200, text, *_tokens(usage))


def _events(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.split(b"\n"):
        if line.startswith(b"data: {"):
            try:
                yield json.loads(line[6:])
            except ValueError as error:
                raise BrokenOffError(f"an event is cut: {line[-300:]!r}") from error


def _tokens(usage: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt, and how many of them were cached."""
    if "input_tokens" in usage:
        n_cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + n_cached, n_cached
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
