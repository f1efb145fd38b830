"""Anthropic's requests as the chat completions that mlx-lm reads."""

from __future__ import annotations

import json
from typing import Any

from xkv.backends.mlx_metal.server.errors import RequestError

_SAME = ("model", "max_tokens", "stream", "temperature", "top_p", "top_k")
_THINKS = {"disabled": False, "enabled": True, "adaptive": True}
_OTHER_BLOCKS = {"user": " and tool_result", "assistant": ", tool_use and thinking"}
_BILLING = "x-anthropic-billing-header:"
"""How the line begins that Claude Code puts first; it changes, so nothing would be reused."""


def chat_of(body: dict[str, Any], is_count: bool = False) -> dict[str, Any]:
    """A request to ``/v1/messages`` as one to ``/v1/chat/completions``; null means "not given".

    What both have under the same name is checked where the latter is.

    Args:
        body: Fields that are not known are left out.
        is_count: Whether the prompt is to be counted and not answered.

    Raises:
        RequestError: With what cannot be read or met.
    """
    given = {name: value for name, value in body.items() if value is not None}
    chat = {name: given[name] for name in _SAME if name in given}
    if is_count:
        chat.update(stream=False, max_tokens=1)
    elif "max_tokens" not in given:
        raise _error("max_tokens is missing")
    if _object(given, "output_config").get("format") or "output_format" in given:
        raise _error("an output format cannot be enforced: ask for it in the messages")
    chat["messages"] = _messages(given)
    chat["stream_options"] = {"include_usage": True}
    chat["stop"] = _stops(given.get("stop_sequences", []))
    chat["tools"] = _tools(given.get("tools", []), _object(given, "tool_choice"))
    if "thinking" in given:
        kind = _object(given, "thinking").get("type")
        if kind not in tuple(_THINKS):
            raise _error(f"thinking.type must be one of {', '.join(_THINKS)}")
        chat["chat_template_kwargs"] = {"enable_thinking": _THINKS[kind]}
    return chat


def _error(message: str) -> RequestError:
    return RequestError(400, message)


def _object(given: dict[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name, {})
    if not isinstance(value, dict):
        raise _error(f"{name} must be an object")
    return value


def _field(where: str, block: dict[str, Any], name: str, kind: type = str) -> Any:
    value = block.get(name)
    if not isinstance(value, kind):
        raise _error(f"{where}.{name} must be {'a string' if kind is str else 'an object'}")
    return value


def _blocks(where: str, value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        raise _error(f"{where} must be a string or a list of content blocks")
    # an empty turn is one, too
    return value or [{"type": "text", "text": ""}]


def _messages(given: dict[str, Any]) -> list[dict[str, Any]]:
    chat: list[dict[str, Any]] = []
    for block in _blocks("system", given.get("system", [])):
        message = _message("system", "system", block)
        if message["content"].startswith(_BILLING):
            message["content"] = message["content"].partition("\n")[2]
        if message["content"]:
            _add(chat, message)
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _error("messages must be a list with at least one message")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise _error(f"{where} must be an object with a role and content")
        role = message.get("role")
        if role not in ("user", "assistant", "system"):
            raise _error(f"{where}.role must be user, assistant or system")
        for j, block in enumerate(_blocks(f"{where}.content", message.get("content"))):
            _add(chat, _message(role, f"{where}.content[{j}]", block))
    if chat[-1]["role"] == "assistant":
        raise _error("the last message is the assistant's: an answer cannot be begun for the model")
    return chat


def _message(role: str, where: str, block: dict[str, Any]) -> dict[str, Any]:
    """A message with nothing but one block of content."""
    match role, block.get("type"):
        case _, "text":
            return {"role": role, "content": _field(where, block, "text")}
        case "user", "tool_result":
            return {
                "role": "tool",
                "tool_call_id": _field(where, block, "tool_use_id"),
                "content": _result(where, block),
            }
        case "assistant", "tool_use":
            function = {
                "name": _field(where, block, "name"),
                "arguments": json.dumps(_field(where, block, "input", dict)),
            }
            call = {"id": _field(where, block, "id"), "type": "function", "function": function}
            return {"role": role, "content": "", "tool_calls": [call]}
        case "assistant", "thinking":
            # what chat templates call it
            thought = _field(where, block, "thinking")
            return {"role": role, "content": "", "reasoning_content": thought}
        case _, kind:
            raise _error(
                f"{where} has type {json.dumps(kind)}: the {role}'s messages may have text"
                f"{_OTHER_BLOCKS.get(role, '')} alone"
            )


def _result(where: str, block: dict[str, Any]) -> str:
    blocks = _blocks(f"{where}.content", block.get("content") or "")
    texts = [_message("tool", f"{where}.content[{i}]", x)["content"] for i, x in enumerate(blocks)]
    # a chat completion has no field for it
    return "\n".join(["Error:"] * bool(block.get("is_error")) + texts)


def _add(chat: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Messages of one role in a row are one message, as several of them are to Anthropic."""
    if not chat or chat[-1]["role"] != message["role"] or message["role"] == "tool":
        chat.append(message)
        return
    last = chat[-1]
    for name in ("content", "reasoning_content"):
        if message.get(name):
            last[name] = "\n".join(filter(None, [last.get(name), message[name]]))
    if "tool_calls" in message:
        last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]


def _stops(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise _error("stop_sequences must be a list of strings")
    return value


def _tools(value: Any, choice: dict[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        raise _error("tools must be a list of objects")
    kind = choice.get("type", "auto")
    if kind not in ("auto", "none"):
        raise _error("tool_choice must be auto or none: a model cannot be made to call a tool")
    if choice.get("disable_parallel_tool_use"):
        raise _error("disable_parallel_tool_use cannot be enforced: leave it out")
    tools = [_tool(f"tools[{i}]", tool) for i, tool in enumerate(value)]
    return tools if kind == "auto" else []


def _tool(where: str, tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type") or "custom"
    if kind != "custom":
        raise _error(
            f"{where} has type {json.dumps(kind)}, which Anthropic's models alone know: tools "
            "have a name, a description and an input_schema"
        )
    described = {**tool, "description": tool.get("description") or ""}
    function = {
        "name": _field(where, tool, "name"),
        "description": _field(where, described, "description"),
        "parameters": _field(where, tool, "input_schema", dict),
    }
    return {"type": "function", "function": function}
