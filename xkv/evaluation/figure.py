"""A plot of results: accuracy beside the bytes that were held for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xkv.checks.plots import new_figure
from xkv.evaluation.summary import Cell, rows_of


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Accuracy against ratio, one panel a length and one line a method.

    Raises:
        InputError: If matplotlib is missing.
    """
    lengths = sorted({cell.length for cell in cells if cell.scores})
    figure = new_figure(5 * len(lengths) + 2, 4.5)
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    labels = list(dict.fromkeys(cell.method for cell in cells))
    for panel, length in zip(panels, lengths, strict=True):
        rows = [row for row in rows_of(cells, length) if row.done]
        for number, label in enumerate(labels):
            points = sorted(
                (row.held_ratio, row.mean, row.half_width) for row in rows if row.label == label
            )
            if points:
                x, y, half = zip(*points, strict=True)
                style = {"marker": "osv^D<>Xp*"[number // 10 % 10], "markersize": 4}
                panel.errorbar(
                    x,
                    [100 * value for value in y],
                    [
                        [100 * min(h, value) for value, h in zip(y, half, strict=True)],
                        [100 * min(h, 1 - value) for value, h in zip(y, half, strict=True)],
                    ],
                    label=rows[[row.label for row in rows].index(label)].name.split(" at ")[0],
                    color=f"C{number % 10}",
                    capsize=2,
                    linestyle="--" if number >= 10 else "-",
                    **style,
                )
        panel.set_xscale("log", base=2)
        panel.set_title(f"{length:,} tokens")
        panel.set_xlabel("dense bytes / bytes held")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean score, %")
    handles: dict[str, Any] = {}
    for panel in panels:
        found, names = panel.get_legend_handles_labels()
        handles.update(zip(names, found, strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)
