"""Tables of the tasks ``hits``: a method's score after each scenario."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from xkv.evaluation.hits.conversation import TASKS
from xkv.evaluation.hits.run import HITS
from xkv.evaluation.hits.scenarios import SCENARIOS
from xkv.evaluation.summary import CAN_DO, table

Row = dict[str, Any]


def rows_of(results: Iterable[dict[str, Any]]) -> list[Row]:
    """A row a length, task, method and scenario, in the order in which they came."""
    scores: dict[tuple[Any, ...], list[float]] = {}
    problems: dict[tuple[Any, ...], str] = {}
    for line in results:
        if line["task"] != HITS:
            continue
        for answer in line.get("answers", _unanswered()):
            about = answer["task"], answer["scenario"], line["method"], line["ratio"]
            key = (*about, line["length"])
            scores.setdefault(key, [])
            if "problem" in line:
                problems[key] = line["problem"]
            else:
                scores[key].append(answer["score"])
    names = "task", "scenario", "method", "ratio", "length"
    return [
        {
            **dict(zip(names, key, strict=True)),
            "n": len(found),
            **({"score": sum(found) / len(found)} if found else {"problem": problems[key]}),
        }
        for key, found in scores.items()
    ]


def _unanswered() -> Iterable[dict[str, str]]:
    return ({"task": task, "scenario": name} for name in SCENARIOS for task in TASKS)


def markdown(rows: Sequence[Row]) -> str:
    """A table a length."""
    parts = []
    for length in sorted({row["length"] for row in rows}):
        here = [row for row in rows if row["length"] == length]
        parts.append(f"## {length:,} tokens, after a cache hit\n\n{_table(here)}")
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    scores = {tuple(row[x] for x in ("task", "method", "ratio", "scenario")): row for row in rows}
    lines = [["task", "method", *SCENARIOS]]
    full = {x["task"]: x for x in rows if (x["method"], x["scenario"]) == ("full", "fresh")}
    cannot = [task for task in TASKS if full[task]["score"] < CAN_DO]
    settings = dict.fromkeys((row["method"], row["ratio"]) for row in rows)
    for task in TASKS:
        for method, ratio in settings:
            found = [scores.get((task, method, ratio, x), {}) for x in SCENARIOS]
            name = method if ratio is None else f"{method} at {ratio:g}x"
            cells = [f"{x['score']:.1%}" if "score" in x else "–" for x in found]
            lines.append([f"{task} *" if task in cannot else task, name, *cells])
    counts = sorted({row["n"] for row in rows if "score" in row})
    asked = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    text = f"{table(lines)}\n{asked} questions a cell.\n"
    if cannot:
        text += f"\\* the full cache itself is right in less than {CAN_DO:.0%}.\n"
    problems = {f"{row['method']}: {row['problem']}" for row in rows if "problem" in row}
    return text + "".join(f"\n– {problem}\n" for problem in sorted(problems))


def csv_text(rows: Sequence[Row]) -> str:
    """A line a row."""
    out = io.StringIO()
    names = "task", "scenario", "method", "ratio", "length", "n", "score", "problem"
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
