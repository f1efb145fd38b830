"""Plots of results: accuracy, or divergence, beside the bytes that were held for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xkv.checks.plots import new_figure
from xkv.evaluation import kl_summary
from xkv.evaluation.summary import Cell, rows_of


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Accuracy against ratio, one panel a length and one line a method.

    Raises:
        InputError: If matplotlib is missing.
    """
    lengths = sorted({cell.length for cell in cells if cell.scores})
    figure, panels = _panels(lengths)
    labels = list(dict.fromkeys(cell.method for cell in cells))
    for panel, length in zip(panels, lengths, strict=True):
        rows = [row for row in rows_of(cells, length) if row.done]
        for number, label in enumerate(labels):
            points = sorted(
                (row.held_ratio, row.mean, row.half_width) for row in rows if row.label == label
            )
            if points:
                x, y, half = zip(*points, strict=True)
                panel.errorbar(
                    x,
                    [100 * value for value in y],
                    [
                        [100 * min(h, value) for value, h in zip(y, half, strict=True)],
                        [100 * min(h, 1 - value) for value, h in zip(y, half, strict=True)],
                    ],
                    label=rows[[row.label for row in rows].index(label)].name.split(" at ")[0],
                    capsize=2,
                    **_style(number),
                )
    panels[0].set_ylabel("mean score, %")
    _save(figure, panels, path)


def plot_divergence(rows: Sequence[kl_summary.Row], path: Path) -> None:
    """Divergence on a logarithmic axis against ratio, one panel a length, one line a method.

    The control is a level below which no method can be told from the full cache.

    Raises:
        InputError: If matplotlib is missing.
    """
    lengths = sorted({row.length for row in rows if row.problem is None})
    figure, panels = _panels(lengths)
    families = list(dict.fromkeys(row.family for row in rows if row.method != "full"))
    for panel, length in zip(panels, lengths, strict=True):
        here = kl_summary.over_texts(rows, length)
        for row in here:
            if row.method == "full" and row.kl > 0:
                panel.axhline(row.kl, color="black", linestyle=":", label=row.name)
        for number, family in enumerate(families):
            # an exact method has no place on a logarithmic axis
            points = sorted((r.held_ratio, r.kl) for r in here if r.family == family and r.kl > 0)
            if points:
                panel.plot(*zip(*points, strict=True), label=family, **_style(number))
        panel.set_yscale("log")
    panels[0].set_ylabel("mean KL(full || method), nats a token")
    _save(figure, panels, path)


def _panels(lengths: Sequence[int]) -> tuple[Any, Sequence[Any]]:
    """A figure with one panel a length, for numbers against ratio."""
    figure = new_figure(5 * len(lengths) + 2, 4.5)
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for panel, length in zip(panels, lengths, strict=True):
        panel.set_xscale("log", base=2)
        panel.set_title(f"{length:,} tokens")
        panel.set_xlabel("dense bytes / bytes held")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        panel.grid(alpha=0.3)
    return figure, panels


def _style(number: int) -> dict[str, Any]:
    """Of the line with this number."""
    return {
        "color": f"C{number % 10}",
        "linestyle": "--" if number >= 10 else "-",
        "marker": "osv^D<>Xp*"[number // 10 % 10],
        "markersize": 4,
    }


def _save(figure: Any, panels: Sequence[Any], path: Path) -> None:
    """Write a figure with one legend for all panels."""
    handles: dict[str, Any] = {}
    for panel in panels:
        found, names = panel.get_legend_handles_labels()
        handles.update(zip(names, found, strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)
