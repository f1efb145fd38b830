"""Errors and bytes that were measured: as a table, as verdicts and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAPER = "latent_bits=16,window=128"


@dataclass(frozen=True)
class Point:
    """One method on one family of caches: means over its caches.

    Args:
        family: Which caches.
        n_tokens: Their length.
        method: As ``xkv.evaluate`` names it.
        ratio: Dense bytes to bytes held.
        asked: The ratio asked for, None where the method has a size of its own.
        output_error: Relative L2 error of the attention's output, mean over layers.
        logit_error: The same of its scores, their mean over the tokens left out.
        seconds: Time to compress.
        problem: Why there are no numbers.
    """

    family: str
    n_tokens: int
    method: str
    ratio: float
    asked: float | None
    output_error: float = 0.0
    logit_error: float = 0.0
    seconds: float = 0.0
    problem: str | None = None

    def row(self) -> dict[str, Any]:
        """As a row of a record."""
        about = {"caches": self.family, "tokens": self.n_tokens}
        about |= {"method": self.method, "ratio": self.asked}
        if self.problem is not None:
            return {**about, "problem": self.problem}
        return {
            **about,
            "held_ratio": self.ratio,
            "output_error": self.output_error,
            "logit_error": self.logit_error,
            "seconds": self.seconds,
        }


def table_row(point: Point) -> str:
    return (
        f"| {point.family} | {point.n_tokens:,} | {point.method} | {point.ratio:.2f} | "
        f"{point.output_error:.4f} | {point.logit_error:.4f} | {point.seconds:.1f} |"
    )


HEAD = (
    "| caches | tokens | method | held | output error | logit error | seconds |\n"
    "| --- | ---: | --- | ---: | ---: | ---: | ---: |"
)


def verdicts(points: Sequence[Point]) -> list[str]:
    """What was to be reached, family by family."""
    lines = []
    for family, n_tokens in dict.fromkeys((p.family, p.n_tokens) for p in points):
        mine = [p for p in points if (p.family, p.n_tokens) == (family, n_tokens)]

        def at(ratio: float, is_ours: bool, mine: Sequence[Point] = mine) -> Point | None:
            return next(
                (
                    p
                    for p in mine
                    if p.method.startswith("xkv")
                    and (PAPER in p.method) != is_ours
                    and p.asked == ratio
                ),
                None,
            )

        quantized = next(p for p in mine if p.method == "quantized:bits=4")
        equal = next(p for p in mine if p.asked and abs(p.asked - quantized.ratio) < 0.01)
        pairs = [
            ("16 x against the paper's form at 8 x", at(16, True), at(8, False)),
            ("8 x against the paper's form at 8 x", at(8, True), at(8, False)),
            (f"{equal.ratio:.2f} x against 4 bits", equal, quantized),
        ]
        for text, ours, theirs in pairs:
            if ours and theirs:
                lines.append(
                    f"{family}, {n_tokens:,} tokens: {text}: output error "
                    f"{ours.output_error / theirs.output_error:.2f}, logit error "
                    f"{ours.logit_error / theirs.logit_error:.2f} of it"
                )
    worst = max(abs(p.ratio / p.asked - 1) for p in points if p.asked and PAPER not in p.method)
    return [*lines, f"ratios asked for are met within {100 * worst:.1f} %"]


def plot(points: Sequence[Point], path: Path) -> None:
    """Rate and distortion, one panel a family and length."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((p.family, p.n_tokens) for p in points))
    figure = Figure(figsize=(3.2 * len(panels) + 2, 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (family, n_tokens) in zip(axes, panels, strict=True):
        for number, (name, is_kind) in enumerate(
            {
                "xKV": lambda m: m.startswith("xkv") and PAPER not in m,
                "paper's form": lambda m: m.startswith("xkv") and PAPER in m,
                "single layers": lambda m: m.startswith("svd"),
                "mlx-lm 8, 4, 2 bits": lambda m: m.startswith("quantized"),
            }.items()
        ):
            mine = sorted(
                (p.ratio, p.output_error)
                for p in points
                if (p.family, p.n_tokens) == (family, n_tokens) and is_kind(p.method)
            )
            if mine:
                axis.plot(*zip(*mine, strict=True), marker="osv^"[number], label=name, markersize=4)
        axis.set(xscale="log", yscale="log", title=f"{family}, {n_tokens:,}", xlabel="ratio")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("relative error of attention output")
    axes[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
