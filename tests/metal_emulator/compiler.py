"""Compiles kernels and the runtime with g++ into a cache of shared libraries, and loads them."""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import MetalKernelError
from .rewrite import check_header, check_rules, place_threadgroup_variables
from .signature import ATTRIBUTES, KernelText

_HERE = Path(__file__).resolve().parent
_COMPILER = "g++"
_OLDEST_COMPILER = 12  # has _Float16 in C++
_KERNEL_FLAGS = [
    "-std=gnu++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fsingle-precision-constant",  # 1.0 is a float in MSL
    "-fexcess-precision=16",  # half is rounded at each step
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-fstack-clash-protection",  # a large private array hits the guard page of its stack
    "-ftrivial-auto-var-init=pattern",  # else what nobody set is often 0
    "-Wall",
    "-Wno-attributes",
    "-Wno-unknown-pragmas",
    "-Wno-literal-suffix",
    "-Wno-unused",
    "-Wno-class-memaccess",
    "-fmax-errors=5",
    "-Werror=uninitialized",
    "-Werror=return-type",
]
_CHECK_FLAGS = [
    "-DCHECKED",
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,shift,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
]
_RUNTIME_FLAGS = [
    "-std=gnu++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-shared",
    "-Wl,-z,noexecstack",
]
_LINK_FLAGS = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,noexecstack"]
_CHECK_LINK_FLAGS = ["-Wl,--wrap=memcpy,--wrap=memset"]


@functools.cache
def _compiler_version() -> str:
    command = [_COMPILER, "-dumpfullversion"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def why_unavailable() -> str | None:
    """Say why kernels cannot be emulated on this machine, or None."""
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        return f"the Metal emulator runs on Linux x86_64, not on {machine}"
    if shutil.which(_COMPILER) is None:
        return f"the Metal emulator needs {_COMPILER} {_OLDEST_COMPILER}, and none is installed"
    if int(_compiler_version().partition(".")[0]) < _OLDEST_COMPILER:
        return f"the Metal emulator needs {_COMPILER} {_OLDEST_COMPILER}, not {_compiler_version()}"
    return None


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "xkv-metal-emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _mlx_headers() -> Path:
    # Found without importing mlx.core, whose package has no file of its own.
    spec = importlib.util.find_spec("mlx")
    if spec is None or not spec.submodule_search_locations:
        raise MetalKernelError("compile", "the headers of MLX are needed: pip install mlx[cpu]")
    return Path(next(iter(spec.submodule_search_locations))) / "include"


@functools.cache
def _cpu_flags() -> tuple[str, ...]:
    known = Path("/proc/cpuinfo").read_text()
    return tuple(f"-m{feature}" for feature in ("f16c", "avx2", "fma") if f" {feature} " in known)


@functools.cache
def _fingerprint() -> str:
    """Of everything but the kernel that decides what a library contains."""
    flags = [
        *_KERNEL_FLAGS,
        *_CHECK_FLAGS,
        *_RUNTIME_FLAGS,
        *_LINK_FLAGS,
        *_CHECK_LINK_FLAGS,
        *_cpu_flags(),
    ]
    digest = hashlib.sha256(" ".join([_compiler_version(), *flags]).encode())
    utils = _mlx_headers() / "mlx/backend/metal/kernels/utils.h"
    own = [
        p for folder in ("runtime", "include") for p in (_HERE / folder).rglob("*") if p.is_file()
    ]
    for path in [utils, *sorted(own)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MetalKernelError("compile", done.stderr[:4000].strip())


def _cached(key: str, make: Callable[[Path, Path], None]) -> Path:
    """The library of this key, made by `make(folder, target)` when it is missing."""
    library = (
        _cache_folder() / f"{hashlib.sha256((_fingerprint() + key).encode()).hexdigest()[:32]}.so"
    )
    if not library.exists():
        # Other processes may build the same one: each its own, and the rename is atomic.
        with tempfile.TemporaryDirectory(dir=_cache_folder()) as folder:
            target = Path(folder) / "library.so"
            make(Path(folder), target)
            os.replace(target, library)
    return library


@functools.cache
def load_runtime() -> ctypes.CDLL:
    """Load the runtime, whose symbols the kernels use."""

    def make(folder: Path, target: Path) -> None:
        sources = sorted(str(p) for p in (_HERE / "runtime").glob("*.cpp"))
        _compile([_COMPILER, *_RUNTIME_FLAGS, *sources, "-o", str(target)])

    runtime = ctypes.CDLL(str(_cached("runtime", make)), mode=ctypes.RTLD_GLOBAL)
    runtime.emu_map.restype = ctypes.c_void_p
    runtime.emu_map.argtypes = [ctypes.c_size_t]
    runtime.emu_unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return runtime


@functools.lru_cache(maxsize=256)
def translate(text: KernelText, name: str) -> str:
    """The C++ translation unit of a kernel. Messages count the lines of `source` and `header`."""
    check_header(f"{name}.header", text.header)
    check_rules(f"{name}.source", text.source, text.template_types)
    if text.is_broken:
        why = "MLX closes its parameter list twice: x_shape, several outputs, no thread attribute"
        raise MetalKernelError(
            "compile", f"{name}: {why}; use an attribute such as thread_position_in_grid"
        )
    values = [
        f"{'*' if argument.is_reference else ''}static_cast<{argument.type}*>(buffers[{i}])"
        for i, argument in enumerate(text.arguments)
    ] + [ATTRIBUTES[a][1] for a in text.attributes]
    return f"""#include <metal_stdlib>
#include "mlx/backend/metal/kernels/utils.h"
#line 1 "{name}.header"
{text.header}
#line 1 "{name}.signature"
{text.opening}
#line 1 "{name}.source"
{place_threadgroup_variables(f"{name}.source", text.source)}
}}
extern "C" __attribute__((visibility("default"), no_sanitize("thread", "undefined")))
void emu_kernel(void* const* buffers) {{
  {text.call}({", ".join(values)});
}}
"""


@functools.lru_cache(maxsize=512)
def load_kernel(unit: str, checked: bool) -> tuple[ctypes.CDLL, Path]:
    """Compile and load a translation unit.

    Returns:
        The library and its file, for looking up lines.
    """

    def make(folder: Path, target: Path) -> None:
        (folder / "kernel.cpp").write_text(unit)
        flags = [*_KERNEL_FLAGS, *_cpu_flags(), *(_CHECK_FLAGS if checked else [])]
        includes = [f"-I{_HERE / 'include'}", f"-I{_mlx_headers()}"]
        _compile(
            [_COMPILER, *flags, *includes, "-c", f"{folder}/kernel.cpp", "-o", f"{folder}/kernel.o"]
        )
        # -fsanitize is not given here: the runtime takes the place of the sanitizers' libraries.
        link_flags = [*_LINK_FLAGS, *(_CHECK_LINK_FLAGS if checked else [])]
        _compile([_COMPILER, *link_flags, f"{folder}/kernel.o", "-o", str(target)])

    load_runtime()
    library = _cached(f"{checked}{unit}", make)
    return ctypes.CDLL(str(library)), library
