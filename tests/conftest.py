"""Fixtures shared by all tests, and the switch that turns a missing device into a failure."""

from __future__ import annotations

import importlib.util
import os
import tempfile

import pytest
import torch

import xkv

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as at_import:
        # whether Triton's own library is interpreted is decided when anything first imports it
        at_import.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        action="append",
        default=[],
        choices=["metal", "cuda"],
        help="fail, instead of skipping, the tests that need this device",
    )


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        # workers share the cores, and start after this; BLAS reads it when a worker starts
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # tests of it calibrate; no other finds, or makes, what a user's cache holds
    os.environ["XKV_NO_CALIBRATION"] = "1"
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="xkv-tests-")


def need_device(request: pytest.FixtureRequest, name: str, is_there: bool) -> None:
    """Skip the test with the reason, unless the command line requires the device."""
    if is_there:
        return
    if name in request.config.getoption("--require-backend"):
        pytest.fail(f"--require-backend {name}: no such device on this machine")
    pytest.skip(f"needs a {name} device, and this machine has none")


@pytest.fixture(scope="session")
def mlx_backend() -> xkv.ops.backend.Backend:
    return xkv.load_backend("mlx")


@pytest.fixture(scope="session")
def reference() -> xkv.ops.backend.Backend:
    """PyTorch on the CPU: with float64 inputs, what every other result is compared with."""
    return xkv.load_backend("torch", device="cpu")
