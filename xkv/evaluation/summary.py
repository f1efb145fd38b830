"""Tables of results: accuracy beside the bytes that were held for it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from xkv.evaluation.methods import parse_method

CAN_DO = 0.9
"""A task counts in the mean where the full cache's score is at least this."""
CANNOT_DO = 0.5
"""Below this a task tells nothing of the methods."""

Z = 1.96
"""Normal quantile of a two-sided 95 % interval."""


@dataclass
class Cell:
    """One method's results in one task at one length.

    ``low`` and ``high`` bound the score with 95 % confidence (Wilson's interval, the questions of
    one document counted as independent).
    """

    task: str
    length: int
    method: str
    ratio: float | None
    scores: list[float] = field(default_factory=list)
    by_round: list[list[float]] = field(default_factory=list)
    """Scores of each round of conversations."""
    dense_bytes: int = 0
    held_bytes: int = 0
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    problem: str | None = None

    def add(self, line: dict[str, Any]) -> None:
        """Take a line of the results."""
        if "problem" in line:
            self.problem = line["problem"]
            return
        self.dense_bytes += line["dense_bytes"]
        self.held_bytes += line["held_bytes"]
        if "nll" in line:
            self.nll.append(line["nll"])
            self.kl.append(line["kl"])
            return
        scores = [answer["score"] for answer in line["answers"]]
        self.scores += scores
        if self.task == "multiturn":
            self.by_round = self.by_round or [[] for _ in scores]
            for before, score in zip(self.by_round, scores, strict=True):
                before.append(score)

    @property
    def held_ratio(self) -> float:
        """Dense bytes to bytes held, over all documents."""
        return self.dense_bytes / max(self.held_bytes, 1)

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of the score."""
        n, share = len(self.scores), self.score
        middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.nll) / len(self.nll))

    @property
    def divergence(self) -> float:
        """Mean Kullback-Leibler divergence of the full cache's next tokens from these, in nats."""
        return sum(self.kl) / len(self.kl)


@dataclass(frozen=True)
class Row:
    """One method at one ratio and one length, over all tasks.

    Args:
        label: The method as it was asked for.
        ratio: The ratio asked for.
        cells: By task.
        counted: Tasks that count in the mean.
    """

    label: str
    ratio: float | None
    cells: dict[str, Cell]
    counted: tuple[str, ...]

    @property
    def name(self) -> str:
        note = " (sees the question)" if parse_method(self.label).is_query_aware else ""
        asked = "" if self.ratio is None else f" at {self.ratio:g}x"
        return f"{self.label}{asked}{note}"

    @property
    def done(self) -> list[Cell]:
        """The tasks that count, where this method has results for all of them."""
        cells = [self.cells[task] for task in self.counted if task in self.cells]
        is_whole = len(cells) == len(self.counted) and all(cell.scores for cell in cells)
        return cells if is_whole else []

    @property
    def held_ratio(self) -> float:
        """Dense bytes to bytes held after the documents; conversations grow on."""
        cells = [x for x in self.cells.values() if x.held_bytes and x.task != "multiturn"]
        dense, held = (sum(getattr(x, n) for x in cells) for n in ("dense_bytes", "held_bytes"))
        return dense / held if held else math.nan

    @property
    def mean(self) -> float:
        """Mean score over the tasks that count."""
        return sum(cell.score for cell in self.done) / len(self.done)

    @property
    def half_width(self) -> float:
        """Half of the mean's 95 % interval."""
        halves = [(cell.interval[1] - cell.interval[0]) / 2 for cell in self.done]
        return math.sqrt(sum(half * half for half in halves)) / len(halves)


def collect(lines: Iterable[dict[str, Any]]) -> list[Cell]:
    """The results by task, length, method and ratio, in the order in which they came."""
    cells: dict[tuple[Any, ...], Cell] = {}
    for line in lines:
        key = tuple(line[name] for name in ("task", "length", "method", "ratio"))
        cells.setdefault(key, Cell(*key)).add(line)
    return list(cells.values())


def rows_of(cells: Sequence[Cell], length: int) -> list[Row]:
    """One row a method and ratio, for one length."""
    here = [cell for cell in cells if cell.length == length]
    counted = tuple(
        cell.task for cell in here if cell.method == "full" and cell.scores and cell.score >= CAN_DO
    )
    settings = dict.fromkeys((cell.method, cell.ratio) for cell in here)
    return [
        Row(
            method,
            ratio,
            {cell.task: cell for cell in here if (cell.method, cell.ratio) == (method, ratio)},
            counted,
        )
        for method, ratio in settings
    ]


def markdown(cells: Sequence[Cell]) -> str:
    """All tables."""
    parts = []
    for length in sorted({cell.length for cell in cells}):
        rows = rows_of(cells, length)
        parts.append(f"## {length:,} tokens\n")
        parts.append(_accuracy_table(rows))
        parts += [_rounds_table(rows), _perplexity_table(rows)]
    return "\n".join(part for part in parts if part)


def _accuracy_table(rows: Sequence[Row]) -> str:
    tasks = list(dict.fromkeys(t for row in rows for t, cell in row.cells.items() if cell.scores))
    if not tasks:
        return ""
    counted = rows[0].counted
    heads = [task if task in counted else f"{task} *" for task in tasks]
    lines = [["method", "held", *heads, "mean"]]
    for row in rows:
        line = [row.name, f"{row.held_ratio:.2f} x" if row.held_ratio == row.held_ratio else "–"]
        line += [_percent(row.cells.get(task)) for task in tasks]
        line.append(f"**{row.mean:.1%}** ±{100 * row.half_width:.1f}" if row.done else "–")
        lines.append(line)
    n = sorted({len(c.scores) for row in rows for c in row.cells.values() if c.scores})
    questions = f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
    text = table(lines)
    text += (
        f"\n{questions} questions a cell; held: dense bytes to all bytes held, measured; "
        "±: half of the 95 % interval.\n"
    )
    left = [task for task in tasks if task not in counted]
    if left:
        text += (
            f"\\* left out of the mean, as the full cache is right in less than {CAN_DO:.0%}: "
            f"{', '.join(left)}.\n"
        )
    full = {task: cell.score for task, cell in rows[0].cells.items() if cell.scores}
    cannot = [task for task in left if full.get(task, 1) < CANNOT_DO]
    if cannot:
        text += f"In no claim, as the full cache cannot do them: {', '.join(cannot)}.\n"
    problems = {f"{row.name}: {c.problem}" for row in rows for c in row.cells.values() if c.problem}
    return text + "".join(f"\n– {problem}\n" for problem in sorted(problems))


def _rounds_table(rows: Sequence[Row]) -> str:
    """Conversations, round by round."""
    rows = [row for row in rows if "multiturn" in row.cells and row.cells["multiturn"].scores]
    if not rows:
        return ""
    n_rounds = len(rows[0].cells["multiturn"].by_round)
    lines = [["multiturn", "held in the end", *(f"round {i + 1}" for i in range(n_rounds))]]
    for row in rows:
        cell = row.cells["multiturn"]
        shares = [f"{sum(scores) / len(scores):.1%}" for scores in cell.by_round]
        lines.append([row.name, f"{cell.held_ratio:.2f} x", *shares])
    n = len(rows[0].cells["multiturn"].by_round[0])
    return f"{table(lines)}\n{n} conversations.\n"


def _perplexity_table(rows: Sequence[Row]) -> str:
    lines = [["method", "held", "perplexity", "divergence from full"]]
    for row in rows:
        cell = row.cells.get("ppl")
        if cell is not None and cell.nll:
            values = [f"{cell.perplexity:.3f}", f"{cell.divergence:.5f}"]
            lines.append([row.name, f"{cell.held_ratio:.2f} x", *values])
    return table(lines) + "\nDivergence in nats a token.\n" if len(lines) > 1 else ""


def _percent(cell: Cell | None) -> str:
    if cell is None or not cell.scores:
        return "–"
    low, high = cell.interval
    return f"{100 * cell.score:.1f} ±{50 * (high - low):.1f}"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as Markdown, the first one the head."""
    head, *rest = [f"| {' | '.join(line)} |" for line in lines]
    rule = f"| --- |{' ---: |' * (len(lines[0]) - 1)}"
    return "\n".join([head, rule, *rest]) + "\n"


def csv_text(cells: Sequence[Cell]) -> str:
    """One line a cell, with the interval's bounds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["task", "length", "method", "ratio", "held_ratio", "n", "score", "low", "high"]
    writer.writerow([*names, "perplexity", "kl", "problem"])
    for cell in cells:
        ratio = "" if cell.ratio is None else f"{cell.ratio:g}"
        start = [cell.task, cell.length, cell.method, ratio]
        if cell.nll:
            measured = ["", "", "", f"{cell.perplexity:.5f}", f"{cell.divergence:.6f}"]
            writer.writerow([*start, f"{cell.held_ratio:.3f}", len(cell.nll), *measured, ""])
        elif cell.scores:
            values = [f"{x:.5f}" for x in (cell.score, *cell.interval)]
            writer.writerow(
                [*start, f"{cell.held_ratio:.3f}", len(cell.scores), *values, *[""] * 3]
            )
        else:
            writer.writerow([*start, "", 0, *[""] * 5, cell.problem])
    return out.getvalue()
