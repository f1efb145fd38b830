"""What a user chooses: grouping, ranks and what stays dense."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Literal

from xkv.errors import InputError

Rank = int | Literal["full"]

BAND = 64
"""Columns that share a number of bits, and in each row a scale and a bias."""

DECODE_TOKENS = 16
"""A call of at most this many tokens (one, or a draft to verify) means that the prompt is over."""

USUAL_COMPRESSION = 8
"""For which the working set is sized where ranks are given instead."""

MIN_WINDOW, MAX_WINDOW = 16, 128
"""Limits of ``window=None``."""

ANSWER_ROWS = 8
"""Tokens of an answer that such a window leaves room for in the buffers of dense rows."""


ROW_STEP = 16
"""Dense buffers grow by a multiple of this many rows."""


def buffer_rows(n_rows: int) -> int:
    """Rows allocated for ``n_rows`` dense ones: a sixteenth more, so that growing stays cheap."""
    return -(-(n_rows + n_rows // 16) // ROW_STEP) * ROW_STEP


ATTENDED = 352
"""Stored rows that a step attends to for each KV head, at least, where no budget is given."""
MIN_REBUILT, MAX_REBUILT, REBUILT_STEP = 128, 256, 32
"""How many of them it rebuilds, at least and at most; the others are recent ones.

What more of them are worth, and cost: docs/measured.md.
"""

OWN_QUERIES = 8
"""Tokens of a call, at most, that attend each to rows of its own, as they would one by one."""

RECENT_IN_ROW = 1.75
"""Rows of 64 features and more in 8 bits, in the bytes of one in 16."""

MAX_RECENT = 2048
"""Recent rows, at most."""


@dataclass(frozen=True)
class Layout:
    """How the rows of a prompt are divided.

    Args:
        n_rows: Rows of the segment; less than 1 if the prompt is too short.
        n_recent: The last of these, which are held in 8 bits too.
    """

    n_rows: int
    n_recent: int = 0


@dataclass(frozen=True)
class XKVConfig:
    """How a KV cache is compressed.

    The size comes from exactly one of two places: ``rank_k`` and ``rank_v``, or ``compression``,
    which is met for the prompt's length in bytes, everything counted (``xkv.store.ranks``).
    With neither, ``compression`` is 4.

    Args:
        group_size: Consecutive layers that share one latent (W).
        groups: Explicit layer groups instead of ``group_size``, e.g. ``((0, 1), (2, 3, 4))``.
        first_layer: First layer to compress; those before it stay dense.
        last_layer: Last layer to compress, inclusive; None means the model's last.
        rank_k: Columns of the shared key latent, or ``"full"`` for the exact form.
        rank_v: Columns of the shared value latent, or ``"full"``.
        compression: Target ratio of dense bytes to all bytes held after the prompt.
        basis: ``auto`` is the model's own, calibrated once, where there is one, and the prompt's
            elsewhere; ``calibrated`` insists on it; ``prompt`` is the paper's form, a joint SVD of
            each prompt. Given ranks, and latents in 16 bits, always mean the prompt's.
        latent_bits: ``auto`` stores the latents' bands of 64 columns, and a prompt's own basis, in
            as many bits, 2 to 8, as their energies are worth; 16 is the paper's form, where
            ``compression`` picks ranks. Given ranks are always held in 16.
        value_rank_ratio: rank_v / rank_k when ``compression`` picks ranks.
        max_key_rank: Columns of keys that ``auto`` keeps at most, each of which costs a product in
            every key that decode rebuilds; None for no limit.
        sinks: First tokens, kept dense.
        window: Last tokens, kept dense; None is 128, or down to 16 where sinks and window would
            take more than an eighth of the bytes that ``compression`` leaves.
        max_tail: Tokens after the window that are kept dense; when there are more, all but the
            window is folded into the compressed part.
        attention: ``auto`` attends to the stored rows that matter most, where there are more than a
            step is worth; ``exact`` to every one.
        budget: Stored rows that a decode step attends to, recent and rebuilt ones together; None
            rebuilds up to 256 beside the recent ones, at least 128, and 256 for more than 8 tokens.
        kept_share: Share of the bytes held that the recent rows, kept in 8 bits, may take.
        power_iterations: Subspace iterations of a prompt's factorization.
        seed: Seed of its random start.

    Raises:
        InputError: If a value is out of range or the rank options contradict each other.

    Source: xKV, arXiv:2503.18893; sinks and window after KVTC, arXiv:2511.01815.
    """

    group_size: int = 4
    groups: tuple[tuple[int, ...], ...] | None = None
    first_layer: int = 0
    last_layer: int | None = None
    rank_k: Rank | None = None
    rank_v: Rank | None = None
    compression: float | None = None
    basis: Literal["auto", "calibrated", "prompt"] = "auto"
    latent_bits: Literal["auto", 16] = "auto"
    value_rank_ratio: float = 1.5
    max_key_rank: int | None = None
    sinks: int = 4
    window: int | None = None
    max_tail: int = 128
    attention: Literal["auto", "exact"] = "auto"
    budget: int | None = None
    kept_share: float = 0.125
    power_iterations: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.groups is not None:
            object.__setattr__(self, "groups", tuple(tuple(group) for group in self.groups))
        if self.group_size < 1:
            raise InputError(f"group_size={self.group_size} must be at least 1")
        if self.max_tail < 1:
            raise InputError(f"max_tail={self.max_tail} must be at least 1")
        for name in ("sinks", "window", "power_iterations", "first_layer"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("rank_k", "rank_v"):
            rank = getattr(self, name)
            if rank is not None and rank != "full" and (not isinstance(rank, int) or rank < 1):
                raise InputError(f"{name}={rank!r} must be a whole number above 0 or 'full'")
        if (self.rank_k is None) != (self.rank_v is None):
            missing = "rank_k" if self.rank_k is None else "rank_v"
            raise InputError(f"{missing} is missing: give both rank_k and rank_v, or compression")
        if self.rank_k is not None and self.compression is not None:
            raise InputError("compression and rank_k/rank_v exclude each other: give one of them")
        if self.rank_k is None and self.compression is None:
            object.__setattr__(self, "compression", 4.0)
        if self.compression is not None and not self.compression > 1:
            raise InputError(f"compression={self.compression} must be above 1")
        if self.latent_bits not in ("auto", 16):
            raise InputError(f"latent_bits={self.latent_bits!r} must be 'auto' or 16")
        if self.basis not in ("auto", "calibrated", "prompt"):
            raise InputError(f"basis={self.basis!r} must be auto, calibrated or prompt")
        if self.basis == "calibrated" and not self.chooses_bits:
            raise InputError(
                "basis='calibrated' chooses its own columns and bits: give compression, without "
                "ranks or latent_bits"
            )
        if self.max_key_rank is not None and self.max_key_rank < BAND:
            raise InputError(f"max_key_rank={self.max_key_rank} must be at least {BAND}")
        if self.attention not in ("auto", "exact"):
            raise InputError(f"attention={self.attention!r} must be auto or exact")
        if self.budget is not None and self.budget <= self.sinks + (self.window or MIN_WINDOW):
            raise InputError(
                f"budget={self.budget} must be above the sinks and the window, "
                f"{self.sinks} + {self.window or MIN_WINDOW}"
            )
        if not 0 <= self.kept_share < 1:
            raise InputError(f"kept_share={self.kept_share} must be at least 0 and below 1")
        if not self.value_rank_ratio > 0:
            raise InputError(f"value_rank_ratio={self.value_rank_ratio} must be above 0")

    @property
    def chooses_bits(self) -> bool:
        """Whether the bits of latents and bases are chosen by their energies."""
        return self.compression is not None and self.latent_bits == "auto"

    @property
    def wants_model_basis(self) -> bool:
        """Whether the model's own basis is taken where there is one."""
        return self.chooses_bits and self.basis != "prompt"

    def window_at(self, n_tokens: int) -> int:
        """Last tokens that stay dense after a prompt."""
        if self.window is not None:
            return self.window
        if self.compression is None:
            return MAX_WINDOW
        affordable = int(n_tokens / self.compression / 8)
        n_fitting = bisect.bisect_right(
            range(MIN_WINDOW, MAX_WINDOW + 1),
            affordable,
            key=lambda window: buffer_rows(self.sinks + window + ANSWER_ROWS),
        )
        return MIN_WINDOW + max(n_fitting - 1, 0)

    def layout(self, n_tokens: int) -> Layout:
        """Which of a prompt's rows are stored, and how many of these are held in 8 bits too."""
        n_rows = n_tokens - self.sinks - self.window_at(n_tokens)
        share = self.kept_share * RECENT_IN_ROW / (self.compression or USUAL_COMPRESSION)
        n_recent = min(int(n_tokens * share), MAX_RECENT, max(n_rows, 0))
        if self.budget is not None:
            n_recent = min(n_recent, self.budget * 7 // 8)
        return Layout(n_rows, n_recent if self.rebuilt_at(n_rows, n_recent) else 0)

    def rebuilt_at(self, n_rows: int, n_recent: int, n_queries: int = 1) -> int | None:
        """Rows of a segment that a decode step rebuilds for each KV head, None for all.

        Args:
            n_rows: Of the segment.
            n_recent: Those that are at hand.
            n_queries: Tokens of the step: up to ``OWN_QUERIES`` have as many each, more share them.
        """
        if self.budget is None:
            least = MIN_REBUILT if n_queries <= OWN_QUERIES else MAX_REBUILT
            # in steps, so that sequences of other lengths rebuild as many
            near = round((ATTENDED - n_recent) / REBUILT_STEP) * REBUILT_STEP
            n_rebuilt = min(max(near, least), MAX_REBUILT)
        else:
            n_rebuilt = max(self.budget - n_recent, 1)
        is_all = self.attention == "exact" or n_rows <= n_recent + n_rebuilt
        return None if is_all else n_rebuilt
