"""Bits of each band: the choice beside the best of all choices."""

from __future__ import annotations

import itertools

import numpy as np

from xkv.store.bit_plan import Option, choose


def brute_force(bands, budget: int) -> float:
    plans = itertools.product(*bands)
    return min(
        sum(o.error for o in plan) for plan in plans if sum(o.n_bytes for o in plan) <= budget
    )


def test_choice_is_near_the_best_of_all():
    generator = np.random.default_rng(0)
    for _ in range(20):
        bands = [
            [
                Option(n_bytes, energy * 4.0 ** -(n_bytes // 10), n_bytes, 0)
                for n_bytes in (0, 20, 30, 45, 60)
            ]
            for energy in generator.exponential(size=4)
        ]
        for budget in (0, 40, 95, 150, 240):
            chosen = choose(bands, budget)
            assert sum(option.n_bytes for option in chosen) <= budget
            lost = sum(option.error for option in chosen)
            assert lost <= 1.5 * brute_force(bands, budget) + 1e-9
