"""Why a request gets no answer."""

from __future__ import annotations

import json
from http import HTTPStatus

from xkv.errors import InputError

MEMORY_PATH = "/xkv/memory"
STATUS_PATH = "/xkv"
MESSAGES_PATH = "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
MODELS_PATH = "/v1/models"

_MESSAGES = {
    HTTPStatus.BAD_REQUEST: "the request must be a JSON object",
    HTTPStatus.NOT_FOUND: "no such path; there are /v1/chat/completions, /v1/completions, "
    f"{MESSAGES_PATH}, {COUNT_PATH}, {MODELS_PATH}, /health, {STATUS_PATH} and {MEMORY_PATH}",
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
        self.headers: dict[str, str] = {}
        """Of the answer."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}

    @classmethod
    def of(cls, error: BaseException | None, status: int) -> RequestError:
        """An error that came up while serving, or None with the status mlx-lm gives it."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, InputError):
            return cls(400, str(error))
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
