"""Tables that pages show, by the name in their mark: each of records with fixed names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scripts.results_cells import NONE, Row, by, grid, held, kl_name, percent, plain, small
from scripts.results_server import batches, prefixes
from scripts.results_tables import (
    DIVERGENCE,
    counted,
    first_run,
    hits,
    over_texts,
    prefill,
    tasks,
)
from xkv.cli.record import Record
from xkv.evaluation.summary import table

RATIOS = (4, 6, 8, 12, 16)
EXACT, BY_DEFAULT = "xkv:attention=exact", "xkv:compression=8"
SHOWN: tuple[tuple[str, float | None], ...] = (
    ("full", None),
    *((f"quantized:bits={bits}", None) for bits in (8, 4, 3)),
    *((EXACT, ratio) for ratio in RATIOS),
    (BY_DEFAULT, None),
)
"""Methods of the short table."""
OF_TEXTS = ((EXACT, 8), (EXACT, 16), ("quantized:bits=4", None))


def _side_by_side(record: Record, wanted: Sequence[tuple[str, float | None]], **about: str) -> str:
    """A row a method, three columns a length; what has no numbers says why below."""
    found = {
        (row["method"], row["ratio"], row["length"]): row
        for rows in by((x for x in record.rows if _is_of(x, about)), "length").values()
        for row in over_texts(rows)
    }
    lengths = list(by(record.rows, "length"))
    heads = [
        f"{length:,} tokens: {name}" if not number else name
        for length in lengths
        for number, name in enumerate(("held", "KL mean", "same top token"))
    ]
    lines, problems = [["method", *heads]], []
    for method, ratio in wanted:
        cells = []
        name = kl_name({"method": method, "ratio": ratio})
        for length in lengths:
            row = found.get((method, ratio, length), {"problem": "it was not measured"})
            if row.get("problem"):
                cells += [NONE] * 3
                problems.append(f"\n– {name}, {length:,} tokens: {plain(row['problem'])}\n")
            else:
                cells += [held(row), small(row["kl"]), percent(row["same_top"])]
        lines.append([name, *cells])
    return table(lines) + "".join(problems)


def _is_of(row: Row, about: dict[str, str]) -> bool:
    return all(row[name] == value for name, value in about.items())


def real_model(record: Record) -> str:
    return _side_by_side(record, SHOWN)


def real_model_all(record: Record) -> str:
    parts = []
    names = ("held", "KL mean", "99 %", "same top token", "change of NLL")
    columns = {name: DIVERGENCE[name] for name in names}
    for length, rows in by(record.rows, "length").items():
        parts.append(f"{length:,} tokens:\n")
        parts.append(grid(over_texts(rows), {"method": kl_name}, columns))
    return "\n".join(parts)


def real_model_texts(record: Record) -> str:
    parts = []
    for text in by((row for row in record.rows if row["text"] != "mean"), "text"):
        parts.append(f"{plain(text)}:\n")
        parts.append(_side_by_side(record, OF_TEXTS, text=text))
    return "\n".join(parts)


def all_tasks(record: Record) -> str:
    return "\n".join(tasks(record))


def all_hits(*records: Record) -> str:
    parts = [f"{plain(x.model)}, {part}" for x in records for part in ["\n".join(hits(x))]]
    return "\n".join(parts)


def all_prefixes(*records: Record) -> str:
    return "\n".join(line for x in records for line in (f"{plain(x.model)}:\n", *prefixes(x)))


def counted_decode(record: Record) -> str:
    return counted([row for row in record.rows if row["what"] == "counted"])


def measured_decode(mlx: Record, torch: Record) -> str:
    """A row a length, a group of columns a framework."""
    sides = {"MLX": _times(mlx), "PyTorch": _times(torch)}
    names = ("full", "xKV", "full / xKV")
    lines = [["tokens", *(f"{side}: {name}" for side in sides for name in names)]]
    for tokens in dict.fromkeys(x for found in sides.values() for x in found):
        cells = []
        for found in sides.values():
            full, ours = (found.get(tokens, {}).get(form) for form in ("full", "working set"))
            is_there = full is not None and ours is not None
            cells += [small(full), small(ours), f"{full / ours:.2f}"] if is_there else [NONE] * 3
        lines.append([f"{tokens:,}", *cells])
    return table(lines)


def _times(record: Record) -> dict[int, dict[str, float]]:
    rows = by((row for row in record.rows if row["what"] == "measured"), "tokens")
    return {
        tokens: {row["form"]: row["ms"] for row in here if not row.get("problem")}
        for tokens, here in rows.items()
    }


@dataclass(frozen=True)
class NamedTable:
    """A table of pages.

    Args:
        make: Called with the records.
        files: Their names in the folder of results.
        kind: Of all of them.
    """

    make: Callable[..., str]
    files: tuple[str, ...]
    kind: str


SMOLLM2 = ("kl-smollm2.json",)
NAMED = {
    "real-model": NamedTable(real_model, SMOLLM2, "kl"),
    "real-model-all": NamedTable(real_model_all, SMOLLM2, "kl"),
    "real-model-texts": NamedTable(real_model_texts, SMOLLM2, "kl"),
    "tasks": NamedTable(all_tasks, ("tasks-bundled.json",), "tasks"),
    "tasks-real": NamedTable(all_tasks, ("tasks-smollm2.json",), "tasks"),
    "decode": NamedTable(counted_decode, ("decode-mlx.json",), "decode"),
    "decode-measured": NamedTable(
        measured_decode, ("decode-mlx.json", "decode-torch.json"), "decode"
    ),
    "prefill": NamedTable(lambda x: "\n".join(prefill(x)), ("prefill.json",), "prefill"),
    "first-run": NamedTable(lambda x: "\n".join(first_run(x)), ("first-run.json",), "first_run"),
    "batches": NamedTable(lambda x: "\n".join(batches(x)), ("batches-bundled.json",), "batches"),
    "prefixes": NamedTable(
        all_prefixes, ("prefixes-bundled.json", "prefixes-smollm2.json"), "prefixes"
    ),
    "hits": NamedTable(all_hits, ("hits-bundled.json", "hits-smollm2.json"), "hits"),
}
