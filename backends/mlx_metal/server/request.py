"""What a request may contain, brought into the form that mlx-lm reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from xkv.backends.mlx_metal.server.errors import RequestError

_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "xtc_probability",
    "xtc_threshold",
)
_INTEGERS = (
    "max_tokens",
    "max_completion_tokens",
    "top_k",
    "top_logprobs",
    "num_draft_tokens",
    "repetition_context_size",
    "presence_context_size",
    "frequency_context_size",
)
_TOKENIZER_OPTIONS = (
    "chat_template",
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)
"""What ``apply_chat_template`` takes beside a template's variables: a template that runs for ever,
padding to any length."""
_LARGEST = 2**31 - 1
_LARGEST_BIAS = 100
_LARGEST_XTC_THRESHOLD = 0.5
_N_SEEDS = 2**64


def checked(body: dict[str, Any]) -> dict[str, Any]:
    """A request's body as mlx-lm expects it; null means "not given".

    Raises:
        RequestError: With what cannot be met.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name in _NUMBERS:
        if name in given:
            given[name] = _number(name, given[name])
    for name in _INTEGERS:
        if name in given and abs(_integer(name, given[name])) > _LARGEST:
            raise _error(f"{name} must be at most {_LARGEST}")
    for name in ("max_tokens", "max_completion_tokens"):
        if given.get(name, 1) < 1:
            raise _error(f"{name} must be at least 1")
    if "seed" in given:
        given["seed"] = _integer("seed", given["seed"]) % _N_SEEDS
    for name in ("n", "best_of"):
        if _integer(name, given.pop(name, 1)) != 1:
            raise _error(f"{name} must be 1: a request gets one answer")
    for name in ("echo", "suffix"):
        if given.pop(name, None):
            raise _error(f"{name} is not supported: leave it out")
    if given.get("xtc_threshold", 0) > _LARGEST_XTC_THRESHOLD:
        raise _error(f"xtc_threshold must be at most {_LARGEST_XTC_THRESHOLD}")
    for name, read in (
        ("stop", _stop_strings),
        ("logit_bias", _biases),
        ("prompt", _prompt),
        ("messages", _messages),
        ("tools", _tools),
        ("chat_template_kwargs", _template_variables),
    ):
        if name in given:
            given[name] = read(given[name])
    return given


def malformed_calls(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Functions in the history whose arguments are no JSON object, as a model may write them.

    Arguments that are no JSON at all become a JSON string, which mlx-lm reads as they were.
    """
    found = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function") or {}
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except (ValueError, RecursionError):
                    function["arguments"] = json.dumps(arguments) if arguments.strip() else ""
            elif arguments is not None:
                # mlx-lm up to 0.31 reads text only
                function["arguments"] = json.dumps(arguments)
            if function and not isinstance(arguments, dict):
                found.append(function)
    return found


def wrap_arguments(functions: Sequence[dict[str, Any]]) -> None:
    """Make arguments an object, for chat templates that list them by name."""
    for function in functions:
        arguments = function.get("arguments")
        wrapped = {} if arguments in (None, "") else {"arguments": arguments}
        function["arguments"] = json.dumps(wrapped)


def _error(message: str) -> RequestError:
    return RequestError(400, message)


def _number(name: str, value: Any) -> float:
    # a number beyond float's range is refused as infinity is
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) < _LARGEST:
        raise _error(f"{name} must be a number, not {_text(value)}")
    return float(value)


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _error(f"{name} must be an integer, not {_text(value)}")
    return value


def _text(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _stop_strings(value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(x, str) for x in strings):
        raise _error("stop must be a string or a list of strings")
    return [x for x in strings if x]


def _biases(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise _error("logit_bias must be an object: token ids and what is added to their logits")
    biases = {}
    for token, bias in value.items():
        if not token.strip().lstrip("-").isdecimal():
            raise _error(f"logit_bias must name token ids, not {_text(token)}")
        biases[token] = _number("a bias in logit_bias", bias)
        if abs(biases[token]) > _LARGEST_BIAS:
            raise _error(f"logit_bias must be from -{_LARGEST_BIAS} to {_LARGEST_BIAS}")
    return biases


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int for x in value)


def _prompt(value: Any) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and not _is_token_ids(value):
        (value,) = value
    if isinstance(value, str) or _is_token_ids(value):
        return value
    if isinstance(value, list) and all(isinstance(x, str) or _is_token_ids(x) for x in value):
        raise _error(f"prompt has {len(value)} prompts: send a request for each")
    raise _error("prompt must be a string or a list of token ids")


def _messages(value: Any) -> list[dict[str, Any]]:
    is_list = isinstance(value, list) and value and all(isinstance(x, dict) for x in value)
    if not is_list or not all(isinstance(x.get("role"), str) for x in value):
        raise _error("messages must be a list of objects, each with a role")
    for message in value:
        parts = message.get("content")
        if isinstance(parts, list) and any(map(_is_fetched, parts)):
            raise _error("an image must be a data: URL: the server fetches nothing")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(map(_is_call, calls)):
            raise _error("tool_calls must be a list of objects, each with a function")
    return value


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function") or {}, dict)


def _is_fetched(part: Any) -> bool:
    """Whether mlx-lm would ask another server for a part of a message."""
    url = None
    if isinstance(part, dict):
        url = part.get("image_url", part.get("image"))
    if isinstance(url, dict):
        url = url.get("url")
    return url is not None and not (isinstance(url, str) and url.startswith("data:"))


def _template_variables(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _error("chat_template_kwargs must be an object: a chat template's variables")
    for name in _TOKENIZER_OPTIONS:
        if name in value:
            raise _error(f"chat_template_kwargs must not have {name}: it is no template's variable")
    return value


def _tools(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
        raise _error("tools must be a list of objects")
    return value
