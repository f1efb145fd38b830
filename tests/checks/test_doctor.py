"""``python -m xkv.doctor``: plain words without a device, and failures that are not hidden."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from xkv import doctor
from xkv.backends.mlx_metal.kernels import common
from xkv.checks import machine

SMALL = ["--lengths", "300", "--json"]


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    from dataclasses import replace

    small = replace(machine.LLAMA_8B, n_heads=4, n_kv_heads=2, rank_k=16, rank_v=24, budget=64)
    monkeypatch.setattr(machine, "LLAMA_8B", small)
    monkeypatch.setattr(machine, "CHECK_TOKENS", 300)


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_doctor_says_what_could_not_be_checked(capsys, backend):
    doctor.main(["--backend", backend, *SMALL])
    report = json.loads(capsys.readouterr().out)
    if backend == "mlx":
        assert {kernel["status"] for kernel in report["kernels"]} == {"not checked"}
        assert "could not be checked here" in report["verdict"]
        assert "no" in report["kernels"][0]["why"] and "Metal" in report["kernels"][0]["why"]
    names = [kernel["kernel"] for kernel in report["kernels"]]
    assert len(names) == 21
    assert "selected_attention, packed" in names
    assert report["attention"][0]["selective_ms"] > 0
    assert report["packages"]["mlx"] and report["machine"]


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
def test_doctor_shows_the_compilers_words_and_exits_with_1(capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("program_source:12: error: unknown type name 'half9'")

    common.build.cache_clear()
    monkeypatch.setattr(common, "device_problem", lambda: None)
    monkeypatch.setattr(mx.fast, "metal_kernel", refuse)
    with pytest.raises(SystemExit) as stop:
        doctor.main(SMALL)
    common.build.cache_clear()
    report = json.loads(capsys.readouterr().out)
    assert stop.value.code == 1
    assert {kernel["status"] for kernel in report["kernels"]} == {"failed"}
    assert "unknown type name 'half9'" in report["kernels"][0]["why"]
    assert "kernels fail" in report["verdict"]


def test_doctor_leaves_out_what_would_take_too_long(capsys):
    doctor.main(["--lengths", "300", "100000000", "--max-seconds", "1"])
    assert "left out: would take about" in capsys.readouterr().out
