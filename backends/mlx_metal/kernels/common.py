"""What the Metal kernels share: where they run, how they are built, low-rank product and RoPE."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import numpy as np

from xkv.backends.mlx_metal.kernels import latents
from xkv.ops.backend import Backend
from xkv.ops.types import Array, Factor, RopeRun, RopeSpec, Segment
from xkv.store.codec import small_latent

DTYPES = ("float32", "float16", "bfloat16")
HEAD_DIMS = (64, 128, 256)
SIMDGROUP = 32

ROPE_SOURCE = """
// The two features of a pair. Pairs past the rotated ones are neighbours, and pass through.
METAL_FUNC int2 pair_features(int pair, int n_pairs, bool is_traditional) {
  return is_traditional || pair >= n_pairs ? int2(2 * pair, 2 * pair + 1)
                                           : int2(pair, pair + n_pairs);
}

// precise: angles reach the context's length, and fast::cos holds up to pi only.
METAL_FUNC float2 turn_pair(float2 x, float angle) {
  const float c = precise::cos(angle), s = precise::sin(angle);
  return float2(x.x * c - x.y * s, x.y * c + x.x * s);
}
"""
"""Rotary pairs; angles are ``float(position) * inverse_freq``, as in ``xkv.ops.rope.cos_sin``."""

PRODUCT_SOURCE = (
    latents.LATENT_SOURCE
    + """
// Tiles of the product [ROWS, D] of latent rows and basis, DEPTH ranks at a time. 16 bytes of
// padding a row spread the rows of an 8x8 load over the banks. Bands reuse the memory of the tiles.
template <typename T, int D, int ROWS, int DEPTH>
struct tiling {
  static constant constexpr int n_threads = ROWS * D / 32;
  static constant constexpr int latent_stride = DEPTH + 16 / int(sizeof(T));
  static constant constexpr int basis_stride = D + 16 / int(sizeof(T));
  static constant constexpr int band_rows = ROWS / 4;
  static constant constexpr int band_stride = D + 4;
  static constant constexpr int tile_bytes =
      (ROWS * latent_stride + DEPTH * basis_stride) * int(sizeof(T));
  static constant constexpr int band_bytes = band_rows * band_stride * 4;
  static constant constexpr int shared_float4s =
      (tile_bytes > band_bytes ? tile_bytes : band_bytes) / 16;
};

// product = latent[row_numbers] @ basis: each simdgroup a block of 32 x 32 as 4 x 4 matrices. A
// negative row number is a row of zeros. All threads of the threadgroup call this.
template <typename T, int D, int ROWS, int DEPTH, typename Latent>
METAL_FUNC void multiply_rows(thread simdgroup_float8x8 (&product)[4][4],
                              threadgroup float4* shared,
                              threadgroup const int* row_numbers,
                              Latent latent,
                              const device T* basis,
                              int basis_row,
                              int thread_index,
                              int sg) {
  using tiles = tiling<T, D, ROWS, DEPTH>;
  threadgroup T* latent_tile = (threadgroup T*)shared;
  threadgroup T* basis_tile = latent_tile + ROWS * tiles::latent_stride;
  const threadgroup T* left = latent_tile + sg / (D / 32) * 32 * tiles::latent_stride;
  const threadgroup T* right = basis_tile + sg % (D / 32) * 32;
#pragma clang loop unroll(full)
  for (int i = 0; i < 4; i++) {
#pragma clang loop unroll(full)
    for (int j = 0; j < 4; j++) product[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (int first = 0; first < latent.width; first += DEPTH) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = thread_index; e < ROWS * DEPTH / 4; e += tiles::n_threads) {
      const int row = e / (DEPTH / 4), column = e % (DEPTH / 4) * 4, number = row_numbers[row];
      vec<T, 4> x = vec<T, 4>(T(0));
      if (number >= 0) x = latent.template load<T>(number, first + column);
      *(threadgroup vec<T, 4>*)(latent_tile + row * tiles::latent_stride + column) = x;
    }
    for (int e = thread_index; e < DEPTH * D / 4; e += tiles::n_threads) {
      const int row = e / (D / 4), column = e % (D / 4) * 4;
      vec<T, 4> x = vec<T, 4>(T(0));
      if (first + row < latent.width)
        x = load_four(basis + int64_t(first + row) * basis_row + column, 4);
      *(threadgroup vec<T, 4>*)(basis_tile + row * tiles::basis_stride + column) = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int depth = min(DEPTH, latent.width - first);
    for (int k = 0; k < depth; k += 8) {
      simdgroup_matrix<T, 8, 8> a[4], b[4];
#pragma clang loop unroll(full)
      for (int i = 0; i < 4; i++) {
        simdgroup_load(a[i], left + i * 8 * tiles::latent_stride + k, tiles::latent_stride);
        simdgroup_load(b[i], right + k * tiles::basis_stride + i * 8, tiles::basis_stride);
      }
#pragma clang loop unroll(full)
      for (int i = 0; i < 4; i++) {
#pragma clang loop unroll(full)
        for (int j = 0; j < 4; j++)
          simdgroup_multiply_accumulate(product[i][j], a[i], b[j], product[i][j]);
      }
    }
  }
}

// Row of the tile that `band_row` of a band holds: a band is 8 rows of every simdgroup's 32.
METAL_FUNC int tile_row(int band, int band_row) {
  return band_row / 8 * 32 + band * 8 + band_row % 8;
}

// A quarter of the product's rows to threadgroup memory, where any thread can read any feature; a
// matrix's place in registers is undocumented.
template <typename T, int D, int ROWS, int DEPTH>
METAL_FUNC threadgroup const float* share_band(thread simdgroup_float8x8 (&product)[4][4],
                                               int band,
                                               threadgroup float4* shared,
                                               int sg) {
  constexpr int stride = tiling<T, D, ROWS, DEPTH>::band_stride;
  threadgroup float* rows = (threadgroup float*)shared;
  threadgroup float* block = rows + sg / (D / 32) * 8 * stride + sg % (D / 32) * 32;
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
  for (int j = 0; j < 4; j++) simdgroup_store(product[band][j], block + j * 8, stride);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return rows;
}
"""
)
"""``multiply_rows``: gathered latent rows times one KV head's basis, on simdgroup matrices."""


def device_problem() -> str | None:
    """A sentence that says why no Metal kernel can run here, or None; an emulator replaces this."""
    if not mx.metal.is_available():
        return "Metal kernels need an Apple GPU, and this machine has none"
    if mx.default_device() != mx.Device(mx.gpu):
        return "Metal kernels run on the GPU, and MLX's default device is the CPU"
    return None


@functools.cache
def build(
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    source: str,
    header: str,
    copies_strided_inputs: bool = True,
) -> Any:
    """Make a kernel when it is first needed, here only; ``cache_clear`` forgets them all."""
    return mx.fast.metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source=source,
        header=header,
        ensure_row_contiguous=copies_strided_inputs,
    )


def dtype_name(x: Array) -> str:
    """``float16`` for ``mx.float16``."""
    return str(x.dtype).rpartition(".")[2]


def dtype_problem(**arrays: Array) -> str | None:
    """A sentence if the arrays' dtypes differ or no kernel takes them."""
    names = {name: dtype_name(x) for name, x in arrays.items()}
    dtypes = sorted(set(names.values()))
    if len(dtypes) > 1:
        given = ", ".join(f"{name} {dtype}" for name, dtype in names.items())
        return f"the kernel takes arrays of one dtype, not {given}"
    if dtypes[0] not in DTYPES:
        return f"the kernel takes {', '.join(DTYPES)}, not {dtypes[0]}"
    return None


def product_problem(segment: Segment) -> str | None:
    """A sentence if :data:`PRODUCT_SOURCE` and one rotation cannot make this segment's keys."""
    head_dim = segment.basis_k.shape[-1]
    if head_dim not in HEAD_DIMS:
        return f"the kernel takes head_dim {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if len(segment.rope_runs) != 1:
        return (
            f"the kernel rotates all rows alike, and this segment has {len(segment.rope_runs)} "
            "different rotations"
        )
    return latents.problem(segment.latent_k)


@functools.lru_cache(maxsize=64)
def _rope_numbers(spec: RopeSpec | None) -> Array:
    if spec is None:
        return mx.array([1.0, 0.0])
    inverse_freqs = np.float32(1) / np.array(spec.freqs, np.float32)
    return mx.array(np.concatenate([np.array([spec.scale], np.float32), inverse_freqs]))


def rope_numbers(segment: Segment) -> Array:
    """The rotation's scale, then the inverse frequency of each pair, float32.

    A layer without rotary embedding turns one pair by nothing.
    """
    return _rope_numbers(segment.rope_runs[0].spec)


def tile_rows(head_dim: int) -> int:
    """Rows of a threadgroup's tile: at most 16 matrices a simdgroup and 8 simdgroups."""
    return 64 if head_dim <= 128 else 32


def n_threads(head_dim: int) -> int:
    """Threads of a threadgroup: a simdgroup for each 32 x 32 of the tile."""
    return tile_rows(head_dim) * head_dim // SIMDGROUP


def product_template(segment: Segment) -> list[tuple[str, Any]]:
    """Template arguments: the dtype, and sizes of a tile that fit in 32 KiB."""
    head_dim = segment.basis_k.shape[-1]
    spec = segment.rope_runs[0].spec
    return [
        ("T", segment.latent_k.dtype),
        ("D", head_dim),
        ("ROWS", tile_rows(head_dim)),
        ("DEPTH", 64 // segment.latent_k.dtype.size),
        ("TRADITIONAL", spec is not None and spec.traditional),
    ]


def product_key(segment: Segment) -> tuple[Any, ...]:
    """What makes a new compilation: layout and :func:`product_template`, the dtype by its name."""
    constants = (value for _, value in product_template(segment)[1:])
    return dtype_name(segment.latent_k), *constants, latents.layout_of(segment.latent_k)


def sample_segment(backend: Backend, segment: Segment, n_rows: int) -> Segment:
    """A small segment with this one's dtype, head sizes, rotation and layout; odd plain ranks."""

    def basis(latent: Factor, head_dim: int, seed: int) -> Array:
        rank = latent.shape[-1]
        return (backend.normal((1, rank, 2, head_dim), seed) * rank**-0.5).astype(latent.dtype)

    latent_k = small_latent(backend, segment.latent_k, n_rows, 37, 0)
    latent_v = small_latent(backend, segment.latent_v, n_rows, 21, 1)
    return Segment(
        latent_k,
        latent_v,
        basis(latent_k, segment.basis_k.shape[-1], 2),
        basis(latent_v, segment.basis_v.shape[-1], 3),
        segment.start,
        (RopeRun(n_rows, segment.rope_runs[0].spec),),
    )
