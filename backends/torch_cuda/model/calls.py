"""What is done before and after each call of a model with a cache of ours."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

from xkv.backends.torch_cuda.model.attention import ATTENTION
from xkv.backends.torch_cuda.model.probe import base_model
from xkv.backends.torch_cuda.model.xkv_cache import XKVCache
from xkv.errors import InputError

Given = dict[str, Any]
"""Arguments of a call by name."""


def watch_calls(model: PreTrainedModel) -> None:
    """Tell a cache of ours of each call of its model, before the layers run and afterwards."""
    base = base_model(model)
    if _before_call not in base._forward_pre_hooks.values():
        base.register_forward_pre_hook(_before_call, with_kwargs=True)
        base.register_forward_hook(_after_call, with_kwargs=True, always_call=True)


def _cache(given: Given) -> XKVCache | None:
    cache = given.get("cache", given.get("past_key_values"))
    return cache if isinstance(cache, XKVCache) else None


def _before_call(
    base: Any, args: tuple[Any, ...], kwargs: Given
) -> tuple[tuple[Any, ...], Given] | None:
    given = dict(zip(inspect.signature(base.forward).parameters, args, strict=False)) | kwargs
    cache = _cache(given)
    if cache is None:
        return None
    if not base.config._attn_implementation.startswith(ATTENTION):
        raise InputError(
            f"the model's attention was set to {base.config._attn_implementation!r} since "
            "torch_cache was called, and only 'xkv' can attend to a compressed cache"
        )
    cache.forget_failed_call()
    given = _without_rows_held(given, cache.get_seq_length())
    _check(given, cache)
    mask = given.get("attention_mask")
    return (), given | {"attention_mask": cache.begin(mask, *_size(given))}


def _after_call(base: Any, args: tuple[Any, ...], kwargs: Given, output: Any) -> None:
    cache = _cache(kwargs)
    if cache is not None and output is None:
        cache.forget_failed_call()
    elif cache is not None:
        cache.end()


def _inputs(given: Given) -> str:
    return "inputs_embeds" if given.get("input_ids") is None else "input_ids"


def _size(given: Given) -> tuple[int, int]:
    """Sequences and rows of a call."""
    batch, n_rows = given[_inputs(given)].shape[:2]
    return batch, n_rows


def _without_rows_held(given: Given, n_held: int) -> Given:
    """The call without the rows at positions that the cache holds.

    ``generate`` brings a prompt from its beginning where an assistant model drafts.

    Raises:
        InputError: If no row is left.
    """
    _, n_rows = _size(given)
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    if not n_held or n_rows < n_held or positions is None or positions.ndim != 2:
        return given
    if (mask is not None and mask.shape[-1] != n_rows) or bool((positions[:, 0] > 0).any()):
        return given
    if n_rows == n_held:
        raise InputError(
            f"the cache holds all {n_held} tokens of this call already: go on from "
            "cache.crop(-1), or with more tokens"
        )
    name = _inputs(given)
    return given | {"position_ids": positions[:, n_held:], name: given[name][:, n_held:]}


def _check(given: Given, cache: XKVCache) -> None:
    """Refuse a call that does not go on from what the cache holds."""
    batch, n_rows = _size(given)
    n_seen, held, mask = cache.get_seq_length(), cache.batch_size, given.get("attention_mask")
    if cache.lost:
        raise InputError(
            f"an earlier call failed, and {', '.join(cache.lost)} cannot go back to what it was: "
            "use cache.reset(), or a new cache"
        )
    if held not in (-1, batch):
        raise InputError(
            f"the cache holds {held} sequences, and the call brings {batch}: use "
            "cache.batch_repeat_interleave or cache.batch_select_indices, or a new cache"
        )
    if mask is not None and mask.ndim != 2:
        raise InputError(
            f"an attention mask of shape {tuple(mask.shape)} is not supported by a compressed "
            "cache: give one of shape [batch, tokens], or none"
        )
    if mask is not None and mask.shape[1] != n_seen + n_rows:
        raise InputError(
            f"the attention mask covers {mask.shape[1]} tokens, and there are {n_seen} in the "
            f"cache and {n_rows} in the call: give one of all {n_seen + n_rows}"
        )
