"""Our attention function for transformers' models, and the mask that it wants."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from xkv.backends.torch_cuda.model.probe import set_attention

ATTENTION = "xkv"
"""Name under which the attention function is registered with transformers."""


class AttendingLayer:
    """A cache layer that stands for its rows on the way to the attention function."""

    def attend(self, queries: torch.Tensor, scale: float) -> torch.Tensor:
        """Causal attention of the newest tokens ``[B, n_heads, L, head_dim]`` over the layer."""
        raise NotImplementedError


def causal_mask(
    q_length: int,
    attention_mask: torch.Tensor | None = None,
    mask_function: Any = causal_mask_function,
    **kwargs: Any,
) -> torch.Tensor | None:
    """For ``AttentionMaskInterface``: a plain causal mask stays ``[B, L]``, or None.

    A compressed layer knows what is causal and which rows are padding; a square mask of a long
    prompt would take more memory than its cache.
    """
    if mask_function is causal_mask_function:
        return attention_mask
    return sdpa_mask(
        q_length=q_length, attention_mask=attention_mask, mask_function=mask_function, **kwargs
    )


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for ``AttentionInterface``; layers of ours compute their own."""
    if isinstance(key, AttendingLayer):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return key.attend(query, scale).transpose(1, 2).contiguous(), None
    if attention_mask is None or attention_mask.ndim == 2:
        attention_mask = _square(attention_mask, query, key)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def _square(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """The causal mask ``[B or 1, 1, Lq, Lk]`` where ``is_causal`` does not say the same."""
    n_queries, n_keys = query.shape[-2], key.shape[-2]
    if mask is None and n_queries in (1, n_keys):
        return None
    square = is_seen(n_queries, n_keys, query.device)[None, None]
    return square if mask is None else square & mask[:, None, None, :n_keys].bool()


def is_seen(n_queries: int, n_keys: int, device: torch.device) -> torch.Tensor:
    """Boolean ``[Lq, Lk]``: the last queries see the keys up to their own."""
    rows = torch.arange(n_keys - n_queries, n_keys, device=device)
    return rows[:, None] >= torch.arange(n_keys, device=device)


def causal_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of the last queries over all rows, no mask ever built where a kernel allows."""
    n_queries, n_keys = queries.shape[-2], keys.shape[-2]
    options: dict[str, Any] = {}
    if n_queries == n_keys:
        options["is_causal"] = n_queries > 1
    elif n_queries > 1:
        options["attn_mask"] = causal_lower_right(n_queries, n_keys)
    return torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, scale=scale, enable_gqa=queries.shape[1] != keys.shape[1], **options
    )


def install(model: PreTrainedModel) -> None:
    """Give a model our attention function, which is transformers' sdpa for every other cache.

    Raises:
        InputError: If the model does not let it be replaced.
    """
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, causal_mask)
    set_attention(model, ATTENTION)


@contextlib.contextmanager
def xkv_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run ``model`` with our attention function, and give it back its own afterwards."""
    before = model.config._attn_implementation
    install(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
