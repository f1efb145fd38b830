"""Bodies that ``/v1/messages`` refuses, and what it says of them."""

from __future__ import annotations

from typing import Any

from tests.serving import MESSAGES

ASK: dict[str, Any] = {"model": "default_model", "max_tokens": 12, "messages": MESSAGES}
"""One that is fine."""


def body(**changed: Any) -> dict[str, Any]:
    return {**ASK, **changed}


def content(*blocks: Any, role: str = "user") -> dict[str, Any]:
    return body(messages=[{"role": role, "content": list(blocks)}, *MESSAGES])


MALFORMED: dict[str, tuple[Any, str]] = {
    "list": ([1], "JSON object"),
    "empty": ({}, "max_tokens is missing"),
    "max-tokens": (body(max_tokens="x"), "max_tokens must be an integer"),
    "no-max-tokens": (body(max_tokens=None), "max_tokens is missing"),
    "zero-max-tokens": (body(max_tokens=0), "max_tokens must be at least 1"),
    "model": (body(model=5), "requested_model must be of type str"),
    "no-messages": (body(messages=None), "messages must be a list"),
    "messages": (body(messages=5), "messages must be a list"),
    "no-message": (body(messages=[]), "at least one message"),
    "message": (body(messages=["a"]), "messages[0] must be an object"),
    "role": (body(messages=[{"role": "tool", "content": "a"}]), "messages[0].role must be"),
    "listed-role": (body(messages=[{"role": ["user"], "content": "a"}]), "messages[0].role"),
    "content": (body(messages=[{"role": "user", "content": 5}]), "messages[0].content must be"),
    "no-content": (body(messages=[{"role": "user"}]), "messages[0].content must be"),
    "begun": (body(messages=[*MESSAGES, {"role": "assistant", "content": "C"}]), "the assistant's"),
    "block": (content("a"), "messages[0].content must be"),
    "no-type": (content({"text": "a"}), "messages[0].content[0] has type null"),
    "text": (content({"type": "text", "text": 5}), "messages[0].content[0].text must be a string"),
    "image": (content({"type": "image", "source": {}}), 'has type "image"'),
    "document": (content({"type": "document", "source": {}}), 'has type "document"'),
    "user-calls": (
        content({"type": "tool_use", "id": "1", "name": "a", "input": {}}),
        "the user's messages may have text and tool_result alone",
    ),
    "result-of-none": (content({"type": "tool_result"}), "tool_use_id must be a string"),
    "result-image": (
        content({"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}),
        'messages[0].content[0].content[0] has type "image"',
    ),
    "call-input": (
        content({"type": "tool_use", "id": "1", "name": "a", "input": "x"}, role="assistant"),
        "messages[0].content[0].input must be an object",
    ),
    "system": (body(system=5), "system must be a string"),
    "system-image": (body(system=[{"type": "image"}]), 'system has type "image"'),
    "tools": (body(tools=5), "tools must be a list"),
    "tool-name": (body(tools=[{"input_schema": {}}]), "tools[0].name must be a string"),
    "tool-schema": (body(tools=[{"name": "a"}]), "tools[0].input_schema must be an object"),
    "server-tool": (body(tools=[{"type": "web_search_1", "name": "a"}]), "web_search_1"),
    "any": (body(tool_choice={"type": "any"}), "tool_choice must be auto or none"),
    "tool": (body(tool_choice={"type": "tool", "name": "a"}), "tool_choice must be auto or none"),
    "choice": (body(tool_choice="auto"), "tool_choice must be an object"),
    "one-tool": (body(tool_choice={"type": "auto", "disable_parallel_tool_use": True}), "disable"),
    "stops": (body(stop_sequences="a"), "stop_sequences must be a list of strings"),
    "stop": (body(stop_sequences=[5]), "stop_sequences must be a list of strings"),
    "stream": (body(stream="x"), "stream must be of type bool"),
    "temperature": (body(temperature="x"), "temperature must be a number"),
    "top-k": (body(top_k=0.5), "top_k must be an integer"),
    "thinking": (body(thinking={"type": "x"}), "thinking.type must be one of"),
    "odd-thinking": (body(thinking={"type": []}), "thinking.type must be one of"),
    "tool-text": (body(tools=[{"name": "a", "description": 5}]), "description must be a string"),
    "format": (body(output_config={"format": {"type": "json_schema"}}), "output format"),
}  # fmt: skip
