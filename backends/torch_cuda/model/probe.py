"""What a transformers model asks of its cache, read off two forward passes of a few tokens."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from xkv.backends.torch_cuda.backend import TorchBackend
from xkv.backends.torch_cuda.model.ropes import rope_candidates
from xkv.errors import InputError
from xkv.ops.types import RopeSpec
from xkv.planning.cache_plan import CacheProbe, KVShape, ModelProbe

logger = logging.getLogger("xkv")

PROBE_TOKENS, PROBE_SHIFT = 12, 5

ROPE_TOLERANCE = 0.15
"""Relative difference of keys that the right inverse rotation leaves, in 16 bits through many
layers; a wrong one leaves about 1.
"""

_PROBE = "xkv_probe"
_CHANGES = ("softcap", "s_aux", "position_bias")
"""Arguments of an attention function that change its arithmetic in ways we do not know."""


class _ProbeLayer(CacheLayerMixin):
    """A plain cache that takes one call and notes what happens to its rows."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.n_updates = 0
        self.reaches_attention = False
        self.changes: set[str] = set()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.n_updates += 1
        # objects of our own, so that they are known again
        self.keys, self.values = key_states[:], value_states[:]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def shape(self) -> KVShape | None:
        """Its rows, None if they are not those of a plain cache."""
        keys, values = self.keys, self.values
        if self.n_updates != 1 or keys is None or values is None:
            return None
        if values.shape[:3] != keys.shape[:3] or not values.shape[-1]:
            return None
        return KVShape(keys.shape[1], keys.shape[-1], values.shape[-1], keys.itemsize)


def base_model(model: PreTrainedModel) -> Any:
    """The part of a model that runs the decoder layers, without the head."""
    return model.base_model


def cache_argument(model: PreTrainedModel) -> str:
    """What ``forward`` calls the cache: ``past_key_values`` up to transformers 5.23."""
    names = inspect.signature(base_model(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Choose a registered attention function.

    Raises:
        InputError: If the model does not let it be replaced.
    """
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise InputError(
            f"{type(model).__name__} does not let its attention be replaced; "
            "use --group-size 0 to run with the full cache"
        )


def native_layers(config: PreTrainedConfig) -> list[Any]:
    """transformers' own cache layers for a model of this configuration."""
    config = config.get_text_config(decoder=True)
    native = DynamicCache(config=config).layers
    return native or [DynamicLayer() for _ in range(config.num_hidden_layers)]


def probe_model(model: PreTrainedModel) -> ModelProbe:
    """Run a model twice over the same few tokens, the second time at later positions.

    What a layer attends to does not change by a shift, so that keys differ only by their rotation:
    it is the one whose inverse makes them equal.

    Raises:
        InputError: If its attention cannot be replaced or computes something else, with the reason.
    """
    candidates = rope_candidates(model)
    first, second = (_run(model, start) for start in (0, PROBE_SHIFT))
    backend = TorchBackend(model.device, "off")
    caches, all_known = [], True
    for before, after in zip(first, second, strict=True):
        name = type(before).__name__
        if not isinstance(before, _ProbeLayer):
            caches.append(CacheProbe(name, reason=f"keeps its own {name}"))
            continue
        shape = before.shape()
        if shape is None:
            caches.append(CacheProbe(name, reason="keeps its own cache, whose rows are no keys"))
            continue
        rope, is_known = _find_rope(backend, before.keys, after.keys, candidates)
        all_known = all_known and is_known
        # what the cache returns is not what attention takes: a latent, expanded on the way
        is_mla = (
            not before.reaches_attention
            and shape.n_kv_heads == 1
            and rope is None
            and shape.key_dim > shape.value_dim
        )
        shape = KVShape(shape.n_kv_heads, shape.key_dim, shape.value_dim, shape.item_bytes, is_mla)
        caches.append(CacheProbe("DynamicLayer", shape, rope, before.reaches_attention))
    if not all_known:
        logger.warning(
            "%s rotates keys in a way that is not known here: they are factored as they are "
            "cached, which loses more at the same rank",
            type(model).__name__,
        )
    return ModelProbe(tuple(caches))


@torch.no_grad()
def _run(model: PreTrainedModel, start: int) -> list[Any]:
    """One forward pass from position ``start``; returns the cache's layers."""
    layers = [_ProbeLayer() if type(x) is DynamicLayer else x for x in native_layers(model.config)]
    probes = [layer for layer in layers if isinstance(layer, _ProbeLayer)]
    watched, n_calls = list(probes), 0

    def attention(
        module: torch.nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        nonlocal n_calls
        n_calls += 1
        changes = {name for name in _CHANGES if kwargs.pop(name, None) is not None}
        for probe in watched:
            if key is probe.keys and value is probe.values:
                probe.reaches_attention, probe.changes = True, changes
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register(_PROBE, attention)
    AttentionMaskInterface.register(_PROBE, sdpa_mask)
    set_attention(model, _PROBE)
    positions = torch.arange(start, start + PROBE_TOKENS, device=model.device)
    try:
        base_model(model)(
            input_ids=torch.arange(PROBE_TOKENS, device=model.device)[None] + 1,
            position_ids=positions[None],
            use_cache=True,
            **{cache_argument(model): Cache(layers=layers)},
        )
    finally:
        model.set_attn_implementation(before)
        watched.clear()  # the registry keeps the function
    _check(model, probes, n_calls)
    return layers


def _check(model: PreTrainedModel, probes: Sequence[_ProbeLayer], n_calls: int) -> None:
    name, remedy = type(model).__name__, "use --group-size 0 to run with the full cache"
    if n_calls < len(probes):
        raise InputError(f"{name} does not let its attention be replaced; {remedy}")
    changes = set().union(*(probe.changes for probe in probes))
    if changes:
        raise InputError(
            f"{name} uses {', '.join(sorted(changes))} in its attention, which a compressed cache "
            f"does not support; {remedy}"
        )
    if len({probe.keys.device for probe in probes if probe.keys is not None}) > 1:
        raise InputError(f"{name} has its layers on several devices; {remedy}, or one device")


def _find_rope(
    backend: TorchBackend, before: Any, after: Any, candidates: Sequence[RopeSpec]
) -> tuple[RopeSpec | None, bool]:
    """What rotated the keys of both passes, None if nothing did; and whether that is known."""
    before, after = before.float(), after.float()

    def difference(spec: RopeSpec | None) -> float:
        rows = before, after
        if spec is not None:
            rows = tuple(
                backend.rope(x, start, spec, inverse=True)
                for x, start in zip(rows, (0, PROBE_SHIFT), strict=True)
            )
        return float((rows[0] - rows[1]).norm() / rows[0].norm())

    fitting = [spec for spec in candidates if spec.dims <= before.shape[-1]]
    best = min((None, *fitting), key=difference)
    is_known = difference(best) < ROPE_TOLERANCE
    return (best, True) if is_known else (None, False)
