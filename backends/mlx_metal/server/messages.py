"""Anthropic's paths: their requests are chat completions in another form."""

from __future__ import annotations

from typing import Any

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.server.errors import COUNT_PATH, MESSAGES_PATH, RequestError
from xkv.backends.mlx_metal.server.handler import Handler
from xkv.backends.mlx_metal.server.messages_answer import (
    Events,
    EventWriter,
    empty_message,
    error_of,
    message_of,
    usage_of,
)
from xkv.backends.mlx_metal.server.messages_request import chat_of

mlx_server = borrowed.module("mlx_lm.server")

_CHAT_PATH = "/v1/chat/completions"


class CountRequest(mlx_server.CompletionRequest):  # type: ignore[name-defined]
    """A request whose prompt is made and counted, and not answered."""


class PromptCount(RequestError):
    """How long a prompt is, in place of an answer."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__(200, f"the prompt has {n_tokens} tokens")
        self.body: dict[str, Any] = {"input_tokens": n_tokens}


class MessagesHandler(Handler):
    """Ours, which reads and answers in Anthropic's form on Anthropic's paths."""

    @property
    def _messages_path(self) -> str | None:
        """Anthropic's path that was asked for, whatever mlx-lm is told."""
        words = getattr(self, "requestline", "").split()
        # clients of beta versions say so in the query
        path = words[1].partition("?")[0] if len(words) > 1 else None
        return path if path in (MESSAGES_PATH, COUNT_PATH) else None

    def do_POST(self) -> None:
        if self._messages_path is not None:
            self.path = _CHAT_PATH
        super().do_POST()

    def read(self, body: dict[str, Any]) -> dict[str, Any]:
        if self._messages_path is not None:
            body = chat_of(body, is_count=self._messages_path == COUNT_PATH)
        return super().read(body)

    def handle_chat_completions(self) -> Any:
        request = super().handle_chat_completions()
        is_count = self._messages_path == COUNT_PATH
        return CountRequest(**vars(request)) if is_count else request

    def handle_completion(self, *args: Any) -> None:
        if self._messages_path is not None and self.stream:
            client: Any = self.response_generator
            self.wfile: Any = EventWriter(self.wfile, Events(self._started, lambda: client.stop))
        super().handle_completion(*args)

    def generate_response(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        response = super().generate_response(*args, **kwargs)
        if self._messages_path is None or self.stream:
            return response
        client: Any = self.response_generator
        return message_of(response, client.stop)

    def _started(self) -> dict[str, Any]:
        """The answer before its first token."""
        client: Any = self.response_generator
        context = client.served.context
        usage = usage_of(len(context.prompt), 0, context.prompt_cache_count)
        return empty_message(self.request_id, self.requested_model, usage)

    def _answer_error(self, error: RequestError) -> None:
        if self._messages_path is not None and not isinstance(error, PromptCount):
            error.body = error_of(error)
        super()._answer_error(error)
