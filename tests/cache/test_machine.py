"""A short run of :mod:`tests.cache.machine`; ``scripts/try_everything.py`` runs longer."""

from __future__ import annotations

import pytest

from tests.cache.machine import MACHINES
from tests.machines import run


@pytest.mark.parametrize("backend", MACHINES)
def test_any_sequence_leaves_a_cache_that_is_right(backend):
    run(MACHINES[backend], n_sequences=30, n_steps=12)
