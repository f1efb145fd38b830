"""Models to enable, disabled again after each test."""

from __future__ import annotations

import mlx_lm
import pytest

import xkv
from tests.architectures import build
from tests.tiny_models import ARCHITECTURES, write_checkpoint


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("llama"), ARCHITECTURES["llama"])
    return mlx_lm.load(str(folder))


@pytest.fixture
def model(loaded):
    yield loaded[0]
    if hasattr(loaded[0], "_xkv"):
        xkv.disable(loaded[0])


@pytest.fixture(scope="module")
def hybrid():
    """Sliding windows, and full attention in every third layer."""
    return build("gemma3_text")
