"""What a benchmark on a GPU found: a row a form, length and batch, their table, their summary."""

from __future__ import annotations

from dataclasses import dataclass

FULL = "full"
REPLAYED = ", replayed"
"""Ends the name of a form whose steps are replays of a graph."""


@dataclass(frozen=True)
class Row:
    """One form at one length and batch."""

    tokens: int
    form: str
    batch: int
    prefill_s: float
    factorize_s: float
    step_ms: float
    low_ms: float
    high_ms: float
    tokens_per_s: float
    held_bytes: int
    prefill_peak_bytes: int
    peak_bytes: int

    @property
    def is_replayed(self) -> bool:
        return self.form.endswith(REPLAYED)

    @property
    def is_full(self) -> bool:
        return self.form.removesuffix(REPLAYED) == FULL

    def cells(self) -> dict[str, str]:
        """As the table shows it."""
        return {
            "tokens": f"{self.tokens:,}",
            "form": self.form,
            "batch": str(self.batch),
            "prefill s": f"{self.prefill_s:.2f}",
            "factorize s": f"{self.factorize_s:.2f}",
            "step ms": f"{self.step_ms:.2f}",
            "middle half": f"{self.low_ms:.2f} - {self.high_ms:.2f}",
            "tokens/s": f"{self.tokens_per_s:.1f}",
            "held GB": f"{self.held_bytes / 1e9:.3f}",
            "prefill peak GB": f"{self.prefill_peak_bytes / 1e9:.3f}",
            "decode peak GB": f"{self.peak_bytes / 1e9:.3f}",
        }


def markdown(rows: list[dict[str, str]]) -> str:
    """A table with the columns of its first row; nothing for no rows."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])


def summary(rows: list[Row]) -> list[str]:
    """Each form beside full attention at equal batches; replays beside replays."""
    lines = []
    for n_tokens in dict.fromkeys(row.tokens for row in rows):
        of_length = [row for row in rows if row.tokens == n_tokens]
        full = {(row.batch, row.is_replayed): row for row in of_length if row.is_full}
        for row in of_length:
            beside = full.get((row.batch, row.is_replayed))
            if not row.is_full and beside is not None:
                ratio, held = beside.step_ms / row.step_ms, beside.held_bytes / row.held_bytes
                lines.append(
                    f"{n_tokens:,} tokens, batch {row.batch}: a step of {row.form} runs at "
                    f"{ratio:.2f} x full attention's speed and holds 1/{held:.1f} of its bytes"
                )
    return lines
