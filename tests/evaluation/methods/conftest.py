"""Every method runs on both frameworks."""

from __future__ import annotations

import pytest

import xkv


@pytest.fixture(scope="module", params=["mlx", "torch"])
def backend(request) -> xkv.ops.backend.Backend:
    options = {"device": "cpu"} if request.param == "torch" else {}
    return xkv.load_backend(request.param, **options)
