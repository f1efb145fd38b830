"""The Triton kernels on packed latents, against the float64 reference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xkv
from tests.cache_decoding import decode_with_cache
from tests.torch_cuda.triton_kernels.checks import (
    OPERATIONS,
    arguments,
    load_copy,
    needs_triton,
)
from xkv.checks.decode_cases import (
    LAYOUTS,
    PACKED_CASES,
    exact_packed_inputs,
    hide_rows,
    make_packed_inputs,
)
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.kernels import with_wide_bases

CACHE_OPTIONS = {"sinks": 2, "window": 20, "budget": 64, "outlier_chunks": 1}

pytestmark = needs_triton


def kernel_error(
    run: Any,
    backend: Backend,
    reference: Backend,
    operation: str,
    layout: str,
    dtype: str = "float32",
    case: str = "gqa4-batch2",
) -> float:
    """Relative error of a kernel that must not read unused rows; infinite if not finite."""
    inputs = make_packed_inputs(backend, PACKED_CASES[case], LAYOUTS[layout], dtype)
    exact = exact_packed_inputs(backend, reference, inputs)
    batch, n_rows, _ = inputs.segment.latent_k.shape
    is_used = np.full((batch, n_rows), operation == "lowrank_attention")
    rows = backend.to_numpy(arguments("reconstruct_rows", inputs)[1]).reshape(batch, -1)
    np.put_along_axis(is_used, rows, True, axis=1)
    latents = [hide_rows(backend, x, is_used) for x in inputs.segment[:2]]
    segment = inputs.segment._replace(latent_k=latents[0], latent_v=latents[1])
    trapped = dataclasses.replace(inputs, segment=segment)
    got = run(*arguments(operation, trapped))
    assert got.dtype == inputs.queries.dtype
    want = getattr(reference, operation)(*arguments(operation, exact))
    if not got.isfinite().all():
        return np.inf
    return relative_error(backend.to_numpy(got), reference.to_numpy(want))


@pytest.mark.parametrize(
    ("layout", "dtype", "case"),
    [
        *(("groups-of-64", dtype, "gqa4-batch2") for dtype in ("float32", "bfloat16")),
        ("groups-of-32", "float32", "gqa1"),
        ("groups-of-32", "float16", "gqa4-batch2"),
        ("one-part", "bfloat16", "gqa1"),
    ],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_packed_latents_are_read_right(
    backend: Backend,
    reference: Backend,
    operation: str,
    layout: str,
    dtype: str,
    case: str,
) -> None:
    run = getattr(backend, operation)
    backend.kernels.last_path.clear()
    error = kernel_error(run, backend, reference, operation, layout, dtype, case)
    assert backend.kernels.last_path[operation] == operation
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_columns_of_a_wider_array_are_read_right(
    backend: Backend, reference: Backend, operation: str
) -> None:
    """A part in 16 bits may be a view of more columns than its own."""
    layout = LAYOUTS["groups-of-64"]
    inputs = make_packed_inputs(backend, PACKED_CASES["gqa4-batch2"], layout, "bfloat16")
    first, *others = inputs.segment.latent_k.parts
    wide = torch.cat([first.arrays[0], torch.full_like(first.arrays[0], float("nan"))], dim=-1)
    view = first._replace(arrays=(wide[..., : first.shape[-1]],))
    latent = dataclasses.replace(inputs.segment.latent_k, parts=(view, *others))
    inputs = dataclasses.replace(inputs, segment=inputs.segment._replace(latent_k=latent))
    assert not inputs.segment.latent_k.arrays[0].is_contiguous()
    exact = exact_packed_inputs(backend, reference, inputs)
    backend.kernels.last_path.clear()
    got = getattr(backend, operation)(*arguments(operation, inputs))
    assert backend.kernels.last_path[operation] == operation
    want = getattr(reference, operation)(*arguments(operation, exact))
    error = relative_error(backend.to_numpy(got), reference.to_numpy(want))
    assert error < TOLERANCE["bfloat16"]


FAULTS = [
    ("reconstruct_rows", "latents", "first_bits % 32)", "first_bits % 16)"),
    ("reconstruct_rows", "latents", "codes |= rest", "codes |= 0 * rest"),
    ("reconstruct_rows", "latents", "* scale + bias)", "* scale)"),
    ("reconstruct_rows", "latents", "(columns // GROUP)", "(columns // width)"),
    ("reconstruct_rows", "common", "basis += width", "basis += 0"),
    ("reconstruct_rows", "common", "latent_start + rows.to(tl.int64),", "rows.to(tl.int64),"),
    ("selected_attention", "common", "output += part_width", "output += 0"),
    ("selected_attention", "common", "rows_start + numbers.to", "numbers.to"),
    ("lowrank_attention", "lowrank_attention", "+= first_column", "+= 0"),
    ("lowrank_attention", "lowrank_attention", "(batch_stride, 1)", "(0, 1)"),
]


@pytest.mark.parametrize(
    ("operation", "file", "old", "new"), FAULTS, ids=[f"{x[0]}-{x[3].strip()}" for x in FAULTS]
)
def test_planted_fault_exceeds_tolerance(
    backend: Backend,
    reference: Backend,
    operation: str,
    file: str,
    old: str,
    new: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"faulty_packed_{FAULTS.index((operation, file, old, new))}"
    kernel = load_copy(tmp_path, name, old, new, file).TritonKernel(operation)

    def run(*args: Any) -> torch.Tensor:
        return kernel(*(with_wide_bases(backend, x) for x in args))

    layout = "groups-of-32" if operation == "lowrank_attention" else "groups-of-64"
    error = kernel_error(run, backend, reference, operation, layout)
    assert error > 10 * TOLERANCE["float32"]


@pytest.mark.parametrize("layout", ["one-part", "groups-of-64"])
def test_first_use_check_runs_on_a_packed_sample(backend: Backend, layout: str) -> None:
    checked = xkv.load_backend("torch", device=str(backend.device), kernels="on")
    inputs = make_packed_inputs(checked, PACKED_CASES["gqa1"], LAYOUTS[layout], "bfloat16")
    for operation in OPERATIONS:
        getattr(checked, operation)(*arguments(operation, inputs))
        assert checked.kernels.last_path[operation] == operation


@pytest.mark.parametrize(
    ("attention", "operations"),
    [
        ("dense", {"lowrank_attention"}),
        ("selective", {"chunk_scores", "selected_attention"}),
    ],
)
def test_cache_in_bits_decodes_on_kernels(
    backend: Backend,
    attention: str,
    operations: set[str],
) -> None:
    config = xkv.XKVConfig(compression=2, attention=attention, **CACHE_OPTIONS)
    plain = xkv.load_backend("torch", device=str(backend.device), kernels="off")
    backend.kernels.last_path.clear()
    got = decode_with_cache(backend, config)
    assert backend.kernels.last_path == {name: name for name in operations}
    assert relative_error(got, decode_with_cache(plain, config)) <= TOLERANCE["float32"]


def test_strided_packed_rows_are_refused(backend: Backend) -> None:
    inputs = make_packed_inputs(backend, PACKED_CASES["gqa1"], LAYOUTS["one-part"], "float32")
    latent = inputs.segment.latent_k.map(lambda x: x[:, ::2])
    strided = dataclasses.replace(inputs, segment=inputs.segment._replace(latent_k=latent))
    with pytest.raises(xkv.InputError, match="rows are strided"):
        backend.selected_attention(*arguments("selected_attention", strided))
