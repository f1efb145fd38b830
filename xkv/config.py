"""What a user chooses: grouping, ranks and what stays dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xkv.errors import InputError

Rank = int | Literal["full"]


@dataclass(frozen=True)
class XKVConfig:
    """How a KV cache is compressed.

    Ranks come from exactly one of two places: ``rank_k`` and ``rank_v``, or ``compression``, which picks
    them for the prompt's length from the byte formula (``xkv.ranks``). With neither, ``compression`` is 4.

    Args:
        group_size: Consecutive layers that share one latent (W).
        groups: Explicit layer groups instead of ``group_size``, e.g. ``((0, 1), (2, 3, 4))``.
        first_layer: First layer to compress; those before it stay dense.
        last_layer: Last layer to compress, inclusive; None means the model's last.
        rank_k: Columns of the shared key latent, or ``"full"`` for the exact form.
        rank_v: Columns of the shared value latent, or ``"full"``.
        compression: Target ratio of dense bytes to all bytes held after the prompt.
        value_rank_ratio: rank_v / rank_k when ``compression`` picks the ranks.
        sinks: First tokens, kept dense.
        window: Last tokens of the prompt, kept dense.
        power_iterations: Subspace iterations of the factorization.
        seed: Seed of the factorization's random start.

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
    value_rank_ratio: float = 1.5
    sinks: int = 4
    window: int = 128
    power_iterations: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.groups is not None:
            object.__setattr__(self, "groups", tuple(tuple(group) for group in self.groups))
        if self.group_size < 1:
            raise InputError(f"group_size={self.group_size} must be at least 1")
        for name in ("sinks", "window", "power_iterations", "first_layer"):
            if getattr(self, name) < 0:
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
        if not self.value_rank_ratio > 0:
            raise InputError(f"value_rank_ratio={self.value_rank_ratio} must be above 0")

    @property
    def is_exact(self) -> bool:
        """Whether both ranks are full, so that the cache loses nothing (and saves nothing)."""
        return self.rank_k == "full" and self.rank_v == "full"
