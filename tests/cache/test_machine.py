"""A short run of :mod:`tests.cache.machine`; ``scripts/try_everything.py`` runs longer."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.cache.machine import MACHINES

N_SEQUENCES, N_STEPS = 25, 14


@pytest.mark.parametrize("backend", MACHINES)
def test_any_sequence_leaves_a_cache_that_is_right(backend):
    run_state_machine_as_test(
        MACHINES[backend],
        settings=settings(
            max_examples=N_SEQUENCES,
            stateful_step_count=N_STEPS,
            deadline=None,
            derandomize=True,
            # a failure is reported as it is found: to make it small takes minutes
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
