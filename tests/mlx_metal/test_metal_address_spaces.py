"""The kernels' generated text under clang, which knows address spaces; the emulator does not."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests import metal_emulator as emulator
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import index_scores, rebuild_rows, weigh_rows
from xkv.checks.decode_cases import DTYPES, DecodeCase, make_inputs
from xkv.checks.operations import absorbed_of, offsets_of

pytest_plugins = ["tests.metal_device"]

if importlib.util.find_spec("ziglang") is not None:
    CLANG = [sys.executable, "-m", "ziglang", "clang"]
else:
    CLANG = [shutil.which("clang") or ""]

pytestmark = pytest.mark.skipif(
    not CLANG[0], reason="needs clang, which `pip install ziglang` brings, and there is none"
)

CASE = DecodeCase(40, 4, 2, 64, 37, 8, n_kept=0, n_rebuilt=9)
FLAGS = (
    "-x clcpp -cl-std=clc++2021 -cl-no-stdinc -target spir64 -Wno-unknown-attributes "
    "-Werror -fsyntax-only"
)

DECLARATIONS = """
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define METAL_FUNC inline
#define INFINITY __builtin_inff()
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef half float16_t;
typedef __bf16 bfloat16_t;
template <class T, int N>
struct vec {
  T all[N];
  vec() = default;
  vec(T);
  vec(T, T, T, T);
  T& operator[](int);
};
template <class T>
struct vec<T, 2> {
  T x, y;
  vec(T, T);
  vec operator*(T) const;
};
typedef vec<int, 2> int2;
typedef vec<float, 2> float2;
typedef vec<float, 4> float4;
struct uint3 {
  uint x, y, z;
};
float fma(float, float, float);
int min(int, int);
float max(float, float);
namespace precise {
float cos(float);
float sin(float);
}
template <class T, int R, int C>
struct simdgroup_matrix {};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
template <class T, int R, int C>
simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
template <class T>
void simdgroup_load(thread simdgroup_matrix<T, 8, 8>&, const threadgroup T*, ulong);
template <class T>
void simdgroup_store(simdgroup_matrix<T, 8, 8>, threadgroup T*, ulong);
template <class T, class A>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<T, 8, 8>&, simdgroup_matrix<A, 8, 8>,
                                   simdgroup_matrix<A, 8, 8>, simdgroup_matrix<T, 8, 8>);
float simd_shuffle_xor(float, ushort);
enum class mem_flags { mem_threadgroup };
void threadgroup_barrier(mem_flags);
"""
"""What of Metal the kernels use, for OpenCL's C++, whose address spaces are Metal's."""


def problems(text: str, folder: Path) -> str:
    """What clang says about the text that MLX makes of a kernel; nothing if it compiles."""
    opening = re.search(r"template <([^>]*)>\n\[\[kernel\]\]", text)
    values = re.search(r"decltype\(\w+<([^>]*)>\)", text)
    assert opening and values
    constants = ""
    # an OpenCL kernel is no template
    for parameter, value in zip(opening[1].split(", "), values[1].split(", "), strict=True):
        kind, name = parameter.split()
        is_type = kind == "typename"
        constants += f"typedef {value} {name};\n" if is_type else f"#define {name} {value}\n"
    kernel = text[opening.end() : text.index("\ntemplate [[host_name")]
    path = folder / "kernel.clcpp"
    # nor does it take references
    kernel = re.sub(r"const constant int32_t& (\w+) \[\[", r"const int32_t \1 [[", kernel)
    path.write_text(f"{DECLARATIONS}{text[: opening.start()]}{constants}__kernel{kernel}")
    command = [*CLANG, *FLAGS.split(), str(path)]
    return subprocess.run(command, capture_output=True, text=True).stderr


def texts(emulated: MLXBackend, case: DecodeCase, dtype: str) -> list[str]:
    """Of all kernels."""
    x = make_inputs(emulated, case, dtype)
    absorbed, offsets = absorbed_of(emulated, x), offsets_of(emulated, x)
    weights = emulated.normal((*x.rows.shape[:2], 2, x.rows.shape[2]), 0).astype(x.queries.dtype)
    with emulator.settings(checked=False) as launches:
        rebuild_rows.KERNEL(x.segment.keys, x.rows)
        index_scores.KERNEL(absorbed, x.segment.keys.latent, offsets, case.n_kv_heads)
        weigh_rows.KERNEL(x.segment.values.latent, x.rows, weights)
    return [launch.text for launch in launches]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [(), (4, 3)], ids=["plain", "packed"])
def test_kernels_compile_with_address_spaces(emulated, tmp_path, bits, dtype):
    for text in texts(emulated, replace(CASE, bits=bits), dtype):
        assert problems(text, tmp_path) == ""


@pytest.mark.parametrize(
    ("kernel", "old", "new", "found"),
    [
        (0, "const device T* right,", "const constant T* right,", "address space"),
        (0, "threadgroup float* rows", "thread float* rows", "variable of type '__private float"),
        (0, "threadgroup const int* row_n", "device const int* row_n", "no matching function"),
        (2, "const device T* from = w", "const threadgroup T* from = w", "cannot initialize"),
    ],
)
def test_pointer_to_another_address_space_is_found(emulated, tmp_path, kernel, old, new, found):
    text = texts(emulated, CASE, "float16")[kernel]
    assert old in text
    assert found in problems(text.replace(old, new), tmp_path)
