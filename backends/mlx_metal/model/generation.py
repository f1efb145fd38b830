"""mlx-lm's functions for a model that is enabled; for every other model they are as they were."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from xkv.backends.mlx_metal.model import borrowed, seam
from xkv.backends.mlx_metal.model.batch import XKVBatch
from xkv.backends.mlx_metal.model.batch_members import member_of, with_members
from xkv.backends.mlx_metal.model.cache import XKVCache
from xkv.backends.mlx_metal.model.drafts import Verifier
from xkv.backends.mlx_metal.model.enabled import (
    Enabled,
    enabled_state,
    lowrank_cache,
    native_caches,
    prefill_prompt,
    prefill_to_cut,
)
from xkv.backends.mlx_metal.model.prefill import flatten
from xkv.backends.mlx_metal.model.snapshot import undone_on_error
from xkv.cli import openblas
from xkv.config import DECODE_TOKENS
from xkv.errors import InputError

STEP_SIZE, DRAFT_STEP_SIZE = 2048, 512
"""mlx-lm's defaults of ``prefill_step_size``, alone and with a draft model."""

_GENERATE = borrowed.module("mlx_lm.generate")
mlx_cache = borrowed.module("mlx_lm.models.cache")


def _generate_step_of(original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @functools.wraps(original)
    def generate_step(prompt: mx.array, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        enabled = enabled_state(model)
        if enabled is None:
            return original(prompt, model, *args, **kwargs)
        return _generate(original, enabled, prompt, model, args, kwargs)

    return generate_step


def _generate(
    original: Callable[..., Iterator[Any]],
    enabled: Enabled,
    prompt: mx.array,
    model: nn.Module,
    args: Any,
    kwargs: Any,
) -> Iterator[Any]:
    """``generate_step`` with the prompt going through layer by layer."""
    _refuse_native_options(kwargs)
    if kwargs.get("prompt_cache") is None:
        kwargs["prompt_cache"] = mlx_cache.make_prompt_cache(model)
    caches = kwargs["prompt_cache"]
    enabled.check(caches)
    if lowrank_cache(caches) is None:
        yield from original(prompt, model, *args, **kwargs)
        return
    embeddings = kwargs.get("input_embeddings")
    n_tokens = len(prompt if embeddings is None else embeddings)
    step_size = kwargs.get("prefill_step_size", STEP_SIZE)
    progress = kwargs.get("prompt_progress_callback") or (lambda done, total: None)
    with undone_on_error(caches):
        enabled.keep_state(caches)
        if enabled.is_layerwise(caches, n_tokens - 1):
            kwargs["prefill_step_size"] = n_tokens
            steps = original(prompt, model, *args, **kwargs)
            with enabled.layerwise(caches, step_size, progress, prompt[:-1].tolist()):
                first = next(steps, None)
        else:
            n_done = 0
            if embeddings is None:
                n_done = prefill_to_cut(enabled, caches, prompt, step_size)
            kwargs["prompt_progress_callback"] = lambda done, total: progress(
                n_done + done, n_done + total
            )
            steps = original(prompt[n_done:], model, *args, **kwargs)
            first = next(steps, None)
    if first is not None:
        with openblas.ONE_THREAD:
            yield first
            yield from steps


def _speculative_of(original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @functools.wraps(original)
    def speculative_generate_step(
        prompt: mx.array, model: nn.Module, draft_model: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        models = model, draft_model
        if not any(map(enabled_state, models)):
            return original(prompt, *models, *args, **kwargs)
        return _speculate(original, prompt, models, args, kwargs)

    return speculative_generate_step


def _speculate(
    original: Callable[..., Iterator[Any]],
    prompt: mx.array,
    models: tuple[nn.Module, nn.Module],
    args: Any,
    kwargs: Any,
) -> Iterator[Any]:
    """``speculative_generate_step`` with both models' prompt going through layer by layer."""
    _refuse_native_options(kwargs)
    if kwargs.get("num_draft_tokens", 0) >= DECODE_TOKENS:
        raise InputError(
            f"{kwargs['num_draft_tokens']} draft tokens at a time are too many: more than "
            f"{DECODE_TOKENS - 1} would count as a prompt"
        )
    parts = _caches_of(models, kwargs.get("prompt_cache"))
    n_answer = kwargs.get("max_tokens", 256)
    for model, caches in zip(models, parts, strict=True):
        enabled = enabled_state(model)
        if enabled is not None:
            enabled.check(caches)
        _refuse_windows(caches, None if n_answer < 0 else len(prompt) + n_answer)
    kwargs["prompt_cache"] = joined = _Joined(parts)
    stream = args[0] if args else kwargs.get("stream", _GENERATE.generation_stream)
    step_size = kwargs.get("prefill_step_size", DRAFT_STEP_SIZE)
    with undone_on_error(joined):
        with mx.stream(stream):
            for model, caches in zip(models, parts, strict=True):
                prefill_prompt(model, caches, prompt[:-1], step_size)
        model, draft_model = models
        steps = original(prompt[-1:], Verifier(model), draft_model, *args, **kwargs)
        first = next(steps, None)
    if first is not None:
        with openblas.ONE_THREAD:
            yield first
            yield from steps


class _Joined(list[Any]):
    """The caches of two models; mlx-lm cuts them apart by layers, which some do not have all of."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        super().__init__(x for part in parts for x in part)
        self._parts = parts

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        return list(self._parts[0] if index.start is None else self._parts[1])


def _caches_of(models: Sequence[nn.Module], prompt_cache: Sequence[Any] | None) -> list[list[Any]]:
    """The caches of a model and of its draft model."""
    if prompt_cache is None:
        return [mlx_cache.make_prompt_cache(model) for model in models]
    n_caches, n_draft_caches = (len(native_caches(model)) for model in models)
    if len(prompt_cache) != n_caches + n_draft_caches:
        raise InputError(
            f"the prompt cache has {len(prompt_cache)} layers, and the two models have "
            f"{n_caches} and {n_draft_caches}: make one for each, and join them"
        )
    return [list(prompt_cache[:n_caches]), list(prompt_cache[n_caches:])]


def _refuse_native_options(kwargs: dict[str, Any]) -> None:
    for name, flag in (("kv_bits", "--kv-bits"), ("max_kv_size", "--max-kv-size")):
        if kwargs.get(name) is not None:
            raise InputError(
                f"{flag} changes mlx-lm's own cache, which xKV replaces: leave it out, or "
                "run without xKV"
            )


def _refuse_windows(caches: Sequence[Any], n_tokens: int | None) -> None:
    """Refuse caches from which drafts cannot be taken back; mlx-lm would go on without a word.

    Args:
        caches: Of one model.
        n_tokens: Of the prompt and the answer, None for no end.
    """
    for cache in flatten(caches):
        window = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
        if window is not None and (n_tokens is None or cache.offset + n_tokens >= window):
            text = "an answer without end" if n_tokens is None else f"{n_tokens} tokens"
            raise InputError(
                f"a layer with a window of {window} tokens cannot take drafts back once it is "
                f"full, and {text} would fill it: leave the draft model out"
            )
        if not cache.is_trimmable():
            raise InputError(
                "a layer's state cannot take drafts back as a KV cache can: leave the draft "
                "model out"
            )


def _make_prompt_cache_of(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    @functools.wraps(original)
    def make_prompt_cache(model: nn.Module, max_kv_size: int | None = None) -> list[Any]:
        if max_kv_size is not None and enabled_state(model) is not None:
            _refuse_native_options({"max_kv_size": max_kv_size})
        return original(model, max_kv_size)

    return make_prompt_cache


def _insert_segments_of(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def insert_segments(batches: Any, segments: Any, *args: Any, **kwargs: Any) -> Any:
        enabled = enabled_state(batches.model)
        if enabled is None:
            return original(batches, segments, *args, **kwargs)
        if enabled.why_not_batched is not None:
            raise InputError(enabled.why_not_batched)
        call = inspect.signature(original).bind(batches, segments, *args, **kwargs)
        given = call.arguments.get("caches") or [None] * len(segments)
        caches = [x or mlx_cache.make_prompt_cache(batches.model) for x in given]
        for cache in caches:
            enabled.check(cache)
        call.arguments["caches"] = caches
        if any(lowrank_cache(cache) is not None for cache in caches):
            # whole prompts go layer by layer, one after the other
            batches.prefill_step_size = sys.maxsize
            whole = [[[token for part in parts for token in part]] for parts in segments]
            call.arguments["segments"] = whole
        return original(*call.args, **call.kwargs)

    return insert_segments


def _prompt_of(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def prompt(batch: Any, tokens: Sequence[Sequence[int]]) -> None:
        if not any(isinstance(x, XKVBatch) for x in flatten(batch.prompt_cache)):
            original(batch, tokens)
            return
        alone = []
        for number, mine in enumerate(tokens):
            pairs = zip(batch.prompt_cache, mlx_cache.make_prompt_cache(batch.model), strict=True)
            caches = [member_of(cache, number, fresh) for cache, fresh in pairs]
            if mine:
                batch.tokens[number] += mine
                _prompt_one(batch, number, caches, mx.array(list(mine)))
            alone.append(caches)
        columns = zip(*alone, strict=True)
        pairs = zip(batch.prompt_cache, columns, strict=True)
        batch.prompt_cache = [with_members(cache, column) for cache, column in pairs]

    return prompt


def _prompt_one(batch: Any, number: int, caches: list[Any], tokens: mx.array) -> None:
    """One sequence's prompt, of which a batch's ``on_progress`` and ``on_error`` are told."""
    uid, on_error = batch.uids[number], vars(batch).get("on_error")
    progress = vars(batch).get("on_progress", lambda uid, done, total: None)
    try:
        step_size = batch.prefill_step_size
        prefill_prompt(batch.model, caches, tokens, step_size, functools.partial(progress, uid))
    except Exception as error:
        if on_error is None:
            raise
        on_error(uid, error)


_PATCHES = (
    seam.ATTENTION,
    seam.Patch(_GENERATE, "generate_step", _generate_step_of),
    seam.Patch(_GENERATE, "speculative_generate_step", _speculative_of),
    seam.Patch(mlx_cache, "make_prompt_cache", _make_prompt_cache_of),
    seam.Patch(_GENERATE.BatchGenerator, "insert_segments", _insert_segments_of),
    seam.Patch(_GENERATE.PromptProcessingBatch, "prompt", _prompt_of),
)


def patch_for(enabled: Enabled) -> Callable[[], Any]:
    """Replace mlx-lm's functions until a model is disabled, or gone.

    Returns:
        Called once, gives them back.
    """
    for patch in _PATCHES:
        patch.install()
    setattr(mlx_cache, XKVCache.__name__, XKVCache)
    undo = weakref.finalize(enabled, _remove_patches)
    undo.atexit = False
    return undo


def _remove_patches() -> None:
    for patch in _PATCHES:
        patch.remove()
    if not _PATCHES[1].is_installed:
        delattr(mlx_cache, XKVCache.__name__)
