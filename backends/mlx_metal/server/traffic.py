"""What the server was asked, in numbers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_N_LAST = 20
"""Answers that a speed is the mean of."""


class Served:
    """One request, from when it is waited for to the end of its answer.

    Args:
        on_end: Called with it then, and perhaps again.
    """

    def __init__(self, on_end: Callable[[Served], None] = lambda served: None) -> None:
        self._on_end = on_end
        self.context: Any = None
        """mlx-lm's, once the prompt is taken."""
        self.n_tokens = 0
        self._begun = self._first = self._last = 0.0

    def begin(self, context: Any) -> None:
        """The prompt is taken."""
        self.context, self._begun = context, time.monotonic()

    def token(self) -> None:
        """A token of the answer is there."""
        self.n_tokens += 1
        self._last = time.monotonic()
        if self.n_tokens == 1:
            self._first = self._last

    def end(self) -> None:
        """The answer is complete."""
        self._on_end(self)

    @property
    def n_prompt(self) -> int:
        return 0 if self.context is None else len(self.context.prompt)

    @property
    def n_cached(self) -> int:
        return 0 if self.context is None else max(self.context.prompt_cache_count, 0)

    @property
    def prefill_s(self) -> float:
        """Seconds to the first token."""
        return self._first - self._begun

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last."""
        return self._last - self._first


class Traffic:
    """Counts of all requests, and how fast the last ones were answered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[Served] = set()
        self._counts = dict.fromkeys(
            ("answered", "with_cached_tokens", "prompt_tokens", "cached_tokens", "answer_tokens"), 0
        )
        self._last: deque[tuple[int, float, int, float]] = deque([(0, 0, 0, 0)], maxlen=_N_LAST)
        """Tokens and seconds of prefill and of decoding."""

    @contextmanager
    def request(self) -> Iterator[Served]:
        """A request, until it ends, or else the block; it counts if its prompt was taken."""
        served = Served(self._end)
        with self._lock:
            self._open.add(served)
        try:
            yield served
        finally:
            served.end()

    def _end(self, served: Served) -> None:
        with self._lock:
            if served in self._open:
                self._open.remove(served)
                if served.context is not None:
                    self._count(served)

    def _count(self, served: Served) -> None:
        for name, n in (
            ("answered", 1),
            ("with_cached_tokens", int(served.n_cached > 0)),
            ("prompt_tokens", served.n_prompt),
            ("cached_tokens", served.n_cached),
            ("answer_tokens", served.n_tokens),
        ):
            self._counts[name] += n
        if served.n_tokens:
            n_computed = served.n_prompt - served.n_cached
            self._last.append((n_computed, served.prefill_s, served.n_tokens - 1, served.decode_s))

    def report(self) -> dict[str, Any]:
        """Requests so far and at the moment, and tokens a second of the last answers."""
        with self._lock:
            n_running = sum(served.context is not None for served in self._open)
            n_prefill, prefill_s, n_decode, decode_s = (
                sum(x) for x in zip(*self._last, strict=True)
            )
            return {
                "running": n_running,
                "waiting": len(self._open) - n_running,
                **self._counts,
                "prefill_tps": _rate(n_prefill, prefill_s),
                "decode_tps": _rate(n_decode, decode_s),
            }


def _rate(n_tokens: int, seconds: float) -> float | None:
    return round(n_tokens / seconds, 1) if n_tokens and seconds else None
