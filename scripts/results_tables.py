"""A table or more of one record, by its kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from scripts.results_cells import (
    NONE,
    Cells,
    Row,
    by,
    grid,
    held,
    kl_name,
    megabytes,
    method_name,
    of,
    percent,
    plain,
    small,
)
from scripts.results_server import batches, prefixes
from xkv.cli.record import Record
from xkv.evaluation.kl_summary import MEAN
from xkv.evaluation.summary import CAN_DO


def kl(record: Record) -> list[str]:
    """A table a length: over all texts, and the mean divergence of each."""
    parts = []
    for length, here in by(record.rows, "length").items():
        texts = [text for text in by(here, "text") if text != MEAN]
        each = {(x["text"], x["method"], x["ratio"]): x for x in here}
        is_mean = len(texts) > 1
        columns: dict[str, Callable[[Row], str]] = {}
        for text in texts if is_mean else ():
            columns[f"KL, {plain(text)}"] = partial(_kl_of, each, text)
        title = f"mean of {len(texts)} texts" if is_mean else plain(texts[0])
        parts.append(f"{length:,} tokens, {title}, {here[0]['n_next']} tokens after it:\n")
        parts.append(grid(over_texts(here), {"method": kl_name}, {**DIVERGENCE, **columns}))
    return parts


def _kl_of(each: dict[tuple[Any, ...], Row], text: str, row: Row) -> str:
    found = each.get((text, row["method"], row["ratio"]), {})
    return small(found["kl"]) if "kl" in found and not found.get("problem") else NONE


DIVERGENCE: Cells = {
    "held": held,
    "KL mean": of("kl", small),
    "median": of("kl_median", small),
    "99 %": of("kl_q99", small),
    "same top token": of("same_top", percent),
    "change of NLL": of("nll_change", "{:+.4f}".format),
}


def over_texts(rows: Sequence[Row]) -> list[Row]:
    """A row a method: the mean over texts, the only text, or the first that has no numbers."""
    found = []
    for each in by(rows, "method", "ratio").values():
        means = [row for row in each if row["text"] == MEAN]
        problems = [row for row in each if row.get("problem")]
        found.append((means or problems or each)[0])
    return found


def tasks(record: Record) -> list[str]:
    """A table a length: a row a method, a column a task, the mean over those the model can do."""
    parts = []
    for length, here in by(record.rows, "length").items():
        scored = [row for row in here if row.get("score") is not None]
        if scored:
            parts.append(f"{length:,} tokens, {asked(scored)}:\n")
            parts.append(scores(here))
        continued = [row for row in here if row.get("perplexity") is not None]
        if continued:
            parts.append(f"{length:,} tokens, the next tokens of texts:\n")
            columns = {"perplexity": of("perplexity", small), "divergence": of("kl", small)}
            parts.append(grid(continued, {"method": method_name}, {"held": held, **columns}))
    return parts


def asked(rows: Sequence[Row]) -> str:
    """How many questions a cell stands for."""
    counts = sorted(row["n"] for row in rows if not row.get("problem")) or [0]
    numbers = dict.fromkeys((counts[0], counts[-1]))
    return f"{' to '.join(map(str, numbers))} questions a cell"


def scores(rows: Sequence[Row]) -> str:
    """One length's table; half of the 95 % interval beside each score."""
    names = list(by((row for row in rows if row.get("perplexity") is None), "task"))
    cells = {(x["method"], x["ratio"], x["task"]): x for x in rows}
    known = {x["task"]: x["score"] for x in rows if x["method"] == "full" and x.get("score")}
    counted = [x for x in names if known.get(x, 0) >= CAN_DO] if known else names
    lines = []
    for (method, ratio), here in by(rows, "method", "ratio").items():
        found = [cells.get((method, ratio, name), {}) for name in names]
        # conversations grow on
        sizes = [
            1 / x["held_ratio"] for x in here if x.get("held_ratio") and x["task"] != "multiturn"
        ]
        sizes = sizes or [1 / x["held_ratio"] for x in here if x.get("held_ratio")]
        mine = [x for name, x in zip(names, found, strict=True) if name in counted]
        is_whole = bool(mine) and all(x.get("score") is not None for x in mine)
        why = dict.fromkeys(x["problem"] for x in here if x.get("problem"))
        lines.append(
            {
                "method": method,
                "ratio": ratio,
                "held": f"{len(sizes) / sum(sizes):.2f} x" if sizes else NONE,
                **{f"task {name}": _score(x) for name, x in zip(names, found, strict=True)},
                "mean": mean_score(mine) if is_whole else NONE,
                "why": "; ".join(why),
            }
        )
    heads = {name if name in counted else f"{name} *": of(f"task {name}", str) for name in names}
    has_mean = len(counted) > 1
    columns = {"held": of("held", str), **heads, **({"mean": of("mean", str)} if has_mean else {})}
    if any(line["why"] for line in lines):
        columns["why not"] = of("why")
    note = f"\n\\* not in the mean: the full cache is right in less than {CAN_DO:.0%}.\n"
    left_out = len(counted) < len(names) and has_mean
    return grid(lines, {"method": method_name}, columns) + (note if left_out else "")


def half_interval(row: Row) -> float:
    return (row["high"] - row["low"]) / 2


def _score(row: Row) -> str:
    if row.get("score") is None:
        return NONE
    return f"{100 * row['score']:.1f} ±{100 * half_interval(row):.1f}"


def mean_score(rows: Sequence[Row]) -> str:
    mean = sum(row["score"] for row in rows) / len(rows)
    half = math.sqrt(sum(half_interval(row) ** 2 for row in rows)) / len(rows)
    return f"**{mean:.1%}** ±{100 * half:.1f}"


def hits(record: Record) -> list[str]:
    """A row a task and method, a column a scenario."""
    parts = []
    for length, here in by(record.rows, "length").items():
        scenarios = list(by(here, "scenario"))
        lines = []
        for (task, method, ratio), each in by(here, "task", "method", "ratio").items():
            line = {"task": task, "method": method, "ratio": ratio}
            line |= {f"after {x['scenario']}": x["score"] for x in each if not x.get("problem")}
            why = (f"{x['scenario']}: {x['problem']}" for x in each if x.get("problem"))
            lines.append({**line, "why": "; ".join(why)})
        columns = {plain(name): of(f"after {name}", percent) for name in scenarios}
        if any(line["why"] for line in lines):
            columns["why not"] = of("why")
        tokens = "" if length is None else f"{length:,} tokens, "
        parts.append(f"{tokens}{asked(here)}:\n")
        parts.append(grid(lines, {"task": of("task"), "method": method_name}, columns))
        weak = [x["task"] for x in here if x["method"] == "full" and x.get("score", 1) < CAN_DO]
        if weak:
            names = ", ".join(map(plain, dict.fromkeys(weak)))
            parts.append(f"The full cache is right in less than {CAN_DO:.0%} of {names}.\n")
    return parts


def decode(record: Record) -> list[str]:
    """What was counted, and what was measured."""
    rows = by(record.rows, "what")
    parts = []
    if "counted" in rows:
        parts += ["Counted, milliseconds by arithmetic:\n", counted(rows["counted"])]
    if "measured" in rows:
        columns = {"ms": of("ms", small), "middle half": _spread, "MB counted": _counted_megabytes}
        about = {"tokens": of("tokens", "{:,}".format), "form": of("form")}
        parts += ["Measured, one layer:\n", grid(rows["measured"], about, columns)]
    return parts


def _spread(row: Row) -> str:
    return f"{small(row['low_ms'])} to {small(row['high_ms'])}" if row.get("low_ms") else NONE


def _counted_megabytes(row: Row) -> str:
    return megabytes(row, "bytes")


def counted(rows: Sequence[Row]) -> str:
    """A row a length and form, a column of milliseconds a chip; launches as on the first chip."""
    lines = []
    for (tokens, form), each in by(rows, "tokens", "form").items():
        first = each[0]
        times = {f"on {row['chip']}": row["ms"] for row in each}
        counts = {name: first[name] for name in ("bytes", "flops", "launches")}
        lines.append({"tokens": tokens, "form": form, **counts, **times})
    chips = {plain(chip): of(f"on {chip}", "{:.1f}".format) for chip in by(rows, "chip")}
    sizes = {
        "GB a step": lambda row: f"{row['bytes'] / 1e9:.2f}",
        "GFLOP": lambda row: f"{row['flops'] / 1e9:.1f}",
        "launches a step": of("launches", "{:,}".format),
    }
    about = {"tokens": of("tokens", "{:,}".format), "attention": of("form")}
    return grid(lines, about, {**sizes, **chips})


def prefill(record: Record) -> list[str]:
    """A row a side."""
    return [
        grid(
            record.rows,
            {"tokens": of("tokens", "{:,}".format), "cache": of("side")},
            {
                "peak MB": lambda row: megabytes(row, "peak_bytes"),
                "held MB": lambda row: megabytes(row, "held_bytes"),
                "seconds": of("seconds", "{:.1f}".format),
                "from": of("low_seconds", "{:.1f}".format),
                "to": of("high_seconds", "{:.1f}".format),
                "of them factoring": of("factor_seconds", "{:.1f}".format),
            },
        )
    ]


def fidelity(record: Record) -> list[str]:
    """A row a method and kind of caches."""
    about = {"caches": of("caches"), "tokens": of("tokens", "{:,}".format), "method": method_name}
    errors = {"output error": of("output_error", small), "logit error": of("logit_error", small)}
    seconds = {"seconds": of("seconds", "{:.1f}".format)}
    return [grid(record.rows, about, {"held": held, **errors, **seconds})]


def first_run(record: Record) -> list[str]:
    """A row a command: the best run, and all."""
    lines = []
    for (command, openblas), each in by(record.rows, "command", "openblas").items():
        times = [row["seconds"] for row in each if not row.get("problem")]
        why = "; ".join(row["problem"] for row in each if row.get("problem"))
        shown = {"best": f"{min(times):.1f}", "all": ", ".join(f"{x:.1f}" for x in times)}
        line = {"command": command, "openblas": openblas, "problem": why}
        lines.append({**line, **(shown if times else {})})
    about = {"command": of("command"), "OpenBLAS": of("openblas")}
    columns = {"seconds, best run": of("best", str), "all runs": of("all", str)}
    return [grid(lines, about, columns)]


def doctor(record: Record) -> list[str]:
    """A row a time, beside what it is compared with."""
    said = plain(record.settings.get("verdict") or "no verdict")
    about = {"what": of("what"), "name": of("name"), "dtype": of("dtype")}
    about["tokens"] = of("tokens", "{:,}".format)
    columns = {
        "ms": of("ms", small),
        "plain twin, or full attention": of("baseline_ms", small),
        "times as fast": lambda row: f"{row['baseline_ms'] / max(row['ms'], 1e-9):.2f}",
    }
    return [f"Verdict: {said}.\n", grid(record.rows, about, columns)]


TABLES: dict[str, Callable[[Record], list[str]]] = {
    "kl": kl,
    "tasks": tasks,
    "hits": hits,
    "decode": decode,
    "prefill": prefill,
    "prefixes": prefixes,
    "batches": batches,
    "fidelity": fidelity,
    "first_run": first_run,
    "doctor": doctor,
}
"""By kind."""
