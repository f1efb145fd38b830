"""Tables of the task ``kl``: divergence beside the bytes that were held for it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from xkv.evaluation.kl import KL
from xkv.evaluation.summary import table

MEAN = "mean"
"""What the row over all texts is called in place of a text."""

SIZES = "bits", "compression", "rank_k", "rank_v"
"""Options of methods that set how many bytes are held."""


@dataclass(frozen=True)
class Row:
    """One method at one ratio on one text, or over all texts.

    Args:
        length: Tokens that were compressed.
        text: The text's name, or :data:`MEAN`.
        method: As it was asked for.
        ratio: As it was asked for.
        dense_bytes: Of the text's rows, or of all texts'.
        held_bytes: By the method.
        kl: Mean Kullback-Leibler divergence of the full cache's next tokens from these, in nats.
        kl_median: Its median over the tokens.
        kl_q99: Its 99 % quantile.
        same_top: Share of tokens after which the likeliest next token is the full cache's.
        nll_change: What the text's own next tokens lost in mean log probability, in nats.
        problem: Why there are no numbers.
    """

    length: int
    text: str
    method: str
    ratio: float | None
    dense_bytes: int = 0
    held_bytes: int = 0
    kl: float = 0.0
    kl_median: float = 0.0
    kl_q99: float = 0.0
    same_top: float = 0.0
    nll_change: float = 0.0
    problem: str | None = None

    @property
    def held_ratio(self) -> float:
        return self.dense_bytes / max(self.held_bytes, 1)

    @property
    def name(self) -> str:
        if self.method == "full":
            return "full in the KV dtype (control)"
        return self.method if self.ratio is None else f"{self.method} at {self.ratio:g}x"

    @property
    def family(self) -> str:
        """The method without what sets its size: what a line in a plot is about."""
        name, _, options = self.method.partition(":")
        others = [x for x in options.split(",") if x.partition("=")[0] not in SIZES]
        return ":".join(filter(None, (name, ",".join(others))))


MEASURED = "kl", "kl_median", "kl_q99", "same_top", "nll_change"


def collect(lines: Iterable[dict[str, Any]], n_next: int) -> list[Row]:
    """Results of this many next tokens, by length: each text's, and over texts if there are more.

    The row over texts is there where a method has numbers for each of them.
    """
    rows = [_row(line) for line in lines if line["task"] == KL and line["n_next"] == n_next]
    means = []
    for length in dict.fromkeys(row.length for row in rows):
        here = [row for row in rows if row.length == length]
        n_texts = len({row.text for row in here})
        for setting in dict.fromkeys((row.method, row.ratio) for row in here):
            each = [x for x in here if (x.method, x.ratio) == setting and x.problem is None]
            if len(each) == n_texts > 1:
                means.append(_mean(each))
    return rows + means


def _row(line: dict[str, Any]) -> Row:
    start = line["length"], line["text"], line["method"], line["ratio"]
    if "problem" in line:
        return Row(*start, problem=line["problem"])
    given = {field.name: line[field.name] for field in fields(Row) if field.name in line}
    return Row(**given, nll_change=line["nll"] - line["full_nll"])


def _mean(rows: Sequence[Row]) -> Row:
    first = rows[0]
    return Row(
        first.length,
        MEAN,
        first.method,
        first.ratio,
        sum(row.dense_bytes for row in rows),
        sum(row.held_bytes for row in rows),
        **{name: sum(getattr(row, name) for row in rows) / len(rows) for name in MEASURED},
    )


def over_texts(rows: Sequence[Row], length: int) -> list[Row]:
    """One row a method with numbers: over all texts, or of the only one."""
    here = [row for row in rows if row.length == length and row.problem is None]
    means = [row for row in here if row.text == MEAN]
    return means or here


def markdown(rows: Sequence[Row], n_next: int, kv_dtype: str, dtype: str) -> str:
    """A table a length and text, the mean over texts first.

    Args:
        rows: Of :func:`collect`.
        n_next: Tokens whose next-token distributions were compared.
        kv_dtype: In which methods get their rows.
        dtype: In which rows are computed.
    """
    parts = []
    for length in sorted({row.length for row in rows}):
        here = [row for row in rows if row.length == length]
        for text in sorted({row.text for row in here}, key=lambda x: (x != MEAN, x)):
            name = f"mean of {len({x.text for x in here}) - 1} texts" if text == MEAN else text
            parts.append(f"## {length:,} tokens, {name}\n")
            parts.append(_table([row for row in here if row.text == text]))
    about = (
        f"Next-token distributions after each of {n_next} tokens; KL(full || method) in nats, the "
        f"full cache's rows as computed ({dtype}). Control: the full cache's rows in {kv_dtype}, "
        "run as every method's are; nothing below it can be told from the full cache. Held: dense "
        "bytes to all bytes held, measured.\n"
    )
    return "\n".join([*parts, about]) if parts else ""


def _table(rows: Sequence[Row]) -> str:
    lines = [["method", "held", "KL mean", "median", "99 %", "same top", "NLL change"]]
    for row in rows:
        if row.problem is None:
            numbers = [f"{x:.3g}" for x in (row.kl, row.kl_median, row.kl_q99)]
            numbers += [f"{row.same_top:.1%}", f"{row.nll_change:+.4f}"]
            lines.append([row.name, f"{row.held_ratio:.2f} x", *numbers])
        else:
            lines.append([row.name, *["–"] * 6])
    problems = [f"\n– {row.name}: {row.problem}\n" for row in rows if row.problem is not None]
    return table(lines) + "".join(problems)


def csv_text(rows: Sequence[Row], n_next: int) -> str:
    """One line a row of :func:`collect`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    start = ["task", "length", "n_next", "text", "method", "ratio"]
    writer.writerow([*start, "dense_bytes", "held_bytes", "held_ratio", *MEASURED, "problem"])
    for row in rows:
        asked = "" if row.ratio is None else f"{row.ratio:g}"
        line = [KL, row.length, n_next, row.text, row.method, asked]
        if row.problem is None:
            line += [row.dense_bytes, row.held_bytes, f"{row.held_ratio:.4f}"]
            line += [f"{getattr(row, name):.6g}" for name in MEASURED]
            writer.writerow([*line, ""])
        else:
            writer.writerow([*line, *[""] * (3 + len(MEASURED)), row.problem])
    return out.getvalue()
