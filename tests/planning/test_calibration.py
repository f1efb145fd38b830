"""A basis of the model's own: measured, kept, resumed, refused, and the same on both frameworks."""

from __future__ import annotations

import fcntl
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.planning.pieces import CONFIG, pieces
from xkv import InputError
from xkv.cli import first_use
from xkv.cli.engine import load_engine
from xkv.planning import basis_file
from xkv.planning import calibrate_model as module
from xkv.planning.basis_file import OFF, basis_path, find_basis, read_basis, uid_of
from xkv.planning.calibrate_model import N_HELD_OUT, calibrate_model
from xkv.planning.calibration import (
    calibration_pieces,
    find_directions,
    gather,
)
from xkv.planning.moments import Moments
from xkv.store.model_basis import MAX_PLANS
from xkv.store.ranks import plan_ranks

WEIGHTS = {8.0: ((1.0, 0.5), (2.0, 0.25))}


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setattr(basis_file, "_UNSAVED", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "xkv"


@pytest.fixture
def fast(monkeypatch):
    """No errors are measured, which takes most of the time."""
    monkeypatch.setattr(module, "measured_weights", lambda *_: WEIGHTS)


def test_a_calibration_survives_its_file(subject, cache_home, fast):
    done = calibrate_model(subject, pieces, lambda *_: None)
    groups, backend = subject.plan.groups, subject.backend
    assert done.problem is None and done.path == basis_path(subject.fingerprint, groups)
    assert not list(cache_home.glob("*.partial"))
    again = find_basis(subject.fingerprint, groups, CONFIG, backend)
    assert (again.uid, again.groups, again.weights) == (done.basis.uid, groups, WEIGHTS)
    for mine, its in zip(done.basis.directions[1], again.directions[1], strict=True):
        for x, y in zip(mine, its, strict=True):
            np.testing.assert_array_equal(x, y)
    # a second run reads it
    assert calibrate_model(subject, lambda: pytest.fail("read"), print).basis.uid == again.uid
    assert find_basis(subject.fingerprint, groups, replace(CONFIG, basis="prompt"), backend) is None


def test_directions_are_orthonormal_and_by_falling_energy(subject, tmp_path):
    moments = Moments(tmp_path)
    gather(subject, pieces(1), moments, lambda *_: None)
    for group in find_directions(subject, moments):
        for each in group:
            scaled = each.rows.astype(np.float64) * each.scales
            np.testing.assert_allclose(scaled @ scaled.T, np.eye(len(scaled)), atol=5e-3)
            assert (np.diff(each.energies) <= 1e-6 * each.energies[0]).all()
            assert (each.scales > 0).all()


def test_both_frameworks_measure_the_same(folder, tmp_path):
    found = []
    for name in ("mlx", "torch"):
        moments = Moments(tmp_path / name)
        moments.folder.mkdir()
        measured = load_engine(name, str(folder)).subject(CONFIG)
        gather(measured, pieces(1), moments, lambda *_: None)
        found.append((measured.fingerprint, find_directions(measured, moments)))
    (first, mlx), (second, torch) = found
    assert first == second
    for one, other in zip(mlx, torch, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_allclose(x.scales, y.scales, rtol=2e-2)
            np.testing.assert_allclose(x.energies[:20], y.energies[:20], rtol=2e-2)


def test_an_interrupted_calibration_goes_on_where_it_ended(subject, cache_home, fast):
    def stop(phase, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_model(subject, pieces, stop)
    assert list(cache_home.glob("*.partial"))
    seen = []
    resumed = calibrate_model(subject, pieces, lambda *step: seen.append(step))
    assert seen[0] == ("calibrate", 1, 2)
    whole = calibrate_model(subject, pieces, lambda *_: None, again=True)
    assert resumed.basis.uid == whole.basis.uid


def test_one_process_calibrates_at_a_time(subject, cache_home, fast, monkeypatch):
    def refuse(*_):
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match="another process is calibrating this model"):
        calibrate_model(subject, pieces, lambda *_: None)


def test_a_folder_that_cannot_be_written_holds_for_the_run(subject, cache_home, fast):
    cache_home.parent.write_text("a file")
    done = calibrate_model(subject, pieces, lambda *_: None)
    assert done.path is None and "for this run only" in done.problem
    found = find_basis(subject.fingerprint, subject.plan.groups, CONFIG, subject.backend)
    assert found is done.basis


def test_files_that_do_not_fit_are_refused(subject, cache_home, fast):
    path = calibrate_model(subject, pieces, lambda *_: None).path
    groups, backend = subject.plan.groups, subject.backend
    with pytest.raises(InputError, match="of another model, or of other groups"):
        read_basis(path, "00000000", groups, backend)
    with pytest.raises(InputError, match="of other groups"):
        read_basis(path, subject.fingerprint, groups[:1], backend)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="no calibration that can be used"):
        find_basis(subject.fingerprint, groups, CONFIG, backend)
    path.unlink()
    with pytest.raises(InputError, match="has no calibration for these groups"):
        find_basis(
            subject.fingerprint, groups, replace(CONFIG, compression=4, basis="calibrated"), backend
        )


def test_too_little_text_and_numbers_that_are_not_finite(subject, cache_home, fast, monkeypatch):
    with pytest.raises(InputError, match="too little text"):
        calibrate_model(subject, lambda: pieces(N_HELD_OUT), lambda *_: None)
    monkeypatch.setattr(
        "xkv.planning.calibration.gram_matrix", lambda backend, rows, dtype: rows[:, :1] * np.nan
    )
    with pytest.raises(InputError, match="NaN or infinity on the calibration texts"):
        calibrate_model(subject, pieces, lambda *_: None)


def test_texts_come_in_turn_and_a_users_are_added(folder, tmp_path):
    tokenizer = load_engine("torch", str(folder)).tokenizer
    ours = calibration_pieces(tokenizer)
    assert sum(map(len, ours)) >= 16_384
    mine = tmp_path / "mine.txt"
    mine.write_text("Words of my own. " * 1000)
    assert len(calibration_pieces(tokenizer, [str(mine)])) > len(ours)
    mine.write_text("short")
    with pytest.raises(InputError, match="calibration needs at least 256"):
        calibration_pieces(tokenizer, [str(mine)])
    with pytest.raises(InputError, match="cannot read"):
        calibration_pieces(tokenizer, [str(tmp_path / "nowhere")])


def test_the_name_of_a_calibration_is_what_it_measured(subject, tmp_path):
    moments = Moments(tmp_path)
    gather(subject, pieces(1), moments, lambda *_: None)
    directions = find_directions(subject, moments)
    assert uid_of(directions) == uid_of(directions) != uid_of(directions[:1])


def test_a_command_calibrates_once(subject, cache_home, fast, monkeypatch, capsys):
    tokenizer = None
    monkeypatch.setattr(first_use, "calibration_pieces", lambda *_: pieces())
    ask = (lambda: subject), tokenizer, CONFIG
    assert first_use.calibrate_at_first_use(*ask, False) is None  # the environment of these tests
    monkeypatch.delenv(OFF)
    assert first_use.calibrate_at_first_use(*ask, True) is None
    assert not capsys.readouterr().err
    basis = first_use.calibrate_at_first_use(*ask, False)
    err = capsys.readouterr().err
    assert basis is not None and "once" in err and f"kept in {cache_home}" in err
    assert first_use.calibrate_at_first_use(*ask, False) is None
    assert not capsys.readouterr().err


def test_a_calibration_that_fails_leaves_the_command_running(
    subject, cache_home, monkeypatch, capsys
):
    monkeypatch.delenv(OFF)
    monkeypatch.setattr(first_use, "calibration_pieces", lambda *_: pieces(1))
    assert first_use.calibrate_at_first_use(lambda: subject, None, CONFIG, False) is None
    assert "too little text" in (err := capsys.readouterr().err) and "basis of its own" in err


def test_lengths_share_plans_and_few_are_kept(subject, basis):
    shape = subject.plan.probe.cache_shape(subject.plan.groups)
    config = replace(CONFIG, compression=3, attention="exact")
    plans, dtype = set(), subject.backend.xp.float32
    for n_tokens in range(2000, 8000, 97):
        plan = plan_ranks(shape, config, n_tokens, basis=basis)
        plans.add(plan.bits)
        held = plan.held_bytes(shape, config, n_tokens)
        assert held <= shape.dense_bytes(n_tokens) / 3 * 1.001
        for number, bits in enumerate(plan.bits):
            basis.columns(number, bits, dtype)
    assert len(plans) <= 20
    widest = sum(x.scales.size**2 for group in basis.directions for x in group) * 4
    assert basis.nbytes <= MAX_PLANS * (widest + 4 * 1024)


def test_a_full_disk_is_one_sentence_and_loses_nothing(subject, cache_home, fast, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as at_once:
        at_once.setattr("xkv.planning.moments.np.save", full)
        with pytest.raises(InputError, match="No space left on device; calibration goes on"):
            calibrate_model(subject, pieces, lambda *_: None)
    with monkeypatch.context() as at_the_end:
        at_the_end.setattr(module, "write_basis", lambda *_: _raise(InputError("cannot write it")))
        done = calibrate_model(subject, pieces, lambda *_: None)
        assert done.path is None and "cannot write it" in done.problem
    seen = []
    calibrate_model(subject, pieces, lambda *step: seen.append(step))
    assert seen[0] == ("calibrate", 2, 2)


def _raise(error):
    raise error


def test_torch_calibrates_in_float32_on_a_cpu(folder, cache_home, fast, monkeypatch):
    model = (engine := load_engine("torch", str(folder))).model.to(torch.bfloat16)
    subject, seen = engine.subject(CONFIG), set()
    before = {name: x.clone() for name, x in model.named_parameters()}

    def fill(self, *args):
        seen.update(x.dtype for x in model.parameters())
        raise InputError("interrupted")

    monkeypatch.setattr(type(subject), "fill", fill)
    with pytest.raises(InputError, match="interrupted"):
        calibrate_model(subject, pieces, lambda *_: None)
    assert seen == {torch.float32}
    for name, x in model.named_parameters():
        assert x.dtype == torch.bfloat16 and torch.equal(x, before[name])
