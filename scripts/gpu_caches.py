"""Caches for timing on a GPU: a full one that does not copy itself, and copies of any."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from xkv.ops.backend import Backend


class DenseLayer(CacheLayerMixin):
    """A full cache with room for what will come: transformers' own copies itself in every step."""

    is_sliding = False

    def __init__(self, n_rows: int) -> None:
        super().__init__()
        self.n_rows, self.used = n_rows, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (*key_states.shape[:2], self.n_rows, key_states.shape[-1])
        self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
        end = min(self.used + key_states.shape[-2], self.n_rows)
        start = end - key_states.shape[-2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def stay(self) -> None:
        """From here on every step writes the same one row: shapes stay what they are."""
        self.n_rows = self.used + 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        return self.used

    def get_max_length(self) -> int:
        return -1


class Recorded:
    """Steps of a full cache that stays as long as it is, on CUDA replays of one graph.

    No cache in use has such steps, but none of growing length is faster.
    """

    def __init__(
        self, cache: Cache, step: Callable[[torch.Tensor], torch.Tensor], token: torch.Tensor
    ) -> None:
        for layer in cache.layers:
            layer.stay()
        self.step, self.token = step, token.clone()
        step(self.token)
        self.graph = torch.cuda.CUDAGraph() if token.is_cuda else None
        if self.graph is not None:
            with torch.cuda.graph(self.graph):
                self.output = step(self.token)

    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        """Logits as of the step."""
        if self.graph is None:
            return self.step(token)
        self.token.copy_(token)
        self.graph.replay()
        return self.output


def tensors(thing: Any) -> list[torch.Tensor]:
    """Every tensor of a cache once, those inside named tuples too."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()

    def look(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            found[id(x)] = x
        elif id(x) not in seen and not isinstance(x, (Backend, PreTrainedConfig)):
            seen.add(id(x))
            inside = (
                x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
            )
            for part in (*inside, *getattr(x, "__dict__", {}).values()):
                look(part)

    look(thing)
    return list(found.values())


def copied(cache: Cache, copy_of: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A cache of its own with other tensors in the place of each."""
    memo: dict[int, Any] = {id(x): copy_of(x) for x in tensors(cache)}
    new = copy.deepcopy(cache, dict(memo))

    def replaced(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return memo.get(id(x), x)
        if isinstance(x, tuple):
            parts = [replaced(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        if dataclasses.is_dataclass(x):
            parts = {
                field.name: replaced(getattr(x, field.name)) for field in dataclasses.fields(x)
            }
            return dataclasses.replace(x, **parts)
        return x

    # latents and bases are immutable and so were not copied
    for sequence in getattr(new, "sequences", []):
        for group in sequence.groups:
            group.state = replaced(group.state)
    return new
