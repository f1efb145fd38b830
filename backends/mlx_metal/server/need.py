"""What a request takes before anything of it is computed, and what those that run take together."""

from __future__ import annotations

import os
from dataclasses import dataclass

import mlx.core as mx

from xkv.backends.mlx_metal.model.enabled import Enabled
from xkv.config import buffer_rows
from xkv.planning.footprint import storing_bytes
from xkv.store.ranks import WAIT_SHARE, ModelPlan, plan_ranks


@dataclass(frozen=True)
class RequestBytes:
    """What a request takes at most.

    Args:
        cache: Its KV cache, while the last group of layers is dense or at the end of the answer.
        work: Besides: hidden states of the prompt, and a group's rows in float32 for factoring.
    """

    cache: int = 0
    work: int = 0

    def __add__(self, other: RequestBytes) -> RequestBytes:
        return RequestBytes(self.cache + other.cache, self.work + other.work)

    @classmethod
    def of(cls, enabled: Enabled, n_prompt: int, n_answer: int, is_layerwise: bool) -> RequestBytes:
        """Estimate a request before anything is computed.

        Args:
            enabled: The model.
            n_prompt: Tokens of the whole prompt, cached ones too.
            n_answer: Most tokens of the answer.
            is_layerwise: Whether at most one group of layers is dense at a time.
        """
        config, shape = enabled.plan.config, enabled.plan.probe.cache_shape(enabled.plan.groups)
        n_tokens = n_prompt + n_answer
        native, beside = enabled.native_bytes(n_tokens)
        dense = shape.dense_bytes(buffer_rows(n_tokens)) + native
        basis = enabled.basis
        is_long = not isinstance(plan_ranks(shape, config, n_prompt, basis=basis), str)
        ranks = plan_ranks(shape, config, n_tokens, 0.0 if is_long else WAIT_SHARE, basis)
        hidden = getattr(getattr(enabled.model, "args", None), "hidden_size", 0)
        work = 3 * n_prompt * hidden * shape.item_bytes
        if isinstance(ranks, str):
            return cls(dense + beside, work)
        work += max(storing_bytes(n_prompt, group, basis is None) for group in shape.groups)
        if basis is not None and isinstance(ranks, ModelPlan):
            # the model's, and there for the next request
            work += max(basis.column_bytes(ranks.bits, shape.item_bytes) - basis.nbytes, 0)
        if not is_layerwise:
            return cls(dense + beside, work)
        tail = shape.dense_bytes(min(n_answer, config.max_tail))
        group = max(x.n_layers * x.row_elements for x in shape.groups) * shape.item_bytes
        held = ranks.held_bytes(shape, config, n_tokens) + native
        most = held + max(tail, group * buffer_rows(n_prompt))
        # full ranks and their bases take more than what they stand for
        return cls((most if held > dense else min(dense, most)) + beside, work)


def memory_limit() -> int:
    """Bytes that MLX may use: the Mac's working set, or the machine's memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
