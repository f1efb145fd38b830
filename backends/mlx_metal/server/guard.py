"""What of a request is looked at before it is believed: its key, its time, its size, its models."""

from __future__ import annotations

import argparse
import base64
import hmac
import io
import json
import socket
import time
from dataclasses import dataclass, replace
from email.message import Message
from http import HTTPStatus
from pathlib import Path
from typing import Any

from xkv.backends.mlx_metal.server.errors import RequestError, error_text

_DEFAULT = "default_model"
_MOST_DIGITS = 18
_SHOWN = 200
"""Characters of what a client sent, in a message."""


def check_key(key: str | None, headers: Message, is_page: bool = False) -> None:
    """Refuse a request that does not have the key; with None everybody may ask.

    Args:
        key: The server's.
        headers: Of the request.
        is_page: Whether a browser may give the key as a password that it asks for. It would send
            that for other sites' pages too, so only where nothing is done.

    Raises:
        RequestError: With status 401.
    """
    if key is None:
        return
    scheme, _, token = (headers.get("Authorization") or "").partition(" ")
    given = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key") or ""]
    if is_page and scheme.lower() == "basic":
        given.append(_password(token))
    # every one is compared, in constant time
    found = [hmac.compare_digest(x.encode(errors="replace"), key.encode()) for x in given]
    if not any(found):
        message = "the server has a key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
        error = RequestError(HTTPStatus.UNAUTHORIZED, message, "invalid_api_key")
        error.headers["WWW-Authenticate"] = 'Basic realm="xkv"' if is_page else "Bearer"
        raise error


def _password(credentials: str) -> str:
    """The password of ``Authorization: Basic``, whatever the user is called."""
    try:
        return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def read_body(headers: Message, stream: io.BufferedIOBase, most_bytes: int) -> bytes:
    """Read a request's body, a JSON object.

    Args:
        headers: Of the request.
        stream: Where the body comes from; nothing is read of one that is refused by its length.
        most_bytes: Largest body.

    Raises:
        RequestError: If it has no length, is too large, incomplete, late or no JSON object.
    """
    n_bytes = _body_bytes(headers, most_bytes)
    try:
        body = stream.read(n_bytes)
    except TimeoutError as error:
        raise RequestError(
            HTTPStatus.REQUEST_TIMEOUT, "the body did not arrive within --request-timeout"
        ) from error
    if len(body) < n_bytes:
        raise RequestError(400, f"the body ended after {len(body)} of {n_bytes} bytes")
    # mlx-lm would write one that is no JSON into the log as a whole
    try:
        content = json.loads(body.decode())
    except ValueError as error:
        raise RequestError(400, error_text(error)) from error
    except RecursionError as error:
        raise RequestError(400, "the request is nested too deeply") from error
    if not isinstance(content, dict):
        raise RequestError.of(None, 400)
    return body


def _body_bytes(headers: Message, most_bytes: int) -> int:
    if headers.get("Transfer-Encoding") is not None:
        message = "a body in chunks is not read: send one with a Content-Length"
        raise RequestError(HTTPStatus.LENGTH_REQUIRED, message)
    lengths = headers.get_all("Content-Length", [])
    if not lengths:
        raise RequestError.of(None, HTTPStatus.LENGTH_REQUIRED)
    text = lengths[0].strip()
    # int() takes signs, underscores and digits of other scripts too
    if len(lengths) > 1 or not (text.isascii() and text.isdecimal()):
        shown = ", ".join(lengths)[:_SHOWN]
        raise RequestError(400, f"the Content-Length is no number of bytes: {shown!r}")
    if len(text) > _MOST_DIGITS or int(text) > most_bytes:
        raise RequestError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body has {text[:_SHOWN]} bytes, and --max-body-bytes allows {most_bytes}",
        )
    return int(text)


def refusal(code: int, message: str | None, method: str | None) -> RequestError:
    """What http.server refuses by itself, as we answer it.

    Args:
        code: Its status.
        message: Its words.
        method: Of the request, where that was read.
    """
    if code == HTTPStatus.NOT_IMPLEMENTED:
        text = f"there is no method {(method or '')[:_SHOWN]!r} here: use GET or POST"
        error = RequestError(HTTPStatus.METHOD_NOT_ALLOWED, text)
        error.headers["Allow"] = "GET, POST, OPTIONS"
        return error
    if code == HTTPStatus.HTTP_VERSION_NOT_SUPPORTED:
        code = HTTPStatus.BAD_REQUEST
    words = (message or HTTPStatus(code).phrase)[:_SHOWN]
    return RequestError(code, f"the request cannot be read: {words}")


class Timed(io.RawIOBase):
    """What a client sends, until the time that it has for its request is over."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        finally:
            # the answer has all the time it takes
            self._connection.settimeout(None)


@dataclass(frozen=True)
class AllowedModels:
    """The models that a request may name; names are compared and never looked up.

    Args:
        model: Of the command line.
        adapter: Of the command line, if any.
        draft: Of the command line, if any.
        others: What ``--allow-models`` names.
    """

    model: str
    adapter: str | None
    draft: str | None
    others: tuple[str, ...] = ()

    @classmethod
    def of(cls, args: argparse.Namespace) -> AllowedModels:
        return cls(args.model, args.adapter_path, args.draft_model, tuple(args.allow_models))

    @property
    def shown(self) -> str:
        """The loaded model's name in ``/v1/models``; a folder's is its whole path, as mlx-lm's."""
        path = Path(self.model)
        return str(path.resolve()) if path.exists() else self.model

    def names(self) -> list[str]:
        """What ``/v1/models`` lists."""
        return list(dict.fromkeys([self.shown, *self.others]))

    def chosen(self, wanted: Any) -> Any:
        """mlx-lm's description of a request's models, by the names that it knows them by.

        Raises:
            RequestError: With status 404, if one is not allowed.
        """
        own = (_DEFAULT, self.model, self.shown)
        for kind, name, names in (
            ("model", wanted.model, own),
            ("draft_model", wanted.draft, (_DEFAULT, self.draft)),
            ("adapters", wanted.adapter, (None, self.adapter)),
        ):
            if name not in (*names, *self.others):
                raise RequestError(
                    HTTPStatus.NOT_FOUND,
                    f"{kind} {name[:_SHOWN]!r} is not served here: leave it out, or start the "
                    "server with --allow-models",
                    "model_not_found",
                )
        if wanted.model not in own:
            return wanted
        # mlx-lm leaves a request's adapters out with its default
        has_own_adapter = wanted.adapter in (None, self.adapter)
        return replace(wanted, model=_DEFAULT if has_own_adapter else self.model)
