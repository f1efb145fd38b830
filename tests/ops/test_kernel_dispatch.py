"""The choice between a kernel and its plain twin: what runs, what is said, and how often."""

from __future__ import annotations

import logging
import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import xkv
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import common, index_scores
from xkv.checks.decode_cases import CASES, make_inputs
from xkv.checks.operations import OPERATIONS
from xkv.ops.kernels import KernelDispatch

pytest_plugins = ["tests.metal_device"]

NO_DEVICE = "there is no device"


class Doubling:
    """A kernel for :func:`double` that does what it is told."""

    name = "doubling"

    def __init__(self, factor: float = 2, reason: str | None = None, error: str | None = None):
        self.factor, self.reason, self.error = factor, reason, error
        self.n_calls = 0

    def why_not(self, x: mx.array) -> str | None:
        return self.reason

    def sample(self, backend: xkv.ops.backend.Backend, x: mx.array) -> tuple[Any, ...]:
        return (backend.normal((8,), 0).astype(x.dtype),)

    def check_key(self, x: mx.array) -> tuple[Any, ...]:
        return (common.dtype_name(x),)

    def __call__(self, x: mx.array) -> mx.array:
        self.n_calls += 1
        if self.error:
            raise RuntimeError(self.error)
        return x * self.factor


def double(x: mx.array) -> mx.array:
    return x + x


def run_twice(kernel: Doubling, mode: str = "auto") -> tuple[list[float], str]:
    """The last result, and the path it took."""
    dispatch = KernelDispatch(MLXBackend(kernels="off"), mode)
    for _ in range(2):
        result = dispatch.run("double", kernel, double, mx.array([1.0, 3.0]))
    return result.tolist(), dispatch.last_path["double"]


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_kernel_that_agrees_runs_and_is_checked_once(mode, caplog):
    kernel = Doubling()
    assert run_twice(kernel, mode) == ([2.0, 6.0], "doubling")
    assert kernel.n_calls == 3
    assert not caplog.records


def test_kernel_is_checked_again_for_another_dtype():
    kernel, dispatch = Doubling(), KernelDispatch(MLXBackend(kernels="off"))
    for dtype in (mx.float32, mx.float16, mx.float32):
        dispatch.run("double", kernel, double, mx.zeros(4, dtype))
    assert kernel.n_calls == 5


FAILING = {
    "cannot run": (Doubling(reason="the array is too odd"), "the array is too odd"),
    "does not compile": (
        Doubling(error="program_source:3: unknown type"),
        "doubling failed: program_source:3: unknown type",
    ),
    "disagrees": (Doubling(factor=2.1), "disagrees with its plain twin .* 5.0e-02, allowed 1e-04"),
    "is not finite": (Doubling(factor=float("nan")), "disagrees with its plain twin"),
}


@pytest.mark.parametrize(("kernel", "sentence"), FAILING.values(), ids=FAILING)
def test_auto_falls_back_and_tells_once(kernel, sentence, caplog):
    assert run_twice(kernel) == ([2.0, 6.0], "plain")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(sentence, record.getMessage())


@pytest.mark.parametrize(("kernel", "sentence"), FAILING.values(), ids=FAILING)
def test_on_raises_with_the_sentence(kernel, sentence):
    with pytest.raises(xkv.InputError, match=f"kernel doubling cannot run: .*{sentence}"):
        run_twice(kernel, "on")


def test_off_runs_the_twin_in_silence(caplog):
    kernel = Doubling(reason="the array is too odd")
    assert run_twice(kernel, "off") == ([2.0, 6.0], "plain")
    assert kernel.n_calls == 0
    assert not caplog.records


def test_device_is_asked_before_the_kernel(caplog):
    dispatch = KernelDispatch(MLXBackend(kernels="off"), "auto", lambda: NO_DEVICE)
    for reason in ("one reason", "another reason"):
        dispatch.run("double", Doubling(reason=reason), double, mx.zeros(4))
    assert [NO_DEVICE in record.getMessage() for record in caplog.records] == [True]


def test_unknown_mode_is_refused():
    with pytest.raises(xkv.InputError, match="'auto', 'on' or 'off'"):
        MLXBackend(kernels="maybe")


def run_every_operation(backend: MLXBackend) -> None:
    inputs = make_inputs(backend, CASES[0], "float32")
    for name in KERNELS:
        OPERATIONS[name](backend, inputs, "float32")


KERNELS = [
    *("attend_dense", "query_terms", "index_scores", "choose_rows", "key_scores", "weigh_rows")
]


def test_missing_device_is_told_once_for_all_operations(monkeypatch, caplog):
    monkeypatch.setattr(common, "device_problem", lambda: NO_DEVICE)
    backend = xkv.load_backend("mlx")
    run_every_operation(backend)
    assert backend.kernels.last_path == dict.fromkeys(KERNELS, "plain")
    assert [NO_DEVICE in record.getMessage() for record in caplog.records] == [True]


def test_missing_device_raises_where_kernels_must_run(monkeypatch):
    monkeypatch.setattr(common, "device_problem", lambda: NO_DEVICE)
    with pytest.raises(xkv.InputError, match=f"attend_dense cannot run: {NO_DEVICE}"):
        run_every_operation(xkv.load_backend("mlx", kernels="on"))


def test_missing_device_is_not_told_where_kernels_are_off(monkeypatch, caplog):
    monkeypatch.setattr(common, "device_problem", lambda: NO_DEVICE)
    backend = xkv.load_backend("mlx", kernels="off")
    run_every_operation(backend)
    assert backend.kernels.last_path == dict.fromkeys(KERNELS, "plain")
    assert not caplog.records


def test_every_operation_has_a_metal_kernel(metal):
    run_every_operation(metal)
    assert metal.kernels.last_path == {name: name for name in KERNELS}


def index_scores_with(monkeypatch, old: str, new: str) -> MLXBackend:
    """A backend whose kernel of that name has another source, after it was run."""
    assert old in index_scores.SOURCE
    monkeypatch.setattr(index_scores, "SOURCE", index_scores.SOURCE.replace(old, new))
    common.build.cache_clear()
    backend = MLXBackend()
    inputs = make_inputs(backend, CASES[0], "float32")
    got = OPERATIONS["index_scores"](backend, inputs, "float32")
    want = OPERATIONS["index_scores"](MLXBackend(kernels="off"), inputs, "float32")
    assert mx.array_equal(got, want)
    assert backend.kernels.last_path["index_scores"] == "plain"
    return backend


def test_compiler_error_is_told_in_its_own_words(metal, monkeypatch, caplog):
    index_scores_with(monkeypatch, "const int", "no_such_type")
    assert "no_such_type" in caplog.text


def test_kernel_that_computes_something_else_is_refused(metal, monkeypatch, caplog):
    index_scores_with(monkeypatch, "max(", "min(")
    assert "index_scores disagrees with its plain twin on this device" in caplog.text


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("number", [np.nan, 2.0])
def test_each_output_of_a_kernel_is_checked(wrong, number):
    backend = MLXBackend(kernels="off")

    class TwoOutputs:
        name = "two_outputs"

        def sample(self, *args):
            return (mx.ones((4,)),)

        def check_key(self, *args):
            return ("float32",)

        def __call__(self, x):
            return tuple(x * number if i == wrong else x for i in range(2))

    problem = backend.kernels.check(TwoOutputs(), lambda x: (x, x))
    assert problem is not None and "two_outputs disagrees with its plain twin" in problem
