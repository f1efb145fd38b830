"""Which stored rows the steps of a few layers rebuild while a model decodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np

from xkv.cache.layer import LayerView
from xkv.cache.lowrank_cache import LayerCache, LowRankCache
from xkv.evaluation.prefix import Prefix
from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.planning.document import Document
from xkv.planning.language_model import LanguageModel

N_LAYERS = 3
"""Layers that are watched: the first, one in the middle, the last."""


class WatchedLayer(LayerCache):
    """A layer that notes which rows each decode step rebuilds; attention is as ever."""

    def __init__(self, layer: LayerCache) -> None:
        super().__init__(layer.cache, layer.number, layer.index)
        self.steps: list[np.ndarray] = []
        """Row numbers of the segment, ``[n_kv_heads, n]``, rising."""

    @property
    def view(self) -> LayerView:
        noting = _NotingBackend(self.cache.backend, self.steps)
        return replace(super().view, backend=cast(Backend, noting))


class _NotingBackend:
    """A backend that notes the rows of the first sequence that are chosen."""

    def __init__(self, backend: Backend, steps: list[np.ndarray]) -> None:
        self._backend, self._steps = backend, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def choose_rows(self, worth: Array, count: int) -> Array:
        rows = self._backend.choose_rows(worth, count)
        # sorted into a copy: the step goes on with its own
        self._steps.append(np.sort(self._backend.to_numpy(rows)[0]))
        return rows


def why_no_working_set(cache: LowRankCache) -> str | None:
    """In a sentence; None where there is one."""
    config, rows = cache.config, cache.groups[0].layers[0]
    if config.attention == "exact":
        return "Every stored row is attended to in each step, as --attention exact asks."
    if config.rebuilt_at(rows.n_segment, rows.n_recent) is None:
        return (
            f"The prompt is too short for a working set: all {rows.n_segment} stored rows are "
            "attended to in each step."
        )
    return None


def watch(
    model: LanguageModel, document: Document, cache: LowRankCache, n_tokens: int
) -> dict[str, Any]:
    """Decode greedily after a document, past the end of an answer too, and say what was rebuilt.

    Args:
        model: The model.
        document: Its rows take the place of layers that are in no group.
        cache: Compressed, of the document; it takes up the tokens.
        n_tokens: Tokens to decode, after those that open a reply.

    Returns:
        Ready for JSON: ``why_not``, a sentence or None, and otherwise ``tokens`` (the text of each
        step's), ``n_opening`` (steps before the first that was decoded) and ``layers``: for each
        its ``layer``, ``start`` and ``end`` of the stored positions, ``recent``, the first that is
        held as a recent row, all three after the last step, and ``heads``: for each a list of the
        positions that each step rebuilt, rising.
    """
    reason = why_no_working_set(cache)
    if reason is not None:
        return {"why_not": reason}
    handles = cache.layers
    chosen = sorted({sorted(handles)[i] for i in (0, len(handles) // 2, -1)})
    watched = {index: WatchedLayer(handles[index]) for index in chosen}
    layers: list[Any] = [watched.get(i) or handles.get(i) for i in range(len(document.keys))]
    for index, layer in enumerate(layers):
        if layer is None:
            keys, values = (document.widen(x[index]) for x in (document.keys, document.values))
            layers[index] = Prefix(document.backend, keys, values, document.n_tokens)
    opening = model.question_tokens("", "")
    tokens = list(opening)
    for step in range(len(opening) + n_tokens):
        # one by one, the opening too: each is a step of its own
        logits = model.forward([[tokens[step]]], layers, last_only=True)
        if len(tokens) == step + 1:
            tokens.append(int(np.argmax(document.backend.to_numpy(logits)[0, -1])))
    return {
        "why_not": None,
        "tokens": [model.decode([token]) for token in tokens[:-1]],
        "n_opening": len(opening),
        "layers": [_story(index, layer) for index, layer in watched.items()],
    }


def _story(index: int, layer: WatchedLayer) -> dict[str, Any]:
    """One layer's part of what :func:`watch` returns."""
    rows = layer.rows
    end = rows.start + rows.n_segment
    by_head = zip(*(step + rows.start for step in layer.steps), strict=True)
    return {
        "layer": index,
        "start": rows.start,
        "recent": end - rows.n_recent,
        "end": end,
        "heads": [[step.tolist() for step in steps] for steps in by_head],
    }
