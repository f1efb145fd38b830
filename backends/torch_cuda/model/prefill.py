"""Prefill of whole prompts through one decoder layer at a time, chunked inside each layer.

A call of the model goes layer by layer already. Here each layer takes its rows in chunks, and a
group is factored and freed when its last layer is done.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from xkv.backends.torch_cuda.model.attention import ATTENTION, attention_forward, causal_mask
from xkv.backends.torch_cuda.model.cache_layer import XKVLayer, storing
from xkv.backends.torch_cuda.model.probe import base_model, cache_argument, set_attention
from xkv.backends.torch_cuda.model.rollback import CacheState
from xkv.backends.torch_cuda.model.xkv_cache import XKVCache
from xkv.config import DECODE_TOKENS
from xkv.errors import InputError

logger = logging.getLogger("xkv")

LAYERWISE = f"{ATTENTION}_layerwise"
"""Name of the attention function while a prompt goes through layer by layer."""

STEP_SIZE = 2048

Progress = Callable[[int, int], None]
"""Called with prompt tokens done and in all."""


class CannotChunk(Exception):
    """A layer is called with something that cannot be cut into chunks of rows."""


@dataclass(frozen=True)
class _LaterMask:
    """How a mask that is not plainly causal was asked for: each chunk asks for its own."""

    options: dict[str, Any]

    def of_chunk(self, cache: XKVCache, layer_idx: int, n_rows: int) -> torch.Tensor | None:
        kv_length, kv_offset = cache.get_mask_sizes(n_rows, layer_idx)
        sizes = {"q_length": n_rows, "kv_length": kv_length, "kv_offset": kv_offset}
        offset = cache.layers[layer_idx].get_seq_length()
        return sdpa_mask(**(self.options | sizes | {"q_offset": offset}))


def _later_mask(mask_function: Any = causal_mask_function, **options: Any) -> Any:
    if mask_function is causal_mask_function:
        return causal_mask(**options)
    return _LaterMask(options | {"mask_function": mask_function})


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    cache: XKVCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    step_size: int = STEP_SIZE,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Take all but the last token of a prompt; see :func:`xkv.torch_prefill`."""
    if step_size <= DECODE_TOKENS:
        raise InputError(
            f"step_size={step_size} must be above {DECODE_TOKENS}: smaller calls count as decoding"
        )
    n_seen = cache.get_seq_length()
    mask = None if attention_mask is None else attention_mask[:, :-1]
    rows = input_ids[:, n_seen:-1]
    problem = None
    on_progress(0, rows.shape[1])
    try:
        with cache.unchanged_on_error(copies=True) as before:
            if rows.shape[1] > DECODE_TOKENS:
                _prefill(model, cache, rows, mask, step_size, on_progress, before)
            elif rows.shape[1]:
                _call(model, cache, rows, mask)
    except torch.OutOfMemoryError as error:
        problem = str(error).splitlines()[0]
    # out of the handler, which keeps the tensors of its frames alive
    if problem is not None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise InputError(
            f"the device ran out of memory in a prompt of {rows.shape[1]} tokens ({problem}); the "
            "cache is as it was: shorten the prompt, or lower step_size or the batch"
        )


def _prefill(
    model: PreTrainedModel,
    cache: XKVCache,
    rows: torch.Tensor,
    mask: torch.Tensor | None,
    step_size: int,
    on_progress: Progress,
    before: CacheState,
) -> None:
    """Layer by layer if the model can, otherwise from ``before`` as a stream."""
    n_seen = cache.get_seq_length()
    try:
        with _chunked_layers(model, cache, rows.shape[1], step_size, on_progress):
            _call(model, cache, rows, mask)
        return
    except CannotChunk as error:
        if n_seen:
            raise InputError(
                f"{type(model).__name__} cannot take a later prompt layer by layer: {error}; call "
                "generate without a prefill"
            ) from error
        reason = str(error)
    cache.go_back(before)
    logger.warning(
        "prompts of %s are compressed in segments as they stream in, and later parts see the "
        "compressed earlier ones: %s",
        type(model).__name__,
        reason,
    )
    cache.stream()
    for start, end in _chunks(rows.shape[1], step_size):
        _call(model, cache, rows[:, start:end], None if mask is None else mask[:, :end])
        on_progress(end, rows.shape[1])


def _call(
    model: PreTrainedModel, cache: XKVCache, rows: torch.Tensor, mask: torch.Tensor | None
) -> None:
    """Run rows through the decoder, without the head."""
    options: dict[str, Any] = {cache_argument(model): cache, "attention_mask": mask}
    if mask is not None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        options["position_ids"] = positions[:, -rows.shape[1] :]
    base_model(model)(input_ids=rows, use_cache=True, **options)


def _chunks(n_rows: int, step_size: int) -> list[tuple[int, int]]:
    """Chunks of equal size: a short last one would count as the end of the prompt."""
    n_chunks = -(-n_rows // step_size)
    size = -(-n_rows // n_chunks)
    return [(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def decoder_layers(model: PreTrainedModel, n_layers: int) -> list[torch.nn.Module]:
    """The modules that a call goes through one after the other.

    Raises:
        CannotChunk: If the model does not list them.
    """
    for part in base_model(model).modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == n_layers:
            return list(part)
    raise CannotChunk("the model does not list its layers")


@contextlib.contextmanager
def _chunked_layers(
    model: PreTrainedModel, cache: XKVCache, n_rows: int, step_size: int, on_progress: Progress
) -> Iterator[None]:
    """Inside, the layers of one model take the rows of one call chunk by chunk."""
    layers = decoder_layers(model, len(cache.layers))
    own = [vars(layer).get("forward") for layer in layers]
    called: list[int] = []
    before = model.config._attn_implementation
    AttentionInterface.register(LAYERWISE, attention_forward)
    AttentionMaskInterface.register(LAYERWISE, _later_mask)
    try:
        set_attention(model, LAYERWISE)
        for layer_idx, layer in enumerate(layers):
            run = _LayerRun(cache, layer_idx, layer.forward, n_rows, step_size, on_progress, called)
            layer.forward = run  # type: ignore[assignment]
        yield
        if called != list(range(len(layers))):
            raise CannotChunk("the layers that it lists are not called once each in their order")
    finally:
        for layer, forward in zip(layers, own, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class _LayerRun:
    """Stands in for one layer's ``forward``."""

    cache: XKVCache
    layer_idx: int
    forward: Callable[..., Any]
    n_rows: int
    step_size: int
    on_progress: Progress
    called: list[int]
    """Layers that were, in order."""

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or hidden_states.ndim != 3 or hidden_states.shape[1] != self.n_rows:
            raise CannotChunk("a layer is called with more than hidden states and named arguments")
        self.called.append(self.layer_idx)
        cached = self.cache.layers[self.layer_idx]
        for part in cached.parts if isinstance(cached, XKVLayer) else []:
            part.reserve(self.n_rows)
        output = torch.empty_like(hidden_states)
        for start, end in _chunks(self.n_rows, self.step_size):
            self.cache.padding.look_at(start, end)
            cut = {name: self._cut(name, x, start, end) for name, x in kwargs.items()}
            chunk = self.forward(hidden_states[:, start:end], **cut)
            if not isinstance(chunk, torch.Tensor):
                raise CannotChunk("a layer returns more than hidden states")
            output[:, start:end] = chunk
            done = self.layer_idx * self.n_rows + end
            self.on_progress(done // len(self.cache.layers), self.n_rows)
        for part in cached.parts if isinstance(cached, XKVLayer) else []:
            if part.is_last_of_group:
                # so that the layers' time does not count as the factorization's
                self.cache.backend.evaluate(output)
                with storing():
                    part.settle()
        return output

    def _cut(self, name: str, value: Any, start: int, end: int) -> Any:
        """What of a layer's argument belongs to the rows from ``start`` to ``end``."""
        if isinstance(value, _LaterMask):
            return value.of_chunk(self.cache, self.layer_idx, end - start)
        if name == "attention_mask" and (value is None or value.ndim == 2):
            return value
        if name in ("position_embeddings", "position_ids") and value is not None:
            if isinstance(value, tuple):
                return tuple(self._cut(name, x, start, end) for x in value)
            axis = 1 if name == "position_embeddings" else value.ndim - 1
            if value.shape[axis] == self.n_rows:
                return value.narrow(axis, start, end - start)
        elif not isinstance(value, (torch.Tensor, tuple, list, dict)):
            return value
        raise CannotChunk(f"a layer is called with {name} besides hidden states, mask and cache")
