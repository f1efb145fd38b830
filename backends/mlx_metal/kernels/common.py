"""What the Metal kernels share: where they run, how they read latents, products of their rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from xkv.config import BAND
from xkv.ops.backend import Backend
from xkv.ops.latent import WORD_BITS, Latent
from xkv.ops.sequences import MOST_TOGETHER, AnyLatent, Latents
from xkv.ops.types import Array

DTYPES = ("float32", "float16", "bfloat16")
BITS = (2, 3, 4, 5, 6, 8)
SIMDGROUP = 32
SMALL = 8
"""MLX passes arrays with fewer elements in another address space."""

LATENT_SOURCE = """
// Eight neighbouring columns of a row.
template <typename T>
struct eight {
  vec<T, 4> low, high;
};

// Four neighbours in memory, aligned like one: rows of odd rank start anywhere.
template <typename T>
struct four {
  T at[4];
};

template <typename T>
METAL_FUNC vec<T, 4> load_four(const device T* from, int n_left) {
  if (n_left >= 4) {
    const four<T> x = *(const device four<T>*)from;
    return vec<T, 4>(x.at[0], x.at[1], x.at[2], x.at[3]);
  }
  vec<T, 4> x = vec<T, 4>(T(0));
  for (int i = 0; i < n_left; i++) x[i] = from[i];
  return x;
}

// The first `width` columns of a matrix. Columns past the last are zeros.
template <typename T>
struct plain_rows {
  const device T* numbers;
  int rank, width;

  eight<T> load(int64_t row, int column) const {
    const device T* from = numbers + row * rank + column;
    return {load_four(from, width - column), load_four(from + 4, width - column - 4)};
  }
};

// Bands of 64 columns in MLX's affine layout: numbers in one stream of bits, the lowest first, and
// a scale and a bias for each band. The table of bands holds each one's bits and first word.
template <typename T>
struct packed_rows {
  const device uint* words;
  const device T* scales;
  const device T* biases;
  const device int* bands;
  int n_words, n_bands, width;

  // Eight numbers end in the second word at the latest.
  eight<T> load(int64_t row, int column) const {
    const int band = column / 64, bits = bands[2 * band];
    const int first_bit = column % 64 * bits, shift = first_bit % 32;
    const device uint* from = words + row * n_words + bands[2 * band + 1] + first_bit / 32;
    ulong codes = from[0];
    if (shift + 8 * bits > 32) codes |= ulong(from[1]) << 32;
    const float scale = float(scales[row * n_bands + band]);
    const float bias = float(biases[row * n_bands + band]);
    const uint low = uint(codes >> shift), high = uint(codes >> (shift + 4 * bits));
    const uint mask = (1u << bits) - 1;
    eight<T> x;
    for (int i = 0; i < 4; i++) {
      x.low[i] = T(fma(float(low >> i * bits & mask), scale, bias));
      x.high[i] = T(fma(float(high >> i * bits & mask), scale, bias));
    }
    return x;
  }
};
"""
"""A latent's rows, eight columns at once, from a column that is a multiple of 8."""


def _each(name: str) -> list[str]:
    """What a kernel calls the arrays of several sequences."""
    return [f"{name}_{i}" for i in range(MOST_TOGETHER)]


def chosen(name: str, suffix: str = "") -> str:
    """An expression for the array of the sequence that a threadgroup's z says, or what it has."""
    *others, last = _each(name)
    z = "threadgroup_position_in_grid.z"
    return "".join(f"{z} == {i} ? {x}{suffix} : " for i, x in enumerate(others)) + last + suffix


def named_each(arrays: dict[str, Sequence[Array]], are_several: bool) -> dict[str, Array]:
    """Arrays of one batch, or of up to ``MOST_TOGETHER`` sequences, by what a kernel calls them."""
    named: dict[str, Array] = {}
    for name, each in arrays.items():
        # as many inputs for any number of sequences: the last one stands for those there are not
        filled = [*each, *[each[-1]] * (MOST_TOGETHER - len(each))] if are_several else each
        named |= dict(zip(_each(name) if are_several else [name], filled, strict=True))
    return named


_READ_PLAIN = """
  const int n_rows = latent_shape[1], n_longest = n_rows, rank = latent_shape[2];
  const int64_t first_stored = int64_t(threadgroup_position_in_grid.z) * n_rows;
  const plain_rows<T> stored = {latent + first_stored * rank, rank, rank};
"""
_READ_PACKED = """
  const int n_rows = words_shape[1], n_longest = n_rows;
  const int n_words = words_shape[2], n_bands = scales_shape[2];
  const int64_t first_stored = int64_t(threadgroup_position_in_grid.z) * n_rows;
  const packed_rows<T> stored = {
      words + first_stored * n_words, scales + first_stored * n_bands,
      biases + first_stored * n_bands, bands, n_words, n_bands, 64 * n_bands};
"""
_LONGEST = functools.reduce(lambda x, y: f"max({x}, {y})", [f"{x}_shape[1]" for x in _each("ROWS")])
_READ_PLAIN_EACH = f"""
  const int n_rows = {chosen("latent", "_shape[1]")};
  const int n_longest = {_LONGEST.replace("ROWS", "latent")};
  const int rank = latent_0_shape[2];
  const plain_rows<T> stored = {{{chosen("latent")}, rank, rank}};
"""
_READ_PACKED_EACH = f"""
  const int n_rows = {chosen("words", "_shape[1]")};
  const int n_longest = {_LONGEST.replace("ROWS", "words")};
  const int n_words = words_0_shape[2], n_bands = scales_0_shape[2];
  const packed_rows<T> stored = {{
      {chosen("words")},
      {chosen("scales")},
      {chosen("biases")},
      bands, n_words, n_bands, 64 * n_bands}};
"""
"""``stored``: a sequence's rows of a batch's latent, or of its own; how many the longest has."""

PRODUCT_SOURCE = """
// Tiles of the product [ROWS, N] of gathered rows and a matrix, DEPTH columns of the rows at a
// time. 16 bytes of padding a row spread the rows of an 8x8 load over the banks. A quarter of the
// product reuses the memory of the tiles.
template <typename T, int N, int ROWS, int DEPTH>
struct tiling {
  static constant constexpr int n_threads = ROWS * N / 32;
  static constant constexpr int left_stride = DEPTH + 16 / int(sizeof(T));
  static constant constexpr int right_stride = N + 16 / int(sizeof(T));
  static constant constexpr int quarter_rows = ROWS / 4;
  static constant constexpr int quarter_stride = N + 4;
  static constant constexpr int tile_bytes =
      (ROWS * left_stride + DEPTH * right_stride) * int(sizeof(T));
  static constant constexpr int quarter_bytes = quarter_rows * quarter_stride * 4;
  static constant constexpr int shared_float4s =
      (tile_bytes > quarter_bytes ? tile_bytes : quarter_bytes) / 16;
};

// product = left[row_numbers] @ right: each simdgroup a block of 32 x 32 as 4 x 4 matrices. A
// negative row number is a row of zeros; so are columns of `right` past `n_right`, whose rows are
// `right_row` apart. All threads of the threadgroup call this.
template <typename T, int N, int ROWS, int DEPTH, typename Left>
METAL_FUNC void multiply_rows(thread simdgroup_float8x8 (&product)[4][4],
                              threadgroup float4* shared,
                              threadgroup const int* row_numbers,
                              Left left,
                              const device T* right,
                              int64_t right_row,
                              int n_right,
                              int thread_index,
                              int sg) {
  using tiles = tiling<T, N, ROWS, DEPTH>;
  threadgroup T* left_tile = (threadgroup T*)shared;
  threadgroup T* right_tile = left_tile + ROWS * tiles::left_stride;
  const threadgroup T* from_left = left_tile + sg / (N / 32) * 32 * tiles::left_stride;
  const threadgroup T* from_right = right_tile + sg % (N / 32) * 32;
#pragma clang loop unroll(full)
  for (int i = 0; i < 4; i++) {
#pragma clang loop unroll(full)
    for (int j = 0; j < 4; j++) product[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  for (int first = 0; first < left.width; first += DEPTH) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int e = thread_index; e < ROWS * DEPTH / 8; e += tiles::n_threads) {
      const int row = e / (DEPTH / 8), column = e % (DEPTH / 8) * 8, number = row_numbers[row];
      eight<T> x = {vec<T, 4>(T(0)), vec<T, 4>(T(0))};
      if (number >= 0 && first + column < left.width) x = left.load(number, first + column);
      threadgroup vec<T, 4>* to =
          (threadgroup vec<T, 4>*)(left_tile + row * tiles::left_stride + column);
      to[0] = x.low;
      to[1] = x.high;
    }
    for (int e = thread_index; e < DEPTH * N / 4; e += tiles::n_threads) {
      const int row = e / (N / 4), column = e % (N / 4) * 4;
      vec<T, 4> x = vec<T, 4>(T(0));
      if (first + row < left.width)
        x = load_four(right + (first + row) * right_row + column, n_right - column);
      *(threadgroup vec<T, 4>*)(right_tile + row * tiles::right_stride + column) = x;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int depth = min(DEPTH, left.width - first);
    for (int k = 0; k < depth; k += 8) {
      simdgroup_matrix<T, 8, 8> a[4], b[4];
#pragma clang loop unroll(full)
      for (int i = 0; i < 4; i++) {
        simdgroup_load(a[i], from_left + i * 8 * tiles::left_stride + k, tiles::left_stride);
        simdgroup_load(b[i], from_right + k * tiles::right_stride + i * 8, tiles::right_stride);
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

// Row of the tile that row `i` of a quarter holds: a quarter is 8 rows of every simdgroup's 32.
METAL_FUNC int tile_row(int quarter, int i) {
  return i / 8 * 32 + quarter * 8 + i % 8;
}

// A quarter of the product's rows to threadgroup memory, where any thread can read any column; a
// matrix's place in registers is undocumented.
template <typename T, int N, int ROWS, int DEPTH>
METAL_FUNC threadgroup const float* share_quarter(thread simdgroup_float8x8 (&product)[4][4],
                                                  int quarter,
                                                  threadgroup float4* shared,
                                                  int sg) {
  constexpr int stride = tiling<T, N, ROWS, DEPTH>::quarter_stride;
  threadgroup float* rows = (threadgroup float*)shared;
  threadgroup float* block = rows + sg / (N / 32) * 8 * stride + sg % (N / 32) * 32;
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma clang loop unroll(full)
  for (int j = 0; j < 4; j++) simdgroup_store(product[quarter][j], block + j * 8, stride);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return rows;
}
"""
"""``multiply_rows``: gathered rows of a latent times a matrix, on simdgroup matrices."""


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
    source: tuple[str, ...],
    header: tuple[str, ...] = (),
    outputs: tuple[str, ...] = ("out",),
    reads_strides: bool = False,
) -> Any:
    """Make a kernel when it is first needed, here only; ``cache_clear`` forgets them all.

    Args:
        source: In pieces, as is the header: a step that puts them together would hash them anew.
        reads_strides: Views are read where they are, not copied.
    """
    return mx.fast.metal_kernel(
        name=name,
        input_names=list(inputs),
        output_names=list(outputs),
        source="".join(source),
        header="".join(header),
        ensure_row_contiguous=not reads_strides,
    )


def launch(
    name: str,
    header: str,
    source: str,
    latent: AnyLatent,
    inputs: dict[str, Any],
    sizes: dict[str, Any],
    n_tiles: tuple[int, int, int],
    shape: tuple[int, ...],
    dtype: Any,
    others: dict[str, tuple[tuple[int, ...], Any]] | None = None,
) -> Any:
    """Run a kernel on a latent.

    Neither the source nor its name says how many bits a band has.

    Args:
        source: For threadgroups whose z is a sequence; its latent's rows are ``stored``.
        inputs: What it reads beside the latent, by name.
        sizes: Numbers of the template, ``N`` and ``ROWS`` among them; ``T`` and ``DEPTH`` follow.
        n_tiles: Threadgroups.
        shape: Of the output ``out``, as is the dtype.
        others: Shape and dtype of each output beside it, by name.

    Returns:
        The output; with others, a tuple of all of them.
    """
    are_several = are_several_of(latent)
    names: tuple[str, ...]
    if latent.is_packed:
        names = ("words", "scales", "biases")
        read = _READ_PACKED_EACH if are_several else _READ_PACKED
    else:
        names = ("latent",)
        read = _READ_PLAIN_EACH if are_several else _READ_PLAIN
    arrays = zip(*(part.arrays for part in latent.parts), strict=True)
    named = named_each(dict(zip(names, arrays, strict=True)), are_several)
    if latent.is_packed:
        named["bands"] = _bands(latent.bits)
    named, made = named | inputs, {"out": (shape, dtype)} | (others or {})
    kernel = build(
        name + "_packed" * latent.is_packed + "_each" * are_several,
        tuple(named),
        (read, source),
        (LATENT_SOURCE, PRODUCT_SOURCE, header),
        tuple(made),
    )
    n_threads = sizes["ROWS"] * sizes["N"] // SIMDGROUP
    depth = 64 // latent.dtype.size
    found = kernel(
        inputs=list(named.values()),
        template=[("T", latent.dtype), *sizes.items(), ("DEPTH", depth)],
        grid=(n_tiles[0] * n_threads, *n_tiles[1:]),
        threadgroup=(n_threads, 1, 1),
        output_shapes=[shape for shape, _ in made.values()],
        output_dtypes=[dtype for _, dtype in made.values()],
    )
    return tuple(found) if others else found[0]


@functools.lru_cache(maxsize=64)
def _bands(bits: tuple[int, ...]) -> Array:
    """Bits and first word of each band."""
    table, word = [], 0
    for n_bits in bits:
        table += [n_bits, word]
        word += BAND * n_bits // WORD_BITS
    return mx.array(table + [0] * (SMALL - len(table)), mx.int32)


def are_several_of(latent: AnyLatent) -> bool:
    """Whether each sequence's latent is an array of its own."""
    return isinstance(latent, Latents)


def dtype_name(x: Array | AnyLatent) -> str:
    """``float16`` for ``mx.float16``."""
    return _name_of(x.dtype)


@functools.cache
def _name_of(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def dtype_problem(**arrays: Array | AnyLatent) -> str | None:
    """A sentence if the arrays' dtypes differ or no kernel takes them."""
    first, *others = (x.dtype for x in arrays.values())
    if any(dtype != first for dtype in others):
        given = ", ".join(f"{name} {dtype_name(x)}" for name, x in arrays.items())
        return f"the kernel takes arrays of one dtype, not {given}"
    dtype = _name_of(first)
    if dtype not in DTYPES:
        return f"the kernel takes {', '.join(DTYPES)}, not {dtype}"
    return None


def size_problem(*arrays: Array) -> str | None:
    """A sentence if arrays to which a kernel makes pointers are too small."""
    size = min(x.size for x in arrays)
    if size < SMALL:
        return f"the kernel takes arrays of {SMALL} elements or more, not {size}"
    return None


def together_problem(n_sequences: int) -> str | None:
    """A sentence if there are more sequences than a kernel has arguments for."""
    if n_sequences > MOST_TOGETHER:
        return f"the kernel takes up to {MOST_TOGETHER} sequences, not {n_sequences}"
    return None


def latent_problem(latent: AnyLatent) -> str | None:
    """A sentence if a kernel cannot make pointers to a latent's arrays."""
    return size_problem(*latent.arrays) or together_problem(len(latent.parts))


def sample_latent(backend: Backend, latent: AnyLatent, n_rows: int) -> AnyLatent:
    """A small latent of this one's dtype: an odd rank, or, if packed, a band of each width.

    As many as sequences have theirs by themselves, all of one length.
    """
    made = [_sample(backend, latent, n_rows, number) for number in range(len(latent.parts))]
    return Latents(tuple(made)) if are_several_of(latent) else made[0]


def _sample(backend: Backend, latent: AnyLatent, n_rows: int, number: int) -> Latent:
    if not latent.is_packed:
        return Latent((backend.normal((1, n_rows, 37), number).astype(latent.dtype),))
    packed = [
        backend.quantize(
            backend.normal((1, n_rows, BAND), 10 * number + bits).astype(latent.dtype), BAND, bits
        )
        for bits in BITS
    ]
    arrays = (mx.concatenate(list(x), axis=-1) for x in zip(*packed, strict=True))
    return Latent(tuple(arrays), BITS)
