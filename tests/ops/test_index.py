"""The latent index: what it scores, and what it finds."""

from __future__ import annotations

import numpy as np
import pytest

from xkv import RopeSpec, load_backend
from xkv.checks.decode_cases import CASES, DecodeCase, make_inputs
from xkv.checks.operations import absorbed_of, offsets_of
from xkv.checks.tolerances import relative_error
from xkv.config import BAND
from xkv.ops import index
from xkv.ops.attention import rebuild_all
from xkv.ops.backend import MAX_TABLES
from xkv.ops.index import BLOCK, absorbed_queries, index_basis, index_columns, index_scores
from xkv.ops.latent import Latent
from xkv.ops.types import RopeRun, Stored
from xkv.store.codec import pack_latent

SEVERAL = DecodeCase(900, 4, 2, 64, bits=(4, 3), batch=2, start=3)
SPECS = (RopeSpec.standard(64, 10_000.0), RopeSpec.standard(64, 50_000.0))
RUNS = {
    "one": (RopeRun(900, SPECS[0]),),
    "two": (RopeRun(500, SPECS[0]), RopeRun(400, SPECS[1])),
    "none": (RopeRun(900, None),),
    "one short": (RopeRun(100, SPECS[1]), RopeRun(800, SPECS[0])),
}


def columns_of(backend, latent, dtype) -> np.ndarray:
    parts = index_columns(backend, latent, dtype)
    return np.concatenate([backend.to_numpy(part) for part in parts], axis=-1)


def by_definition(backend, x) -> np.ndarray:
    """Scores ``[B, n_kv_heads, L]`` row by row: means over the positions of a row's block."""
    stored, case = x.segment.keys, x.case
    columns = columns_of(backend, stored.latent, stored.basis.dtype)
    rows = np.einsum("blr,brhd->bhld", columns, backend.to_numpy(index_basis(backend, stored)))
    queries = backend.to_numpy(x.queries * x.scale)
    queries = queries.reshape(case.batch, case.n_kv_heads, -1, case.head_dim)
    offsets = backend.to_numpy(offsets_of(backend, x)).reshape(queries.shape[:3])
    ends = np.cumsum([run.n_rows for run in stored.rope_runs])
    found = np.zeros(rows.shape[:3])
    for first in range(0, case.n_rows, BLOCK):
        middle = min(first + BLOCK // 2, case.n_rows - 1)
        spec = stored.rope_runs[int(np.searchsorted(ends, middle, side="right"))].spec
        mine, total = rows[:, :, first : first + BLOCK], 0.0
        for position in range(first, first + BLOCK):
            at = backend.positions(stored.start + position, 1)
            turned = backend.from_numpy(np.ascontiguousarray(mine))
            turned = turned if spec is None else backend.rope(turned, at, spec)
            total = total + queries @ backend.to_numpy(turned).swapaxes(-1, -2)
        scores = total / BLOCK - offsets[..., None]
        found[:, :, first : first + BLOCK] = scores.max(axis=2)
    return found


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_scores_are_means_over_the_positions_of_a_block(reference, runs):
    x = make_inputs(reference, SEVERAL, "float32", exact=True)
    segment = x.segment._replace(keys=x.segment.keys._replace(rope_runs=runs))
    x = type(x)(**{**vars(x), "segment": segment})
    got = index_scores(
        reference, absorbed_of(reference, x), segment.keys.latent, offsets_of(reference, x), 2
    )
    assert relative_error(reference.to_numpy(got), by_definition(reference, x)) < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_is_scored_by_definition(reference, case):
    x = make_inputs(reference, case, "float32", exact=True)
    latent, offsets = x.segment.keys.latent, offsets_of(reference, x)
    got = index_scores(reference, absorbed_of(reference, x), latent, offsets, case.n_kv_heads)
    assert relative_error(reference.to_numpy(got), by_definition(reference, x)) < 1e-6


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_the_row_that_a_query_is_made_of_is_found(name):
    """In each part of a long segment, its last row too."""
    backend = load_backend(name, kernels="off")
    x = make_inputs(backend, DecodeCase(1000, 2, 1, 64, 48, 16), "float32")
    keys = backend.to_numpy(rebuild_all(backend, x.segment.keys))
    for row in (0, 130, 255, 256, 700, 999):
        queries = np.zeros((1, 2, 1, 64), np.float32)
        queries[0, 1, 0] = 10 * keys[0, 0, row]
        absorbed = absorbed_queries(backend, backend.from_numpy(queries), x.segment.keys)
        offsets = backend.from_numpy(np.zeros((1, 2), np.float32))
        scores = backend.index_scores(absorbed, x.segment.keys.latent, offsets, 1)
        assert row in backend.to_numpy(backend.top_indices(scores, 40))


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_bands_after_the_first_are_read_without_their_words(name):
    """Their means are, nearly, the middles of their ranges: strong directions are put there."""
    backend = load_backend(name, kernels="off")
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((1, 300, 3 * BAND)).astype(np.float32)
    strong = 6 * generator.standard_normal((1, 300, 2)).astype(np.float32)
    rows[..., BAND : 2 * BAND] += strong[..., :1]
    rows[..., 2 * BAND :] += strong[..., 1:]
    latent = pack_latent(backend, backend.from_numpy(rows), (4, 3, 2))
    words, scales, biases = latent.arrays
    blind = backend.xp.where(backend.positions(0, words.shape[-1]) < 8, words, 0 * words)
    latent = Latent((blind, scales, biases), latent.bits)
    got = columns_of(backend, latent, backend.xp.float32)
    assert got.shape[-1] == index.n_columns(latent) == BAND + 2
    assert relative_error(got[..., :BAND], rows[..., :BAND].astype(np.float64)) < 0.1
    assert relative_error(got[..., BAND:], 8 * strong.astype(np.float64)) < 0.1


def test_a_block_belongs_to_the_rotation_of_its_middle(reference):
    stored = Stored(
        Latent((reference.from_numpy(np.zeros((1, 600, 4))),)),
        reference.from_numpy(np.zeros((1, 4, 1, 64))),
        5,
        (RopeRun(300, SPECS[0]), RopeRun(300, SPECS[1])),
    )
    table = index.block_table(reference, stored, False, reference.xp.float64)
    first, second = (index.block_numbers(spec, 5, 3, False) for spec in SPECS)
    assert (
        relative_error(reference.to_numpy(table), np.stack([first[0], second[1], second[2]])) < 1e-7
    )


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_top_indices_are_those_of_a_full_sort(name):
    backend = load_backend(name, kernels="off")
    for n_rows in (39, 640, 1000, 4099):
        scores = np.random.default_rng(n_rows).standard_normal((2, 3, n_rows)).astype(np.float32)
        scores[..., 100:116] += 9  # many in one run
        got = backend.to_numpy(backend.top_indices(backend.from_numpy(scores), 20))
        want = np.argsort(-scores, axis=-1)[..., :20]
        np.testing.assert_array_equal(np.sort(got), np.sort(want))


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_a_rope_of_each_call_keeps_few_tables(name):
    """One that changes with the length rotates every token of a reply by another spec."""
    backend = load_backend(name, kernels="off")
    runs = tuple(RopeRun(1, RopeSpec.standard(64, 10_000.0 + i)) for i in range(300))
    latent = Latent((backend.normal((1, 300, 8), 0),))
    stored = Stored(latent, backend.normal((1, 8, 1, 64), 1), 0, runs)
    table = index.block_table(backend, stored, False, backend.xp.float32)
    # of the rows in the middle of two blocks, the second of which is not full
    specs = [runs[BLOCK // 2].spec, runs[-1].spec]
    want = [index.block_numbers(spec, 0, 2, False)[i] for i, spec in enumerate(specs)]
    assert relative_error(backend.to_numpy(table), np.stack(want)) < 1e-6
    assert len(backend._angles) == 2
    for i in range(200):
        backend.block_angles(RopeSpec.standard(64, 9.0 + i), 0, 2, False, backend.xp.float32)
    assert len(backend._angles) <= MAX_TABLES
