"""From a model and texts to a calibration in a file: once for a model, resumed where it ended."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from xkv.errors import InputError
from xkv.planning.basis_file import basis_path, keep_unsaved, read_basis, uid_of, write_basis
from xkv.planning.calibration import (
    CONTEXT_TOKENS,
    PREDICTED_TOKENS,
    Subject,
    find_directions,
    gather,
)
from xkv.planning.moments import Moments
from xkv.planning.tensor_weights import measured_weights
from xkv.store.model_basis import ModelBasis

N_HELD_OUT = 3
"""Pieces, of different texts, on which plans are tried."""

OnPhase = Callable[[str, int, int], None]
"""Called with what is done, and how much of it, and in all."""


@dataclass(frozen=True)
class Calibrated:
    """What a calibration gave.

    Args:
        basis: Of the model.
        path: Where it is kept; None where that could not be written.
        problem: Why not, in a sentence.
    """

    basis: ModelBasis
    path: Path | None
    problem: str | None = None


def calibrate_model(
    subject: Subject,
    read_pieces: Callable[[], Sequence[Sequence[int]]],
    on_phase: OnPhase,
    again: bool = False,
    out: Path | None = None,
) -> Calibrated:
    """Measure a model's basis, or read it where it was measured before.

    Args:
        subject: The model.
        read_pieces: Gives pieces of text, those of different kinds in turn; the first are held out
            to compare plans.
        on_phase: Told of the progress.
        again: Measure although there is one.
        out: Where to keep it instead of the user's cache.

    Raises:
        InputError: If another process calibrates the model, there is too little text, the model's
            rows are not finite, or a file that is there cannot be used.
    """
    groups = subject.plan.groups
    path = out or basis_path(subject.fingerprint, groups)
    if path.is_file() and not again:
        return Calibrated(read_basis(path, subject.fingerprint, groups, subject.backend), path)
    pieces = read_pieces()
    n_needed = CONTEXT_TOKENS + PREDICTED_TOKENS
    held_out = [piece for piece in pieces[:N_HELD_OUT] if len(piece) >= n_needed]
    if len(held_out) == len(pieces) or not held_out:
        raise InputError(
            f"there is too little text to calibrate on: pieces of {n_needed} tokens are needed, "
            f"more than {N_HELD_OUT} of them"
        )
    with subject.at_full_speed(), _folder(path, pieces) as (folder, problem):
        moments = Moments(folder)
        try:
            gather(
                subject,
                pieces[len(held_out) :],
                moments,
                lambda done, total: on_phase("calibrate", done, total),
            )
        except OSError as error:
            raise InputError(
                f"cannot keep what was measured in {folder}: {error.strerror or error}; "
                "calibration goes on from there once it can be written"
            ) from error
        directions = find_directions(subject, moments)
        basis = ModelBasis(subject.backend, uid_of(directions), groups, directions)
        weights = measured_weights(
            subject, basis, held_out, lambda done, total: on_phase("plan", done, total)
        )
        basis = replace(basis, weights=weights)
        if problem is None:
            note = f"{moments.done['rows']} tokens"
            try:
                write_basis(path, subject.fingerprint, basis, note)
                shutil.rmtree(folder, ignore_errors=True)
            except InputError as error:
                problem = str(error)
    if problem is not None:
        keep_unsaved(subject.fingerprint, basis)
    return Calibrated(basis, None if problem else path, problem)


@contextlib.contextmanager
def _folder(path: Path, pieces: Sequence[Sequence[int]]) -> Iterator[tuple[Path, str | None]]:
    """A folder for what is summed, and why nothing will be kept.

    Raises:
        InputError: If another process uses it.
    """
    code = hashlib.sha256(json.dumps([list(piece) for piece in pieces]).encode()).hexdigest()[:8]
    folder = path.with_name(f"{path.stem}.{code}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        with tempfile.TemporaryDirectory() as name:
            yield (
                Path(name),
                f"the calibration holds for this run only: {folder.parent} cannot be written "
                f"({error.strerror})",
            )
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                "another process is calibrating this model: wait for it, or go on without with "
                "--no-calibration"
            ) from None
        yield folder, None
