"""Which stored rows the working sets of a few layers hold while a model decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import numpy as np

from xkv.cache.layer import LayerView
from xkv.cache.lowrank_cache import LayerCache, LowRankCache
from xkv.evaluation.prefix import Prefix
from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.ops.working_set import Choice
from xkv.planning.document import Document
from xkv.planning.language_model import LanguageModel

N_LAYERS = 3
"""Layers that are watched: the first, one in the middle, the last."""


class Step(NamedTuple):
    """What one decode step found in a layer's slots, and did; one array for each KV head."""

    kept: Sequence[np.ndarray]
    """Positions that the slots held, rising."""
    rebuilt: Sequence[np.ndarray]
    """Positions of the rows that were rebuilt."""
    at_hand: Sequence[float]
    """Of the rows that the step's queries wanted most, as many as slots: the share in the slots."""


class WatchedLayer(LayerCache):
    """A layer that notes what each decode step does with its working set; attention is as ever."""

    def __init__(self, layer: LayerCache) -> None:
        super().__init__(layer.cache, layer.number, layer.index)
        self.steps: list[Step] = []
        self._notes = _Notes(layer.cache.backend)

    @property
    def view(self) -> LayerView:
        return replace(super().view, backend=cast(Backend, self._notes))

    def attend(self, queries: Array, scale: float, mask: Array | None, **more: Any) -> Array:
        self._notes = _Notes(self.cache.backend)
        kept = self.positions()
        output = super().attend(queries, scale, mask, **more)
        start, to_numpy = self.rows.start, self.cache.backend.to_numpy
        worth, rebuilt = (to_numpy(x)[0] for x in (self._notes.worth, self._notes.rebuilt))
        wanted = [start + np.argsort(-w)[: len(rows)] for w, rows in zip(worth, kept, strict=True)]
        at_hand = [float(np.isin(w, rows).mean()) for w, rows in zip(wanted, kept, strict=True)]
        self.steps.append(Step(kept, [np.sort(rows) + start for rows in rebuilt], at_hand))
        return output

    def positions(self) -> list[np.ndarray]:
        """Which positions the slots hold now."""
        rows = self.view.filled()
        # sorted into a copy: PyTorch's array is the cache's own, which steps write into
        assert rows.slots is not None
        held = self.cache.backend.to_numpy(rows.slots.rows)
        return [np.sort(x) + rows.start for x in held[0]]


class _Notes:
    """A backend that keeps what a step made of its index: scores of rows, and rows it rebuilt."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.worth: Any = None
        self.rebuilt: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def choose_rows(self, worth: Array, *rest: Any) -> Choice:
        chosen = self._backend.choose_rows(worth, *rest)
        self.worth, self.rebuilt = worth, chosen.rows
        return chosen


def why_no_working_set(cache: LowRankCache) -> str | None:
    """In a sentence; None where there is one."""
    config, rows = cache.config, cache.groups[0].layers[0]
    if config.attention == "exact":
        return "Every stored row is attended to in each step, as --attention exact asks."
    if config.rebuilt_at(rows.n_segment, rows.n_kept) is None:
        return (
            f"The prompt is too short for a working set: all {rows.n_segment} stored rows are "
            "attended to in each step."
        )
    if not rows.n_kept:
        return "No rows are kept between steps: --kept-share leaves no room for any."
    return None


def watch(
    model: LanguageModel, document: Document, cache: LowRankCache, n_tokens: int
) -> dict[str, Any]:
    """Decode greedily after a document, past the end of an answer too, and say what was kept.

    Args:
        model: The model.
        document: Its rows take the place of layers that are in no group.
        cache: Compressed, of the document; it takes up the tokens.
        n_tokens: Tokens to decode, after those that open a reply.

    Returns:
        Ready for JSON: ``why_not``, a sentence or None, and otherwise ``tokens`` (the text of each
        step's), ``n_opening`` (steps before the first that was decoded) and ``layers``: for each
        its ``layer``, ``start`` and ``end`` of the stored positions, and of each of ``heads`` the
        positions ``first`` held and, of each of ``steps``, those that ``came`` and ``went`` after
        it and were ``rebuilt`` in it, and the share ``at_hand``.
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
    heads: list[dict[str, Any]] = []
    for head, last in enumerate(layer.positions()):
        held = [step.kept[head] for step in layer.steps] + [last]
        steps = [
            {
                "came": np.setdiff1d(after, before).tolist(),
                "went": np.setdiff1d(before, after).tolist(),
                "rebuilt": step.rebuilt[head].tolist(),
                "at_hand": round(step.at_hand[head], 4),
            }
            for step, before, after in zip(layer.steps, held, held[1:], strict=False)
        ]
        heads.append({"first": held[0].tolist(), "steps": steps})
    start, n_rows = layer.rows.start, layer.rows.n_segment
    return {"layer": index, "start": start, "end": start + n_rows, "heads": heads}
