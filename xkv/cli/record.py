"""Records: what one measuring command found, in one JSON file that says where and how."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from xkv.cache.whole_file import whole_file
from xkv.cli.record_kinds import FORMAT, KINDS, record_problem
from xkv.cli.this_machine import ROOT, code_commit, this_machine, versions
from xkv.errors import InputError


@dataclass(frozen=True)
class Record:
    """What one command measured.

    Args:
        kind: Of :data:`KINDS`.
        date: As in 2026-11-26.
        command: As it was typed.
        commit: Of the code, None where it was installed.
        machine: ``cpu``, ``cores``, ``memory_bytes``, ``os`` and ``gpu``.
        versions: Of Python and packages.
        model: Its name.
        backend: "mlx" or "torch".
        settings: What else the figures depend on.
        rows: Flat, with the kind's columns.
    """

    kind: str
    date: str
    command: str
    commit: str | None
    machine: dict[str, Any]
    versions: dict[str, str]
    model: str
    backend: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]


MakeRecord = Callable[[str, list[dict[str, Any]]], Record]
"""Called with the kind and the rows."""


def typed_command(program: str, argv: Sequence[str] | None = None) -> str:
    """The command as it was typed, without folders that only this machine has."""
    arguments = sys.argv[1:] if argv is None else argv
    return shlex.join([*program.split(), *map(shown_path, arguments)])


def shown_path(argument: str) -> str:
    """An absolute path, also after ``--flag=``, from the repository on, or its last part."""
    start, equals, value = argument.rpartition("=")
    path = Path(value)
    if path.is_absolute():
        is_inside = path.is_relative_to(ROOT)
        value = str(path.relative_to(ROOT)) if is_inside else path.name
    return "".join(x if x.isprintable() else "?" for x in start + equals + value)


def make_record(
    kind: str,
    rows: list[dict[str, Any]],
    *,
    command: str,
    model: str,
    backend: str,
    settings: dict[str, Any],
) -> Record:
    """A record of what was measured here and now.

    Args:
        kind: Of :data:`KINDS`.
        rows: With the kind's columns.
        command: Of :func:`typed_command`.
        model: A name or a path.
        backend: "mlx" or "torch".
        settings: What else the figures depend on.

    Raises:
        InputError: If the rows are not of the kind.
    """
    record = Record(
        kind,
        datetime.date.today().isoformat(),
        command,
        code_commit(),
        this_machine(),
        versions(),
        shown_path(model),
        backend,
        settings,
        rows,
    )
    _check(kind, {"format": FORMAT, **asdict(record)})
    return record


def rows_from_csv(kind: str, text: str) -> list[dict[str, Any]]:
    """Rows of a table that was written for people; a number that is none is a problem."""
    types = KINDS[kind].all
    return [
        _with_problem(kind, {name: _value(types[name], cell) for name, cell in line.items()})
        for line in csv.DictReader(io.StringIO(text))
    ]


def _value(wanted: str, cell: str) -> Any:
    if not cell:
        return None
    kind = wanted.rstrip("?")
    return cell if kind == "text" else int(cell) if kind == "count" else float(cell)


def _with_problem(kind: str, row: dict[str, Any]) -> dict[str, Any]:
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            about = {x: row[x] for x in KINDS[kind].about}
            return {**about, "problem": f"{name} is {value}"}
    return row


def record_text(record: Record) -> str:
    """A record as JSON, a row a line."""
    head = {"format": FORMAT, **asdict(record)}
    rows = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in head.pop("rows")]
    start = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)[:-2]
    return start + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def write_record(path: Path, record: Record) -> None:
    """Write a record wholly or not at all.

    Raises:
        InputError: If it cannot be written.
    """
    content = record_text(record).encode()
    with whole_file(path, len(content), ()) as beside:
        Path(beside).write_bytes(content)


def read_record(path: Path) -> Record:
    """Read a record and check all of it.

    Raises:
        InputError: What is wrong with it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, InputError) else "it is not JSON"
        raise InputError(f"{path} is no record: {reason}") from None
    _check(str(path), data)
    del data["format"]
    return Record(**data)


def _no_number(name: str) -> None:
    raise InputError(f"{name} is not a number")


def _check(place: str, data: Any) -> None:
    """Raise an error that begins with the place unless this is a record."""
    problem = record_problem(data, [field.name for field in fields(Record)])
    if problem is not None:
        raise InputError(f"{place} is no record: {problem}")
