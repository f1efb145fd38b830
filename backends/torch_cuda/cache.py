"""The low-rank cache as transformers' models expect a cache, and their attention over it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from xkv.backends.torch_cuda.backend import TorchBackend
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.grouping import make_groups
from xkv.layer_cache import LayerCache
from xkv.lowrank_cache import LowRankCache
from xkv.profile import ModelIdentity
from xkv.rope import RopeSpec

ATTENTION = "xkv"
"""Name under which the attention function is registered with transformers."""


class XKVLayer(CacheLayerMixin):
    """One layer's cache; once compressed, ``update`` returns itself for the attention function."""

    is_croppable = True
    is_sliding = False

    def __init__(self, layer: LayerCache, rope: RopeSpec) -> None:
        super().__init__()
        self.layer = layer
        self._rope = rope

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Take new tokens ``[B, n_kv_heads, L, head_dim]``; returns what attention consumes."""
        self.is_initialized = True
        self.layer.append(key_states, value_states, self._rope)
        return (self, self) if self.layer.is_compressed else self.layer.dense()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layer.offset + query_length, 0

    def get_seq_length(self) -> int:
        return self.layer.offset

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        self.layer.trim(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise InputError("beam search over an xKV cache is not supported; use sampling or greedy")


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' ``AttentionInterface``; compressed layers compute their own."""
    if not isinstance(key, XKVLayer):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    unknown = {
        name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None
    }
    if unknown:
        raise InputError(
            f"{type(module).__name__} uses {', '.join(sorted(unknown))} in its attention, "
            "which a compressed cache does not support; run it with the full cache"
        )
    n_queries = query.shape[-2]
    if attention_mask is None and n_queries > 1:
        offset = key.layer.offset
        rows = torch.arange(offset - n_queries, offset, device=query.device)
        attention_mask = rows[:, None] >= torch.arange(offset, device=query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.layer.attend(query, scale, attention_mask).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def xkv_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run ``model`` with our attention function, and give it back its own afterwards."""
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise InputError(
            f"{type(model).__name__} does not let its attention be replaced; "
            "use --group-size 0 to run with the full cache"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def identity_of(model: PreTrainedModel) -> ModelIdentity:
    """What a profile of a model agrees with."""
    config = model.config.get_text_config()
    n_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return ModelIdentity(
        model.config.model_type,
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim,
        head_dim,
    )


def find_rope(model: PreTrainedModel) -> RopeSpec:
    """The rotary embedding of a transformers model as data.

    Raises:
        InputError: If it has none or several, or one whose frequencies change with the length.
    """
    modules = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] == "rotary_emb"]
    if len(modules) != 1 or not isinstance(getattr(modules[0], "inv_freq", None), torch.Tensor):
        kinds = ", ".join(type(module).__name__ for module in modules) or "none"
        raise InputError(
            f"{type(model).__name__} has {len(modules)} rotary embeddings ({kinds}), and exactly "
            "one with fixed frequencies is supported; use --group-size 0 to run with the full cache"
        )
    rotary = modules[0]
    kind = getattr(rotary, "rope_type", "default")
    if "dynamic" in kind or kind == "longrope":
        raise InputError(
            f"rotary embedding {type(rotary).__name__} of type {kind!r} changes with the length, "
            "which is not supported on PyTorch; use --group-size 0, or --backend mlx"
        )
    freqs = tuple((1.0 / rotary.inv_freq.double()).tolist())
    return RopeSpec(freqs, scale=float(getattr(rotary, "attention_scaling", 1.0)))


def make_cache(
    model: PreTrainedModel,
    config: XKVConfig | None = None,
    *,
    backend: TorchBackend | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Cache:
    """A compressed cache for ``past_key_values=``, inside :func:`xkv_attention`.

    Args:
        model: A decoder whose layers all use transformers' plain ``DynamicLayer``.
        config: Defaults to a compression of 4.
        backend: Defaults to one on the model's device.
        on_progress: Called with (factorizations done, factorizations in all) after each.

    Raises:
        InputError: If a layer's cache or the rotary embedding is of another kind, by name.
    """
    config = config or XKVConfig()
    native = DynamicCache(config=model.config).layers
    n_layers = model.config.get_text_config().num_hidden_layers
    native = native or [DynamicLayer() for _ in range(n_layers)]
    groups = make_groups(config, len(native))
    for layer_idx in sorted(layer for group in groups for layer in group):
        if type(native[layer_idx]) is not DynamicLayer:
            raise InputError(
                f"layer {layer_idx} uses {type(native[layer_idx]).__name__}, and only plain "
                "DynamicLayer layers can be compressed; use --group-size 0 for the full cache"
            )
    rope = find_rope(model)
    backend = backend or TorchBackend(model.device)
    cache = LowRankCache(backend, config, groups, len(native) - sum(map(len, groups)), on_progress)
    return Cache(
        layers=[
            XKVLayer(cache.layers[i], rope) if i in cache.layers else plain
            for i, plain in enumerate(native)
        ]
    )
