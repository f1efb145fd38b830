"""Prefilled texts on disk, with what the full cache says comes next: made once for all methods."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from xkv.cache.whole_file import whole_file
from xkv.errors import InputError
from xkv.evaluation.prefix import Prefix
from xkv.planning.document import Document
from xkv.planning.language_model import LanguageModel

BLOCK = 64
"""Tokens of a continuation whose distributions are computed at a time."""

FORMAT = 1
OF_THE_MODEL = "backend", "ropes", "dtype", "make_cache"
"""Fields of a document that a file does not hold."""

REFERENCE = "reference"
N_SAMPLES, SAMPLE_BYTES = 256, 4096
"""Places of each file of weights that tell it from others, and bytes read there."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prefill:
    """The beginning of a text in a model's full cache.

    Args:
        document: Its rows in the KV dtype, which methods start from.
        reference: Log probabilities of what follows each token of the continuation out of the
            rows as they were computed, ``[C, vocabulary]`` float32.
    """

    document: Document
    reference: np.ndarray


@dataclass(frozen=True)
class Prefills:
    """A folder of prefills of one model.

    Args:
        folder: Made if it is not there.
        model: The model.
        checkpoint: :func:`checkpoint_code` of the model.
    """

    folder: Path
    model: LanguageModel
    checkpoint: str

    def get(self, tokens: Sequence[int], continuation: Sequence[int], seed: int) -> Prefill:
        """Read a prefill, or make it where there is none that fits.

        Args:
            tokens: The beginning of the text.
            continuation: What comes after it there.
            seed: Of the document.

        Raises:
            InputError: If the file cannot be written.
        """
        key = self._key(tokens, continuation, seed)
        code = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / f"prefill-{len(tokens)}-{code}.safetensors"
        if path.exists():
            try:
                return _read(path, key, self.model)
            except InputError as error:
                _logger.warning("%s; it is made again", error)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror}") from error
        prefill = make_prefill(self.model, tokens, continuation, seed)
        _write(path, key, prefill)
        return prefill

    def _key(self, tokens: Sequence[int], continuation: Sequence[int], seed: int) -> dict[str, Any]:
        """All that the rows depend on."""
        text = json.dumps([list(tokens), list(continuation)])
        return {
            "xkv_prefill": FORMAT,
            "checkpoint": self.checkpoint,
            "backend": self.model.backend.name,
            "kv_dtype": dtype_name(self.model.kv_dtype),
            "dtype": dtype_name(self.model.dtype),
            "tokens": hashlib.sha256(text.encode()).hexdigest(),
            "seed": seed,
        }


def make_prefill(
    model: LanguageModel, tokens: Sequence[int], continuation: Sequence[int], seed: int
) -> Prefill:
    """Run the beginning of a text through the model, and what follows over its exact rows."""
    # a model whose rows are not rounded; the one that is given stays as it is
    wide = copy.copy(model)
    wide.kv_dtype = model.dtype
    exact = wide.prefill(tokens, seed)
    layers = [
        Prefix(model.backend, keys, values, exact.n_tokens)
        for keys, values in zip(exact.keys, exact.values, strict=True)
    ]
    reference = np.concatenate(
        [
            model.log_probabilities(continuation[start : start + BLOCK], layers, False)
            for start in range(0, len(continuation), BLOCK)
        ]
    )
    del layers

    def narrow(rows: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(model.backend.xp.astype(x, model.kv_dtype) for x in rows)

    keys, values = narrow(exact.keys), narrow(exact.values)
    model.backend.evaluate(*keys, *values)
    document = replace(exact, keys=keys, values=values, make_cache=model.make_cache)
    return Prefill(document, reference)


def dtype_name(dtype: object) -> str:
    """A framework's dtype as numpy would call it, as ``float16``."""
    return str(dtype).rsplit(".", 1)[-1]


def checkpoint_code(model: str) -> str:
    """What tells a checkpoint from others: a digest of pieces of its files.

    Args:
        model: A local directory, or a Hugging Face repository that was downloaded; where its files
            are not found, its name is all that counts.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError):
            return hashlib.sha256(model.encode()).hexdigest()
    digest = hashlib.sha256()
    weights = [x for x in folder.iterdir() if x.suffix in (".safetensors", ".bin", ".npz")]
    for path in sorted([*weights, folder / "config.json"]):
        try:
            _digest_file(digest, path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _digest_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        for sample in range(N_SAMPLES):
            file.seek(size * sample // N_SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))


def _write(path: Path, key: Mapping[str, Any], prefill: Prefill) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    document = prefill.document
    arrays, about = {REFERENCE: prefill.reference}, dict(key)
    about["dtypes"], about["numbers"] = {}, {}
    for name in _held_fields():
        value = getattr(document, name)
        if not _is_of_arrays(value):
            about["numbers"][name] = value
            continue
        about["dtypes"][name] = [None if x is None else dtype_name(x.dtype) for x in value]
        for i, array in enumerate(value):
            if array is not None:
                rows = document.backend.to_numpy(array)
                arrays[f"{name}.{i}"] = np.ascontiguousarray(rows)
    about["crc"] = _checksum(arrays)
    n_bytes = sum(x.nbytes for x in arrays.values())
    with whole_file(path, n_bytes, (SafetensorError,)) as beside:
        save_file(arrays, beside, {"about": json.dumps(about)})


def _read(path: Path, key: Mapping[str, Any], model: LanguageModel) -> Prefill:
    """The prefill in a file.

    Raises:
        InputError: If it is no such file, or of something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a prefill ({error})") from error
    if any(about.get(name) != value for name, value in key.items()):
        raise InputError(f"{path} is the prefill of another model or text")
    if about.get("crc") != _checksum(arrays):
        raise InputError(f"{path} is damaged: its numbers are not those that were written")
    xp, given = model.backend.xp, {name: getattr(model, name) for name in OF_THE_MODEL}
    try:
        for name in _held_fields():
            if name in about["numbers"]:
                number = about["numbers"][name]
                given[name] = tuple(number) if isinstance(number, list) else number
                continue
            given[name] = tuple(
                dtype
                and xp.astype(
                    model.backend.from_numpy(arrays.pop(f"{name}.{i}")), getattr(xp, dtype)
                )
                for i, dtype in enumerate(about["dtypes"][name])
            )
        return Prefill(Document(**given), arrays[REFERENCE])
    except KeyError as error:
        raise InputError(f"{path} has no {error}, which a prefill has to have") from error


def _held_fields() -> list[str]:
    """Fields of a document that a file holds: numbers and rows."""
    return [field.name for field in fields(Document) if field.name not in OF_THE_MODEL]


def _is_of_arrays(value: Any) -> bool:
    return isinstance(value, tuple) and not all(isinstance(x, int) for x in value)


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
    code = 0
    for name in sorted(arrays):
        array = arrays[name]
        code = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), code)
        code = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, code)
    return code
