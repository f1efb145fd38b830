"""Cells of the tables of results, and the rows that they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xkv.evaluation.summary import table

Row = dict[str, Any]
Cells = Mapping[str, Callable[[Row], str]]
"""Heads of columns, and what each shows of a row."""

NONE = "–"
NAMES = {
    "full": "full cache in 16 bits",
    "xkv": "xKV",
    "xkv:attention=exact": "xKV",
    "xkv:compression=8": "xKV at 8x, default attention",
    "xkv:latent_bits=16,compression=8,attention=exact": "paper's form, 16 bits, at 8x",
    "svd:compression=8,attention=exact": "single layers, bits by energy, at 8x",
    **{f"quantized:bits={bits}": f"mlx-lm, {bits} bits" for bits in (8, 4, 3, 2)},
    **{f"lloydmax:bits={bits}": f"Hadamard and Lloyd-Max, {bits} bits" for bits in (4, 3, 2)},
}
"""Of methods; others go by what was typed."""


def method_name(row: Row) -> str:
    name = plain(NAMES.get(row["method"], row["method"]))
    return name if row["ratio"] is None else f"{name} at {row['ratio']:g}x"


def kl_name(row: Row) -> str:
    """A method's name; the control is what nothing can be told apart below."""
    return method_name(row) + " (control)" * (row["method"] == "full")


def plain(text: Any) -> str:
    """Text that stays in its cell."""
    words = " ".join(str(text).split())
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'")):
        words = words.replace(sign, written)
    return words


def small(value: float) -> str:
    """Three digits, or two of a number below a hundredth, without an exponent."""
    if not value:
        return "0"
    n_digits = 2 if abs(value) < 0.01 else 3
    return f"{value:,.{max(0, n_digits - 1 - math.floor(math.log10(abs(value))))}f}"


def held(row: Row) -> str:
    return f"{row['held_ratio']:.2f} x"


def percent(share: float) -> str:
    return f"{share:.1%}"


def megabytes(row: Row, name: str) -> str:
    return f"{row[name] / 1e6:,.1f}"


def of(name: str, show: Callable[[Any], str] = plain) -> Callable[[Row], str]:
    """Show a column, or a dash where it is empty."""
    return lambda row: NONE if row.get(name) is None else show(row[name])


def grid(rows: Iterable[Row], about: Cells, measured: Cells) -> str:
    """A row each; those that have no numbers say why in a last column."""
    rows = list(rows)
    has_problems = any(row.get("problem") for row in rows)
    lines = [[*about, *measured, *["why not"] * has_problems]]
    for row in rows:
        why = row.get("problem")
        cells = [show(row) for show in about.values()]
        cells += [NONE if why else show(row) for show in measured.values()]
        lines.append(cells + [plain(why or "")] * has_problems)
    return table(lines)


def by(rows: Iterable[Row], *names: str) -> dict[Any, list[Row]]:
    """Rows with the same values together, in the order in which they came."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in names)
        found.setdefault(key[0] if len(names) == 1 else key, []).append(row)
    return found
