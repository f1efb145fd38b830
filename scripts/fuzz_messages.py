"""Malformed requests to Anthropic's paths, as those of :mod:`scripts.fuzz_requests` are made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from scripts.fuzz_requests import VALUES, Kind, changes, post
from tests.serving import MESSAGES

MESSAGE = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
CACHED = {"cache_control": {"type": "ephemeral"}}
FULL: dict[str, Any] = {
    "model": "default_model",
    "max_tokens": 2,
    "system": [{"type": "text", "text": "Be brief.", **CACHED}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Add 2.", **CACHED}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Two.", "signature": ""},
                {"type": "text", "text": "I add."},
                {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 2}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "1",
                    "content": [{"type": "text", "text": "4"}],
                    "is_error": False,
                },
            ],
        },
        {"role": "assistant", "content": "4"},
        *MESSAGES,
    ],
    "tools": [
        {
            "name": "add",
            "description": "Adds.",
            "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
            "type": "custom",
        }
    ],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "stop_sequences": ["ladders"],
    "stream": False,
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "low"},
    "metadata": {"user_id": "someone"},
    "service_tier": "auto",
    "container": None,
    "context_management": {"edits": []},
    "mcp_servers": [],
}
"""Every field of a message."""
BLOCKS: dict[str, Any] = {
    "image": {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}},
    "file": {"type": "image", "source": {"type": "file", "file_id": "../../etc/passwd"}},
    "document": {"type": "document", "source": {"type": "text", "data": "x"}},
    "search": {"type": "search_result", "content": []},
    "server-tool": {"type": "server_tool_use", "id": "1", "name": "web_search", "input": {}},
    "redacted": {"type": "redacted_thinking", "data": "x"},
    "unasked": {"type": "tool_result", "tool_use_id": "no such call", "content": "4"},
    "empty-result": {"type": "tool_result", "tool_use_id": "1"},
    "call": {"type": "tool_use", "id": "1", "name": "", "input": {"a": [[{}]]}},
}
"""Blocks that are of Anthropic's form, and not for every place."""


def message_kinds() -> Iterator[Kind]:
    """All malformed requests to both paths, answered in Anthropic's form."""
    for path in (MESSAGE, COUNT):
        yield from changes(FULL, path, f"{path} ", is_message=True)
        for label, value in VALUES.items():
            whole = json.dumps(value).encode()
            yield Kind(f"{path} body {label}", post(whole, path), is_message=True)
    for is_stream in (False, True):
        for label, block in BLOCKS.items():
            for role in ("user", "assistant", "system"):
                turns = [{"role": role, "content": [block]}, *MESSAGES]
                body = {"max_tokens": 2, "messages": turns, "stream": is_stream}
                name = f"{MESSAGE} {role}'s {label}, {'streamed' if is_stream else 'whole'}"
                yield Kind(name, post(json.dumps(body).encode(), MESSAGE), is_message=True)
    for path in (f"{MESSAGE}/", f"{MESSAGE}?beta=true", f"{COUNT}/x", f"{MESSAGE}/batches"):
        yield Kind(f"POST to {path}", post(json.dumps(FULL).encode(), path))
