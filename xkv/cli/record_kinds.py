"""Kinds of records, their columns, and what can be wrong with one."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FORMAT = 1


def _columns(text: str) -> dict[str, str]:
    return dict(column.split("=") for column in text.split())


@dataclass(frozen=True)
class Columns:
    """Columns of a kind's rows and what is in them; ``?`` marks one that may be empty or absent.

    Args:
        about: In every row.
        measured: In every row but those whose ``problem`` says why there are no numbers.
    """

    about: dict[str, str]
    measured: dict[str, str]

    @property
    def all(self) -> dict[str, str]:
        return {**self.about, **self.measured, "problem": "text?"}


_METHOD = "method=text ratio=number?"
KINDS = {
    kind: Columns(_columns(about), _columns(measured))
    for kind, about, measured in (
        (
            "kl",
            f"task=text length=count n_next=count text=text {_METHOD}",
            "dense_bytes=count held_bytes=count held_ratio=number kl=number kl_median=number "
            "kl_q99=number same_top=number nll_change=number",
        ),
        (
            "tasks",
            f"task=text length=count {_METHOD}",
            "held_ratio=number n=count score=number? low=number? high=number? perplexity=number? "
            "kl=number?",
        ),
        ("hits", f"task=text scenario=text {_METHOD} length=count?", "n=count score=number"),
        (
            "decode",
            "what=text tokens=count form=text chip=text?",
            "ms=number bytes=count? flops=count? launches=count? low_ms=number? high_ms=number?",
        ),
        (
            "prefill",
            "tokens=count side=text",
            "peak_bytes=count held_bytes=count seconds=number low_seconds=number "
            "high_seconds=number factor_seconds=number?",
        ),
        (
            "fidelity",
            f"caches=text tokens=count {_METHOD}",
            "held_ratio=number output_error=number logit_error=number seconds=number",
        ),
        (
            "prefixes",
            "tokens=count side=text run=count",
            "seconds=number bytes=count? write_seconds=number?",
        ),
        (
            "batches",
            f"sequences=count tokens=count {_METHOD} run=count",
            "seconds=number decode_tps=number held_bytes=count longest_gap=number "
            "first_token=number",
        ),
        ("first_run", "command=text openblas=text run=count", "seconds=number"),
        (
            "doctor",
            "what=text name=text tokens=count dtype=text?",
            "ms=number baseline_ms=number",
        ),
    )
}
"""What can be recorded."""


def record_problem(data: Any, names: Sequence[str]) -> str | None:
    """What is wrong with a record, None if nothing is.

    Args:
        data: As JSON gives it.
        names: Its fields but the format.
    """
    if not isinstance(data, dict):
        return "it is not one JSON object"
    given = data.get("format")
    if isinstance(given, int) and given > FORMAT:
        return f"its format {given} is newer than {FORMAT}, the newest this version reads: update"
    for name in ("format", *names):
        if name not in data:
            return f"it has no {name}"
    if given != FORMAT:
        return f"its format is {given!r}, not {FORMAT}"
    for name in data:
        if name not in (*names, "format"):
            return f"no record has a field {name!r}"
    return _head_problem(data) or _rows_problem(data)


def _head_problem(data: dict[str, Any]) -> str | None:
    """What is wrong above the rows."""
    kind = data["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        return f"there is no kind {kind!r}; kinds: {', '.join(KINDS)}"
    for name in ("date", "command", "model", "backend"):
        if not _is_line(data[name]):
            return f"{name} is {data[name]!r}, not a line of text"
    if data["commit"] is not None and not _is_line(data["commit"]):
        return f"commit is {data['commit']!r}, not a line of text or null"
    try:
        if len(data["date"]) != len("2026-11-26"):
            raise ValueError
        datetime.date.fromisoformat(data["date"])
    except ValueError:
        return f"date is {data['date']!r}, not one like 2026-11-26"
    for name in ("machine", "versions", "settings"):
        if not isinstance(data[name], dict):
            return f"{name} is {data[name]!r}, not an object"
        for key, value in data[name].items():
            if not _is_line(key) or not (_is_line(value) or _is_number(value) or value is None):
                return f"{key!r} of {name} is {value!r}, not a line of text, a number or null"
    machine = {"cpu": "text", "cores": "count?", "memory_bytes": "count?"}
    return _column_problem(
        data["machine"], {**machine, "os": "text", "gpu": "text?"}, "its machine"
    )


def _rows_problem(data: dict[str, Any]) -> str | None:
    """What is wrong with the rows."""
    columns, rows = KINDS[data["kind"]], data["rows"]
    if not isinstance(rows, list) or not rows:
        return "it has no rows"
    for number, row in enumerate(rows, 1):
        place = f"row {number}"
        if not isinstance(row, dict):
            return f"{place} is not an object"
        for name, value in row.items():
            if not (isinstance(value, str) or _is_number(value) or value is None):
                return f"{place} has {name} = {value!r}, neither text nor a number"
        has_numbers = not row.get("problem")
        wanted = {**columns.about, **(columns.measured if has_numbers else {}), "problem": "text?"}
        if problem := _column_problem(row, wanted, place):
            return problem
    return None


WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", lambda x: isinstance(x, str) and bool(x)),
    "number": ("a number", lambda x: _is_number(x)),
    "count": ("a whole number, 0 or more", lambda x: _is_number(x) and x == int(x) and x >= 0),
}


def _column_problem(row: dict[str, Any], columns: dict[str, str], place: str) -> str | None:
    for name, wanted in columns.items():
        value = row.get(name)
        if value is None and wanted.endswith("?"):
            continue
        if name not in row:
            return f"{place} has no {name}"
        words, is_met = WANTED[wanted.rstrip("?")]
        if not is_met(value):
            return f"{place} has {name} = {value!r}, not {words}"
    return None


def _is_number(value: Any) -> bool:
    """Whether this is a number that can be written and plotted."""
    is_kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_kind and abs(value) <= sys.float_info.max


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()
