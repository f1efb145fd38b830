"""Plots of the rows that decode steps rebuild, out of what ``xkv.evaluation.working_set`` noted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

N_BINS = 160
"""Of positions, across a picture of a working set."""

RECENT_COLOR, REBUILT_COLOR = (0.09, 0.34, 0.68), (0.96, 0.56, 0.13)


def repeated(head: list[list[int]]) -> list[float]:
    """The share of the rows of each step but the first that the step before rebuilt too."""
    return [float(np.isin(now, before).mean()) for before, now in pairwise(head)]


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
        start, recent, head = layer["start"], layer["recent"], layer["heads"][number]
        edges = np.linspace(start, recent, min(recent - start, N_BINS) + 1)
        counts = np.array([np.histogram(rows, edges)[0] for rows in head])
        # the root: single rows of a bin are seen, too
        share = np.sqrt(counts / np.diff(edges))[..., None].clip(0, 1)
        panel.imshow(
            1 - share * (1 - np.array(REBUILT_COLOR)),
            aspect="auto",
            interpolation="nearest",
            extent=(start, recent, len(head) + 0.5, 0.5),
        )
        panel.axvspan(recent, layer["end"], color=RECENT_COLOR, linewidth=0)
        title = f"layer {layer['layer']}, KV head {number}"
        panel.set(title=title, xlabel="position", xlim=(start, layer["end"]))
    for row in panels:
        row[0].set_ylabel("step")


def repeats(figure: Any, report: dict[str, Any]) -> None:
    """A line for each layer: the share of rows that are rebuilt again, over steps."""
    panel = figure.subplots()
    for layer in report["working_set"]["layers"]:
        shares = np.mean([repeated(head) for head in layer["heads"]], 0)
        panel.plot(np.arange(2, len(shares) + 2), shares, label=f"layer {layer['layer']}")
    panel.set(xlabel="step", ylabel="share rebuilt again", ylim=(0, 1))
    panel.legend()
    panel.grid(alpha=0.3)
