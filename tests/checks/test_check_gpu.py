"""``scripts/check_gpu.sh`` without a GPU: what it says, and that no part stops another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "check_gpu.sh")
PARTS = ("machine", "kernels", "parity", "doctor", "step", "bench")
STUB = """#!/bin/sh
case "$*" in
    -c*) echo cpu ;;
    "-m pytest"*) echo "no such test"; exit 4 ;;
    *) echo "ran $*" ;;
esac
"""


def run(folder: Path, python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        ["bash", SCRIPT, str(folder)], capture_output=True, text=True, env=environment, cwd=folder
    )


def test_script_is_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_machine_without_a_gpu_is_told_in_a_sentence(tmp_path):
    done = run(tmp_path, sys.executable, CHECK_GPU_ON_CPU="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: PyTorch sees no GPU on this machine; CHECK_GPU_ON_CPU=1")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_interpreter_without_the_backend_is_told_in_a_sentence(tmp_path):
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho Traceback >&2\necho 'No module named torch' >&2\nexit 1\n")
    stub.chmod(0o755)
    done = run(tmp_path, str(stub))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {stub} cannot import the PyTorch backend: No module named torch; "
        "install the project there first: pip install -e '.[torch]'\n"
    )


@pytest.mark.parametrize("fails", [True, False])
def test_every_part_runs_whatever_another_does(tmp_path, fails):
    stub = tmp_path / "python"
    stub.write_text(STUB if fails else STUB.replace("exit 4", "exit 0"))
    stub.chmod(0o755)
    done = run(tmp_path, str(stub), CHECK_GPU_ON_CPU="1")
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == list(PARTS)
    failed = [line.split(",")[0] for line in lines if "passed" not in line]
    assert failed == (["kernels: FAILED: exit status 4"] if fails else [])
    assert done.returncode == int(fails) and done.stdout.splitlines()[-6:] == lines
    assert "no such test" in (tmp_path / "kernels.txt").read_text()
    ran = (tmp_path / "attention.txt").read_text()
    assert "ran -m xkv.doctor" in ran and "ran scripts/gpu_step.py" in ran


def test_parity_on_the_cpu_compares_operations_answers_and_steps_of_constant_shapes():
    done = subprocess.run(
        [sys.executable, "scripts/parity_gpu.py", "--device", "cpu", "--max-tokens", "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\ngeneration, logits ") == 4
    assert done.stdout.count("\nreplays, logits ") == 3 and "MISS" not in done.stdout
