"""Malformed requests, made from a well-formed one by changing one thing in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.serving import CHAT, MESSAGES

TEXT = "/v1/completions"
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": '{"a": 2}'}}
FULL: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Add 2."}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        *MESSAGES,
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "model": "default_model",
    "draft_model": "default_model",
    "adapters": None,
    "max_tokens": 2,
    "max_completion_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "min_p": 0.1,
    "seed": 1,
    "stop": ["ladders"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"3": 1.0},
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "repetition_penalty": 1.1,
    "repetition_context_size": 20,
    "presence_penalty": 0.1,
    "presence_context_size": 20,
    "frequency_penalty": 0.1,
    "frequency_context_size": 20,
    "xtc_probability": 0.1,
    "xtc_threshold": 0.1,
    "num_draft_tokens": 2,
    "role_mapping": {"user": "USER: "},
    "chat_template_kwargs": {"enable_thinking": False},
    "response_format": {"type": "text"},
    "user": "someone",
}
"""Every field of a chat."""
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "minus": -1,
    "half": 0.5,
    "huge": 10**30,
    "wide": 10**400,
    "large": 1e308,
    "nan": float("nan"),
    "infinite": float("-inf"),
    "text": "x",
    "empty": "",
    "path": "../../../etc/passwd",
    "surrogate": "\ud800",
    "null-character": "\0",
    "list": [],
    "nested": [[[1]]],
    "mixed": [1, "a", None, {}],
    "object": {},
    "wrong-object": {"role": 5, "type": [], "x": {"y": None}},
}
KWARGS = ("chat_template", "tokenize", "padding", "max_length", "tools", "messages", "documents")


class Kind(NamedTuple):
    """One malformed request.

    Args:
        name: What is wrong with it.
        request: All bytes that are sent.
        ends: Whether the client says that no more will come.
        leaves: Whether the client goes without reading its answer.
        may_close: Whether there is nothing to answer.
        has_no_body: Whether the answer is a status only.
        is_message: Whether an error is told in Anthropic's form.
    """

    name: str
    request: bytes
    ends: bool = False
    leaves: bool = False
    may_close: bool = False
    has_no_body: bool = False
    is_message: bool = False


def post(body: bytes, path: str = CHAT, *headers: str, n_bytes: Any = None) -> bytes:
    """A request by POST with these bytes."""
    length = len(body) if n_bytes is None else n_bytes
    lines = (f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {length}", *headers)
    return "\r\n".join((*lines, "", "")).encode("latin-1") + body


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value is inside another, by keys and positions."""
    inside = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else inside:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(body: Any, place: tuple[Any, ...], *value: Any) -> Any:
    """A copy with another value in a place, or with none."""
    body = copy.deepcopy(body)
    owner = body
    for key in place[:-1]:
        owner = owner[key]
    if value:
        owner[place[-1]] = value[0]
    else:
        del owner[place[-1]]
    return body


def changes(full: Any, path: str, prefix: str = "", **options: bool) -> Iterator[Kind]:
    """Each value of a request left out, and replaced by every odd one."""
    for place in places(full):
        name = prefix + ".".join(map(str, place))
        body = json.dumps(changed(full, place)).encode()
        yield Kind(f"{name} left out", post(body, path), **options)
        for label, value in VALUES.items():
            body = json.dumps(changed(full, place, value)).encode()
            yield Kind(f"{name} {label}", post(body, path), **options)


def field_kinds() -> Iterator[Kind]:
    """Each value of a chat replaced by every odd one, left out, and put in by itself."""
    yield from changes(FULL, CHAT)
    for label, value in VALUES.items():
        yield Kind(f"prompt {label}", post(json.dumps({"prompt": value}).encode(), TEXT))
        tokens = json.dumps({"prompt": [5, value]}).encode()
        yield Kind(f"prompt with {label}", post(tokens, TEXT))
        yield Kind(f"body {label}", post(json.dumps(value).encode()))
        for keyword in KWARGS:
            body = {"messages": MESSAGES, "chat_template_kwargs": {keyword: value}}
            yield Kind(f"template's {keyword} {label}", post(json.dumps(body).encode()))


def body_kinds() -> Iterator[Kind]:
    """Bodies that are no JSON, or JSON as no program writes it."""
    good = json.dumps({"messages": MESSAGES, "max_tokens": 2})
    for i in range(0, len(good), 6):
        yield Kind(f"cut after {i} bytes", post(good[:i].encode()))
        yield Kind(f"ended after {i} bytes", post(good[:i].encode(), n_bytes=len(good)), ends=True)
        odd = good[:i].encode() + b"\xff\xfe" + good[i:].encode()
        yield Kind(f"no UTF-8 after {i} bytes", post(odd))
    deep = 100_000
    for name, text in {
        "deep list": "[" * deep + "]" * deep,
        "deep object": '{"a":' * deep + "1" + "}" * deep,
        "deep messages": '{"messages": ' + "[" * 900 + "]" * 900 + "}",
        "deep schema": good[:-1] + ', "tools": [' + '{"a":' * 900 + "1" + "}" * 900 + "]}",
        "open brackets": "[" * deep,
        "double keys": good[:-1] + ', "messages": 5, "max_tokens": "x"}',
        "double good keys": '{"messages": 5, ' + good[1:],
        "comment": "// hi\n" + good,
        "trailing": good + "}",
        "two values": good + good,
        "single quotes": good.replace('"', "'"),
        "nan key": "{NaN: 1}",
        "lone escape": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "bad escape": '{"messages": "\\x"}',
        "raw control": '{"messages": "\n\0"}',
        "million digits": '{"seed": ' + "9" * 10**6 + "}",
        "long number": '{"temperature": 0.' + "1" * 10**5 + "}",
        "white": " " * 1000,
        "mark": "\ufeff" + good,
        "no surrogate pair": good.replace("Carl", "\\udc00\\ud800"),
    }.items():
        yield Kind(name, post(text.encode()))
    yield Kind("UTF-16", post(good.encode("utf-16")))
    yield Kind("UTF-32", post(good.encode("utf-32")))
    yield Kind("latin-1", post('{"messages": "é"}'.encode("latin-1")))
    yield Kind("compressed", post(b"\x1f\x8b\x08\0" * 20, CHAT, "Content-Encoding: gzip"))
    yield Kind("too large", post(b" " * 2_100_000 + good.encode()))


def head_kinds(timeout_s: float) -> Iterator[Kind]:
    """Methods, paths, versions and headers that are not there; bytes that are no HTTP."""
    good = json.dumps({"messages": MESSAGES, "max_tokens": 2}).encode()
    for method in (
        "PUT",
        "DELETE",
        "PATCH",
        "TRACE",
        "CONNECT",
        "get",
        "post",
        "GE T",
        "É",
        "X" * 99,
    ):
        request = f"{method} {CHAT} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        yield Kind(f"method {method}", request)
    yield Kind("method HEAD", b"HEAD /v1/models HTTP/1.1\r\n\r\n", has_no_body=True)
    yield Kind("GET of a chat", f"GET {CHAT} HTTP/1.1\r\n\r\n".encode())
    yield Kind("GET with a body", b"GET /health HTTP/1.1\r\nContent-Length: 9\r\n\r\n{}")
    for path in (
        "/", "//", "*", "/v1", "/v1/chat", "/v1/chat/completions/", "/v1/chat/completions?x=1",
        "/%2e%2e/etc/passwd", "/../../etc/passwd", "http://x/v1/models", "/v1/embeddings",
        "/v1/models/../../etc", "/v1/modelsx", "/v1/models/%ff", "/xkv/memory/", "/\x1b[31m",
        "/" + "a" * 60_000,
    ):  # fmt: skip
        yield Kind(f"path {path[:30]}", f"GET {path} HTTP/1.1\r\n\r\n".encode())
        yield Kind(f"POST to {path[:30]}", post(good, path))
    for version in (
        "HTTP/0.9",
        "HTTP/1.9",
        "HTTP/2.0",
        "HTTP/9",
        "HTTP/a.b",
        "HTTP/1.1.1",
        "FTP/1.1",
    ):
        yield Kind(f"version {version}", f"GET /health {version}\r\n\r\n".encode())
    yield Kind("no version", b"GET /health\r\n\r\n")
    lengths = (
        "-1",
        "+5",
        "5_0",
        "0x10",
        "1e3",
        "",
        "five",
        "٣",
        "5 5",
        "5,5",
        "9" * 18,
        "9" * 5000,
    )
    for length in lengths:
        shown = length.encode("utf-8").decode("latin-1")
        yield Kind(f"length {length[:20]}", post(b"", n_bytes=shown))
    for header in (
        "Content-Length: 3", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip", "X" * 70_000,
        "no colon", ": no name", " folded", "A\0: b", "A: \0", "Expect: 100-continue",
        "Connection: keep-alive", "Content-Type: text/plain", "Authorization: Bearer",
        "x-api-key: é", "Authorization: " + "a" * 60_000, "Origin: \x1b[31m",
    ):  # fmt: skip
        yield Kind(f"header {header[:30]}", post(good, CHAT, header))
    for n in (90, 300):
        yield Kind(f"{n} headers", post(good, CHAT, *["A: b"] * n))
    lines = f"POST {CHAT} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{{}}\r\n0\r\n\r\n"
    yield Kind("chunks", lines.encode())
    yield Kind("no length", f"POST {CHAT} HTTP/1.1\r\n\r\n".encode() + good)
    yield Kind("bare newlines", post(good).replace(b"\r\n", b"\n"))
    yield Kind("pipelined", post(good) + b"GARBAGE\r\n\r\n" + post(good) + b"\0" * 10_000)
    for name, start in {
        "TLS": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\x55" * 500 + b"\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "noise": bytes(range(256)) * 40,
        "line without end": b"A" * 70_000,
        "zeros": b"\0" * 5000 + b"\r\n",
    }.items():
        yield Kind(name, start, ends=True)
    for name, start in {
        "nothing": b"",
        "empty lines": b"\r\n\r\n",
        "half a head": post(good)[:30],
    }.items():
        yield Kind(name, start, ends=True, may_close=True)
        yield Kind(f"{name}, then silence for {timeout_s} s", start, may_close=True)
    yield Kind("half a body, then silence", post(good[:9], n_bytes=99))
    for n_bytes in (0, 10, 40, 80, len(post(good)) - 1, len(post(good))):
        yield Kind(f"left after {n_bytes} bytes", post(good)[:n_bytes], leaves=True)


def kinds(timeout_s: float) -> Iterator[Kind]:
    """All malformed requests.

    Args:
        timeout_s: Seconds in which the server wants a whole request.
    """
    yield from head_kinds(timeout_s)
    yield from body_kinds()
    yield from field_kinds()
