"""The fixtures with which a test runs Metal kernels: on a Metal device, else in the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest

from tests import metal_emulator as emulator
from tests.conftest import need_device
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import common


def is_emulated() -> bool:
    """Whether :func:`metal` runs kernels in the emulator, for lack of a Metal device."""
    return not mx.metal.is_available()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[MLXBackend]:
    """A backend whose kernels must run, in the emulator; ``emulator.settings`` says how."""
    why_not = emulator.why_unavailable()
    if why_not is not None:
        pytest.skip(why_not)
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    monkeypatch.setattr(common, "device_problem", lambda: None)
    common.build.cache_clear()
    yield MLXBackend(kernels="on")
    common.build.cache_clear()


@pytest.fixture
def metal(request: pytest.FixtureRequest) -> MLXBackend:
    """A backend whose kernels must run: on the Metal device, without one in the emulator."""
    if not is_emulated():
        return MLXBackend(kernels="on")
    if "metal" in request.config.getoption("--require-backend"):
        need_device(request, "metal", False)
    return request.getfixturevalue("emulated")


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces one occurrence of a text in a source, which is a module's attribute."""

    def replace(place: tuple[Any, str], old: str, new: str, occurrence: int = 0) -> None:
        pieces = getattr(*place).split(old)
        assert occurrence + 1 < len(pieces), f"{old!r} is not in the source"
        before, after = pieces[: occurrence + 1], pieces[occurrence + 1 :]
        monkeypatch.setattr(*place, old.join(before) + new + old.join(after))

    return replace
