"""What becomes of a group between calls of the model: which step is due, and how far it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from xkv.cache import steps
from xkv.cache.group import GroupState
from xkv.config import XKVConfig
from xkv.ops.backend import Backend
from xkv.store.ranks import WAIT_SHARE, BitPlan, Plan, plan_ranks
from xkv.store.shapes import CacheShape


class Settled(NamedTuple):
    """A group's next state, and what its cache takes note of."""

    state: GroupState
    plan: Plan | None
    """Of a first compression; None where the rows stay dense."""
    unspent: int
    """Bytes left for the next group."""
    notice: str | None
    """What was not done as asked, in a sentence."""


def compressed(
    backend: Backend,
    config: XKVConfig,
    shape: CacheShape,
    number: int,
    state: GroupState,
    unspent: int,
    is_streaming: bool,
    on_factored: Callable[[], None],
) -> Settled | None:
    """Factor everything but sinks and window, unless that would gain nothing.

    Args:
        number: Of the group in the shape.
        state: Dense rows.
        unspent: Bytes that the groups before it left.
        is_streaming: Whether the prompt is still coming in.
        on_factored: Called after the keys and after the values.

    Returns:
        None where it is not worth another look yet.
    """
    first = state.layers[0]
    n_tokens, batch = first.offset, first.batch
    if n_tokens < state.retry_at:
        return None
    state = state._replace(keys=None, values=None)
    is_first = state.retry_at == 0 and not is_streaming
    plan = plan_ranks(shape, config, n_tokens, 0.0 if is_first else WAIT_SHARE)
    if isinstance(plan, str):
        waiting = state._replace(retry_at=n_tokens + config.max_tail)
        return Settled(waiting, None, unspent, plan)
    layout = config.layout(n_tokens)
    ranks: Sequence[int] = plan.for_group(shape, config, number, layout.n_rows)
    budget = None
    if isinstance(plan, BitPlan):
        budget = batch * plan.factor_bytes(shape, config, number, layout.n_rows) + unspent
    if shape.groups[number].has_dense_values:
        ranks = ranks[:1]
    state = steps.compress(backend, config, state, layout, ranks, budget, on_factored)
    unspent = 0 if budget is None else budget - sum(x.nbytes for x in state.factors)
    notice = None
    if config.attention == "selective" and not layout.is_selective:
        notice = (
            f"attention is dense, which is exact over the factors: budget={config.budget} "
            f"covers all that is compressed of {n_tokens} tokens"
        )
    return Settled(state, plan, unspent, notice)


def continued(
    backend: Backend, config: XKVConfig, shape: CacheShape, number: int, state: GroupState
) -> GroupState:
    """A compressed group with what has grown too long in its tail folded in."""
    state = steps.released(backend, state)
    first = state.layers[0]
    n_rows = first.n_tail - config.window_at(first.offset)
    if n_rows < max(config.max_tail, config.chunk_size):
        return state
    n_rows = n_rows // config.chunk_size * config.chunk_size
    limits = _growth_limits(config, shape, number, state, first.n_recent + n_rows)
    state = steps.fold(backend, config, state, n_rows, limits)
    if first.n_recent + n_rows > config.budget:
        state = steps.merge(backend, config, state)
    return state


def _growth_limits(
    config: XKVConfig, shape: CacheShape, number: int, state: GroupState, n_recent: int
) -> list[int]:
    """Rows that the bases may grow by: up to as many as there are, where ranks were given, or as
    a fresh compression of the same tokens would take more bytes.
    """
    kept = state.factors
    if config.compression is None:
        limits = [2 * factors.latent.rank - factors.rank for factors in kept]
    else:
        fresh = fresh_bytes(config, shape, number, state, state.layers[0].n_segment + n_recent)
        spare = fresh - sum(factors.nbytes_with(n_recent) for factors in kept)
        limits = [int(spare / len(kept) // factors.column_bytes(n_recent)) for factors in kept]
    return [max(limit, 0) for limit in limits]


def fresh_bytes(
    config: XKVConfig, shape: CacheShape, number: int, state: GroupState, n_rows: int
) -> int:
    """Bytes of a group's factors if the tokens held were compressed afresh."""
    first = state.layers[0]
    plan = plan_ranks(shape, config, first.offset)
    if isinstance(plan, str):
        return 0
    return first.batch * plan.factor_bytes(shape, config, number, n_rows)
