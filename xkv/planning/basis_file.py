"""A model's calibration in a file: the basis of its own, see :mod:`xkv.planning.calibration`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from xkv.cache.whole_file import whole_file
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.planning.profile import cache_folder
from xkv.store.model_basis import Directions, ModelBasis, loaded_basis
from xkv.tiny import CHECKPOINT_DIR

FORMAT = 3
OFF = "XKV_NO_CALIBRATION"
"""An environment variable: set, no model is calibrated at its first use."""

_UNSAVED: dict[tuple[str, Any, str, str], ModelBasis] = {}
"""Calibrations that could not be written, for the rest of the process."""

_ARRAYS = ("rows", "scales", "energies")

Groups = tuple[tuple[int, ...], ...]


def basis_path(fingerprint: str, groups: Groups) -> Path:
    """Where the calibration of a model is, or would be kept: the bundled model ships with its own.

    Args:
        fingerprint: Of the model's weights.
        groups: Layers that share a basis.
    """
    code = hashlib.sha256(repr([list(group) for group in groups]).encode()).hexdigest()[:8]
    name = f"xkv-basis-{fingerprint}-{code}.safetensors"
    shipped = CHECKPOINT_DIR.parent / "basis" / name
    return shipped if shipped.is_file() else cache_folder() / name


def write_basis(
    path: Path,
    fingerprint: str,
    basis: ModelBasis,
    note: str,
) -> None:
    """Write a calibration; an older file survives a failure.

    Raises:
        InputError: If the file cannot be written.
    """
    arrays = {
        f"{number}.{part}.{name}": np.ascontiguousarray(getattr(each, name))
        for number, group in enumerate(basis.directions)
        for part, each in enumerate(group)
        for name in _ARRAYS
    }
    about = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "groups": basis.groups,
        "heads": [[each.heads for each in group] for group in basis.directions],
        "weights": list(basis.weights.items()),
        "note": note,
    }
    data = save(arrays, {"xkv_basis": json.dumps(about)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; nothing was changed") from error
    with whole_file(path, len(data), ()) as beside:
        Path(beside).write_bytes(data)


def read_basis(path: Path, fingerprint: str, groups: Groups, backend: Backend) -> ModelBasis:
    """Read a calibration for one device.

    Args:
        path: The file.
        fingerprint: Of the model that it is for.
        groups: Its layers that share a basis.
        backend: Whose arrays are made of it.

    Raises:
        InputError: If the file cannot be read, or is of another model, other groups, or a version.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads((file.metadata() or {})["xkv_basis"])
            if about["format"] != FORMAT:
                raise InputError(
                    f"it has format {about['format']} and this version of xkv reads {FORMAT}"
                )
            found = tuple(tuple(group) for group in about["groups"])
            if (about["fingerprint"], found) != (fingerprint, groups):
                raise InputError("it is of another model, or of other groups of layers")
            directions = tuple(
                tuple(
                    Directions(
                        **{name: file.get_tensor(f"{number}.{part}.{name}") for name in _ARRAYS},
                        heads=tuple(each),
                    )
                    for part, each in enumerate(heads)
                )
                for number, heads in enumerate(about["heads"])
            )
            weights = {
                float(ratio): tuple(map(tuple, by_group)) for ratio, by_group in about["weights"]
            }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, InputError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InputError(
            f"{path} is no calibration that can be used: {reason}; make it again with "
            "python -m xkv.calibrate --again"
        ) from error
    return ModelBasis(backend, uid_of(directions), groups, directions, weights)


def keep_unsaved(fingerprint: str, basis: ModelBasis) -> None:
    """Let :func:`find_basis` find a calibration that has no file."""
    backend = basis.backend
    _UNSAVED[fingerprint, basis.groups, backend.name, backend.device_name] = basis


def uid_of(directions: tuple[tuple[Directions, ...], ...]) -> str:
    """Names a calibration by what it measured."""
    energies = (each.energies.tobytes() for group in directions for each in group)
    return hashlib.sha256(b"".join(energies)).hexdigest()


def find_basis(
    fingerprint: str, groups: Groups, config: XKVConfig, backend: Backend
) -> ModelBasis | None:
    """The calibration of a model, None where it has none or the configuration wants none.

    Raises:
        InputError: If the configuration insists and there is none, or there is one that cannot be
            used.
    """
    if not config.wants_model_basis:
        return None
    path = basis_path(fingerprint, groups)
    if path.is_file():
        return read_basis(path, fingerprint, groups, backend)
    key = fingerprint, groups, backend.name, backend.device_name
    if key in _UNSAVED:
        return _UNSAVED[key]
    if config.basis == "calibrated":
        raise InputError(
            "the model has no calibration for these groups of layers: make it with "
            "python -m xkv.calibrate, or leave basis='calibrated' out"
        )
    return None


def basis_of_cache(
    backend: Backend, fingerprint: str | None, groups: Groups, uid: str
) -> ModelBasis:
    """The calibration that a prompt cache from a file was made with.

    Raises:
        InputError: If it is not loaded, and not where the model's is kept.
    """
    found = loaded_basis(backend, uid)
    path = basis_path(fingerprint or "", groups)
    if found is None and path.is_file():
        read = read_basis(path, fingerprint or "", groups, backend)
        found = read if read.uid == uid else None
    if found is None:
        raise InputError(
            "the prompt cache was made with a calibration of its model that is not here any more: "
            "make it again"
        )
    return found
