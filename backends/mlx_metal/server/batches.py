"""The conversations that the server answers at a time, in one batch of mlx-lm's."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from greenlet import getcurrent, greenlet

from xkv.backends.mlx_metal.model import borrowed
from xkv.backends.mlx_metal.model.batch import XKVBatch
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.backends.mlx_metal.server.answers import Answers
from xkv.backends.mlx_metal.server.budget import arrays_held
from xkv.backends.mlx_metal.server.errors import ClientGone
from xkv.backends.mlx_metal.server.need import RequestBytes

_GENERATE = borrowed.module("mlx_lm.generate")

_NO_LOGPROBS = 64
"""Of an answer that ends in an error: at least as many as a client may ask for."""


class Batches(_GENERATE.BatchGenerator):  # type: ignore[name-defined,misc]
    """mlx-lm's batch, in which a request that fails takes no other with it.

    A prompt goes in beside the answers of the others: its prefill rests after a chunk of a layer,
    for a step of theirs, where they had less than half of the time.

    Args:
        take: Gives the answers of the request that is being inserted.
        keep: Called with the tokens and the cache of one that ends before its answer does.
        args: mlx-lm's, as are the others.
    """

    def __init__(
        self,
        take: Callable[[], Answers],
        keep: Callable[[list[int], list[Any]], None],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # one prompt at a time, between which the others go on; mlx-lm decodes as many, at least
        self.prefill_batch_size = 1
        self.completion_batch_size = kwargs["completion_batch_size"]
        self._take, self._keep = take, keep
        self.answers: dict[int, Answers] = {}
        """Of the requests in the batch."""
        self._failed: list[int] = []
        self._prefill: greenlet | None = None
        """A prompt that is going in, by itself: a stack of calls that rests between steps."""
        self._held: list[Any] = []
        """What there is to say of it once it is in."""
        self._step_seconds = self._step_end = 0.0
        """How long the last step of the answers took, and when it ended."""
        self._prompt_batch.on_progress = self._progress
        self._prompt_batch.on_error = self._fail
        self._prompt_batch.prompt = self._begin_prefill

    def insert_segments(self, *args: Any, **kwargs: Any) -> Any:
        uids = super().insert_segments(*args, **kwargs)
        self.answers.update((uid, self._take()) for uid in uids)
        return uids

    def _begin_prefill(self, tokens: Sequence[list[int]]) -> None:
        if tokens:
            batch = self._prompt_batch
            self._prefill = greenlet(lambda: type(batch).prompt(batch, tokens))
            self._prefill.switch()

    def _progress(self, uid: int, done: int, total: int) -> None:
        answers = self.answers[uid]
        answers.put((done, total))
        if uid in self._left():
            raise ClientGone("the client is gone")
        since = time.perf_counter() - self._step_end
        if len(self._generation_batch) and (_is_distributed() or since >= self._step_seconds):
            getcurrent().parent.switch()

    def _drop_prefill(self) -> None:
        """End a prefill that rests."""
        prefill, self._prefill, self._held = self._prefill, None, []
        if prefill is not None:
            prefill.throw()

    def close(self) -> None:
        self._drop_prefill()
        super().close()

    def _left(self) -> list[int]:
        """Requests that nobody waits for, or that a stop string ended."""
        # other devices of a model that runs on several do not know of clients
        if _is_distributed():
            return []
        return [uid for uid, answers in self.answers.items() if answers.is_left]

    def _fail(self, uid: int, error: Exception) -> None:
        self.answers[uid].put(error)
        self._failed.append(uid)

    def next(self) -> tuple[list[Any], list[Any]]:
        """One step of all but those that were left; requests that fail end with it."""
        prefilling = [] if self._prefill is None else self._prompt_batch.uids
        left = [uid for uid in self._left() if uid not in prefilling]
        self.remove(left)
        try:
            prompts, generated = self._step()
        except Exception as error:
            # in the step of all, so that none of them can go on
            self._drop_prefill()
            prompts, generated = [], []
            for uid in self.answers:
                self._fail(uid, error)
        failed, self._failed = self._failed, []
        self.remove(failed)
        for response in prompts:
            if response.end_of_prompt and response.uid in self.answers:
                answers = self.answers[response.uid]
                answers.need = RequestBytes(answers.need.cache)
        for response in generated:
            if response.finish_reason is not None:
                self.answers.pop(response.uid, None)
        prompts = [x for x in prompts if x.uid not in failed]
        return prompts, [*generated, *map(_ended, [*left, *failed])]

    def _step(self) -> tuple[list[Any], list[Any]]:
        """A step of the answers, and a prompt as far as it gets before the next one."""
        began = time.perf_counter()
        if self._prefill is None:
            prompts, generated = super().next()
        else:
            # mlx-lm goes on to prompts where it decodes fewer than it may
            most, self.completion_batch_size = self.completion_batch_size, 0
            try:
                _, generated = super().next()
            finally:
                self.completion_batch_size = most
            self._step_end = time.perf_counter()
            self._step_seconds = self._step_end - began
            prompts = self._held
            with mx.stream(self._stream):
                self._prefill.switch()
        if self._prefill is None or self._prefill.dead:
            self._prefill, self._held = None, []
            return prompts, generated
        self._held = prompts
        return [], generated

    def remove(self, uids: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave requests out; those that had begun to answer can go on later."""
        left = {uid: self.answers.pop(uid) for uid in uids if uid in self.answers}
        answering = set(self._generation_batch.uids)
        whole = [uid for uid, x in left.items() if uid in answering and not x.has_failed]
        for cache, tokens in self.extract_cache(whole).values():
            self._keep(list(tokens), cache)
        return super().remove(uids, *args, **kwargs)

    def arrays(self) -> dict[int, int]:
        """:func:`arrays_held` of all that is in the batch, or waits for it."""
        held: dict[int, int] = {}
        for sequence in self._unprocessed_sequences:
            held |= arrays_held(sequence[3])
        for batch in (self._prompt_batch, self._generation_batch):
            for layer in flatten(batch.prompt_cache):
                members = layer.members if isinstance(layer, XKVBatch) else [layer]
                for member in members:
                    held |= arrays_held([member])
        return held


def _is_distributed() -> bool:
    return mx.distributed.init().size() > 1


def _ended(uid: int) -> Any:
    """What lets mlx-lm's loop forget a request that gets no more answers."""
    cls = _GENERATE.GenerationBatch.Response
    fields: dict[str, Any] = dict.fromkeys(x.name for x in dataclasses.fields(cls))
    fields |= {"uid": uid, "token": 0, "logprobs": mx.zeros(_NO_LOGPROBS)}
    return cls(**fields | {"finish_reason": "length", "prompt_cache": [], "all_tokens": []})
