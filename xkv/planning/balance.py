"""How a plan divides its bytes among groups, keys and values: chosen by divergence, on a text that
calibration did not see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from xkv.cache import steps
from xkv.cache.lowrank_cache import LowRankCache
from xkv.config import MIN_WINDOW, Layout
from xkv.planning.calibration import PREDICTED_TOKENS, Progress, Subject
from xkv.store.model_basis import Balance, ModelBasis

RATIOS = (4.0, 8.0, 16.0, 32.0)
"""Of dense bytes to bytes of latents, at which plans are compared."""

BALANCES = (
    Balance(0.5, 1.0, False),
    Balance(1.0, 1.0, False),
    Balance(1.0, 2.0, False),
    Balance(1.0, 1.0, True),
    Balance(1.0, 2.0, True),
)
"""What is tried."""


class KeepingCache(LowRankCache):
    """Rows of a prompt, which stay as they are."""

    def settle_group(self, number: int) -> None:
        pass


def best_balances(
    subject: Subject, basis: ModelBasis, pieces: Sequence[Sequence[int]], on_progress: Progress
) -> dict[float, Balance]:
    """The balance of each ratio whose plan diverges least.

    Args:
        subject: The model.
        basis: Its calibration so far.
        pieces: Texts that were held out.
        on_progress: Called with plans tried and in all.
    """
    plans = [(ratio, balance) for ratio in RATIOS for balance in BALANCES]
    found = dict.fromkeys(plans, 0.0)
    n_done, n_total = 0, len(plans) * len(pieces)
    for piece in pieces:
        for plan, divergence in _divergences(subject, basis, piece, plans):
            found[plan] += divergence / len(pieces)
            n_done += 1
            on_progress(n_done, n_total)
    return {ratio: min(BALANCES, key=lambda balance: found[ratio, balance]) for ratio in RATIOS}


def _divergences(
    subject: Subject,
    basis: ModelBasis,
    piece: Sequence[int],
    plans: Sequence[tuple[float, Balance]],
) -> Iterator[tuple[tuple[float, Balance], float]]:
    """Each plan, and the mean divergence of what follows a text from what the full cache says."""
    shape = subject.plan.probe.cache_shape(subject.plan.groups)
    cache = KeepingCache(subject.backend, subject.plan.config, subject.plan.groups, shape=shape)
    n_context = len(piece) - PREDICTED_TOKENS
    caches = subject.fill(cache, piece[:n_context])
    following = piece[n_context:]
    exact = subject.log_probabilities(caches, following)
    before = cache.snapshot()
    dense = shape.dense_bytes(1) - shape.dense_row_bytes
    for ratio, balance in plans:
        tried = replace(basis, balances={ratio: balance})
        bits = tried.plan(dense / ratio, shape.item_bytes, None)
        assert bits is not None
        for number, group in enumerate(cache.groups):
            state = group.state
            layout = Layout(state.layers[0].offset - cache.config.sinks - MIN_WINDOW)
            columns = tried.columns(number, bits[number], state.layers[0].keys.rows.dtype)
            group.state = steps.compress(subject.backend, cache.config, state, layout, columns)
        got: Any = subject.log_probabilities(caches, following)
        cache.restore(before)
        yield (ratio, balance), float((np.exp(exact) * (exact - got)).sum(-1).mean())
