"""What a model asks of its caches, and what becomes of each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from xkv.cache.lowrank_cache import LowRankCache
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.types import Rope
from xkv.planning.grouping import make_groups
from xkv.planning.report import LayerKind, LayerReport, Report
from xkv.store.model_basis import ModelBasis
from xkv.store.shapes import CacheShape, GroupShape


@dataclass(frozen=True)
class KVShape:
    """Rows of one layer's cache: layers with equal shapes can share a latent.

    Args:
        n_kv_heads: KV heads.
        key_dim: Features of a key head (of the latent, for MLA).
        value_dim: Features of a value head (of the rotary key, for MLA).
        item_bytes: Bytes of an element.
        is_mla: The cache holds a latent and a rotary key instead of keys and values.
    """

    n_kv_heads: int
    key_dim: int
    value_dim: int
    item_bytes: int
    is_mla: bool = False

    @property
    def row_bytes(self) -> int:
        """Dense bytes of one token."""
        return self.n_kv_heads * (self.key_dim + self.value_dim) * self.item_bytes


@dataclass(frozen=True)
class CacheProbe:
    """One entry of a model's prompt cache.

    Args:
        cache_type: The framework's class.
        shape: Its rows; None unless it is a plain full cache that was filled once.
        rope: What rotates its keys.
        reaches_seam: Whether its layer's attention takes just what the cache returned, so that the
            cache can compute it.
        is_attended_once: Whether nothing else attends to it, as layers do that look at another
            layer's rows.
        reason: Why it is not compressed; None if it can be.
    """

    cache_type: str
    shape: KVShape | None = None
    rope: Rope | None = None
    reaches_seam: bool = False
    is_attended_once: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class ModelProbe:
    """A model's prompt cache, and whether whole prompts can go through layer by layer.

    Args:
        caches: One entry for each of the model's caches.
        why_not_layerwise: A sentence, or None.
    """

    caches: tuple[CacheProbe, ...]
    why_not_layerwise: str | None = None

    def cache_shape(self, groups: tuple[tuple[int, ...], ...]) -> CacheShape:
        """What the byte formula needs to know for these groups of caches."""
        shapes = []
        for group in groups:
            shape = self.caches[group[0]].shape
            assert shape is not None
            shapes.append(
                GroupShape(
                    len(group), shape.n_kv_heads, shape.key_dim, shape.value_dim, shape.is_mla
                )
            )
        first = self.caches[groups[0][0]].shape
        grouped = {index for group in groups for index in group}
        dense = sum(
            probe.shape.row_bytes
            for index, probe in enumerate(self.caches)
            if probe.shape is not None and index not in grouped
        )
        assert first is not None
        return CacheShape(tuple(shapes), first.item_bytes, dense)


@dataclass(frozen=True)
class CachePlan:
    """What becomes of each of a model's caches.

    Args:
        name: The model's, for people.
        config: How to compress; attention is dense where a latent has no heads to select for.
        probe: What the model asks of its caches.
        groups: Indices of the caches that share a latent.
    """

    name: str
    config: XKVConfig
    probe: ModelProbe
    groups: tuple[tuple[int, ...], ...]

    @staticmethod
    def of_probe(name: str, config: XKVConfig, probe: ModelProbe) -> CachePlan:
        """The plan for a model that was looked at.

        Raises:
            InputError: If nothing of it can be compressed, with the reason.
        """
        kinds = [cache.shape for cache in probe.caches]
        if not any(kinds):
            reasons = sorted({cache.reason for cache in probe.caches if cache.reason})
            raise InputError(
                f"{name} has no layer with a full KV cache to compress "
                f"(its layers: {'; '.join(reasons) or 'none'}); "
                "use --group-size 0 to run it with its own cache"
            )
        if any(kind is not None and kind.is_mla for kind in kinds):
            # the model rebuilds every row by itself
            config = replace(config, attention="exact")
        return CachePlan(name, config, probe, make_groups(config, len(kinds), kinds))

    def lowrank_cache(
        self,
        backend: Backend,
        on_progress: Callable[[int, int], None] | None = None,
        basis: ModelBasis | None = None,
    ) -> LowRankCache:
        """A new compressed cache for the grouped layers.

        Args:
            backend: Does the arithmetic.
            on_progress: As for :class:`xkv.cache.lowrank_cache.LowRankCache`.
            basis: The model's own.
        """
        shape = self.probe.cache_shape(self.groups)
        return LowRankCache(backend, self.config, self.groups, 0, on_progress, shape, basis)

    def report(self) -> Report:
        """Which layers are compressed, and which are not."""
        grouped = {index: group for group in self.groups for index in group}
        layers = []
        for index, cache in enumerate(self.probe.caches):
            if index in grouped:
                kind: LayerKind = "compressed" if cache.reaches_seam else "bypassed"
                layers.append(LayerReport(index, kind, grouped[index]))
            elif cache.shape is not None:
                layers.append(LayerReport(index, "dense", detail="left out of the groups"))
            else:
                layers.append(LayerReport(index, "native", detail=cache.reason or ""))
        return Report(self.name, tuple(layers), self.probe.why_not_layerwise)
