"""A small random model on each backend, and a basis of its own."""

from __future__ import annotations

import pytest

from tests.planning.pieces import CONFIG, pieces
from tests.tiny_models import ARCHITECTURES, write_checkpoint
from xkv.cli.engine import load_engine
from xkv.planning.basis_file import uid_of
from xkv.planning.calibration import find_directions, gather
from xkv.planning.moments import Moments
from xkv.store.model_basis import ModelBasis


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of five layers."""
    return write_checkpoint(tmp_path_factory.mktemp("model"), ARCHITECTURES["llama"])


@pytest.fixture(scope="module", params=["mlx", "torch"])
def subject(request, folder):
    return load_engine(request.param, str(folder)).subject(CONFIG)


@pytest.fixture
def basis(subject, tmp_path):
    moments = Moments(tmp_path)
    gather(subject, pieces(1), moments, lambda *_: None)
    directions = find_directions(subject, moments)
    return ModelBasis(subject.backend, uid_of(directions), subject.plan.groups, directions)
