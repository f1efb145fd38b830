"""Rebuild BENCHMARKS.md, and the tables in README.md and docs/, from scripts/results/*.json.

    python -m scripts.summarize_results
    python -m scripts.summarize_results --check

In a page all between a line ``<!-- results: NAME -->`` and the next ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

# run as a file, the scripts' folder is where imports are looked for
sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.results_cells import plain
from scripts.results_named import NAMED
from scripts.results_tables import TABLES
from xkv.cache.whole_file import whole_file
from xkv.cli.record import Record, read_record
from xkv.cli.terminal import user_errors
from xkv.errors import InputError

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = "scripts/results", "BENCHMARKS.md"
TITLES = {
    "kl": "Divergence of next tokens",
    "tasks": "Tasks",
    "hits": "Tasks through a cache hit",
    "decode": "Decode attention",
    "prefill": "Prefill",
    "prefixes": "Beginnings on disk",
    "batches": "Conversations in one batch",
    "first_run": "First commands",
    "fidelity": "Error of attention",
    "doctor": "Machines",
}
"""Sections of the page, in their order, by kind."""
START = f"""# Benchmarks

`python -m scripts.summarize_results` makes this page out of the records in `{RESULTS}`, and
nothing in it is written by hand. `python -m scripts.add_result FILE` adds one: what
`python -m xkv.doctor --json` printed, what `python -m xkv.evaluate` left in its folder, or what a
script under `scripts` wrote with `--json FILE`.
"""
GPU = f"""## On a GPU

What `bash scripts/check_gpu.sh` left on an H200: [what passed]({RESULTS}/gpu/summary.txt),
[kernels]({RESULTS}/gpu/kernels.txt), [parity]({RESULTS}/gpu/parity.txt),
[machine]({RESULTS}/gpu/machine.txt), [a layer's step by its operations]({RESULTS}/gpu/step.md); on
an H100 and for commit d273810, before decode had an index and a working set,
[a whole model's steps]({RESULTS}/gpu/bench.md).
"""
MARK = re.compile(r"^<!-- results: (.*?) -->\n", re.MULTILINE)
END = "<!-- end -->"


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if a file differs"
    )
    return parser


def read_records(root: Path) -> dict[str, Record]:
    """All records by the names of their files.

    Raises:
        InputError: If one is broken.
    """
    return {path.name: read_record(path) for path in sorted((root / RESULTS).glob("*.json"))}


def benchmarks(records: dict[str, Record]) -> str:
    """The page with every record: a section a kind, the newest first in it."""
    parts = [START]
    for kind, title in TITLES.items():
        found = [(name, record) for name, record in records.items() if record.kind == kind]
        if not found:
            continue
        parts.append(f"## {title}\n")
        for name, record in sorted(found, key=lambda x: x[1].date, reverse=True):
            heading = f"### {record.model} on {record.backend}, {chip(record)}, {record.date}"
            parts += [plain(heading) + "\n", about(name, record)]
            parts += TABLES[kind](record)
    return "\n".join([*parts, GPU])


def about(name: str, record: Record) -> str:
    """Where, when, with what and how it was measured."""
    versions = ", ".join(f"{k} {v}" for k, v in record.versions.items())
    settings = ", ".join(f"{k} {_shown(v)}" for k, v in record.settings.items() if k != "verdict")
    lines = [
        f"* {plain(machine(record))}",
        f"* {plain(versions)}",
        *([f"* {plain(settings)}"] if settings else []),
        f"* {plain(record.date)}, {plain(commit(record))}, [{name}]({RESULTS}/{name})",
    ]
    return "\n".join([*lines, "", f"      {record.command}", ""])


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def chip(record: Record) -> str:
    return record.machine.get("gpu") or record.machine["cpu"]


def machine(record: Record) -> str:
    found = record.machine
    parts = [found["cpu"]]
    if found.get("cores") is not None:
        parts.append(f"{found['cores']} cores")
    if found.get("memory_bytes") is not None:
        parts.append(f"{found['memory_bytes'] / 1e9:.0f} GB")
    return ", ".join([*parts, found["os"], found.get("gpu") or "no GPU"])


def commit(record: Record) -> str:
    return "installed, no checkout" if record.commit is None else f"commit {record.commit}"


def named_table(name: str, records: dict[str, Record], page: str) -> str:
    """The table of a mark, and below it the commands of its records.

    Raises:
        InputError: If there is no such table, or a record of it is not there.
    """
    if name not in NAMED:
        raise InputError(f"{page}: there is no table {name!r}; tables: {', '.join(NAMED)}")
    named, found = NAMED[name], []
    for file in named.files:
        if file not in records:
            raise InputError(f"{page}: the table {name!r} needs {RESULTS}/{file}, which is missing")
        if records[file].kind != named.kind:
            kind = records[file].kind
            raise InputError(f"{page}: {RESULTS}/{file} is of kind {kind!r}, not {named.kind!r}")
        found.append(records[file])
    notes = [
        f"\n`{plain(x.command)}` ({plain(machine(x))}; {plain(commit(x))}, {plain(x.date)})\n"
        for x in found
    ]
    return named.make(*found) + "".join(notes)


def fill(text: str, records: dict[str, Record], page: str) -> str:
    """A page with its tables.

    Raises:
        InputError: If a mark names no table or has no end.
    """
    parts, rest = [], text
    while mark := MARK.search(rest):
        place = rest.find(END, mark.end())
        following = MARK.search(rest, mark.end())
        if place < 0 or (following and following.start() < place):
            raise InputError(f"{page}: the table {mark[1]!r} has no line {END}")
        parts += [rest[: mark.end()], "\n", named_table(mark[1], records, page), "\n"]
        rest = rest[place:]
    return "".join([*parts, rest])


def rebuilt(root: Path, records: dict[str, Record]) -> dict[Path, str]:
    """All pages as they should be.

    Raises:
        InputError: If one cannot be made.
    """
    pages = {root / PAGE: benchmarks(records)}
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        pages[path] = fill(text, records, str(path.relative_to(root)))
    return pages


def differing(pages: dict[Path, str]) -> dict[Path, str]:
    """Those whose file is not as it should be."""
    return {
        path: text
        for path, text in pages.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def write_page(path: Path, text: str) -> None:
    content = text.encode()
    with whole_file(path, len(content), ()) as beside:
        Path(beside).write_bytes(content)


def main() -> None:
    args = setup_arg_parser().parse_args()
    with user_errors():
        found = differing(rebuilt(ROOT, read_records(ROOT)))
        names = ", ".join(str(path.relative_to(ROOT)) for path in found)
        if args.check:
            if found:
                sys.exit(f"error: {names}: not as the results are; run scripts.summarize_results")
            return
        for path, text in found.items():
            write_page(path, text)
        print(f"wrote {names}" if found else "nothing to change")


if __name__ == "__main__":
    main()
