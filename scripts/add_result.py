"""Add a record of yours to the results, and rebuild BENCHMARKS.md.

python -m scripts.add_result FILE
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

# run as a file, the scripts' folder is where imports are looked for
sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.summarize_results import (
    PAGE,
    RESULTS,
    ROOT,
    benchmarks,
    chip,
    read_records,
    write_page,
)
from xkv.cli.record import Record, read_record, write_record
from xkv.cli.terminal import user_errors
from xkv.errors import InputError


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="a record, see BENCHMARKS.md")
    return parser


def file_name(record: Record) -> str:
    """The name that tells a record from others."""
    parts = (record.kind, chip(record), record.model.rpartition("/")[2])
    return "-".join([*map(_slug, parts), f"{record.date}.json"])


def _slug(text: str) -> str:
    """A word of a file's name."""
    words = re.sub(r"\((r|tm)\)", "", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:40].strip("-") or "unnamed"


def add(root: Path, path: Path) -> str:
    """Add the record, or change nothing.

    Returns:
        What was done, in a line.

    Raises:
        InputError: If it is none, or another one has its name.
    """
    record = read_record(path)
    name = file_name(record)
    records = read_records(root)
    if records.get(name, record) != record:
        raise InputError(f"{RESULTS}/{name} is there and holds another result: remove it first")
    is_there = name in records
    page = benchmarks(dict(sorted({**records, name: record}.items())))
    if not is_there:
        write_record(root / RESULTS / name, record)
    write_page(root / PAGE, page)
    done = "is there already" if is_there else "added"
    return f"{RESULTS}/{name} {done}, {len(record.rows)} rows; {PAGE} rebuilt"


def main() -> None:
    args = setup_arg_parser().parse_args()
    with user_errors():
        print(add(ROOT, args.file))


if __name__ == "__main__":
    main()
