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
from tests.sequences import PACKED, PLAIN, attend_at_once, make_sequences
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import (
    attend_dense,
    choose_rows,
    index_scores,
    key_scores,
    query_terms,
    weigh_rows,
)
from xkv.checks.decode_cases import DTYPES, DecodeCase, make_inputs
from xkv.checks.operations import absorbed_of, choice_of, offsets_of, weighing_of
from xkv.ops.index import index_basis

pytest_plugins = ["tests.metal_device"]

if importlib.util.find_spec("ziglang") is not None:
    CLANG = [sys.executable, "-m", "ziglang", "clang"]
else:
    CLANG = [shutil.which("clang") or ""]

pytestmark = pytest.mark.skipif(
    not CLANG[0], reason="needs clang, which `pip install ziglang` brings, and there is none"
)

CASE = DecodeCase(40, 4, 2, 64, 37, 8, n_recent=8, n_rebuilt=9)
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
typedef signed char int8_t;
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
  vec() = default;
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
float exp(float);
float log(float);
int min(int, int);
int max(int, int);
uint min(uint, uint);
uint max(uint, uint);
uint clamp(uint, uint, uint);
uint clz(uint);
float max(float, float);
namespace fast {
float exp(float);
}
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
template <class T>
T simd_shuffle(T, ushort);
template <class T>
T simd_shuffle_xor(T, ushort);
template <class T>
T simd_sum(T);
template <class T>
T simd_max(T);
template <class T>
T simd_min(T);
template <class T>
T simd_prefix_exclusive_sum(T);
template <class T>
T as_type(float);
enum memory_order_ { memory_order_relaxed };
int atomic_exchange_explicit(volatile threadgroup atomic_int*, int, memory_order_);
uint atomic_fetch_add_explicit(volatile threadgroup atomic_uint*, uint, memory_order_);
enum class mem_flags { mem_device, mem_threadgroup };
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
    kernel = re.sub(r"const constant (int32_t|float)& (\w+) \[\[", r"const \1 \2 [[", kernel)
    path.write_text(f"{DECLARATIONS}{text[: opening.start()]}{constants}__kernel{kernel}")
    command = [*CLANG, *FLAGS.split(), str(path)]
    return subprocess.run(command, capture_output=True, text=True).stderr


def texts(emulated: MLXBackend, case: DecodeCase, dtype: str) -> list[str]:
    """Of all kernels."""
    x = make_inputs(emulated, case, dtype)
    queries, keys = x.queries * x.scale, x.segment.keys
    absorbed, offsets = absorbed_of(emulated, x), offsets_of(emulated, x)
    weighing, choice = weighing_of(emulated, x), choice_of(emulated, x)
    with emulator.settings(checked=False) as launches:
        key_scores.KERNEL(keys, x.rows, queries)
        weigh_rows.KERNEL(*weighing)
        index_scores.KERNEL(absorbed, keys.latent, offsets, case.n_kv_heads)
        attend_dense.KERNEL(queries, x.dense, None)
        query_terms.KERNEL(queries, index_basis(emulated, keys), case.spec)
        choose_rows.KERNEL(*choice)
        several = make_sequences(emulated, PACKED if case.bits else PLAIN, dtype, 2)
        attend_at_once(emulated, several, emulated.normal((PLAIN.n_heads,), 5))
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
        (1, "shared = (threadgroup", "shared = (device", "mismatching address spaces"),
    ],
)
def test_pointer_to_another_address_space_is_found(emulated, tmp_path, kernel, old, new, found):
    text = texts(emulated, CASE, "float16")[kernel]
    assert old in text
    assert found in problems(text.replace(old, new), tmp_path)
