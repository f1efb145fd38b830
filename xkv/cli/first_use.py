"""Calibrating a model when a command first meets it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xkv.cli.terminal import ProgressBars
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.basis_file import OFF, basis_path
from xkv.planning.calibrate_model import Calibrated, calibrate_model
from xkv.planning.calibration import Subject, calibration_pieces
from xkv.store.model_basis import ModelBasis


def calibrate_at_first_use(
    make_subject: Callable[[], Subject], tokenizer: Any, config: XKVConfig | None, is_off: bool
) -> ModelBasis | None:
    """Measure the basis of a model that has none, unless that is turned off; says so on stderr.

    Args:
        make_subject: Makes the model's form for calibration.
        tokenizer: The model's.
        config: Of the command; nothing is done where it wants no basis of the model's.
        is_off: Whether ``--no-calibration`` was given.

    Returns:
        What was measured now, None if nothing was.
    """
    if config is None or not config.wants_model_basis or is_off or os.environ.get(OFF):
        return None
    subject = make_subject()
    if basis_path(subject.fingerprint, subject.plan.groups).is_file():
        return None
    print(
        f"Calibrating {subject.plan.name}, once; it is kept for later runs, and --no-calibration "
        "goes on without",
        file=sys.stderr,
    )
    try:
        return calibrate(subject, tokenizer).basis
    except InputError as error:
        print(f"Note: {error}; each prompt gets a basis of its own", file=sys.stderr)
        return None


def calibrate(
    subject: Subject,
    tokenizer: Any,
    files: Sequence[str] = (),
    again: bool = False,
    out: Path | None = None,
) -> Calibrated:
    """:func:`xkv.planning.calibrate_model.calibrate_model` with progress bars, told where it is."""
    with ProgressBars() as bars:
        done = calibrate_model(
            subject, lambda: calibration_pieces(tokenizer, files), bars.update, again, out
        )
    kept = f"kept in {done.path}" if done.path else f"Note: {done.problem}"
    print(f"Calibration: {kept}", file=sys.stderr)
    return done
