"""What the bytes of a model's cache depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xkv.config import XKVConfig, buffer_rows
from xkv.ops.recent import SCALE_BYTES


@dataclass(frozen=True)
class GroupShape:
    """One group of layers whose keys, and whose values, are factored together.

    Args:
        n_layers: Layers of the group (W).
        n_kv_heads: KV heads of each.
        key_dim: Features of a key head.
        value_dim: Features of a value head.
        has_dense_values: The values are not factored: MLA's rotary key, which mlx-lm keeps there.
    """

    n_layers: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    has_dense_values: bool = False

    @property
    def key_width(self) -> int:
        """Columns of the keys of all layers side by side."""
        return self.n_layers * self.n_kv_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Columns of the values that are factored, all layers side by side."""
        return 0 if self.has_dense_values else self.n_layers * self.n_kv_heads * self.value_dim

    @property
    def row_elements(self) -> int:
        """Dense elements of one token in one layer."""
        return self.n_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class CacheShape:
    """What the size of a model's cache depends on.

    Args:
        groups: The groups that are compressed.
        item_bytes: Bytes of an element in the model's KV dtype.
        dense_row_bytes: Bytes of one token in all the layers that grow with it and are in no group.
    """

    groups: tuple[GroupShape, ...]
    item_bytes: int
    dense_row_bytes: int = 0

    @classmethod
    def uniform(
        cls,
        group_sizes: Sequence[int],
        n_kv_heads: int,
        key_dim: int,
        value_dim: int,
        item_bytes: int,
        n_dense_layers: int = 0,
    ) -> CacheShape:
        """The shape of a model whose layers are all alike."""
        groups = tuple(GroupShape(n, n_kv_heads, key_dim, value_dim) for n in group_sizes)
        row_bytes = n_kv_heads * (key_dim + value_dim) * item_bytes
        return cls(groups, item_bytes, n_dense_layers * row_bytes)

    def dense_bytes(self, n_tokens: int) -> int:
        """Bytes of the same tokens in the full cache."""
        elements = sum(group.n_layers * group.row_elements for group in self.groups)
        return n_tokens * (elements * self.item_bytes + self.dense_row_bytes)

    def unfactored_bytes(self, config: XKVConfig, n_tokens: int) -> int:
        """Bytes of all but latents and bases after a prompt and one more token."""
        layout = config.layout(n_tokens)
        n_dense = n_tokens - layout.n_rows + 1
        total = n_tokens * self.dense_row_bytes
        for group in self.groups:
            n_recent = 0 if group.has_dense_values else layout.n_recent
            n_values = n_tokens + 1 if group.has_dense_values else n_dense
            elements = buffer_rows(n_dense) * group.key_dim
            elements += buffer_rows(n_values) * group.value_dim
            recent = n_recent * (group.key_dim + group.value_dim + SCALE_BYTES)
            per_head = elements * self.item_bytes + recent
            total += per_head * group.n_layers * group.n_kv_heads
        return total
