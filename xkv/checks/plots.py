"""What every plot shares, and the plots of ``python -m xkv.inspect``."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xkv.checks.set_plots import repeats, working_set
from xkv.errors import InputError
from xkv.planning.grouping import layers_text

CAPTION_COLUMNS = 120


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches.

    Raises:
        InputError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the plot needs matplotlib: pip install 'xkv[evaluate]'") from None
    return Figure(figsize=(width, height), layout="constrained")


CAPTIONS = {
    "spectra": "Left: singular values of each group's layers side by side (solid) and of its "
    "layers one by one (dashed, their root mean square). Right: the relative error of factors that "
    "take this share of the dense bytes; the dot is this cache. Look at whether a group's solid "
    "line lies below the dashed one of its colour: there sharing a latent pays, and where it does "
    "not, smaller groups are better.",
    "similarity": "Linear centred CKA of every two layers; 1: the same up to a rotation and a "
    "factor. White squares are the groups. Look for bright blocks: layers of a block should share "
    "a group, and a square over two blocks costs accuracy.",
    "errors": "Relative error of each layer's compressed keys and values against the exact ones. "
    "Look for layers that stand out: they are alike to none of their group, or quiet beside a loud "
    "one. A dashed line is a boundary between groups.",
    "bands": "Columns of each latent, from the largest singular value on, and the bits in which "
    "they are held. Look at how long the bars are: a group whose spectrum falls slowly needs more "
    "columns. Columns that are left out are the error.",
    "working_set": "Stored positions against decode steps, for some layers and each of their KV "
    "heads. Orange rows are rebuilt in that step and gone after it; the fuller the colour, the "
    "more of the rows there. Blue, at the end: recent rows, which are held in 8 bits and never "
    "rebuilt. Look for stripes that run down: rows that stay wanted.",
    "repeats": "The share of a step's rebuilt rows that the step before rebuilt too, mean over KV "
    "heads. Look for dips: there a token wants other rows than the one before it.",
}
"""What to look at in each plot."""


def captions_of(report: dict[str, Any]) -> dict[str, str]:
    """Those of a report's plots."""
    has_set = report["working_set"]["why_not"] is None
    return {name: x for name, x in CAPTIONS.items() if has_set or name not in _OF_WORKING_SET}


def spectra(figure: Any, report: dict[str, Any]) -> None:
    """Singular values, and error against bytes, of keys and values."""
    panels = figure.subplots(2, 2)
    for row, tensor in zip(panels, ("keys", "values"), strict=True):
        for entry in report["spectra"]:
            if entry["tensor"] != tensor:
                continue
            color = f"C{entry['group'] % 10}"
            single = np.sqrt(np.mean(np.square(entry["single"]), axis=0))
            row[0].plot(entry["joint"], color=color, label=layers_text(entry["layers"]))
            row[0].plot(single, "--", color=color)
            for name, style in (("joint", "-"), ("single", "--")):
                curve = entry[f"{name}_curve"]
                row[1].plot(curve["share_of_dense"], curve["error"], style, color=color)
            rank = min(entry["rank"], len(entry["joint_curve"]["error"]) - 1)
            curve = entry["joint_curve"]
            row[1].plot(curve["share_of_dense"][rank], curve["error"][rank], "o", color=color)
        row[0].set(title=f"{tensor}: singular values", xlabel="column", yscale="log")
        row[1].set(title=f"{tensor}: relative error", xlabel="bytes of factors / dense bytes")
        row[1].set(xlim=(0, 1), yscale="log", ylim=(1e-3, 1.2))
        for panel in row:
            panel.grid(alpha=0.3)
    panels[0][0].legend(title="layers", fontsize=7, ncols=2)


def similarity(figure: Any, report: dict[str, Any]) -> None:
    """Heat maps of keys and values, groups framed."""
    panels = figure.subplots(1, 2)
    for panel, tensor in zip(panels, ("keys", "values"), strict=True):
        image = panel.imshow(np.array(report["similarity"][tensor]), vmin=0, vmax=1)
        for group in report["groups"]:
            if list(group) == list(range(group[0], group[-1] + 1)):
                low, high = group[0] - 0.45, group[-1] + 0.45
                corners = [low, high, high, low, low], [low, low, high, high, low]
                panel.plot(*corners, color="white", linewidth=1.5)
        panel.set(title=tensor, xlabel="layer", ylabel="layer")
    figure.colorbar(image, ax=panels, label="CKA", shrink=0.8)


def errors(figure: Any, report: dict[str, Any]) -> None:
    """One line for keys and one for values, over layers."""
    panel = figure.subplots()
    for tensor, marker in (("keys", "o"), ("values", "s")):
        found = [(i, x) for i, x in enumerate(report["errors"][tensor]) if x is not None]
        if found:
            panel.plot(*zip(*found, strict=True), marker, label=tensor)
    for group in report["groups"][1:]:
        panel.axvline(group[0] - 0.5, linestyle="--", color="gray", linewidth=1)
    panel.set(xlabel="layer", ylabel="relative error", ylim=(0, None))
    panel.legend()
    panel.grid(alpha=0.3)


def bands(figure: Any, report: dict[str, Any]) -> None:
    """A bar a latent, coloured by bits."""
    names = list(dict.fromkeys((band["group"], band["tensor"]) for band in report["bands"]))
    figure.set_size_inches(9, 2.2 + 0.35 * len(names))
    panel = figure.subplots()
    seen: dict[int, Any] = {}
    for band in report["bands"]:
        bits = band["latent_bits"]
        bar = panel.barh(
            names.index((band["group"], band["tensor"])),
            band["n_columns"],
            left=band["first_column"],
            color=_bits_color(bits),
            edgecolor="white",
        )
        panel.bar_label(bar, [str(bits)], label_type="center", fontsize=7)
        seen.setdefault(bits, bar)
    labels = [f"{layers_text(report['groups'][group])} {tensor}" for group, tensor in names]
    panel.set_yticks(range(len(names)), labels, fontsize=7)
    panel.invert_yaxis()
    panel.set_xlabel("column")
    order = sorted(seen, reverse=True)
    panel.legend(
        [seen[bits] for bits in order],
        [f"{bits} bits" for bits in order],
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )


def _bits_color(bits: int) -> tuple[float, float, float]:
    """The darker, the more bits."""
    shade = min(bits, 16) ** 0.5 / 4
    return 0.97 - 0.85 * shade, 0.97 - 0.45 * shade, 0.9 - 0.15 * shade


_PLOTS: dict[str, tuple[Callable[[Any, dict[str, Any]], None], float, float]] = {
    "spectra": (spectra, 11, 8.5),
    "similarity": (similarity, 11, 6),
    "errors": (errors, 9, 4.5),
    "bands": (bands, 9, 6),
    "working_set": (working_set, 11, 6),
    "repeats": (repeats, 9, 4.5),
}
_OF_WORKING_SET = ("working_set", "repeats")


def draw(name: str, report: dict[str, Any]) -> Any:
    """One plot as a figure of matplotlib, without its caption."""
    plot, width, height = _PLOTS[name]
    figure = new_figure(width, height)
    plot(figure, report)
    return figure


def write_plots(folder: Path, report: dict[str, Any]) -> list[str]:
    """Draw what :func:`xkv.inspect.inspect` measured, each plot with its caption below.

    Returns:
        Names of the files.

    Raises:
        InputError: If matplotlib is missing or a file cannot be written.
    """
    names = []
    for name, caption in report["captions"].items():
        figure = draw(name, report)
        figure.supxlabel(textwrap.fill(caption, CAPTION_COLUMNS), fontsize=9)
        path = folder / f"{name}.png"
        try:
            figure.savefig(path, dpi=120)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
        names.append(path.name)
    return names
