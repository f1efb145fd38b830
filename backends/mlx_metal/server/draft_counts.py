"""How well a draft model does in the server, for the log and for ``GET /xkv/memory``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from xkv.backends.mlx_metal.model.drafts import DraftCount
from xkv.cli.answer import drafts_text


class DraftCounts:
    """Counts of all answers with a draft model."""

    def __init__(self) -> None:
        self._n_answers = self._n_drafted = self._n_taken = self._n_tokens = 0
        self._seconds = 0.0

    def counting(self, original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """``stream_generate`` that counts, and writes a line for each answer."""

        @functools.wraps(original)
        def stream_generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
            answers = original(*args, **kwargs)
            return answers if kwargs["draft_model"] is None else self._counted(answers, kwargs)

        return stream_generate

    def _counted(self, answers: Iterator[Any], options: dict[str, Any]) -> Iterator[Any]:
        count = DraftCount(options["num_draft_tokens"], options["max_tokens"])
        answer = None
        try:
            for answer in answers:
                count.count(answer.from_draft)
                yield answer
        finally:
            if answer is not None:
                self._add(count, answer.generation_tps)

    def _add(self, count: DraftCount, tps: float) -> None:
        logging.info(f"{drafts_text(count.n_drafted, count.n_taken)}, {tps:.1f} tokens-per-sec")
        self._n_answers += 1
        self._n_drafted += count.n_drafted
        self._n_taken += count.n_taken
        self._n_tokens += count.n_tokens
        self._seconds += count.n_tokens / tps

    def report(self) -> dict[str, Any]:
        """Tokens drafted and taken so far, and tokens a second of those answers."""
        return {
            "answers": self._n_answers,
            "drafted": self._n_drafted,
            "accepted": self._n_taken,
            "acceptance": round(self._n_taken / self._n_drafted, 3) if self._n_drafted else None,
            "decode_tps": round(self._n_tokens / self._seconds, 1) if self._seconds else None,
        }
