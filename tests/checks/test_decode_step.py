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


def change_recent(step, **changes):
    step.dense = step.dense._replace(recent=step.dense.recent._replace(**changes))


def empty_the_recent(step):
    change_recent(step, scales=0 * step.dense.recent.scales)


def shift_the_recent(step):
    change_recent(step, numbers=step.backend.xp.roll(step.dense.recent.numbers, 1, axis=2))


def leave_out_too_few(step):
    step.n_recent -= 1


@pytest.mark.parametrize("fault", [empty_the_recent, shift_the_recent, leave_out_too_few])
def test_parity_sees_a_planted_fault(mlx_backend, fault):
    step = DecodeStep(mlx_backend, replace(SMALL, dtype="float32"), 700)
    assert step.n_recent > 8
    fault(step)
    assert (step.parity() or "").startswith("working set differs")


def test_steps_say_what_they_move(reference):
    step = DecodeStep(reference, SMALL, 2500)
    layout = step.config.layout(2500)
    assert step.dense.keys.shape[-2] == 2500 - layout.n_rows
    assert step.dense.recent.n_rows == layout.n_recent == 2500 * 7 // 256
    (output,) = step.working_set()
    assert output.shape == (1, 8, 1, 64)
    moved = step.moved_bytes()
    assert moved["full"] == 2500 * 2 * 2 * 64 * 2
    assert set(moved) == set(step.forms()) == {"full", "every row", "working set"}


def test_budget_is_what_is_kept_and_rebuilt(reference):
    step = DecodeStep(reference, replace(SMALL, budget=300), 2500)
    assert step.n_recent + step.n_rebuilt == 300


def test_too_short_a_cache_is_refused(reference):
    with pytest.raises(InputError, match="15 tokens are too few"):
        DecodeStep(reference, SMALL, 15)


def test_forms_are_timed_in_turn(reference):
    called = []
    forms = {name: lambda name=name: called.append(name) or [] for name in ("one", "two")}
    timings = time_alternating(reference, forms, 3)
    assert called == ["one", "two"] * 4
    assert all(0 <= x.low_ms <= x.median_ms <= x.high_ms for x in timings.values())
