"""How the server answers: mlx-lm's handler, with errors in OpenAI's form."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.server.answers import Answer
from xkv.backends.mlx_metal.server.errors import (
    MEMORY_PATH,
    MODELS_PATH,
    STATUS_PATH,
    ClientGone,
    RequestError,
)
from xkv.backends.mlx_metal.server.listening import GuardedRequests
from xkv.backends.mlx_metal.server.request import checked
from xkv.backends.mlx_metal.server.status import POLICY, page
from xkv.backends.mlx_metal.server.traffic import Served

mlx_server = borrowed.module("mlx_lm.server")

_COLDEST = 2e-4
"""Below it log probabilities over the temperature leave float16's range: greedy."""


class _Client:
    """The generator as one client's handler sees it: it stops when the client is gone."""

    def __init__(self, generator: Any, connection: socket.socket) -> None:
        self._generator = generator
        self._connection = connection
        self._entries: list[dict[str, Any]] = []
        self.end: str | None = None
        """Why the answer ended."""
        self.stop: str | None = None
        """The stop string that it ended at."""
        self.served = Served()
        """The request that is being answered."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def generate(self, request: Any, args: Any, progress_callback: Callable[..., None]) -> Any:
        def progress(done: int, total: int) -> None:
            self._check()
            progress_callback(done, total)

        context, answers = self._generator.generate(request, args, progress)
        self.served.begin(context)
        return context, self._checked(answers)

    def _checked(self, answers: Iterator[Answer]) -> Iterator[Answer]:
        for answer in answers:
            self._check()
            self.served.token()
            self.end, self.stop = answer.end, answer.stop
            if answer.entry is not None:
                self._entries.append(answer.entry)
            yield answer
        # before the client has all of it
        self.served.end()

    def take_entries(self) -> list[dict[str, Any]]:
        """Log probabilities of the tokens since the last call."""
        taken, self._entries = self._entries, []
        return taken

    def _check(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                raise ClientGone("the client is gone")


class Handler(GuardedRequests, mlx_server.APIHandler):  # type: ignore[name-defined]
    """mlx-lm's requests; errors are answered in OpenAI's form."""

    temperature: float
    stream_options: dict[str, Any] | None

    def __init__(self, generator: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        self._has_begun = False
        self._has_called = False
        client: Any = _Client(generator, request)
        super().__init__(client, request, *args, **kwargs)

    def refuse(self, error: RequestError) -> None:
        with self._answering_errors(error.status):
            raise error

    def handle_models_request(self) -> None:
        generator: Any = self.response_generator
        entries = {
            name: {"id": name, "object": "model", "created": self.created}
            for name in generator.allowed.names()
        }
        path = self.path.partition("?")[0].removeprefix(MODELS_PATH)
        if path in ("", "/"):
            self._answer(200, {"object": "list", "data": list(entries.values())})
        elif path[0] != "/":
            raise RequestError.of(None, 404)
        elif unquote(path[1:]) not in entries:
            raise RequestError(404, "the server has no such model", "model_not_found")
        else:
            self._answer(200, entries[unquote(path[1:])])

    def do_POST(self) -> None:
        # whatever stops mlx-lm before it generates is in the request
        with self._answering_errors(400):
            super().do_POST()

    @property
    def body(self) -> Any:
        """The request, as mlx-lm reads it."""
        return self._body

    @body.setter
    def body(self, value: Any) -> None:
        self._body = self.read(value) if isinstance(value, dict) else value

    def read(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request's body as mlx-lm expects it."""
        return checked(body)

    def validate_model_parameters(self) -> None:
        super().validate_model_parameters()
        if self.temperature < _COLDEST:
            self.temperature = 0.0
        self._validate("requested_draft_model", str)
        self._validate("stream_options", dict, optional=True)
        if self.stream_options is not None:
            self.stream_options = {"include_usage": False, **self.stream_options}

    def generate_response(
        self, text: str, finish_reason: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """mlx-lm's, with the end and the log probabilities of :class:`Answer`."""
        client: Any = self.response_generator
        self._has_called = self._has_called or bool(kwargs.get("tool_calls"))
        if finish_reason is not None:
            finish_reason = client.end or finish_reason
        if finish_reason == "stop" and self._has_called:
            finish_reason = "tool_calls"
        kwargs.update(token_logprobs=None, top_tokens=None)
        response = super().generate_response(text, finish_reason, *args, **kwargs)
        entries = client.take_entries()
        if entries:
            response["choices"][0]["logprobs"] = {"content": entries}
        return response

    def handle_completion(self, *args: Any) -> None:
        client: Any = self.response_generator
        try:
            with self.server.traffic.request() as client.served:
                super().handle_completion(*args)
        except ConnectionError:
            raise
        except Exception as error:
            raise RequestError.of(error, 500) from error

    def do_GET(self) -> None:
        with self._answering_errors(500):
            if self.path == MEMORY_PATH:
                self._answer(200, self._report())
            elif self.path == STATUS_PATH:
                self._answer_page()
            else:
                super().do_GET()

    def _report(self) -> dict[str, Any]:
        generator: Any = self.response_generator
        return {**generator.memory(), "requests": self.server.traffic.report()}

    def _answer_page(self) -> None:
        generator: Any = self.response_generator
        body = page(self._report(), generator.allowed.shown).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        self._has_begun = True
        super().end_headers()

    def _set_completion_headers(self, status_code: int = 200) -> None:
        """Where mlx-lm begins to answer an error, take over."""
        if status_code >= 400 and self.path != "/health":
            raise RequestError.of(sys.exc_info()[1], status_code)
        super()._set_completion_headers(status_code)

    @contextlib.contextmanager
    def _answering_errors(self, status: int) -> Iterator[None]:
        try:
            yield
        except ConnectionError:
            logging.info("the client is gone before its answer was complete")
        except Exception as raised:
            error = RequestError.of(raised, status)
            log = logging.error if error.status >= 500 else logging.info
            log(f"{self.path!r}: {error}", exc_info=raised if error.status >= 500 else None)
            with contextlib.suppress(ConnectionError):
                self._answer_error(error)

    def _answer_error(self, error: RequestError) -> None:
        if not self._has_begun:
            # a status that mlx-lm has prepared but not sent
            self._headers_buffer: list[bytes] = []
            self._answer(error.status, error.body, error.headers)
        elif getattr(self, "stream", False):
            self.wfile.write(f"data: {json.dumps(error.body)}\n\n".encode())

    def _answer(
        self, status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        body = json.dumps(content).encode()
        super()._set_completion_headers(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
