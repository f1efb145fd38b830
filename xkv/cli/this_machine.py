"""What figures are beside: this machine, its versions, and the commit of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
"""Of the checkout, where there is one."""

PACKAGES = ("xkv", "mlx", "mlx-lm", "torch", "transformers", "triton", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def this_machine() -> dict[str, Any]:
    """Processor, cores, bytes of memory, system, and GPU if there is one."""
    is_apple = platform.system() == "Darwin"
    cpu = _said("sysctl", "-n", "machdep.cpu.brand_string") if is_apple else _linux_cpu()
    # on Apple silicon the GPU is a part of the chip
    is_chip = is_apple and platform.machine() == "arm64"
    gpu = cpu if is_chip else _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return {
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "os": f"{_system()} {platform.machine()}",
        "gpu": gpu,
    }


def _system() -> str:
    """Name and version, without a build's own marks."""
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"


def memory_bytes() -> int:
    """Of the whole machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def code_commit() -> str | None:
    """The checkout's commit, ``+changes`` if the code differs from it; None if there is none."""
    if not (ROOT / ".git").exists():
        return None
    git = "git", "-C", str(ROOT)
    commit = _said(*git, "rev-parse", "--short", "HEAD")
    code = "xkv", "backends", ":(glob)scripts/*.py"
    is_changed = commit and _said(*git, "status", "--porcelain", "--", *code)
    return f"{commit}+changes" if is_changed else commit


def _linux_cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def _said(*command: str) -> str | None:
    """The first line that a program prints; None if it cannot be run or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = run.stdout.strip().splitlines()
    return lines[0].strip() if lines and not run.returncode else None
