"""The Triton kernels against the float64 reference, on the GPU or in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import xkv
from tests.torch_cuda.triton_kernels.checks import (
    OPERATIONS,
    WITHOUT_LATENT,
    arguments,
    check,
    kernel_error,
    mapped,
    needs_triton,
    results,
)
from xkv.checks.decode_cases import CASES, DTYPES, DecodeCase, make_inputs
from xkv.checks.tolerances import TOLERANCE, relative_error
from xkv.ops.backend import Backend
from xkv.ops.latent import Latent
from xkv.ops.scores import Dense
from xkv.ops.types import RopeRun

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel_matches_reference(
    backend: Backend, reference: Backend, operation: str, case: DecodeCase, dtype: str
) -> None:
    check(backend, reference, operation, case, dtype)


EDGES = [
    *(
        DecodeCase(300, 2, 1, 64, 16, 16, n_rebuilt=n, n_recent=0)
        for n in (1, 31, 32, 33, 63, 64, 65, 129)
    ),
    *(DecodeCase(40, 2, 1, 64, rank, rank, n_recent=0) for rank in (1, 31, 33, 63, 64, 65)),
    *(DecodeCase(n, 2, 1, 64, 16, 16, n_rebuilt=1, n_recent=0) for n in (1, 63, 65, 255, 256, 257)),
    *(DecodeCase(70, 17 * n, n, 64, bits=(3,) * 18, n_recent=0, n_rebuilt=3) for n in (1, 3)),
    *(DecodeCase(70, 1, 1, 64, 16, 16, n_queries=n, n_recent=0) for n in (15, 16, 33)),
    DecodeCase(70, 4, 2, 32, 16, 16, rope_dims=16),
    DecodeCase(300, 32, 8, 32, bits=(4, 3, 2), n_recent=0),
]
"""Around a kernel's tiles of rows, of columns, of blocks, of queries, of bands and of pairs."""
ODD_SIZES = [
    ("query_terms", DecodeCase(70, 4, 2, 64, 16, 16, rope_dims=2, n_recent=0)),
    ("query_terms", DecodeCase(70, 4, 2, 64, 32, 16, rope_dims=34, n_recent=0, traditional=True)),
    ("query_terms", DecodeCase(70, 2, 1, 80, 1, 16, n_recent=0, n_queries=3, rope_scale=1.2)),
    *(("weigh_rows", DecodeCase(70, 4, 2, n, 16, 16, n_recent=0)) for n in (1, 63, 65, 80, 256)),
    *(("attend_dense", DecodeCase(70, 4, 2, n, 16, 16, n_recent=n)) for n in (1, 33, 80)),
    *(
        ("attend_dense", DecodeCase(70, 2, 1, 64, 16, 16, n_dense=n, n_recent=n - 1, batch=2))
        for n in (1, 64, 65, 128, 129, 257)
    ),
    ("attend_dense", DecodeCase(70, 34, 2, 32, 16, 16, n_queries=3, n_dense=130)),
    ("attend_dense", DecodeCase(70, 2, 2, 32, 16, 16, n_dense=2200, n_recent=0)),
]
"""Of features that other kernels do not take, and around tiles of dense rows, parts and queries."""
EDGE_OPERATIONS = ["key_scores", "weigh_rows", "index_scores", "query_terms"]


@pytest.mark.parametrize("case", EDGES, ids=str)
@pytest.mark.parametrize("operation", EDGE_OPERATIONS)
def test_kernel_at_tile_edges(
    backend: Backend, reference: Backend, operation: str, case: DecodeCase
) -> None:
    check(backend, reference, operation, case, "float32")


@pytest.mark.parametrize(("operation", "case"), ODD_SIZES, ids=str)
def test_kernel_at_sizes_of_its_own(
    backend: Backend, reference: Backend, operation: str, case: DecodeCase
) -> None:
    check(backend, reference, operation, case, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_used", [None, 1, 32, 33, 70])
def test_attend_dense_takes_sinks_and_rows_in_use(
    backend: Backend, reference: Backend, n_used: int | None, dtype: str
) -> None:
    """As many as the device counts, of buffers with NaN in those that are not."""
    case = DecodeCase(70, 8, 2, 64, 16, 16, n_dense=70, n_recent=40, batch=2)
    x = make_inputs(backend, case, dtype)
    queries, dense, _ = arguments(backend, "attend_dense", x)
    sinks = backend.normal((case.n_heads,), 5) + 3
    given = dense
    if n_used is not None:
        held = [torch.nn.functional.pad(y[..., :n_used, :], (0, 0, 0, 9)) for y in dense[:2]]
        for y in held:
            y[..., n_used:, :] = torch.nan
        given = Dense(*held, torch.tensor([n_used], device=x.rows.device), dense.recent)
        dense = Dense(*(y[..., :n_used, :] for y in dense[:2]), None, dense.recent)
    got = results(backend.attend_dense(queries, given, sinks))
    assert backend.kernels.last_path["attend_dense"] == "attend_dense"
    exact = mapped(
        (queries, dense, sinks), lambda y: y.cpu().double() if y.is_floating_point() else y.cpu()
    )
    for y, want in zip(got, results(reference.attend_dense(*exact)), strict=True):
        error = relative_error(backend.to_numpy(y), reference.to_numpy(want))
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("operation", ["key_scores", "index_scores"])
def test_kernel_without_rope(backend: Backend, reference: Backend, operation: str) -> None:
    inputs = make_inputs(backend, CASES[6], "float32")
    keys = inputs.segment.keys._replace(rope_runs=(RopeRun(CASES[6].n_rows, None),))
    segment = inputs.segment._replace(keys=keys)
    check(backend, reference, operation, CASES[6], "float32", segment=segment)


def test_query_terms_take_a_basis_of_each_sequence(backend: Backend, reference: Backend) -> None:
    args = arguments(backend, "query_terms", make_inputs(backend, CASES[4], "float32"))
    queries, basis, spec = args
    wide = torch.cat([basis, torch.full_like(basis, torch.nan)], dim=1)[:, : basis.shape[1]]
    assert not wide.is_contiguous() and len(basis) == len(queries) == 2
    for changed in ((queries, wide), (queries, basis[:1]), (queries[:1], basis)):
        error = kernel_error(
            *(backend.query_terms, backend, reference, "query_terms"), (*changed, spec)
        )
        assert error <= TOLERANCE["float32"]


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float16", "float32")], ids="-".join)
def test_queries_need_no_dtype_of_the_basis(
    backend: Backend, reference: Backend, dtypes: tuple[str, str]
) -> None:
    of_queries, of_basis = (getattr(torch, dtype) for dtype in dtypes)
    inputs = make_inputs(backend, CASES[2], "float32")
    stored, rows, queries = arguments(backend, "key_scores", inputs)
    stored = stored._replace(basis=stored.basis.to(of_basis))
    args = stored, rows, queries.to(of_queries)
    error = kernel_error(backend.key_scores, backend, reference, "key_scores", args)
    assert error <= max(TOLERANCE[dtype] for dtype in dtypes)
    queries, basis, spec = arguments(backend, "query_terms", inputs)
    args = queries.to(of_queries), basis.to(of_basis), spec
    error = kernel_error(backend.query_terms, backend, reference, "query_terms", args)
    assert error <= TOLERANCE["float32"]


def test_kernel_takes_a_basis_of_each_sequence(backend: Backend, reference: Backend) -> None:
    inputs = make_inputs(backend, CASES[4], "float32")
    stored, rows, queries = arguments(backend, "key_scores", inputs)
    wide = torch.cat([stored.basis, torch.full_like(stored.basis, torch.nan)], dim=1)
    view = stored._replace(basis=wide[:, : stored.basis.shape[1]])
    assert not view.basis.is_contiguous() and view.basis.shape[0] == 2
    one = stored._replace(basis=stored.basis[:1])
    for args in ((view, rows.long(), queries), (one, rows, queries)):
        error = kernel_error(backend.key_scores, backend, reference, "key_scores", args)
        assert error <= TOLERANCE["float32"]


def test_weigh_rows_takes_wide_row_numbers_and_any_strides(
    backend: Backend, reference: Backend
) -> None:
    args = arguments(backend, "weigh_rows", make_inputs(backend, CASES[4], "float32"))
    assert args[1].dtype == torch.int32
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (args[1].long(), *args[2:])]
    assert not any(x.is_contiguous() for x in turned)
    args = args[0], *turned
    error = kernel_error(backend.weigh_rows, backend, reference, "weigh_rows", args)
    assert error <= TOLERANCE["float32"]


def test_weigh_rows_of_no_rows_leaves_the_others(backend: Backend) -> None:
    args = arguments(backend, "weigh_rows", make_inputs(backend, CASES[0], "float32"))
    latent, rows, scores, totals, beside = args
    sums, rest = backend.weigh_rows(latent, rows[..., :0], scores[..., :0], totals, beside)
    assert sums.shape[-1] == CASES[0].rank_v and not sums.any()
    assert torch.equal(rest, beside.reshape(rest.shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [-1000.0, -12.0, 12.0, 1000.0])
def test_weigh_rows_of_rows_or_others_alone(
    backend: Backend, reference: Backend, shift: float, dtype: str
) -> None:
    """A flat softmax, whose weights or what is left are far below one."""
    latent, rows, *others = arguments(backend, "weigh_rows", make_inputs(backend, CASES[6], dtype))
    scores, totals, beside = others[0] / 50, others[1] / 50 + shift, others[2]
    # large enough to be normal numbers of any dtype in what is asked for
    latent = latent.map(lambda x: x * 100 if x.is_floating_point() else x)
    args = latent, rows, scores, totals, beside * 100
    got = backend.weigh_rows(*args)
    assert all(x.isfinite().all() for x in got)
    exact = mapped(args, lambda x: x.cpu().double() if x.is_floating_point() else x.cpu())
    for x, y in zip(got, reference.weigh_rows(*exact), strict=True):
        difference = backend.to_numpy(x) - reference.to_numpy(y)
        largest = max(float(np.abs(reference.to_numpy(y)).max()), 1.0)
        assert np.abs(difference).max() <= TOLERANCE[dtype] * largest


@pytest.mark.parametrize("start", [100_000, 1_000_000])
def test_key_scores_far_positions(backend: Backend, start: int) -> None:
    # float32 angles are coarse out here, and are part of the definition: the cosines are not
    inputs = make_inputs(backend, CASES[0], "float32")
    stored, rows, queries = arguments(backend, "key_scores", inputs)
    got = backend.to_numpy(backend.key_scores(stored._replace(start=start), rows, queries))
    half, ids = CASES[0].head_dim // 2, backend.to_numpy(rows)[0]
    inverse = np.float32(1) / np.array(stored.rope_runs[0].spec.freqs, np.float32)
    angles = (np.float32(start + ids)[..., None] * inverse).astype(np.float64)
    latent = backend.to_numpy(stored.latent.arrays[0])[0].astype(np.float64)
    basis = backend.to_numpy(stored.basis)[0].astype(np.float64)
    keys = np.einsum("hsr,rhd->hsd", latent[ids], basis)
    x, y = keys[..., :half], keys[..., half:]
    turned = [x * np.cos(angles) - y * np.sin(angles), y * np.cos(angles) + x * np.sin(angles)]
    grouped = backend.to_numpy(queries)[0].reshape(len(keys), -1, 2 * half).astype(np.float64)
    want = grouped @ np.concatenate(turned, axis=-1).swapaxes(-1, -2)
    assert relative_error(got[0], want) <= 1e-6


@pytest.mark.parametrize("operation", [x for x in OPERATIONS if x not in WITHOUT_LATENT])
def test_index_reads_no_words_but_the_first_bands(
    backend: Backend, reference: Backend, operation: str
) -> None:
    """What is left out there changes what is rebuilt, and nothing that is scored."""
    inputs = make_inputs(backend, CASES[6], "float32")
    args = arguments(backend, operation, inputs)

    def flip(latent: Latent) -> Latent:
        words, *others = latent.arrays
        is_first = torch.arange(words.shape[-1], device=words.device) < 16
        return Latent((torch.where(is_first, words, ~words), *others), latent.bits)

    changed = mapped(args, flip, Latent)
    run = getattr(backend, operation)
    first, second = (results(run(*x))[0] for x in (args, changed))
    assert torch.equal(first, second) == (operation == "index_scores")


@pytest.mark.parametrize("case", [CASES[3], CASES[6]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_use_check_passes(backend: Backend, case: DecodeCase, dtype: str) -> None:
    checked = xkv.load_backend("torch", device=str(backend.device), kernels="on")
    inputs = make_inputs(backend, case, dtype)
    for operation in OPERATIONS:
        getattr(checked, operation)(*arguments(backend, operation, inputs))
        assert checked.kernels.last_path[operation] == operation


@pytest.mark.parametrize("n_rows", [1, 9, 32767, 32769, 70_001])
@pytest.mark.parametrize("kind", ["positive", "negative", "few numbers", "no numbers"])
def test_choose_rows_takes_the_largest_in_their_order(
    backend: Backend, n_rows: int, kind: str
) -> None:
    worth = backend.normal((2, 2, n_rows), 4)
    worth = worth.abs() if kind == "positive" else -worth.abs() - 1e-30
    if kind == "few numbers":
        # ties: of one run, between runs, at the edge of the choice
        worth = worth.round()
    if kind == "no numbers":
        worth[:, :, n_rows // 2 :] = -torch.inf
    for count in {1, min(n_rows, 100), min(n_rows, 128)}:
        rows = backend.choose_rows(worth, count)
        assert backend.kernels.last_path["choose_rows"] == "choose_rows"
        # of equal ones the first, as of a stable order
        want = worth.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values
        assert torch.equal(rows, want)
