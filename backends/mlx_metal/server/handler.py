"""How the server answers: mlx-lm's handler, with errors in OpenAI's form."""

from __future__ import annotations

import contextlib
import json
import logging
import select
import socket
import sys
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from mlx_lm import server as mlx_server

MEMORY_PATH = "/xkv/memory"

_MESSAGES = {
    HTTPStatus.BAD_REQUEST: "the request must be a JSON object",
    HTTPStatus.NOT_FOUND: "no such path; there are /v1/chat/completions, /v1/completions, "
    f"/v1/models, /health and {MEMORY_PATH}",
    HTTPStatus.LENGTH_REQUIRED: "the request has no Content-Length",
}


class RequestError(Exception):
    """Why a request gets no answer.

    Args:
        status: HTTP status.
        message: A sentence.
        code: OpenAI's name for it.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}

    @classmethod
    def of(cls, error: BaseException | None, status: int) -> RequestError:
        """An error that came up while serving, or None with the status mlx-lm gives it."""
        if isinstance(error, RequestError):
            return error
        if error is None:
            return cls(status, _MESSAGES.get(HTTPStatus(status), HTTPStatus(status).phrase))
        # mlx-lm calls whatever stops a generation 404
        return cls(500 if status == HTTPStatus.NOT_FOUND else status, error_text(error))


def error_text(error: BaseException) -> str:
    """An error by its message, and its class where that does not say much."""
    if isinstance(error, json.JSONDecodeError):
        return f"the request is not JSON: {error}"
    is_sentence = isinstance(error, (ValueError, AssertionError)) and " " in str(error)
    return str(error) if is_sentence else f"{type(error).__name__}: {error}"


class ClientGone(ConnectionError):
    """Nobody waits for the answer any more."""


class _Client:
    """The generator as one client's handler sees it: it stops when the client is gone."""

    def __init__(self, generator: Any, connection: socket.socket) -> None:
        self._generator = generator
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def generate(self, request: Any, args: Any, progress_callback: Callable[..., None]) -> Any:
        def progress(done: int, total: int) -> None:
            self._check()
            progress_callback(done, total)

        context, answers = self._generator.generate(request, args, progress)
        return context, self._checked(answers)

    def _checked(self, answers: Iterator[Any]) -> Iterator[Any]:
        for answer in answers:
            self._check()
            yield answer

    def _check(self) -> None:
        is_readable = select.select([self._connection], [], [], 0)[0]
        if is_readable and not self._connection.recv(1, socket.MSG_PEEK):
            raise ClientGone("the client is gone")


class Handler(mlx_server.APIHandler):
    """mlx-lm's requests; errors are answered in OpenAI's form."""

    def __init__(self, generator: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        self._has_begun = False
        client: Any = _Client(generator, request)
        super().__init__(client, request, *args, **kwargs)

    def do_POST(self) -> None:
        # whatever stops mlx-lm before it generates is in the request
        with self._answering_errors(400):
            super().do_POST()

    def validate_model_parameters(self) -> None:
        super().validate_model_parameters()
        self._validate("seed", int, min_val=0, optional=True)
        self._validate("requested_draft_model", str)
        self._validate("stream_options", dict, optional=True)
        if self.stream_options is not None:
            self.stream_options = {"include_usage": False, **self.stream_options}

    def handle_completion(self, *args: Any) -> None:
        try:
            super().handle_completion(*args)
        except ConnectionError:
            raise
        except Exception as error:
            raise RequestError.of(error, 500) from error

    def do_GET(self) -> None:
        with self._answering_errors(500):
            if self.path == MEMORY_PATH:
                memory: Any = self.response_generator
                self._answer(200, memory.memory())
            else:
                super().do_GET()

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
            log(f"{self.path}: {error}", exc_info=raised if error.status >= 500 else None)
            with contextlib.suppress(ConnectionError):
                self._answer_error(error)

    def _answer_error(self, error: RequestError) -> None:
        if not self._has_begun:
            # a status that mlx-lm has prepared but not sent
            self._headers_buffer: list[bytes] = []
            self._answer(error.status, error.body)
        elif getattr(self, "stream", False):
            self.wfile.write(f"data: {json.dumps(error.body)}\n\n".encode())

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        super()._set_completion_headers(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
