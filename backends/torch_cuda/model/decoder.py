"""Decode steps of constant shapes over a compressed cache, on CUDA each the replay of one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from xkv.backends.torch_cuda.model.attention import AttendingLayer
from xkv.backends.torch_cuda.model.cache_layer import XKVLayer, storing
from xkv.backends.torch_cuda.model.probe import cache_argument
from xkv.backends.torch_cuda.model.xkv_cache import XKVCache
from xkv.cache.lowrank_cache import LayerCache
from xkv.errors import InputError

Run = Callable[[], torch.Tensor]


class Replay(NamedTuple):
    """A step that was recorded."""

    run: Run
    n_seen: int
    """Tokens before it."""


class Decoder:
    """One token after the other; see :func:`xkv.torch_decoder`.

    Between two folds of the tail nothing of a compressed cache changes but the rows behind it. They
    are written into buffers with room for all of them, at a position that the device counts, so
    that a step can be recorded and replayed. The step in which the tail may be folded runs as it
    would without a decoder; so does every step while the prompt is not compressed. A graph keeps
    the memory of its step: where plain operations run, a layer's rebuilt keys too.

    Args:
        model: The cache's model.
        cache: After its prompt.
        record: Makes of a step a function that repeats it on the same memory; by default a CUDA
            graph on CUDA, and nothing on the CPU.

    Raises:
        InputError: If some rows of the cache grow by copying.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: XKVCache,
        record: Callable[[Run], Run] | None = None,
    ) -> None:
        _check(cache)
        self.model, self.cache = model, cache
        self._record = record or (_graph if model.device.type == "cuda" else None)
        self._argument = cache_argument(model)
        self._n_new = torch.zeros(1, dtype=torch.int64, device=model.device)
        """Rows that are in use behind those that the recorded step counts on."""
        self._steps_left = 0
        self._n_seen = 0
        self._buffer: torch.Tensor | None = None
        self._is_warm = False
        self._replay: Replay | None = None

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, vocabulary]`` after tokens ``[B, 1]``; the next step may overwrite them."""
        self.cache.forget_failed_call()
        if not self._steps_left or self._was_used_otherwise():
            _check(self.cache)
            self._steps_left = 0
            logits = self._call(tokens, self.cache)
            self._begin(tokens)
            return logits
        # a step that fails is the last one: what the device has counted is no longer known
        steps_left, self._steps_left = self._steps_left, 0
        with self.cache.unchanged_on_error():
            logits = self._next(tokens)
        self._steps_left = steps_left - 1
        return logits

    def _next(self, tokens: torch.Tensor) -> torch.Tensor:
        """One of the steps between two folds."""
        self._tokens.copy_(tokens)
        self._positions += 1
        # a step that is run and not replayed counts all rows but its own by itself
        self._n_new.fill_(1)
        if self._is_warm and self._record is not None:
            if self._replay is None:
                self._replay = Replay(self._record(self._step), self._n_seen)
            self._n_new.fill_(1 + self._n_seen - self._replay.n_seen)
            logits = self._replay.run()
        else:
            # kernels are compiled, and checked, before anything is recorded
            logits = self._step()
            self._is_warm = True
        for layer, part in zip(self.cache.layers, self._parts, strict=True):
            layer.n_rows += 1
            part.count_step(None if layer.rope is None else layer.rope.at(part.offset + 1))
        self._n_seen += 1
        return logits

    @property
    def _parts(self) -> list[LayerCache]:
        return [layer.parts[0] for layer in self.cache.layers]

    def _was_used_otherwise(self) -> bool:
        """Whether the cache has other rows, or other buffers, than this decoder left."""
        first = self._parts[0]
        return first.offset != self._n_seen or first.rows.keys.allocated is not self._buffer

    @storing()
    def _begin(self, tokens: torch.Tensor) -> None:
        """Make room for the steps up to the next fold."""
        self._replay, self._is_warm = None, False
        parts = self._parts
        if not all(part.is_compressed for part in parts):
            return
        config, first = self.cache.sequences[0].config, parts[0]
        n_steps = min(config.max_tail + config.window_at(x.offset) - x.rows.n_tail for x in parts)
        for part in parts:
            part.rows = part.rows.with_room(self.cache.backend, max(n_steps, 0))
        self._view = Cache(layers=[_StaticLayer(part, self._n_new) for part in parts])
        self._tokens = torch.empty_like(tokens)
        self._positions = torch.full_like(tokens, first.offset - 1)
        self._n_seen, self._buffer = first.offset, first.rows.keys.allocated
        self._steps_left = max(n_steps, 0)

    def _step(self) -> torch.Tensor:
        return self._call(self._tokens, self._view, position_ids=self._positions)

    def _call(self, tokens: torch.Tensor, cache: Cache, **options: Any) -> torch.Tensor:
        options |= {"use_cache": True, "logits_to_keep": 1, self._argument: cache}
        return self.model(input_ids=tokens, **options).logits[:, -1]


def _check(cache: XKVCache) -> None:
    """Refuse a cache with rows that grow by copying."""
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, XKVLayer) or layer.returns_rows:
            raise InputError(
                "steps of constant shapes need every layer's rows in the compressed cache; "
                f"those of layer {index} are not, or are rebuilt for the model in every step"
            )
    if cache.padding.is_token is not None:
        raise InputError("steps of constant shapes do not take batches with padding")


class _StaticLayer(CacheLayerMixin, AttendingLayer):
    """One layer's cache while its buffers are written at a position that the device counts."""

    is_sliding = False

    def __init__(self, part: LayerCache, n_new: torch.Tensor) -> None:
        super().__init__()
        self.part, self.n_new = part, n_new
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        mine = self.part.rows
        for buffer, rows in ((mine.keys, key_states), (mine.values, value_states)):
            assert buffer.allocated is not None
            buffer.allocated.index_copy_(-2, self.n_new + (buffer.n_rows - 1), rows)
        return self, self

    def attend(self, queries: torch.Tensor, scale: float) -> torch.Tensor:
        return self.part.attend(queries, scale, None, n_new=self.n_new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.part.offset + query_length, 0

    def get_seq_length(self) -> int:
        return self.part.offset

    def get_max_length(self) -> int:
        return -1


def _graph(run: Run) -> Run:
    """A CUDA graph of a step; recording computes nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay
