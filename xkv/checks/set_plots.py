"""Plots of working sets over time, out of what ``xkv.evaluation.working_set`` noted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

N_BINS = 160
"""Of positions, across a picture of a working set."""

KEPT_COLOR, REBUILT_COLOR = (0.09, 0.34, 0.68), (0.96, 0.56, 0.13)


def held_rows(head: dict[str, Any]) -> Iterator[set[int]]:
    """Positions that a KV head's slots hold in each step."""
    held = set(head["first"])
    for step in head["steps"]:
        yield held
        held = held - set(step["went"]) | set(step["came"])


def returned_rows(head: dict[str, Any]) -> list[int]:
    """How many of the rows that came after each step had been in the slots before."""
    seen: set[int] = set()
    counts = []
    for held, step in zip(held_rows(head), head["steps"], strict=True):
        seen |= held
        counts.append(len(seen & set(step["came"])))
    return counts


def working_set(figure: Any, report: dict[str, Any]) -> None:
    """A picture for each layer and KV head: positions from left to right, steps down."""
    story = report["working_set"]
    cells = [(layer, i) for layer in story["layers"] for i in range(len(layer["heads"]))]
    n_across = min(len(story["layers"][0]["heads"]), 4)
    n_down = -(-len(cells) // n_across)
    figure.set_size_inches(11, 1 + 2.3 * n_down)
    panels = figure.subplots(n_down, n_across, squeeze=False, sharey=True)
    for panel in panels.flat[len(cells) :]:
        panel.set_visible(False)
    for panel, (layer, number) in zip(panels.flat, cells, strict=False):
        start, end, head = layer["start"], layer["end"], layer["heads"][number]
        edges = np.linspace(start, end, min(end - start, N_BINS) + 1)
        kept = [np.histogram(list(rows), edges)[0] for rows in held_rows(head)]
        rebuilt = [np.histogram(step["rebuilt"], edges)[0] for step in head["steps"]]
        shade = np.ones((1, 1, 3))
        # what is kept on top
        for counts, color in ((rebuilt, REBUILT_COLOR), (kept, KEPT_COLOR)):
            # the root: single rows of a bin are seen, too
            share = np.sqrt(np.array(counts) / np.diff(edges))[..., None].clip(0, 1)
            shade = shade * (1 - share) + share * np.array(color)
        panel.imshow(
            shade,
            aspect="auto",
            interpolation="nearest",
            extent=(start, end, len(kept) + 0.5, 0.5),
        )
        panel.set(title=f"layer {layer['layer']}, KV head {number}", xlabel="position")
    for row in panels:
        row[0].set_ylabel("step")


def swaps(figure: Any, report: dict[str, Any]) -> None:
    """Rows at hand, and rows that come and come back, over steps."""
    left, right = figure.subplots(1, 2)
    for number, layer in enumerate(report["working_set"]["layers"]):
        heads, color = layer["heads"], f"C{number}"
        at_hand = np.array([[step["at_hand"] for step in head["steps"]] for head in heads])
        steps = np.arange(1, at_hand.shape[1] + 1)
        left.plot(steps, at_hand.mean(0), color=color, label=f"layer {layer['layer']}")
        left.fill_between(steps, at_hand.min(0), at_hand.max(0), color=color, alpha=0.15)
        came = [[len(step["came"]) for step in head["steps"]] for head in heads]
        right.plot(steps, np.mean(came, 0), color=color)
        right.plot(steps, np.mean([returned_rows(head) for head in heads], 0), "--", color=color)
    left.set(title="wanted rows at hand", xlabel="step", ylabel="share", ylim=(0, 1))
    right.set(title="rows that come in", xlabel="step", ylabel="rows", ylim=(0, None))
    left.legend()
    for panel in (left, right):
        panel.grid(alpha=0.3)
