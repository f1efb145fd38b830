"""The work of one decode step of one layer by formula, and the milliseconds it takes on a chip.

Counted are bytes that operations read and write, floating-point operations of matrix products
(what else is computed hides behind memory), and launches. On Metal each fused operation is one
kernel, which holds no intermediate result in memory; on CUDA some are a second that puts parts
together. Everything else is what :mod:`xkv.ops` does on MLX. One sequence, one query, 16-bit
arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from xkv.config import BAND, USUAL_COMPRESSION, XKVConfig
from xkv.ops.index import BLOCK, RUN, n_columns
from xkv.ops.latent import Latent
from xkv.ops.recent import SCALE_BYTES
from xkv.store.codec import BITS, row_bytes
from xkv.store.shapes import CacheShape, GroupShape

FULL_LAUNCHES = 3
"""The new token's key and value written, and the fused attention."""
LAUNCHES = {
    "scaled queries": 1,
    "dense rows": 1,
    "absorbed queries": 2,
    "index scores": 1,
    "choice": 1,
    "rebuilt keys": 1,
    "values": 2,
    "new token": 2,
}
"""By part: the nodes of MLX's graph but views, and those written."""
CUDA_LAUNCHES = LAUNCHES | {"dense rows": 2, "choice": 2, "rebuilt keys": 2}
"""The same on CUDA, where programs take some rows or columns, and others put them together."""
EXACT_LAUNCHES = 14
"""Dense rows and the softmax, where every row is attended to."""

RADIX_PASSES = 4
"""Of the Metal kernel that chooses rows, over what it selects from, at most."""
CUDA_DENSE_ROWS, CUDA_KEY_PARTS, CUDA_RUNS, CUDA_RUN = 64, 8, 4096, 8
"""Of the Triton kernels: dense rows of a program, parts of a key's columns at most, runs that a
choice looks at at most, and the fewest rows of one."""
SCORE_BYTES, SUM_BYTES = 32, 24
"""A score and its weight on their way from product to product, and in the sum of dense rows."""

PLANNED_BITS, KEY_SHARE = 3, 1 / 3


@dataclass(frozen=True)
class StepWork:
    """What a part of a step moves, computes and launches."""

    n_bytes: int = 0
    flops: int = 0
    launches: int = 0

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(
            self.n_bytes + other.n_bytes, self.flops + other.flops, self.launches + other.launches
        )


Parts = Mapping[str, StepWork]


def total(parts: Parts) -> StepWork:
    """All parts together."""
    return sum(parts.values(), StepWork())


Bits = tuple[int, ...]


@dataclass(frozen=True)
class LayerShape:
    """What the work of a layer depends on.

    Args:
        n_heads: Query heads.
        group: The group it is in; its values are factored.
        item_bytes: Of a number in the KV dtype.
        key_bits: Of the bands of the keys' latent.
        value_bits: Of the values'.
    """

    n_heads: int
    group: GroupShape
    item_bytes: int
    key_bits: Bits = ()
    value_bits: Bits = ()

    def latent_row_bytes(self, bits: Bits) -> int:
        """Bytes of a token in a latent."""
        return sum(row_bytes(BAND, n, self.item_bytes) for n in bits)


def planned_bits(
    shape: CacheShape, config: XKVConfig, n_tokens: int
) -> list[tuple[Bits, Bits]] | None:
    """Bands of each group's keys and values in the model's basis, where no calibration is at hand.

    An assumption: keys, which want about half the bits of values, get a third of a group's latent
    bytes, and both 3 bits a number: 6 in the first band, 2 in the last three.

    Args:
        shape: The model's cache.
        config: Its ``compression`` is met.
        n_tokens: In the cache.

    Returns:
        None where the prompt stays dense.
    """
    n_rows = config.layout(n_tokens).n_rows
    held = shape.dense_bytes(n_tokens) / (config.compression or USUAL_COMPRESSION)
    left = held - shape.unfactored_bytes(config, n_tokens)
    if n_rows < 1 or left <= 0:
        return None
    width = sum(group.key_width + group.value_width for group in shape.groups)
    found = []
    for group in shape.groups:
        allowed = left / n_rows * (group.key_width + group.value_width) / width
        keys = _bands(allowed * KEY_SHARE, group.key_width, shape.item_bytes)
        spent = sum(row_bytes(BAND, n, shape.item_bytes) for n in keys)
        values = _bands(allowed - spent, group.value_width, shape.item_bytes)
        if not keys or not values:
            return None
        found.append((keys, values))
    return found


def _bands(n_bytes: float, width: int, item_bytes: int) -> Bits:
    """So many bands as fit into the bytes; where there are no more columns, in more bits."""
    n_bands = int(n_bytes / row_bytes(BAND, PLANNED_BITS, item_bytes))
    most = width // BAND
    if n_bands >= most:
        fitting = [n for n in BITS if most * row_bytes(BAND, n, item_bytes) <= n_bytes]
        return (fitting[-1],) * most if fitting else ()
    if n_bands < 4:
        return (PLANNED_BITS,) * n_bands
    return (6, *[PLANNED_BITS] * (n_bands - 4), 2, 2, 2)


def _n_runs(bits: Bits) -> int:
    """Runs of bands alike, each of which is widened by itself."""
    return len(list(itertools.groupby(bits)))


def full_cache(layer: LayerShape, n_tokens: int) -> dict[str, StepWork]:
    """The framework's fused attention over every row."""
    group, dims = layer.group, layer.group.key_dim + layer.group.value_dim
    n_bytes = n_tokens * group.row_elements * layer.item_bytes
    flops = 2 * n_tokens * layer.n_heads * dims
    return {"attention": StepWork(n_bytes, flops, FULL_LAUNCHES)}


def every_row(layer: LayerShape, config: XKVConfig, n_tokens: int) -> dict[str, StepWork]:
    """:func:`xkv.ops.attention.attend_all`: keys rebuilt, values in latent space."""
    group, item, heads = layer.group, layer.item_bytes, layer.n_heads
    n_rows = config.layout(n_tokens).n_rows
    rank_k, rank_v = BAND * len(layer.key_bits), BAND * len(layer.value_bits)
    width = group.n_kv_heads * group.key_dim
    keys = n_rows * (layer.latent_row_bytes(layer.key_bits) + 2 * rank_k * item + 4 * width * item)
    keys += rank_k * width * item + n_rows * heads * SCORE_BYTES
    values = n_rows * (layer.latent_row_bytes(layer.value_bits) + 2 * rank_v * item)
    values += rank_v * group.n_kv_heads * group.value_dim * item
    by_latent = 2 * heads * rank_v * (n_rows + group.value_dim)
    runs_k, runs_v = _n_runs(layer.key_bits), _n_runs(layer.value_bits)
    return {
        "rebuilt keys": StepWork(
            keys, 2 * n_rows * (width * rank_k + heads * group.key_dim), 7 + runs_k
        ),
        "values": StepWork(values, by_latent, 3 + runs_v),
        "dense rows": _dense(layer, n_tokens - n_rows, is_fused=False, launches=EXACT_LAUNCHES),
    }


def working_set(
    layer: LayerShape, config: XKVConfig, n_tokens: int, is_metal: bool = True
) -> dict[str, StepWork]:
    """:func:`xkv.ops.working_set.attend_set`, or what takes its place in a short cache.

    Args:
        layer: With the bits of its latents.
        config: Says which rows are stored, recent and rebuilt.
        n_tokens: In the cache.
        is_metal: All fused operations are kernels.
    """
    layout = config.layout(n_tokens)
    n_rows, n_recent = layout.n_rows, layout.n_recent
    if n_rows < 1 or not layer.key_bits:
        return full_cache(layer, n_tokens)
    n_rebuilt = config.rebuilt_at(n_rows, n_recent)
    if n_rebuilt is None:
        return every_row(layer, config, n_tokens)
    n_dense, n_rows = n_tokens - n_rows, n_rows - n_recent
    group, item, heads = layer.group, layer.item_bytes, layer.n_heads
    dim, value_dim = group.key_dim, group.value_dim
    rank_k, rank_v = BAND * len(layer.key_bits), BAND * len(layer.value_bits)
    basis_k = rank_k * group.n_kv_heads * dim * item
    basis_v = rank_v * group.n_kv_heads * value_dim * item
    key_row, value_row = (layer.latent_row_bytes(x) for x in (layer.key_bits, layer.value_bits))
    width, n_blocks = n_columns(Latent((), layer.key_bits)), -(-n_rows // BLOCK)
    terms, absorbed = dim * width * heads * item, n_blocks * width * heads * item
    index = width * group.n_kv_heads * dim * item + 2 * terms + n_blocks * dim * item + absorbed
    columns = BAND * layer.key_bits[0] // 8 + 2 * item * len(layer.key_bits)
    scored = 4 * group.n_kv_heads * n_rows
    n_best = n_rebuilt * group.n_kv_heads
    n_scores = n_rebuilt * heads * (1 if is_metal else 1 + 2 * CUDA_KEY_PARTS)
    keys = n_best * key_row + basis_k + 4 * n_scores
    values = n_best * value_row + basis_v + heads * (4 * n_rebuilt + 2 * rank_v * item)
    dense = _dense(layer, n_dense, True, 0)
    dense += StepWork(
        n_recent * group.n_kv_heads * (dim + value_dim + SCALE_BYTES),
        2 * n_recent * heads * (dim + value_dim),
    )
    if not is_metal:
        n_parts = sum(-(-n // CUDA_DENSE_ROWS) for n in (n_dense, n_recent))
        dense += StepWork(2 * 4 * n_parts * heads * (value_dim + 2))
    work = {
        "scaled queries": StepWork(2 * heads * dim * item),
        "dense rows": dense,
        "absorbed queries": StepWork(index, 2 * n_blocks * dim * width * heads),
        "index scores": StepWork(
            absorbed + n_rows * columns + scored, 2 * n_blocks * BLOCK * width * heads
        ),
        "choice": _choice(group.n_kv_heads, n_rows, n_rebuilt, is_metal),
        "rebuilt keys": StepWork(keys, 2 * n_best * rank_k * dim + 2 * n_rebuilt * heads * dim),
        "values": StepWork(values, 2 * heads * rank_v * (n_rebuilt + value_dim)),
        "new token": StepWork(2 * group.row_elements * item),
    }
    launches = LAUNCHES if is_metal else CUDA_LAUNCHES
    return {name: each + StepWork(launches=launches[name]) for name, each in work.items()}


def _dense(layer: LayerShape, n_rows: int, is_fused: bool, launches: int) -> StepWork:
    """Dense rows: fused attention over them, or products and a softmax."""
    group = layer.group
    n_bytes = n_rows * group.row_elements * layer.item_bytes
    if not is_fused:
        n_bytes += n_rows * layer.n_heads * (SCORE_BYTES + SUM_BYTES)
    flops = 2 * n_rows * layer.n_heads * (group.key_dim + group.value_dim)
    return StepWork(n_bytes, flops, launches)


def _choice(n_heads: int, n_rows: int, count: int, is_metal: bool) -> StepWork:
    """:func:`xkv.ops.working_set.choose_rows` of float32 scores."""
    if is_metal:
        # read once; the runs' maxima, and the scores of the best runs, by each pass
        run, of_runs, of_rows = RUN, RADIX_PASSES, RADIX_PASSES
    else:
        # the runs' maxima are written and read, the best runs' scores read once
        run, of_runs, of_rows = CUDA_RUN, 2, 1
        while run * CUDA_RUNS < n_rows:
            run *= 2
    n_runs = -(-n_rows // run)
    return StepWork(4 * n_heads * (n_rows + of_runs * n_runs + of_rows * run * min(count, n_runs)))
