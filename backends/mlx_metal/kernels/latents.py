"""How the Metal kernels read rows of a latent: one array, or parts of columns in few bits."""

from __future__ import annotations

import functools
from string import Template

import mlx.core as mx

from xkv.ops.packed import Packed
from xkv.ops.types import Array, Factor

Layout = tuple[tuple[int, int], ...]
"""Bits and group size of each part of a packed latent; empty for one in its own dtype."""

MAX_ARRAYS = 19
"""Metal binds 31 buffers to a kernel, and the kernels need up to 12 for other things."""

LATENT_SOURCE = """
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

// Columns in the latent's own dtype. Columns past the last are zeros.
template <typename T>
struct plain_part {
  const device T* rows;
  int width;

  template <typename U>
  vec<U, 4> load(int row, int column) const {
    return vec<U, 4>(load_four(rows + int64_t(row) * width + column, width - column));
  }
};

// Columns in MLX's affine layout: BITS bits a number in one stream of bits, the lowest first, and a
// scale and a bias for GROUP numbers. Rows of 32 columns start at a word.
template <typename T, int BITS, int GROUP>
struct packed_part {
  const device uint* words;
  const device T* scales;
  const device T* biases;
  int width;

  template <typename U>
  vec<U, 4> load(int row, int column) const {
    const device uint* from = words + uint(row) * uint(width * BITS / 32) + column * BITS / 32;
    const int shift = column * BITS % 32;
    uint codes = from[0] >> shift;
    // the last of four numbers may end in the next word
    if (32 % BITS != 0 && shift + 4 * BITS > 32) codes |= from[1] << (32 - shift);
    const uint group = uint(row) * uint(width / GROUP) + column / GROUP;
    const float scale = float(scales[group]), bias = float(biases[group]);
    vec<U, 4> x;
    for (int i = 0; i < 4; i++)
      x[i] = U(fma(float(codes >> i * BITS & ((1u << BITS) - 1)), scale, bias));
    return x;
  }
};

// Columns of one part, then those of others.
template <typename First, typename Rest>
struct joined_parts {
  First first;
  Rest rest;
  int width;

  template <typename U>
  vec<U, 4> load(int row, int column) const {
    return column < first.width ? first.template load<U>(row, column)
                                : rest.template load<U>(row, column - first.width);
  }
};

template <typename T>
METAL_FUNC plain_part<T> plain_columns(const device T* rows, int width, int64_t first_row) {
  return {rows + first_row * width, width};
}

template <int BITS, int GROUP, typename T>
METAL_FUNC packed_part<T, BITS, GROUP> packed_columns(
    const device uint* words, const device T* scales, const device T* biases, int width,
    int64_t first_row) {
  const int64_t first_group = first_row * (width / GROUP);
  return {words + first_row * (width * BITS / 32), scales + first_group, biases + first_group,
          width};
}

template <typename First, typename Rest>
METAL_FUNC joined_parts<First, Rest> join(First first, Rest rest) {
  return {first, rest, first.width + rest.width};
}
"""
"""Four columns of a row at once, from a column that is a multiple of 4."""


def layout_of(latent: Factor) -> Layout:
    """What of a latent's form a kernel's source depends on."""
    if not isinstance(latent, Packed):
        return ()
    return tuple((part.bits, part.group_size) for part in latent.parts)


def suffix(layout: Layout) -> str:
    """What tells a kernel's name from those for other layouts."""
    return "".join(f"_{bits}g{group_size}" for bits, group_size in layout)


def input_names(layout: Layout) -> tuple[str, ...]:
    """Names of :func:`inputs`."""
    if not layout:
        return ("latent",)
    names = ["sizes"]
    for i, (bits, _) in enumerate(layout):
        names += [f"rows{i}"] if bits == 16 else [f"words{i}", f"scales{i}", f"biases{i}"]
    return tuple(names)


def inputs(latent: Factor) -> list[Array]:
    """A latent's arrays; of a packed one first its number of rows and the parts' widths."""
    if not isinstance(latent, Packed):
        return [latent]
    return [mx.array([latent.shape[1], *latent.widths], mx.int32), *latent.arrays]


@functools.cache
def fill_in(source: str, layout: Layout) -> str:
    """A kernel's source for a layout.

    Args:
        source: With ``$n_latent_rows``, and with ``$latent`` for an object of
            :data:`LATENT_SOURCE` that reads rows from number ``first_row`` on.
        layout: Of the latent.
    """
    n_rows, columns = "latent_shape[1]", "plain_columns(latent, latent_shape[2], first_row)"
    if layout:
        n_rows, columns = "sizes[0]", _columns(layout, 0)
    return Template(source).substitute(n_latent_rows=n_rows, latent=columns)


def _columns(layout: Layout, i: int) -> str:
    """An expression for part ``i`` and those after it."""
    bits, group_size = layout[i]
    if bits == 16:
        first = f"plain_columns(rows{i}, sizes[{i + 1}], first_row)"
    else:
        first = (
            f"packed_columns<{bits}, {group_size}>(words{i}, scales{i}, biases{i}, "
            f"sizes[{i + 1}], first_row)"
        )
    return first if i + 1 == len(layout) else f"join({first}, {_columns(layout, i + 1)})"


def problem(latent: Factor) -> str | None:
    """A sentence if the kernels cannot read a latent, or None."""
    arrays = latent.arrays if isinstance(latent, Packed) else [latent]
    if (size := min(x.size for x in arrays)) < 8:
        # MLX passes such arrays in another address space
        return f"the kernel takes latents of 8 elements or more, not {size}"
    if len(arrays) > MAX_ARRAYS:
        return f"the kernel takes a latent in up to {MAX_ARRAYS} arrays, not {len(arrays)}"
    if isinstance(latent, Packed):
        odd = [n for n in latent.widths if n % 32]
        if odd:
            return f"the kernel takes packed latents in parts of whole 32 columns, not {odd[0]}"
    return None
