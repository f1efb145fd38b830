"""What the state machine draws: a model's shape and a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from xkv import RopeSpec, XKVConfig
from xkv.cache.lowrank_cache import LowRankCache
from xkv.ops.types import DynamicNTKRope
from xkv.store.model_basis import Directions, ModelBasis
from xkv.store.shapes import CacheShape, GroupShape

RANK = 10
"""Of the rows of one topic: the bases hold them, whatever the bits."""


@dataclass(frozen=True)
class Setting:
    """One model and one configuration."""

    config: XKVConfig
    groups: tuple[tuple[int, ...], ...]
    n_heads: int
    n_kv_heads: int
    head_dim: int
    batch: int
    rope_name: str
    is_mla: bool
    is_streaming: bool
    is_calibrated: bool

    @property
    def rope(self) -> Any:
        """What rotates keys."""
        if self.is_mla:
            return None
        return {
            "none": None,
            "halves": RopeSpec.standard(self.head_dim, 10_000.0),
            "partial": RopeSpec.standard(self.head_dim // 2, 10_000.0, traditional=True),
            "dynamic": DynamicNTKRope(self.head_dim, 10_000.0, 2.0, 100),
        }[self.rope_name]

    @property
    def n_layers(self) -> int:
        return sum(map(len, self.groups))

    @property
    def is_exact(self) -> bool:
        return self.config.rank_k == "full"

    def cache(self, backend: Any) -> LowRankCache:
        """A new cache."""
        groups = tuple(
            GroupShape(len(group), self.n_kv_heads, self.head_dim, self.head_dim, self.is_mla)
            for group in self.groups
        )
        shape = CacheShape(groups, 4) if self.is_mla else None
        basis = self.model_basis(backend) if self.is_calibrated else None
        cache = LowRankCache(backend, self.config, self.groups, shape=shape, basis=basis)
        cache.is_streaming = self.is_streaming
        return cache

    def model_basis(self, backend: Any) -> ModelBasis:
        """Directions at random: every row fits them, and costs the same in each."""
        random = np.random.default_rng(0)
        groups = []
        for group in self.groups:
            heads = len(group), self.n_kv_heads, self.head_dim
            width, parts = int(np.prod(heads)), []
            for _ in range(1 if self.is_mla else 2):
                scales = random.uniform(0.5, 2, width).astype(np.float32)
                rows = np.linalg.qr(random.standard_normal((width, width)))[0] / scales
                energies = np.linspace(2, 1, width)
                parts.append(Directions(rows.astype(np.float16), scales, energies, heads))
            groups.append(tuple(parts))
        return ModelBasis(backend, "drawn", self.groups, tuple(groups))


@st.composite
def settings_of(draw: Any) -> Setting:
    """Every mode, with sizes small enough for hundreds of sequences."""
    head_dim = draw(st.sampled_from((64, 64, 80, 96, 120, 128, 256)))
    n_kv_heads = draw(st.sampled_from((1, 2))) if head_dim <= 128 else 1
    groups = draw(st.sampled_from((((0, 1),), ((0,), (1, 2)), ((0, 2), (1, 3)), ((0,),))))
    is_mla = draw(st.sampled_from((False,) * 7 + (True,)))
    size: dict[str, Any] = draw(
        st.sampled_from(
            (
                {"rank_k": "full", "rank_v": "full"},
                {"rank_k": "full", "rank_v": "full"},
                {"rank_k": RANK, "rank_v": RANK},
                {"compression": 2.0},
                {"compression": 3.0},
                {"compression": 1.5, "latent_bits": 16},
            )
        )
    )
    config = XKVConfig(
        groups=groups,
        **size,
        sinks=draw(st.sampled_from((0, 2, 4))),
        window=draw(st.sampled_from((0, 8, 16, None))),
        max_tail=draw(st.sampled_from((1, 16, 40))),
        attention=draw(st.sampled_from(("auto", "auto", "exact"))),
        budget=draw(st.sampled_from((None, 24, 40))),
        kept_share=draw(st.sampled_from((0.0, 0.125, 0.5))),
    )
    return Setting(
        config,
        groups,
        n_kv_heads * draw(st.sampled_from((1, 3))),
        n_kv_heads,
        head_dim,
        draw(st.sampled_from((1, 1, 1, 2))),
        draw(st.sampled_from(("halves", "partial", "dynamic", "none"))),
        is_mla,
        draw(st.sampled_from((False, False, True))),
        config.wants_model_basis and draw(st.booleans()),
    )
