"""Formulas of a decode step's work against what runs: its products, and the nodes of its graph."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import mlx.core as mx
import pytest
from torch.utils.flop_counter import FlopCounterMode

from xkv import XKVConfig
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.checks.decode_step import DecodeStep, StepShape
from xkv.ops.attention import attend_all
from xkv.ops.working_set import attend_set
from xkv.planning.chips import CHIPS, LENGTHS, MODELS, Chip, milliseconds
from xkv.planning.decode_cost import (
    LayerShape,
    StepWork,
    every_row,
    full_cache,
    planned_bits,
    total,
    working_set,
)
from xkv.store.shapes import CacheShape, GroupShape

SMALL = StepShape(replace(MODELS["Llama-3.1-8B"], group=GroupShape(4, 2, 64, 64), n_heads=8))
SHAPES = {
    "8-heads-of-64": SMALL,
    "bundled": StepShape(MODELS["bundled"]),
    "smollm2": StepShape(MODELS["SmolLM2-135M"]),
}
VIEWS = {"Broadcast", "ExpandDims", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
CONFIG = XKVConfig(compression=8)
KERNELS = {"attend_dense", "query_terms", "index_scores", "choose_rows", "key_scores", "weigh_rows"}
MOST_LAUNCHES = 11
"""Of a layer's step on Metal."""
MORE_WITHOUT = 120
"""Launches, at most, where plain operations take the place of kernels."""


@pytest.mark.parametrize("n_tokens", [1500, 4200])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_by_formula_are_those_that_run(reference, shape, n_tokens):
    step = DecodeStep(reference, replace(shape, dtype="float32"), n_tokens)
    layer, config = step.layer, step.config
    for name, parts in {
        "every row": every_row(layer, config, n_tokens),
        "working set": working_set(layer, config, n_tokens, is_metal=False),
    }.items():
        with FlopCounterMode(display=False) as counter:
            step.forms()[name]()
        assert total(parts).flops == pytest.approx(counter.get_total_flops(), rel=0.01), name


def test_full_attention_by_formula_is_two_products(reference):
    step = DecodeStep(reference, replace(SMALL, dtype="float32"), 1000)
    scores = 2 * 1000 * 8 * 64
    assert total(full_cache(step.layer, 1000)).flops == 2 * scores
    # keys and values of 2 heads in 2 bytes
    assert total(full_cache(SMALL.layer(1000), 1000)).n_bytes == 1000 * 2 * 2 * 64 * 2


class OneNodeEach(MLXBackend):
    """What is one kernel is one node of the graph, of the right shape; nothing runs.

    Args:
        kernels: Operations that have one.
    """

    def __init__(self, kernels: set[str]) -> None:
        super().__init__("off")
        self.with_kernel = kernels

    def dequantize(self, packed, group_size, bits):
        scales = packed[1]
        return _node((*scales.shape[:-1], scales.shape[-1] * group_size), scales.dtype, *packed)

    def attend_dense(self, queries, dense, sinks):
        if "attend_dense" not in self.with_kernel:
            return super().attend_dense(queries, dense, sinks)
        shapes = queries.shape, queries.shape[:3]
        held = [*dense[:2], *dense.recent]
        return _nodes(shapes, (queries.dtype, mx.float32), queries, *held)

    def query_terms(self, queries, basis, spec):
        if "query_terms" not in self.with_kernel:
            return super().query_terms(queries, basis, spec)
        shape = (queries.shape[0], spec.dims, basis.shape[1] * queries.shape[1] * queries.shape[2])
        return _node(shape, queries.dtype, queries, basis)

    def index_scores(self, absorbed, latent, offsets, n_kv_heads):
        if "index_scores" not in self.with_kernel:
            return super().index_scores(absorbed, latent, offsets, n_kv_heads)
        shape = (absorbed.shape[0], n_kv_heads, latent.shape[1])
        return _node(shape, mx.float32, absorbed, offsets, *latent.arrays)

    def choose_rows(self, worth, count):
        if "choose_rows" not in self.with_kernel:
            return self.top_indices(worth, count)
        return _node((*worth.shape[:2], count), mx.int32, worth)

    def key_scores(self, stored, rows, queries):
        if "key_scores" not in self.with_kernel:
            return super().key_scores(stored, rows, queries)
        n_queries = queries.shape[1] * queries.shape[2] // rows.shape[1]
        shape = (*rows.shape[:2], n_queries, rows.shape[2])
        return _node(shape, mx.float32, rows, stored.basis, *stored.latent.arrays, queries)

    def weigh_rows(self, latent, rows, scores, totals, beside):
        if "weigh_rows" not in self.with_kernel:
            return super().weigh_rows(latent, rows, scores, totals, beside)
        shapes = [(*scores.shape[:3], n) for n in (latent.rank, beside.shape[-1])]
        read = rows, scores, totals, beside, *latent.arrays
        return _nodes(shapes, (beside.dtype, beside.dtype), *read)

    def top_indices(self, scores, count):
        return _node((*scores.shape[:-1], count), mx.int32, scores)

    def rope(self, x, positions, spec, inverse=False):
        if not isinstance(positions, int):
            return super().rope(x, positions, spec, inverse)
        return _node(x.shape, x.dtype, x)

    def step_dtype(self, dtype):
        return dtype


def _nodes(shapes, dtypes, *arrays):
    zeros = [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    mx.eval(zeros)
    return tuple(mx.depends(zeros, list(arrays)))


def _node(shape, dtype, *arrays):
    return _nodes([shape], [dtype], *arrays)[0]


def count_nodes(outputs) -> int:
    """Primitives of a graph that launch something."""
    file = io.StringIO()
    mx.export_to_dot(file, *outputs)
    names = re.findall(r'\[label ?= ?"([^"]*)", shape=rectangle\]', file.getvalue())
    return sum(name not in VIEWS for name in names)


def count_step(shape: StepShape, n_tokens: int, kernels: set[str]) -> int:
    """Nodes of a step's graph."""
    backend = OneNodeEach(kernels)
    step = DecodeStep(backend, replace(shape, dtype="float16"), n_tokens)

    def graph():
        inputs = step.wide_queries(), step.segment(step.n_recent), step.dense, step.scale
        return [attend_set(backend, *inputs, step.n_rebuilt)]

    graph()
    # tables of angles are kept from the step before
    mx.eval(*backend._angles.values())
    return count_nodes(graph())


@pytest.mark.parametrize("n_tokens", [1500, 20_000])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_launches_by_formula_are_the_nodes_of_the_graph(shape, n_tokens):
    layer, config = replace(shape, dtype="float16").layer(n_tokens), shape.config
    parts = working_set(layer, config, n_tokens)
    on_metal = total(parts).launches
    assert on_metal <= MOST_LAUNCHES
    # without writing the new token's rows
    assert count_step(shape, n_tokens, KERNELS) == on_metal - 2
    assert count_step(shape, n_tokens, set()) <= on_metal + MORE_WITHOUT


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_launches_over_every_row_are_no_more_than_by_formula(shape):
    step = DecodeStep(OneNodeEach(KERNELS), replace(shape, dtype="float16"), 1500)
    inputs = step.wide_queries(), step.segment(), step.dense
    # without writing the new token, and what only a working set asks of dense rows
    bound = total(every_row(step.layer, step.config, 1500)).launches - 2 - 4
    assert 0.8 * bound <= count_nodes([attend_all(step.backend, *inputs, step.scale)]) <= bound


def test_named_models_meet_the_compression():
    for name, model in MODELS.items():
        for n_tokens in LENGTHS[:1] if model.bits else LENGTHS:
            layer = model.layer(CONFIG, n_tokens)
            shape = CacheShape((model.group,), 2)
            row = sum(layer.latent_row_bytes(x) for x in (layer.key_bits, layer.value_bits))
            held = shape.unfactored_bytes(CONFIG, n_tokens)
            held += CONFIG.layout(n_tokens).n_rows * row
            assert shape.dense_bytes(n_tokens) / held == pytest.approx(8, rel=0.06), name


@pytest.mark.parametrize(
    ("compression", "n_tokens", "bands"),
    [(8, 20, None), (8, 8192, (18, 38)), (8, 131072, (22, 45)), (12, 131072, (14, 29))],
)
def test_planned_bits_are_three_on_average(compression, n_tokens, bands):
    shape = CacheShape((GroupShape(4, 8, 128, 128),), 2)
    found = planned_bits(shape, XKVConfig(compression=compression), n_tokens)
    assert (found and tuple(map(len, found[0]))) == bands
    for bits in found[0] if found else ():
        assert sum(bits) == 3 * len(bits) and list(bits) == sorted(bits, reverse=True)


def test_values_of_all_columns_get_more_bits():
    keys, values = planned_bits(
        CacheShape((GroupShape(4, 8, 128, 128),), 2), XKVConfig(compression=4), 131072
    )[0]
    assert len(keys) == 47 and values == (4,) * 64
    keys, values = planned_bits(
        CacheShape((GroupShape(4, 8, 128, 128),), 2), XKVConfig(compression=3), 131072
    )[0]
    assert len(keys) == 63 and values == (6,) * 64


def test_short_caches_are_dense_and_middling_ones_attend_to_every_row():
    layer = SMALL.layer(8192)
    assert working_set(layer, CONFIG, 20) == full_cache(layer, 20)
    assert working_set(layer, CONFIG, 150) == every_row(layer, CONFIG, 150)
    exact = replace(CONFIG, attention="exact")
    assert working_set(layer, exact, 8192) == every_row(layer, exact, 8192)
    assert working_set(LayerShape(8, layer.group, 2), CONFIG, 8192) == full_cache(layer, 8192)


def test_only_the_index_and_recent_rows_grow_with_the_length():
    layer = SMALL.layer(32768)
    short, long = (working_set(layer, CONFIG, n) for n in (32768, 131072))
    assert {name for name in short if long[name].flops > short[name].flops} == {
        "absorbed queries",
        "index scores",
        "dense rows",
    }
    assert long["values"] == short["values"]


def test_a_long_choice_reads_little_but_its_scores():
    layer = SMALL.layer(8192)
    for n_tokens, most in ((8000, 5), (131_072, 1.6)):
        read = working_set(layer, CONFIG, n_tokens)["choice"].n_bytes
        scores = 4 * 2 * CONFIG.layout(n_tokens).n_rows
        assert scores < read <= most * scores


def test_milliseconds_are_the_longer_of_memory_and_products_part_by_part():
    chip = Chip("toy", bandwidth=1e9, products=1e12, launch_us=10)
    parts = {"read": StepWork(2_000_000, 10), "multiply": StepWork(10, 3_000_000_000, 100)}
    assert milliseconds(chip, parts) == pytest.approx(2 + 3 + 1)
    assert milliseconds(chip, parts, 2, 4_000_000) == pytest.approx(2 * 6 + 4)


def test_chips_agree_with_the_evidence():
    found = {chip.name: chip for chip in CHIPS}
    model, m3 = MODELS["Llama-3.1-8B"], found["M3 Max"]
    assert m3.products == pytest.approx(9e12, rel=0.02)
    assert milliseconds(m3, {}, 0, model.weight_bytes) == pytest.approx(10.55, rel=0.01)
    for n_tokens, ms in ((8192, 2.97), (131072, 43.2)):
        full = full_cache(model.layer(CONFIG, n_tokens), n_tokens)
        assert milliseconds(m3, full, model.n_layers) == pytest.approx(ms, rel=0.02)
    assert all(chip.source for chip in CHIPS)
