"""A compressed cache in words, for people."""

from __future__ import annotations

from collections import Counter

from xkv.cache.lowrank_cache import LowRankCache
from xkv.store.ranks import RankPlan


def describe(cache: LowRankCache) -> str:
    """Ranks and attention of a compressed cache, for people."""
    if cache.ranks is None:
        return "nothing compressed"
    widths = "+".join(str(len(group.layers)) for group in cache.groups)
    first = cache.groups[0].layers[0]
    n_rebuilt = cache.config.rebuilt_at(first.n_segment, first.n_recent)
    attention = "every row is attended to"
    if n_rebuilt is not None:
        recent = [layer.recent for group in cache.groups for layer in group.layers]
        held = sum(x.nbytes for rows in recent if rows is not None for x in rows)
        attention = (
            f"{first.n_recent + n_rebuilt} of {first.n_segment} stored rows are attended to: the "
            f"last {first.n_recent}, in 8 bits {held / 1e6:.3f} MB of what is held, and "
            f"{n_rebuilt} rebuilt in each step"
        )
    return f"layers {widths}, {describe_factors(cache)}, {attention}"


def describe_factors(cache: LowRankCache) -> str:
    """Ranks, or the columns in each number of bits, of the groups' keys and values."""
    if isinstance(cache.ranks, RankPlan):
        return f"rank_k {cache.ranks.rank_k}, rank_v {cache.ranks.rank_v}"
    texts = []
    for name in ("keys", "values"):
        columns: Counter[int] = Counter()
        kept = [getattr(group, name) for group in cache.groups if getattr(group, name)]
        for factors in kept:
            for width, bits, _ in factors.parts():
                columns[bits] += width
        if columns:
            spread = " + ".join(f"{n} of {bits} bits" for bits, n in sorted(columns.items())[::-1])
            texts.append(f"{name} {spread}")
    return "columns: " + ", ".join(texts)
