"""Writing what an evaluation found: tables for people and programs, and plots."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from xkv.cli.record import MakeRecord, rows_from_csv, write_record
from xkv.errors import InputError
from xkv.evaluation import kl_summary, summary
from xkv.evaluation.figure import plot, plot_divergence
from xkv.evaluation.hits import summary as hits_summary
from xkv.evaluation.hits.run import HITS
from xkv.evaluation.kl import KL
from xkv.evaluation.prefills import dtype_name
from xkv.evaluation.store import Store
from xkv.planning.language_model import LanguageModel


def report_scores(store: Store, folder: Path, record: MakeRecord) -> list[str]:
    """Write and print the results of all tasks but ``kl`` and ``hits``.

    Args:
        store: With the results.
        folder: To write to.
        record: Makes a record of rows.

    Returns:
        Names of the files.

    Raises:
        InputError: If the folder cannot be written.
    """
    cells = summary.collect(line for line in store.results() if line["task"] not in (KL, HITS))
    if not cells:
        return []
    draw = (lambda path: plot(cells, path)) if any(cell.scores for cell in cells) else None
    table = summary.csv_text(cells)
    return [
        *_write(folder, "summary", summary.markdown(cells), table, draw),
        _keep(folder, "tasks", table, record),
    ]


def report_divergence(
    store: Store, folder: Path, n_next: int, model: LanguageModel, record: MakeRecord
) -> list[str]:
    """Write and print the results of ``kl`` over this many next tokens.

    Args:
        store: With the results.
        folder: To write to.
        n_next: Tokens whose next-token distributions were compared.
        model: Whose dtypes are told.
        record: Makes a record of rows.

    Returns:
        Names of the files.

    Raises:
        InputError: If the folder cannot be written.
    """
    rows = kl_summary.collect(store.results(), n_next)
    if not rows:
        return []
    dtypes = dtype_name(model.kv_dtype), dtype_name(model.dtype)
    text, table = kl_summary.markdown(rows, n_next, *dtypes), kl_summary.csv_text(rows, n_next)
    has_numbers = any(row.problem is None for row in rows)
    draw = (lambda path: plot_divergence(rows, path)) if has_numbers else None
    return [*_write(folder, KL, text, table, draw), _keep(folder, KL, table, record)]


def report_hits(store: Store, folder: Path, record: MakeRecord) -> list[str]:
    """Write and print the results of ``hits``.

    Args:
        store: With the results.
        folder: To write to.
        record: Makes a record of rows.

    Returns:
        Names of the files.

    Raises:
        InputError: If the folder cannot be written.
    """
    rows = hits_summary.rows_of(store.results())
    if not rows:
        return []
    table = hits_summary.csv_text(rows)
    return [
        *_write(folder, HITS, hits_summary.markdown(rows), table, None),
        _keep(folder, HITS, table, record),
    ]


def _keep(folder: Path, kind: str, table: str, record: MakeRecord) -> str:
    """Write the record of a table, and return its name."""
    write_record(folder / f"{kind}.json", record(kind, rows_from_csv(kind, table)))
    return f"{kind}.json"


def _write(
    folder: Path, name: str, text: str, table: str, draw: Callable[[Path], None] | None
) -> list[str]:
    try:
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        (folder / f"{name}.csv").write_text(table, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    print(text)
    written = [f"{name}.md", f"{name}.csv"]
    if draw is not None:
        try:
            draw(folder / f"{name}.png")
            written.append(f"{name}.png")
        except InputError as error:
            print(error, file=sys.stderr)
    return written
