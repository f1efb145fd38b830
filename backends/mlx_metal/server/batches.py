"""The conversations that the server answers at a time, in one batch of mlx-lm's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx

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
        self._prompt_batch.on_progress = self._progress
        self._prompt_batch.on_error = self._fail

    def insert_segments(self, *args: Any, **kwargs: Any) -> Any:
        uids = super().insert_segments(*args, **kwargs)
        self.answers.update((uid, self._take()) for uid in uids)
        return uids

    def _progress(self, uid: int, done: int, total: int) -> None:
        answers = self.answers[uid]
        answers.put((done, total))
        if uid in self._left():
            raise ClientGone("the client is gone")

    def _left(self) -> list[int]:
        """Requests that nobody waits for, or that a stop string ended."""
        # other devices of a model that runs on several do not know of clients
        if mx.distributed.init().size() > 1:
            return []
        return [uid for uid, answers in self.answers.items() if answers.is_left]

    def _fail(self, uid: int, error: Exception) -> None:
        self.answers[uid].put(error)
        self._failed.append(uid)

    def next(self) -> tuple[list[Any], list[Any]]:
        """One step of all but those that were left; requests that fail end with it."""
        left = self._left()
        self.remove(left)
        try:
            prompts, generated = super().next()
        except Exception as error:
            # in the step of all, so that none of them can go on
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


def _ended(uid: int) -> Any:
    """What lets mlx-lm's loop forget a request that gets no more answers."""
    cls = _GENERATE.GenerationBatch.Response
    fields: dict[str, Any] = dict.fromkeys(x.name for x in dataclasses.fields(cls))
    fields |= {"uid": uid, "token": 0, "logprobs": mx.zeros(_NO_LOGPROBS)}
    return cls(**fields | {"finish_reason": "length", "prompt_cache": [], "all_tokens": []})
