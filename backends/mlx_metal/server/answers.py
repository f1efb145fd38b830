"""What goes from the generation thread to a client's thread."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.server.errors import ClientGone, RequestError, error_text
from xkv.backends.mlx_metal.server.need import RequestBytes
from xkv.backends.mlx_metal.server.stops import StopText
from xkv.errors import InputError

mlx_server = borrowed.module("mlx_lm.server")

_LEAST_LOGPROB = -9999.0
"""OpenAI's for tokens that cannot be; JSON has no infinity."""


@dataclass
class Answer(mlx_server.Response):  # type: ignore[name-defined]
    """One token of an answer.

    mlx-lm drops text that comes with the reason "stop", so that every end is a "length" to it.
    """

    end: str | None = None
    """Why the answer ends here, if it does."""
    stop: str | None = None
    """The stop string that it ends at."""
    entry: dict[str, Any] | None = None
    """The sampled token and the likeliest ones, as OpenAI's ``logprobs.content`` has them."""


class Answers:
    """The queue of one request's answers, which end before a stop string.

    Args:
        queue: What the client's thread reads.
        args: The request's.
        tokenizer: Gives the one of the model that serves the request.
    """

    def __init__(self, queue: Any, args: Any, tokenizer: Callable[[], Any]) -> None:
        self._queue = queue
        self._stops = StopText(args.stop_words)
        self._has_logprobs = args.logprobs or args.top_logprobs > 0
        self._tokenizer = tokenizer
        self.is_done = False
        """Whether nothing more comes, but an end that is held."""
        self._is_held = False
        """The end is there, and not sent on."""
        self.context: Any = None
        self.is_alone = False
        """Whether the request is served by itself, so that its prefill can be ended."""
        self.has_failed = False
        self.need = RequestBytes()
        """What the request takes at most."""

    @property
    def is_left(self) -> bool:
        """Whether nobody waits for them any more."""
        return self.context is not None and self.context._should_stop

    def put(self, item: Any) -> None:
        """Send an item on; the end of an answer waits for :meth:`send_end`.

        Raises:
            ClientGone: If it is the progress of a prefill that nobody waits for.
        """
        is_end = item is None or isinstance(item, Exception)
        if is_end:
            self.need = RequestBytes()
        if self.is_done:
            return
        self.is_done = is_end
        if item is None:
            self._is_held = True
            return
        if isinstance(item, mlx_server.GenerationContext):
            self.context = item
            if item.tool_parser is not None:
                item.tool_parser = _checked_calls(item.tool_parser)
        elif isinstance(item, mlx_server.Response):
            item = self._cut(item)
        elif isinstance(item, tuple):
            if self.is_alone and self.is_left:
                raise ClientGone("the client is gone")
        elif isinstance(item, Exception):
            self.has_failed = True
            if not isinstance(item, (RequestError, InputError, ClientGone)):
                logging.error("the generation stopped", exc_info=item)
            _forget_frames(item)
        self._queue.put(item)
        if self._stops.is_found:
            self.is_done = self._is_held = True

    def send_end(self) -> None:
        """Send the end on, if it is there: what the answer leaves is kept by now, and counted."""
        if self._is_held:
            self._is_held = False
            self._queue.put(None)

    def _cut(self, response: Any) -> Answer:
        fields = vars(response)
        if len(fields.get("match") or ()) == 1:
            # mlx-lm up to 0.31 blanks a control token's text later, with what was held back
            fields = {**fields, "text": "", "match": None}
        text, end = self._stops.add(fields["text"]), response.finish_reason
        if end is not None and not self._stops.is_found:
            text += self._stops.end()
        if self._stops.is_found:
            end = "stop"
            self.context.stop()
        fields = fields | {"text": text, "finish_reason": None if end is None else "length"}
        entry = self._entry(response) if self._has_logprobs else None
        return Answer(**fields, end=end, stop=self._stops.found, entry=entry)

    def _entry(self, response: Any) -> dict[str, Any]:
        top = sorted(response.top_tokens, key=lambda x: x["logprob"], reverse=True)
        return {
            **self._named(response.token, response.logprob),
            "top_logprobs": [self._named(x["id"], x["logprob"]) for x in top],
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer().decode([token])
        least = logprob if math.isfinite(logprob) else _LEAST_LOGPROB
        return {"id": token, "token": text, "bytes": list(text.encode()), "logprob": least}


def _checked_calls(parser: Callable[..., Any]) -> Callable[..., Any]:
    """A tool parser that raises nothing but what mlx-lm expects, whatever the model wrote."""

    def parse(text: str, tools: Any) -> Any:
        try:
            parsed = parser(text, tools)
        except Exception as error:
            raise ValueError(error_text(error)) from error
        calls: Sequence[Any] = parsed if isinstance(parsed, list) else [parsed]
        if not all(isinstance(x, dict) and {"name", "arguments"} <= x.keys() for x in calls):
            raise ValueError("a tool call has a name and arguments")
        return parsed

    return parse


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the functions that an error came through held, caches among them."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
