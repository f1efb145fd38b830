"""mlx-lm's chat completions as Anthropic's answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from xkv.backends.mlx_metal.server.errors import RequestError

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_of(error: RequestError) -> dict[str, Any]:
    """Why there is no answer, in Anthropic's form."""
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    return {
        "type": "error",
        "error": {"type": _KINDS.get(error.status, kind), "message": str(error)},
    }


def usage_of(n_prompt: int, n_answer: int, n_cached: int) -> dict[str, int]:
    """Tokens; those of the prompt that were cached are no input, as Anthropic counts."""
    n_cached = max(n_cached, 0)
    return {
        "input_tokens": n_prompt - n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": n_cached,
        "output_tokens": n_answer,
    }


def message_of(response: dict[str, Any], stop_sequence: str | None = None) -> dict[str, Any]:
    """A whole answer.

    Args:
        response: mlx-lm's.
        stop_sequence: The stop string that ended it.
    """
    (choice,) = response["choices"]
    return {
        **empty_message(response["id"], response["model"], _usage(response)),
        "content": [x for x in _blocks(choice["message"]) if not _is_blank(x)],
        **_ending(choice["finish_reason"], stop_sequence),
    }


def empty_message(chat_id: str, model: str, usage: dict[str, int]) -> dict[str, Any]:
    """An answer that has not begun."""
    return {
        "id": "msg_" + chat_id.removeprefix("chatcmpl-"),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


class Events:
    """The events of an answer that is sent as it comes.

    Args:
        start: Gives the message without content.
        stop_sequence: Gives the stop string that ended the answer, at its end.
    """

    def __init__(
        self, start: Callable[[], dict[str, Any]], stop_sequence: Callable[[], str | None]
    ) -> None:
        self._start = start
        self._stop_sequence = stop_sequence
        self._has_begun = False
        self._n_blocks = 0
        self._open: str | None = None
        """The type of the block that is being sent."""
        self._blank = ""
        """Text before the first block's first letter: a block of it alone is none."""
        self._ending: dict[str, Any] = {}
        self._usage: dict[str, int] = {}

    def ping(self) -> Iterator[dict[str, Any]]:
        """What keeps the connection alive."""
        yield from self._begin()
        yield {"type": "ping"}

    def add(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of mlx-lm's chunk."""
        yield from self._begin()
        if not chunk["choices"]:
            self._usage = _usage(chunk)
            return
        (choice,) = chunk["choices"]
        for block in _blocks(choice["delta"]):
            yield from self._block(block)
        if choice["finish_reason"] is not None:
            self._ending = _ending(choice["finish_reason"], self._stop_sequence())

    def end(self) -> Iterator[dict[str, Any]]:
        """What comes last."""
        yield from self._close()
        yield {"type": "message_delta", "delta": self._ending, "usage": self._usage}
        yield {"type": "message_stop"}

    def _begin(self) -> Iterator[dict[str, Any]]:
        if not self._has_begun:
            self._has_begun = True
            yield {"type": "message_start", "message": self._start()}

    def _block(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        kind = block["type"]
        if kind == "tool_use":
            yield from self._close()
            text = json.dumps(block["input"], ensure_ascii=False)
            yield self._opened({**block, "input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": text})
            yield from self._close()
            return
        if self._open != kind:
            yield from self._close()
            block = {**block, kind: self._blank + block[kind]}
            if _is_blank(block):
                self._blank = block[kind]
                return
            yield self._opened({**block, kind: ""})
        yield self._delta({"type": f"{kind}_delta", kind: block[kind]})

    def _opened(self, block: dict[str, Any]) -> dict[str, Any]:
        self._open, self._blank = block["type"], ""
        self._n_blocks += 1
        return {
            "type": "content_block_start",
            "index": self._n_blocks - 1,
            "content_block": block,
        }

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._n_blocks - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._n_blocks - 1}


class EventWriter:
    """A file that mlx-lm writes its stream to, and that a client of Anthropic's reads.

    What is no event, such as the headers, goes through.
    """

    def __init__(self, file: Any, events: Events) -> None:
        self._file = file
        self._events = events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        """Take what mlx-lm writes at once: one event."""
        if data.startswith(b":"):
            self._send(self._events.ping())
        elif data.startswith(b"data: [DONE]"):
            self._send(self._events.end())
        elif data.startswith(b"data: "):
            content = json.loads(data.removeprefix(b"data: "))
            is_error = content.get("type") == "error"
            self._send(iter([content]) if is_error else self._events.add(content))
        else:
            self._file.write(data)

    def _send(self, events: Iterator[dict[str, Any]]) -> None:
        for event in events:
            self._file.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())


def _usage(response: dict[str, Any]) -> dict[str, int]:
    usage = response["usage"]
    n_cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return usage_of(usage["prompt_tokens"], usage["completion_tokens"], n_cached)


def _ending(finish_reason: str, stop_sequence: str | None) -> dict[str, Any]:
    if finish_reason != "stop":
        stop_sequence = None
    reason = _REASONS[finish_reason] if stop_sequence is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": stop_sequence}


def _blocks(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Content blocks of a message or of a part of one."""
    if message.get("reasoning"):
        # signatures are for Anthropic's own to check
        yield {"type": "thinking", "thinking": message["reasoning"], "signature": ""}
    if message.get("content"):
        yield {"type": "text", "text": message["content"]}
    for call in message.get("tool_calls") or ():
        arguments = json.loads(call["function"]["arguments"])
        is_object = isinstance(arguments, dict)
        yield {
            "type": "tool_use",
            "id": call["id"],
            "name": call["function"]["name"],
            "input": arguments if is_object else {"arguments": arguments},
        }


def _is_blank(block: dict[str, Any]) -> bool:
    return block["type"] != "tool_use" and not block[block["type"]].strip()
