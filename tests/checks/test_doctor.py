"""``python -m xkv.doctor``: plain words without a device, and failures that are not hidden."""

from __future__ import annotations

import mlx.core as mx
import pytest

from xkv import doctor
from xkv.backends.mlx_metal.kernels import common
from xkv.checks import machine
from xkv.checks.decode_step import Timing
from xkv.cli.record import read_record
from xkv.planning.chips import Chip
from xkv.store.shapes import GroupShape

SMALL = ["--lengths", "600", "--json"]


def said(capsys, folder):
    """The record that was printed, checked."""
    (folder / "doctor.json").write_text(capsys.readouterr().out)
    return read_record(folder / "doctor.json")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    from dataclasses import replace

    model = replace(machine.LLAMA_8B.model, n_heads=4, group=GroupShape(4, 2, 64, 64))
    monkeypatch.setattr(machine, "LLAMA_8B", replace(machine.LLAMA_8B, model=model))
    monkeypatch.setattr(machine, "CHECK_TOKENS", 600)
    monkeypatch.setitem(machine.COPIED_BYTES, "cpu", 1 << 20)
    monkeypatch.setitem(machine.SIDE, "cpu", 64)


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_doctor_says_what_could_not_be_checked(capsys, tmp_path, backend):
    doctor.main(["--backend", backend, *SMALL])
    record = said(capsys, tmp_path)
    kernels, (timed,), (estimate,) = (
        [row for row in record.rows if row["what"] == what]
        for what in ("kernel", "attention", "decode step")
    )
    if backend == "mlx":
        assert "could not be checked here" in record.settings["verdict"]
        for row in kernels:
            assert row["problem"].startswith("not checked: ") and "Metal" in row["problem"]
    names = [row["name"] for row in kernels]
    latent = {"index_scores", "key_scores", "weigh_rows"}
    others = {"query_terms", "attend_dense", "choose_rows"}
    assert set(names) == latent | others | {f"{name}, packed" for name in latent}
    assert len(names) == len(set(names)) * len(machine.DTYPES)
    assert timed["tokens"] == 600 and timed["ms"] > 0 and timed["baseline_ms"] > 0
    assert estimate["tokens"] == 600 and record.settings["bytes_per_second"] > 0
    assert record.versions["mlx"] and record.machine["cpu"] and record.backend == backend
    assert record.command == f"python -m xkv.doctor --backend {backend} --lengths 600 --json"


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
def test_doctor_shows_the_compilers_words_and_exits_with_1(capsys, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("program_source:12: error: unknown type name 'half9'")

    common.build.cache_clear()
    monkeypatch.setattr(common, "device_problem", lambda: None)
    monkeypatch.setattr(mx.fast, "metal_kernel", refuse)
    with pytest.raises(SystemExit) as stop:
        doctor.main(SMALL)
    common.build.cache_clear()
    record = said(capsys, tmp_path)
    assert stop.value.code == 1
    for row in (row for row in record.rows if row["what"] == "kernel"):
        assert row["problem"].startswith("failed: ")
        assert "unknown type name 'half9'" in row["problem"]
    assert "kernels fail" in record.settings["verdict"]


def test_doctor_leaves_out_what_would_take_too_long(capsys, tmp_path):
    lengths = ["--lengths", "600", "100000000", "--max-seconds", "1"]
    doctor.main(lengths)
    assert "left out: would take about" in capsys.readouterr().out
    doctor.main([*lengths, "--json"])
    timed = [row for row in said(capsys, tmp_path).rows if row["what"] == "attention"]
    assert timed[0]["ms"] > 0 and timed[1]["problem"].startswith("left out: would take about")


def test_estimate_is_arithmetic_on_measured_rates(monkeypatch, reference):
    chip = Chip("toy", 100e9, 1e12, 0.0, True)
    monkeypatch.setattr(machine, "measured_chip", lambda backend: chip)
    said = []
    found = machine._estimate(reference, [2000], said.append)
    # a small layer's rows in 16 bits and the weights, at 100 GB/s
    read = 32 * 2000 * 2 * 2 * 64 * 2 + machine.LLAMA_8B.model.weight_bytes
    (entry,) = found["decode"]
    assert entry["full_ms"] == pytest.approx(1e3 * read / 100e9)
    assert said[0].startswith("estimate  100 GB/s and 1 TFLOP/s measured")
    assert f"{entry['working_set_ms']:.1f} ms a token at 2000" in said[0]


def test_rates_are_what_is_done_in_a_second(monkeypatch, mlx_backend):
    timings = {"copy": Timing(2.0, 2.0, 2.0), "product": Timing(4.0, 4.0, 4.0)}
    monkeypatch.setattr(machine, "time_alternating", lambda *_: timings)
    chip = machine.measured_chip(mlx_backend)
    # a mebibyte read and written; 64 x 64 x 64 products and sums
    assert chip.bandwidth == pytest.approx(2 * (1 << 20) / 2e-3)
    assert chip.products == pytest.approx(2 * 64**3 / 4e-3)
