"""Tables of what the server does: conversations in one batch, and beginnings on disk."""

from __future__ import annotations

import statistics

from scripts.results_cells import by, grid, method_name, of, small
from xkv.cli.record import Record


def prefixes(record: Record) -> list[str]:
    """A row a side: the median run, and all."""
    lines = []
    for (tokens, side), each in by(record.rows, "tokens", "side").items():
        times = [row["seconds"] for row in each]
        sizes = {name: each[-1].get(name) for name in ("bytes", "write_seconds")}
        shown = {"median": statistics.median(times), "all": ", ".join(map(small, times))}
        lines.append({"tokens": tokens, "side": side, **shown, **sizes})
    about = {"tokens": of("tokens", "{:,}".format), "beginning": of("side")}
    columns = {
        "seconds to the first token": of("median", small),
        "all runs": of("all", str),
        "MB on disk": of("bytes", lambda size: f"{size / 1e6:,.1f}"),
        "seconds to write": of("write_seconds", small),
    }
    return [grid(lines, about, columns)]


def batches(record: Record) -> list[str]:
    """A row a side, medians of all runs."""
    lines = []
    for each in by(record.rows, "sequences", "tokens", "method", "ratio").values():
        names = "decode_tps", "seconds", "held_bytes", "longest_gap", "first_token"
        medians = {name: statistics.median(row[name] for row in each) for name in names}
        lines.append({**each[0], **medians})
    about = {
        "conversations": of("sequences"),
        "tokens of each": of("tokens", "{:,}".format),
        "cache": method_name,
    }
    columns = {
        "tokens a second, decoding": of("decode_tps", "{:.1f}".format),
        "seconds in all": of("seconds", "{:.1f}".format),
        "MB held": of("held_bytes", lambda size: f"{size / 1e6:,.1f}"),
        "longest wait for a token, s": of("longest_gap", "{:.2f}".format),
        "first token of one that joins, s": of("first_token", "{:.1f}".format),
    }
    return [grid(lines, about, columns)]
