"""The synthetic decode step: its forms agree, a planted fault does not, and its shapes hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xkv import InputError, load_backend
from xkv.checks.decode_step import BUNDLED, LLAMA_8B, SMOLLM2, DecodeStep, time_alternating
from xkv.store.shapes import GroupShape

SMALL = replace(LLAMA_8B, model=replace(LLAMA_8B.model, n_heads=8, group=GroupShape(4, 2, 64, 64)))
CASES = {
    "small-f32": replace(SMALL, dtype="float32", batch=2),
    "small-f16": replace(SMALL, dtype="float16", batch=2),
    "small-bf16": replace(SMALL, batch=2),
    "bundled-f16": BUNDLED,
    "smollm2-f32": replace(SMOLLM2, dtype="float32"),
}


@pytest.mark.parametrize("backend_name", ["mlx", "torch"])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_forms_agree_where_they_attend_to_every_row(shape, backend_name):
    backend = load_backend(backend_name, kernels="off")
    assert DecodeStep(backend, shape, 700).parity() is None


def change_slots(step, **changes):
    step.dense = step.dense._replace(slots=step.dense.slots._replace(**changes))


def empty_the_slots(step):
    change_slots(step, scales=0 * step.dense.slots.scales)


def name_other_rows(step):
    change_slots(step, rows=step.dense.slots.rows - 1)


def lose_the_swapped_rows(step):
    """Only a second step sees it."""
    swapped = step.working_set

    def working_set(n_rebuilt=None):
        held = step.dense.slots.numbers
        found = swapped(n_rebuilt)
        change_slots(step, numbers=held)
        return found

    step.working_set = working_set


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (empty_the_slots, "working set differs"),
        (name_other_rows, "working set differs"),
        (lose_the_swapped_rows, "working set after its swaps differs"),
    ],
)
def test_parity_sees_a_planted_fault(mlx_backend, fault, words):
    step = DecodeStep(mlx_backend, replace(SMALL, dtype="float32"), 700)
    assert step.n_kept > 8
    fault(step)
    assert (step.parity() or "").startswith(words)


def test_steps_keep_their_shapes_and_say_what_they_move(reference):
    step = DecodeStep(reference, SMALL, 2500)
    layout = step.config.layout(2500)
    assert step.dense.keys.shape[-2] == 2500 - layout.n_rows
    for _ in range(2):
        output, numbers, scales, kept = step.working_set()
        assert output.shape == (1, 8, 1, 64)
        assert numbers.shape == (1, 2, layout.n_kept, 128)
        assert scales.shape == (1, 2, layout.n_kept, 2)
        # distinct rows of the store
        for row in kept.reshape(-1, layout.n_kept).tolist():
            assert len(set(row)) == layout.n_kept and min(row) >= 0 and max(row) < layout.n_rows
    moved = step.moved_bytes()
    assert moved["full"] == 2500 * 2 * 2 * 64 * 2
    assert set(moved) == set(step.forms()) == {"full", "every row", "working set"}


def test_swaps_bring_in_rows_that_are_worth_more(reference):
    step = DecodeStep(reference, SMALL, 2500)
    before = step.dense.slots.rows.clone()
    step.working_set()
    assert not (step.dense.slots.rows == before).all()


def test_budget_is_what_is_kept_and_rebuilt(reference):
    step = DecodeStep(reference, replace(SMALL, budget=300), 2500)
    assert step.n_kept + step.n_rebuilt == 300


def test_too_short_a_cache_is_refused(reference):
    with pytest.raises(InputError, match="15 tokens are too few"):
        DecodeStep(reference, SMALL, 15)


def test_forms_are_timed_in_turn(reference):
    called = []
    forms = {name: lambda name=name: called.append(name) or [] for name in ("one", "two")}
    timings = time_alternating(reference, forms, 3)
    assert called == ["one", "two"] * 4
    assert all(0 <= x.low_ms <= x.median_ms <= x.high_ms for x in timings.values())
