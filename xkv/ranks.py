"""Bytes of a compressed cache by formula, and the ranks that meet a target."""

from __future__ import annotations

from dataclasses import dataclass

from xkv.config import Rank, XKVConfig
from xkv.errors import InputError

ROW_STEP = 16
"""Dense buffers grow by a multiple of this many rows."""


def buffer_rows(n_rows: int) -> int:
    """Rows allocated for ``n_rows`` dense ones: a sixteenth more, so that growing stays cheap."""
    return -(-(n_rows + n_rows // 16) // ROW_STEP) * ROW_STEP


def landmark_group_size(head_dim: int) -> int:
    """Features that share a scale in quantized landmarks; 0 where MLX's layout cannot hold them."""
    return next((size for size in (64, 32) if head_dim % size == 0), 0)


@dataclass(frozen=True)
class CacheShape:
    """What the size of a model's cache depends on.

    Args:
        group_sizes: Layers in each group that is compressed.
        n_kv_heads: KV heads of a layer.
        key_dim: Features of a key head.
        value_dim: Features of a value head.
        item_bytes: Bytes of an element in the model's KV dtype.
        n_dense_layers: Layers in no group.
    """

    group_sizes: tuple[int, ...]
    n_kv_heads: int
    key_dim: int
    value_dim: int
    item_bytes: int
    n_dense_layers: int = 0

    @property
    def row_bytes(self) -> int:
        """Dense bytes of one token in one layer."""
        return self.n_kv_heads * (self.key_dim + self.value_dim) * self.item_bytes

    def landmark_bytes(self, config: XKVConfig, n_chunks: int) -> int:
        """Bytes of one layer's landmarks and of the mark that says which chunks are outliers."""
        group_size = landmark_group_size(self.key_dim)
        if config.landmark_bits == 16 or not group_size:
            per_chunk = self.key_dim * self.item_bytes
        else:
            per_chunk = self.key_dim * config.landmark_bits // 8
            per_chunk += 2 * self.item_bytes * (self.key_dim // group_size)
        return self.n_kv_heads * n_chunks * (per_chunk + 1)

    def dense_bytes(self, n_tokens: int) -> int:
        """Bytes of the same tokens in the full cache."""
        return (sum(self.group_sizes) + self.n_dense_layers) * n_tokens * self.row_bytes


@dataclass(frozen=True)
class RankPlan:
    """Ranks for one prompt; those of a group are clamped to what it can have.

    Args:
        rank_k: Columns of the key latent.
        rank_v: Columns of the value latent.
    """

    rank_k: Rank
    rank_v: Rank

    def for_group(self, shape: CacheShape, n_layers: int, n_rows: int) -> tuple[int, int]:
        """``(rank_k, rank_v)`` of a group of ``n_layers`` whose segment has ``n_rows`` tokens.

        A rank above the number of rows or the joint width holds nothing more, but ``"full"`` is
        always the joint width.
        """

        def clamp(rank: Rank, head_dim: int) -> int:
            width = n_layers * shape.n_kv_heads * head_dim
            return width if rank == "full" else min(rank, width, n_rows)

        return clamp(self.rank_k, shape.key_dim), clamp(self.rank_v, shape.value_dim)

    def held_bytes(self, shape: CacheShape, config: XKVConfig, n_tokens: int) -> int:
        """Bytes held after a prompt of ``n_tokens`` and one more token: factors and dense rows."""
        layout = config.layout(n_tokens)
        n_rows = layout.n_rows
        outlier_rows = layout.n_outliers * config.chunk_size
        layer_bytes = buffer_rows(n_tokens - n_rows + outlier_rows + 1) * shape.row_bytes
        if layout.is_selective:
            layer_bytes += shape.landmark_bytes(config, n_rows // config.chunk_size)
        total = sum(shape.group_sizes) * layer_bytes
        total += shape.n_dense_layers * n_tokens * shape.row_bytes
        for n_layers in shape.group_sizes:
            rank_k, rank_v = self.for_group(shape, n_layers, n_rows)
            width = n_layers * shape.n_kv_heads
            elements = rank_k * (n_rows + width * shape.key_dim)
            elements += rank_v * (n_rows + width * shape.value_dim)
            total += elements * shape.item_bytes
        return total


def check_ranks(shape: CacheShape, config: XKVConfig) -> None:
    """Refuse ranks that no group of the model can have.

    Raises:
        InputError: If a rank is above the joint width of the largest group.
    """
    n_layers = max(shape.group_sizes)
    for name, head_dim in (("rank_k", shape.key_dim), ("rank_v", shape.value_dim)):
        rank, width = getattr(config, name), n_layers * shape.n_kv_heads * head_dim
        if isinstance(rank, int) and rank > width:
            raise InputError(
                f"{name}={rank} exceeds the joint width {width} ({n_layers} layers x "
                f"{shape.n_kv_heads} kv heads x {head_dim}); lower {name}"
            )


def plan_ranks(shape: CacheShape, config: XKVConfig, n_tokens: int) -> RankPlan | str:
    """Choose the ranks for a prompt.

    Args:
        shape: The model's cache.
        config: Its ranks are taken as they are; with ``compression`` the largest ranks in the ratio
            ``value_rank_ratio`` whose bytes, all counted, stay within dense bytes / compression.
        n_tokens: Tokens in the cache.

    Returns:
        The plan, or one sentence that says why the prompt stays dense.
    """
    if config.layout(n_tokens).n_rows < 1:
        return (
            f"kept dense: {n_tokens} tokens are not more than the {config.sinks} sinks "
            f"and {config.window} window tokens that always stay dense"
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
    assert config.compression is not None
    allowed = dense / config.compression
    best = None
    low, high = 1, max(shape.group_sizes) * shape.n_kv_heads * max(shape.key_dim, shape.value_dim)
    while low <= high:
        rank_k = (low + high) // 2
        plan = RankPlan(rank_k, max(1, round(rank_k * config.value_rank_ratio)))
        if plan.held_bytes(shape, config, n_tokens) <= allowed:
            best, low = plan, rank_k + 1
        else:
            high = rank_k - 1
    if best is None:
        return (
            f"kept dense: {n_tokens} tokens are too few for a compression of "
            f"{config.compression:g} with {config.sinks + config.window} tokens dense "
            "and a basis in every group"
        )
    return best
