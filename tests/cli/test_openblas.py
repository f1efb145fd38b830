"""Which BLAS a command's MLX gets on Linux."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from xkv.cli import openblas

CODE = "from xkv.cli.openblas import load_mlx; load_mlx(); print(open('/proc/self/maps').read())"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX brings a fast one")
@pytest.mark.parametrize("is_kept_out", [False, True])
def test_a_command_loads_openblas_before_mlx(monkeypatch, is_kept_out):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    try:
        ctypes.CDLL(openblas.LIBRARY)
    except OSError:
        pytest.skip(f"{openblas.LIBRARY} is not installed")
    if is_kept_out:
        monkeypatch.setenv(openblas.OPT_OUT, "1")
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert ("/libopenblas" in run.stdout) != is_kept_out
    assert "mlx" in run.stdout


def test_a_program_that_has_imported_mlx_is_left_as_it_is(monkeypatch):
    import mlx.core  # noqa: F401

    monkeypatch.setattr(ctypes, "CDLL", pytest.fail)
    assert openblas.load_mlx().run_generate


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        ("fpu sse2 avx avx2 fma avx512f avx512bw avx512dq avx512vl", "SKYLAKEX"),
        ("fpu sse2 avx avx2 fma avx512f", "HASWELL"),
        ("fpu sse2 avx", None),
    ],
)
def test_openblas_is_told_what_a_cpu_can(flags, kernels):
    assert openblas.kernels_for(f"processor\t: 0\nflags\t\t: {flags}\n") == kernels
    assert openblas.kernels_for("processor\t: 0\nFeatures\t: fp asimd\n") is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX brings a fast one")
@pytest.mark.parametrize("given", [None, "Prescott"])
def test_a_users_choice_of_kernels_stands(monkeypatch, given):
    code = "import os; from xkv.cli import openblas; openblas.load_mlx(); "
    code += "print(os.environ.get(openblas.KERNELS))"
    monkeypatch.delenv(openblas.KERNELS, raising=False)
    if given is not None:
        monkeypatch.setenv(openblas.KERNELS, given)
    expected = given or openblas.kernels_for(openblas.cpu_info())
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.stdout.split() == [str(expected)]
