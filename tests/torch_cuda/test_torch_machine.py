"""Sequences of everything that a caller of transformers can do to a cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.machines import run
from tests.torch_cuda.machine import TransformersCache


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices only wait for a second thread."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@torch.no_grad()
def test_any_sequence_of_calls_gives_the_logits_of_dynamic_cache(one_thread):
    run(TransformersCache, n_sequences=24, n_steps=12)
