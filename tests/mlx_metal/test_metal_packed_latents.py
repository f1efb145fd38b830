"""The Metal kernels on packed latents, their real source, against the float64 reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import xkv
from tests import metal_emulator as emulator
from tests.cache_decoding import decode_with_cache
from xkv.backends.mlx_metal.backend import MLXBackend
from xkv.backends.mlx_metal.kernels import latents, reconstruct_rows, selected_attention
from xkv.checks.decode_cases import (
    CHUNK_SIZE,
    DTYPES,
    LAYOUTS,
    PACKED_CASES,
    DecodeInputs,
    exact_packed_inputs,
    hide_rows,
    make_packed_inputs,
)
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.selection import chunk_rows
from xkv.store.codec import pack_latent

pytest_plugins = ["tests.metal_device"]

CACHE_OPTIONS = {"sinks": 2, "window": 20, "budget": 64, "outlier_chunks": 1}
OPERATIONS = ["reconstruct_rows", "selected_attention", "lowrank_attention"]
MAX_BUFFERS = 31
"""Of a Metal kernel."""


def arguments(backend: Backend, operation: str, inputs: DecodeInputs) -> tuple[Any, ...]:
    """The inputs in the order of the backend's method; an odd number of rows to reconstruct."""
    x = inputs
    if operation == "reconstruct_rows":
        return x.segment, chunk_rows(backend, x.chunks, CHUNK_SIZE)[..., :-1]
    if operation == "selected_attention":
        return x.queries, x.segment, x.chunks, CHUNK_SIZE, x.keys, x.values, x.scale
    return x.queries, x.segment, x.keys, x.values, x.scale


def with_traps(metal: MLXBackend, operation: str, inputs: DecodeInputs) -> DecodeInputs:
    """NaN in what the operation must not read of the latents."""
    batch, n_rows, _ = inputs.segment.latent_k.shape
    is_used = np.full((batch, n_rows), operation == "lowrank_attention")
    rows = metal.to_numpy(chunk_rows(metal, inputs.chunks, CHUNK_SIZE)).reshape(batch, -1)
    np.put_along_axis(is_used, rows, True, axis=1)
    latent_k, latent_v = (hide_rows(metal, x, is_used) for x in inputs.segment[:2])
    segment = inputs.segment._replace(latent_k=latent_k, latent_v=latent_v)
    return dataclasses.replace(inputs, segment=segment)


def kernel_error(
    metal: MLXBackend,
    reference: Backend,
    operation: str,
    layout: str,
    dtype: str = "float16",
    case: str = "gqa4-batch2",
) -> float:
    """Relative error of a kernel through the backend, the path asserted; NaN stays NaN."""
    inputs = make_packed_inputs(metal, PACKED_CASES[case], LAYOUTS[layout], dtype)
    exact = exact_packed_inputs(metal, reference, inputs)
    trapped = with_traps(metal, operation, inputs)
    got = getattr(metal, operation)(*arguments(metal, operation, trapped))
    assert metal.kernels.last_path[operation] == operation
    assert got.dtype == inputs.queries.dtype
    want = getattr(reference, operation)(*arguments(reference, operation, exact))
    return relative_error(metal.to_numpy(got), reference.to_numpy(want))


@pytest.mark.parametrize(
    ("layout", "dtype", "case"),
    [
        *(("groups-of-64", dtype, "gqa4-batch2") for dtype in DTYPES),
        ("groups-of-32", "float32", "gqa1"),
        ("groups-of-32", "float16", "gqa4-batch2"),
        ("one-part", "bfloat16", "gqa1"),
    ],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_packed_latents_are_read_right(metal, reference, operation, layout, dtype, case):
    error = kernel_error(metal, reference, operation, layout, dtype, case)
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_packed_latents_do_not_depend_on_the_schedule(emulated, reference, schedule):
    with emulator.settings(checked=False, schedule=schedule, seed=3) as launches:
        for operation in OPERATIONS:
            error = kernel_error(emulated, reference, operation, "groups-of-64")
            assert error < TOLERANCE["float16"]
    assert max(launch.text.count("[[buffer(") for launch in launches) <= MAX_BUFFERS


# Name: the text of LATENT_SOURCE that is replaced, by what.
FAULTS = {
    "wrong-shift": ("from[0] >> shift", "from[0] >> (shift ^ 8)"),
    "next-word-left-out": ("codes |= from[1]", "codes |= 0 * from[1]"),
    "bias-missing": ("scale, bias)", "scale, 0.0f)"),
    "scale-of-the-first-group": (" + column / GROUP", ""),
    "parts-in-wrong-order": ("column - first.width)", "column % first.width)"),
    "part-too-short": ("column < first.width ?", "column < first.width - 32 ?"),
    "words-of-another-batch": ("{words + first_row", "{words + 0 * first_row"),
    "scales-of-another-batch": ("= first_row * (width / GROUP)", "= 0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(emulated, reference, monkeypatch, name):
    for module in (reconstruct_rows, selected_attention):
        assert FAULTS[name][0] in module.HEADER
        monkeypatch.setattr(module, "HEADER", module.HEADER.replace(*FAULTS[name]))
    emulated.kernels.check = lambda *args: None
    for operation in ("reconstruct_rows", "selected_attention"):
        try:
            error = kernel_error(emulated, reference, operation, "groups-of-64")
        except (ValueError, emulator.MetalKernelError) as found:
            assert "not finite" in str(found) or getattr(found, "kind", "compile") != "compile"
            continue
        assert error > 10 * TOLERANCE["float16"], f"{operation}: an error of {error:.1e} only"


def test_wrong_packed_kernel_fails_its_check(emulated, monkeypatch):
    wrong = reconstruct_rows.HEADER.replace(*FAULTS["bias-missing"])
    monkeypatch.setattr(reconstruct_rows, "HEADER", wrong)
    inputs = make_packed_inputs(emulated, PACKED_CASES["gqa1"], LAYOUTS["one-part"], "float16")
    with pytest.raises(xkv.InputError, match="disagrees with its plain twin"):
        emulated.reconstruct_rows(*arguments(emulated, "reconstruct_rows", inputs))


@pytest.mark.parametrize(
    ("attention", "operations"),
    [
        ("dense", {"lowrank_attention"}),
        ("selective", {"chunk_scores", "selected_attention", "reconstruct_rows"}),
    ],
)
def test_cache_in_bits_decodes_on_kernels(metal, attention, operations):
    config = xkv.XKVConfig(compression=2, attention=attention, **CACHE_OPTIONS)
    got = decode_with_cache(metal, config)
    assert metal.kernels.last_path == {name: name for name in operations}
    want = decode_with_cache(MLXBackend(kernels="off"), config)
    assert relative_error(got, want) <= TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([(32, 4)] * 7, "up to 19 arrays, not 21"),
        ([(40, 16), (64, 4)], "parts of whole 32 columns, not 40"),
    ],
)
def test_latents_that_kernels_cannot_read(metal, parts, sentence):
    widths, bits = zip(*parts, strict=True)
    latent = pack_latent(metal, mx.ones((1, 9, sum(widths))), widths, bits)
    assert sentence in latents.problem(latent)


def test_float64_is_refused(metal):
    inputs = make_packed_inputs(metal, PACKED_CASES["gqa1"], ((64, 4),), "float32")
    wide = inputs.segment.latent_k.map(
        lambda x: x if x.dtype == mx.uint32 else x.astype(mx.float64, stream=mx.cpu)
    )
    segment = inputs.segment._replace(latent_k=wide)
    rows = mx.zeros((1, 2, 1), mx.int32)
    with pytest.raises(xkv.InputError, match="latent_k float64"):
        metal.reconstruct_rows(segment, rows)
