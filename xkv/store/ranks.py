"""Bytes of a compressed cache by formula, and the size of its factors that meets a target."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xkv.config import BAND, Rank, XKVConfig
from xkv.errors import InputError
from xkv.ops.packed import group_size_of
from xkv.store.codec import BITS, basis_row_bytes, row_bytes
from xkv.store.model_basis import BandBits, ModelBasis
from xkv.store.shapes import CacheShape

WAIT_SHARE = 0.5
"""A conversation that was too short for compression waits for ranks of this share of a very long
one's: with those below, most of the bundled model's answers were lost.
"""

PLAN_STEP = 1.02
"""Bytes of a token's latents in the model's own basis are a whole power of this."""

PLANNED_BITS = 4
"""Bits of a latent's column for which the factorization's rank is sized."""


@dataclass(frozen=True)
class RankPlan:
    """Ranks for one prompt; those of a group are clamped to what it can have.

    Args:
        rank_k: Columns of the key latent.
        rank_v: Columns of the value latent.
    """

    rank_k: Rank
    rank_v: Rank

    def for_group(
        self, shape: CacheShape, config: XKVConfig, index: int, n_rows: int
    ) -> tuple[int, int]:
        """``(rank_k, rank_v)`` of group number ``index``, whose segment has ``n_rows`` tokens.

        A rank above the number of rows or the joint width holds nothing more, but ``"full"`` is
        always the joint width.
        """
        group = shape.groups[index]

        def clamp(rank: Rank, width: int) -> int:
            return width if rank == "full" else min(rank, width, n_rows)

        return clamp(self.rank_k, group.key_width), clamp(self.rank_v, group.value_width)

    def factor_bytes(self, shape: CacheShape, config: XKVConfig, index: int, n_rows: int) -> int:
        """Bytes of the latents and bases of group number ``index``."""
        group = shape.groups[index]
        rank_k, rank_v = self.for_group(shape, config, index, n_rows)
        elements = rank_k * (n_rows + group.key_width) + rank_v * (n_rows + group.value_width)
        return elements * shape.item_bytes

    def held_bytes(self, shape: CacheShape, config: XKVConfig, n_tokens: int) -> int:
        """Bytes held after a prompt of ``n_tokens`` and one more token: factors and dense rows."""
        n_rows = config.layout(n_tokens).n_rows
        factors = (self.factor_bytes(shape, config, i, n_rows) for i in range(len(shape.groups)))
        return shape.unfactored_bytes(config, n_tokens) + sum(factors)


@dataclass(frozen=True)
class BitPlan:
    """Bytes for the factors of one prompt; how they are spent is decided when spectra are known.

    Args:
        budget_bytes: Of the latents and bases of all groups.
    """

    budget_bytes: int

    def for_group(
        self, shape: CacheShape, config: XKVConfig, index: int, n_rows: int
    ) -> tuple[int, int]:
        """Columns of keys and of values of group number ``index`` that are looked at.

        One band more than the budget holds at ``PLANNED_BITS``, were it shared evenly.
        """
        group = shape.groups[index]
        budget = self.factor_bytes(shape, config, index, n_rows)
        widths = (group.key_width, group.value_width)
        share = budget / (2 if all(widths) else 1)
        bits = 8 * row_bytes(BAND, PLANNED_BITS, shape.item_bytes) / BAND

        def columns(width: int) -> int:
            fitting = int(8 * share / bits / (n_rows + width))
            return min((-(-fitting // BAND) + 1) * BAND, width)

        keys, values = map(columns, widths)
        limit = config.max_key_rank
        return keys if limit is None else min(keys, max(limit // BAND, 1) * BAND), values

    def factor_bytes(self, shape: CacheShape, config: XKVConfig, index: int, n_rows: int) -> int:
        """Bytes of the latents and bases of group number ``index``."""
        sizes = [group.key_width + group.value_width for group in shape.groups]
        return self.budget_bytes * sizes[index] // sum(sizes)

    def held_bytes(self, shape: CacheShape, config: XKVConfig, n_tokens: int) -> int:
        """Bytes held after a prompt of ``n_tokens`` and one more token: factors and dense rows."""
        return shape.unfactored_bytes(config, n_tokens) + self.budget_bytes


@dataclass(frozen=True)
class ModelPlan:
    """Bits of the columns of the model's own basis, settled before the prompt.

    Args:
        bits: Of each group's keys, and values, band by band.
        row_bytes: Of one token's latents in all groups.
    """

    bits: tuple[tuple[BandBits, ...], ...]
    row_bytes: int

    def __post_init__(self) -> None:
        # lists, where it comes from a file
        bits = tuple(tuple(map(tuple, group)) for group in self.bits)
        object.__setattr__(self, "bits", bits)

    def held_bytes(self, shape: CacheShape, config: XKVConfig, n_tokens: int) -> int:
        """Bytes held after a prompt of ``n_tokens`` and one more token: latents and dense rows."""
        n_rows = config.layout(n_tokens).n_rows
        return shape.unfactored_bytes(config, n_tokens) + n_rows * self.row_bytes


Plan = RankPlan | BitPlan | ModelPlan


def check_ranks(shape: CacheShape, config: XKVConfig) -> None:
    """Refuse ranks that no group of the model can have.

    Raises:
        InputError: If a rank is above the joint width of the largest group.
    """
    for name in ("rank_k", "rank_v"):
        group = max(shape.groups, key=lambda g: g.key_width if name == "rank_k" else g.value_width)
        head_dim = group.key_dim if name == "rank_k" else group.value_dim
        width = group.n_layers * group.n_kv_heads * head_dim
        rank = getattr(config, name)
        if isinstance(rank, int) and rank > width:
            raise InputError(
                f"{name}={rank} exceeds the joint width {width} ({group.n_layers} layers x "
                f"{group.n_kv_heads} kv heads x {head_dim}); lower {name}"
            )


LONG_PROMPT = 1 << 24
"""Tokens from which on bases and dense rows no longer count."""


def plan_ranks(
    shape: CacheShape,
    config: XKVConfig,
    n_tokens: int,
    min_share: float = 0.0,
    basis: ModelBasis | None = None,
) -> Plan | str:
    """Choose the size of a prompt's latents and, without a basis of the model's own, its bases.

    Args:
        shape: The model's cache.
        config: Its ranks are taken as they are; with ``compression`` it is what of dense bytes /
            compression all else leaves, as bytes or, in 16 bits, as the largest ranks in the ratio
            ``value_rank_ratio`` that fit.
        n_tokens: Tokens in the cache.
        min_share: Factors that ``compression`` makes smaller, for each token, than this share of
            those of a very long prompt count as too small.
        basis: The model's own.

    Returns:
        The plan, or one sentence that says why the prompt stays dense.
    """
    n_rows = config.layout(n_tokens).n_rows
    if n_rows < 1:
        return (
            f"kept dense: {n_tokens} tokens are not more than the {config.sinks} sinks "
            f"and {config.window_at(n_tokens)} window tokens that always stay dense"
        )
    dense = shape.dense_bytes(n_tokens)
    if config.rank_k is not None and config.rank_v is not None:
        plan = RankPlan(config.rank_k, config.rank_v)
        if "full" not in (plan.rank_k, plan.rank_v) and (
            plan.held_bytes(shape, config, n_tokens) >= dense
        ):
            return (
                f"kept dense: at {n_tokens} tokens ranks {plan.rank_k}/{plan.rank_v} "
                "would take more memory than the full cache"
            )
        return plan
    if basis is not None:
        return _plan_columns(shape, config, n_tokens, min_share, basis)
    if config.chooses_bits:
        return _plan_bits(shape, config, n_tokens, min_share)
    rank_k = _largest_rank(shape, config, n_tokens)
    if min_share and rank_k < min_share * _largest_rank(shape, config, LONG_PROMPT):
        rank_k = 0
    return _ranks(config, rank_k) if rank_k else _too_short(shape, config, n_tokens)


def _plan_columns(
    shape: CacheShape, config: XKVConfig, n_tokens: int, min_share: float, basis: ModelBasis
) -> ModelPlan | str:
    assert config.compression is not None
    n_rows = config.layout(n_tokens).n_rows
    left = shape.dense_bytes(n_tokens) / config.compression
    allowed = (left - shape.unfactored_bytes(config, n_tokens)) / n_rows
    bits = None
    if allowed > 0 and allowed >= min_share * left / n_tokens:
        # few plans for all lengths, so that conversations share columns of the basis
        stepped = PLAN_STEP ** math.floor(math.log(allowed, PLAN_STEP))
        bits = basis.plan(stepped, shape.item_bytes, config.max_key_rank)
    if bits is None:
        return (
            f"kept dense: {n_tokens} tokens are too few for a compression of "
            f"{config.compression:g} with {config.sinks + config.window_at(n_tokens)} tokens dense"
        )
    spent = sum(
        row_bytes(BAND, band, shape.item_bytes) for group in bits for part in group for band in part
    )
    return ModelPlan(bits, spent)


def _plan_bits(
    shape: CacheShape, config: XKVConfig, n_tokens: int, min_share: float
) -> BitPlan | str:
    assert config.compression is not None
    allowed = shape.dense_bytes(n_tokens) / config.compression
    plan = BitPlan(int(allowed - shape.unfactored_bytes(config, n_tokens)))
    n_rows = config.layout(n_tokens).n_rows
    width = max(max(group.key_width, group.value_width) for group in shape.groups)
    if min_share and plan.budget_bytes / allowed * n_rows / (n_rows + width) < min_share:
        return _too_short(shape, config, n_tokens)
    for index in range(len(shape.groups)):
        needed = _least_factor_bytes(shape, config, index, n_rows)
        if plan.factor_bytes(shape, config, index, n_rows) < needed:
            return _too_short(shape, config, n_tokens)
    return plan


def _least_factor_bytes(shape: CacheShape, config: XKVConfig, index: int, n_rows: int) -> int:
    """Bytes of a group's factors with one band of columns each in the fewest bits."""
    group, total = shape.groups[index], 0
    for width, dim in ((group.key_width, group.key_dim), (group.value_width, group.value_dim)):
        if width:
            bits = BITS[0] if group_size_of(dim) else 16
            columns = -(-min(BAND, width) // BAND) * BAND
            basis = width // dim * basis_row_bytes(dim, bits, shape.item_bytes)
            total += columns * basis
            total += columns // BAND * n_rows * row_bytes(BAND, BITS[0], shape.item_bytes)
    return total


def _too_short(shape: CacheShape, config: XKVConfig, n_tokens: int) -> str:
    """Why a compression cannot be met, with the best that can."""
    best = _best_compression(shape, config, n_tokens)
    reach = f"; at most {best:.3g} can be reached" if best > 1 else ""
    return (
        f"kept dense: {n_tokens} tokens are too few for a compression of "
        f"{config.compression:g} with {config.sinks + config.window_at(n_tokens)} tokens dense "
        f"and a basis in every group{reach}"
    )


def _best_compression(shape: CacheShape, config: XKVConfig, n_tokens: int) -> float:
    """The largest compression that this prompt could be given, below 1 if there is none."""
    n_rows = config.layout(n_tokens).n_rows
    if config.chooses_bits:
        least = sum(_least_factor_bytes(shape, config, i, n_rows) for i in range(len(shape.groups)))
    else:
        held = _ranks(config, 1).held_bytes(shape, config, n_tokens)
        least = held - shape.unfactored_bytes(config, n_tokens)
    return shape.dense_bytes(n_tokens) / (least + shape.unfactored_bytes(config, n_tokens))


def _ranks(config: XKVConfig, rank_k: int) -> RankPlan:
    return RankPlan(rank_k, max(1, round(rank_k * config.value_rank_ratio)))


def _largest_rank(shape: CacheShape, config: XKVConfig, n_tokens: int) -> int:
    """The largest key rank that reaches ``compression``, 0 if none does."""
    assert config.compression is not None
    allowed = shape.dense_bytes(n_tokens) / config.compression
    best, low = 0, 1
    high = max(max(group.key_width, group.value_width) for group in shape.groups)
    while low <= high:
        rank_k = (low + high) // 2
        if _ranks(config, rank_k).held_bytes(shape, config, n_tokens) <= allowed:
            best, low = rank_k, rank_k + 1
        else:
            high = rank_k - 1
    return best
