"""Small records of every kind, and a folder like the repository's to add them to."""

from __future__ import annotations

import json
from pathlib import Path

from xkv.cli.record import Record, write_record

KL = {"task": "kl", "length": 2048, "n_next": 64, "ratio": None}
KL |= {"dense_bytes": 3000, "held_bytes": 1500, "held_ratio": 2.0, "kl_median": 0.001}
KL |= {"kl_q99": 0.5, "same_top": 0.9, "nll_change": -0.01}
XKV = {"method": "xkv", "ratio": 4.0}
ROWS = {
    "kl": [
        {**KL, "text": "a.txt", "method": "full", "kl": 2e-7},
        {**KL, "text": "a.txt", "method": "xkv:attention=exact", "ratio": 8.0, "kl": 0.0123},
    ],
    "tasks": [
        {"task": "needle", "length": 1024, "method": "full", "ratio": None, "held_ratio": 1.0}
        | {"n": 40, "score": 0.95, "low": 0.84, "high": 0.98},
        {"task": "needle", "length": 1024, **XKV, "problem": "the prompt is too short"},
    ],
    "hits": [
        {"task": "needle", "scenario": "file", **XKV, "n": 8, "score": 0.5},
        {"task": "needle", "scenario": "edited", **XKV, "problem": "no room"},
    ],
    "decode": [
        {"what": "counted", "tokens": 8192, "form": "full", "chip": "M1", "ms": 16.08}
        | {"bytes": 1 << 30, "flops": 1 << 32, "launches": 96},
        {"what": "measured", "tokens": 8192, "form": "full", "ms": 50.5, "bytes": 1 << 25},
        {"what": "measured", "tokens": 8192, "form": "working set", "ms": 101, "bytes": 1 << 24},
    ],
    "prefill": [
        {"tokens": 600, "side": "xKV", "peak_bytes": 3_000_000, "held_bytes": 2_000_000}
        | {"seconds": 1.5, "low_seconds": 1.25, "high_seconds": 2.0}
    ],
    "fidelity": [
        {"caches": "knee", "tokens": 512, **XKV, "held_ratio": 4.1, "output_error": 0.0123}
        | {"logit_error": 0.2, "seconds": 3.0}
    ],
    "prefixes": [
        {"tokens": 4096, "side": "computed again", "run": 1, "seconds": 2.5},
        {"tokens": 4096, "side": "read from disk", "run": 1, "seconds": 0.25}
        | {"bytes": 2_500_000, "write_seconds": 0.5},
    ],
    "batches": [
        {"sequences": 4, "tokens": 2048, "method": "full", "ratio": None, "run": i}
        | {"seconds": seconds}
        | {"decode_tps": 40.25, "held_bytes": 38_000_000}
        | {"longest_gap": 1.5, "first_token": 2.0}
        for i, seconds in enumerate((9.5, 8.0, 8.25))
    ],
    "first_run": [
        {"command": "python -m xkv.generate", "openblas": "no", "run": i + 1, "seconds": seconds}
        for i, seconds in enumerate((9.5, 8.25))
    ],
    "doctor": [
        {"what": "attention", "name": "one layer", "tokens": 600, "ms": 2.0, "baseline_ms": 3.0},
        {"what": "attention", "name": "one layer", "tokens": 8192, "problem": "needs 80 GB"},
    ],
}
SHOWN = {
    "kl": "| xKV at 8x | 2.00 x | 0.0123 |",
    "tasks": "| xKV at 4x | – | – | the prompt is too short |",
    "hits": "| needle | xKV at 4x | 50.0% | – | edited: no room |",
    "decode": "| 8,192 | full | 1.07 | 4.3 | 96 | 16.1 |",
    "prefill": "| 600 | xKV | 3.0 | 2.0 | 1.5 | 1.2 | 2.0 | – |",
    "fidelity": "| knee | 512 | xKV at 4x | 4.10 x | 0.0123 | 0.200 | 3.0 |",
    "prefixes": "| 4,096 | read from disk | 0.250 | 0.250 | 2.5 | 0.500 |",
    "batches": "| 4 | 2,048 | full cache in 16 bits | 40.2 | 8.2 | 38.0 | 1.50 | 2.0 |",
    "first_run": "| python -m xkv.generate | no | 8.2 | 9.5, 8.2 |",
    "doctor": "| attention | one layer | – | 8,192 | – | – | – | needs 80 GB |",
}
"""A line of each kind's table."""
MACHINE = {"cpu": "Apple M3 Max", "cores": 16, "memory_bytes": 64 * 10**9, "os": "macOS 15.1 arm64"}


def make(kind: str, **changes: object) -> Record:
    fields = {
        "kind": kind,
        "date": "2026-11-26",
        "command": f"python -m xkv.some {kind}",
        "commit": "abc1234",
        "machine": {**MACHINE, "gpu": None},
        "versions": {"python": "3.12.1", "xkv": "0.1.0"},
        "model": "some/Model-1B",
        "backend": "mlx",
        "settings": {"dtype": "float16"},
        "rows": ROWS[kind],
    }
    return Record(**{**fields, **changes})


def make_folder(root: Path, **records: Record) -> Path:
    """A repository of a README, a page, and these records."""
    results = root / "scripts" / "results"
    results.mkdir(parents=True)
    (root / "docs").mkdir()
    (root / "README.md").write_text("Hello.\n\n<!-- results: tasks -->\n<!-- end -->\n\nBye.\n")
    (root / "docs" / "page.md").write_text("No table.\n")
    write_record(results / "tasks-bundled.json", make("tasks"))
    for name, record in records.items():
        write_record(results / f"{name}.json", record)
    return root


def contents(root: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def as_json(record: Record, path: Path, **changes: object) -> Path:
    """A record's file with other fields; one that is given as ``None`` is left out."""
    write_record(path, record)
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in data.items() if v != "left out"}))
    return path
