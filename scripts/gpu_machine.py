"""Versions, the device, and on a GPU how fast it copies and multiplies: what timings are beside.

python scripts/gpu_machine.py
"""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "pytest")
QUERY = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.limit"


def smi() -> str:
    """One line of nvidia-smi, which only looks."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run: {error}"
    return (done.stdout or done.stderr).strip()


def median_seconds(run: Callable[[], object], n_runs: int = 10) -> float:
    """By the device's clock, after three runs that are not timed."""
    times = []
    for i in range(3 + n_runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def ceilings() -> str:
    """What no kernel exceeds: a large copy, bytes read and written, and a large product."""
    rows = torch.randn(2**29, device="cuda")
    other = torch.empty_like(rows)
    copied = 2 * rows.nbytes / median_seconds(lambda: other.copy_(rows))
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplied = 2 * 8192**3 / median_seconds(lambda: left @ right)
    return (
        f"copies {copied / 1e12:.2f} TB/s, multiplies bfloat16 at {multiplied / 1e12:.0f} TFLOP/s"
    )


def main() -> None:
    print(f"{platform.machine()} {platform.system()} {platform.release()}")
    print(f"Python {platform.python_version()}")
    for name in PACKAGES:
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} is not installed")
    print(f"nvidia-smi ({QUERY}): {smi()}")
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU")
        return
    found = torch.cuda.get_device_properties(0)
    print(
        f"{found.name}, compute capability {found.major}.{found.minor}, CUDA {torch.version.cuda}, "
        f"{found.multi_processor_count} multiprocessors, {found.total_memory / 1e9:.1f} GB"
    )
    print(ceilings())


if __name__ == "__main__":
    main()
