"""What becomes of a group between calls of the model: which step is due, and how far it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from xkv.cache import steps
from xkv.cache.group import GroupState
from xkv.cache.rows import LayerRows
from xkv.config import XKVConfig
from xkv.ops.backend import Backend
from xkv.store.model_basis import ModelBasis
from xkv.store.ranks import WAIT_SHARE, BitPlan, ModelPlan, Plan, plan_ranks
from xkv.store.shapes import CacheShape

MISFIT, ENERGY_FLOOR = 4.0, 1e-3
"""Later rows are spoken of when they lose this many times the share of energy that those before
did, and more than the floor times it."""


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
    basis: ModelBasis | None,
    number: int,
    state: GroupState,
    unspent: int,
    is_streaming: bool,
    on_factored: Callable[[], None],
) -> Settled | None:
    """Store everything but sinks and window, unless that would gain nothing.

    Args:
        basis: The model's own, None for one of the prompt's.
        number: Of the group in the shape.
        state: Dense rows.
        unspent: Bytes that the groups before it left.
        is_streaming: Whether the prompt is still coming in.
        on_factored: Called after the keys and after the values of a prompt's own basis.

    Returns:
        None where it is not worth another look yet.
    """
    first = state.layers[0]
    n_tokens, batch = first.offset, first.batch
    if n_tokens < state.retry_at:
        return None
    state = state._replace(keys=None, values=None)
    is_first = state.retry_at == 0 and not is_streaming
    plan = plan_ranks(shape, config, n_tokens, 0.0 if is_first else WAIT_SHARE, basis)
    if isinstance(plan, str):
        waiting = state._replace(retry_at=n_tokens + config.max_tail)
        return Settled(waiting, None, unspent, plan)
    layout, budget = config.layout(n_tokens), None
    if isinstance(plan, ModelPlan):
        assert basis is not None
        bases = basis.columns(number, plan.bits[number], first.keys.rows.dtype)
    else:
        ranks = list(plan.for_group(shape, config, number, layout.n_rows))
        if isinstance(plan, BitPlan):
            budget = batch * plan.factor_bytes(shape, config, number, layout.n_rows) + unspent
        if shape.groups[number].has_dense_values:
            ranks = ranks[:1]
        bases = steps.prompt_bases(
            backend, config, state, layout.n_rows, ranks, budget, on_factored
        )
    state = steps.compress(backend, config, state, layout, bases)
    if budget is not None:
        unspent = budget - sum(x.nbytes for x in state.stores)
    return Settled(state, plan, unspent, None)


def rows_due(config: XKVConfig, rows: LayerRows, n_more: int = 0) -> int:
    """Rows of a compressed layer's tail that are stored once it has seen ``n_more`` tokens more."""
    n_rows = rows.n_tail + n_more - config.window_at(rows.offset + n_more)
    return n_rows if n_rows >= config.max_tail else 0


def tokens_until_due(config: XKVConfig, state: GroupState, n_tokens: int) -> int:
    """After which of a call's tokens, one by one, the group would change; else all of them."""
    rows = state.layers[0]

    def is_due(n_more: int) -> bool:
        if rows.is_compressed:
            return rows_due(config, rows, n_more) > 0
        return rows.offset + n_more >= state.retry_at

    if is_due(0):
        return n_tokens
    return next(filter(is_due, range(1, n_tokens)), n_tokens)


def continued(
    backend: Backend, config: XKVConfig, state: GroupState
) -> tuple[GroupState, str | None]:
    """A compressed group with what has grown too long in its tail moved into the store.

    Returns:
        The state, and a sentence where the rows that were moved fit the basis badly.
    """
    state = steps.released(backend, state)
    first = state.layers[0]
    n_rows = rows_due(config, first)
    if not n_rows:
        return state, None
    after = steps.fold(backend, config, state, n_rows)
    return after, _misfit(state, after, n_rows)


def _misfit(before: GroupState, after: GroupState, n_rows: int) -> str | None:
    """What is said of later rows that lose far more than the rows before them did."""
    for name in ("keys", "values"):
        old, new = getattr(before, name), getattr(after, name)
        if old is None or new.total == old.total:
            continue
        share = (new.lost - old.lost) / (new.total - old.total)
        if share > MISFIT * max(old.error**2, ENERGY_FLOOR):
            whose = "model's" if new.basis.is_shared else "first prompt's"
            return (
                f"the last {n_rows} tokens that were stored fit the {whose} basis badly: "
                f"{share:.1%} of the energy of their {name} is lost, {old.error**2:.1%} of those "
                "before"
            )
    return None
