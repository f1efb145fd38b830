"""A model's profile: its groups of layers, measured once, kept in a file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.planning.grouping import layers_text, make_groups

FILE_NAME = "xkv-profile.json"
FORMAT = 1


@dataclass(frozen=True)
class ModelIdentity:
    """What a profile has to agree with a model about.

    Args:
        model_type: As in the model's configuration.
        n_layers: Layers with a cache.
        n_kv_heads: KV heads of a layer.
        key_dim: Features of a key head.
        value_dim: Features of a value head.
    """

    model_type: str
    n_layers: int
    n_kv_heads: int
    key_dim: int
    value_dim: int

    def __str__(self) -> str:
        return (
            f"{self.model_type} with {self.n_layers} layers of {self.n_kv_heads} kv heads x "
            f"{self.key_dim} (values {self.value_dim})"
        )


@dataclass(frozen=True)
class Profile:
    """How one model's layers are grouped.

    Args:
        model: The model that it was measured on.
        groups: As in :class:`xkv.XKVConfig`.
        note: How it was measured, for people.
        source: Where it comes from, for people.

    Raises:
        InputError: If the groups name a layer that there is not, or name one twice.
    """

    model: ModelIdentity
    groups: tuple[tuple[int, ...], ...]
    note: str = ""
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        make_groups(XKVConfig(groups=self.groups), self.model.n_layers)

    def apply(self, config: XKVConfig, model: ModelIdentity) -> XKVConfig:
        """A configuration with these groups, for a model.

        Raises:
            InputError: If this is the profile of another model.
        """
        if model != self.model:
            raise InputError(
                f"{self.source or 'the profile'} is for {self.model}, and this model is {model}: "
                "make its own with python -m xkv.calibrate, or use --grouping consecutive"
            )
        return replace(config, groups=self.groups)

    def __str__(self) -> str:
        return ", ".join(map(layers_text, self.groups))

    def save(self, path: str | Path) -> None:
        """Write the profile.

        Raises:
            InputError: If the file cannot be written.
        """
        about = {"xkv_profile": FORMAT, **asdict(self)}
        del about["source"]
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"cannot write {path}: {error.strerror}; name another file with --out"
            ) from error


def profile_path(model: str) -> Path:
    """Where a model's profile is kept: in its directory, or the user's cache for a repository."""
    if Path(model).is_dir():
        return Path(model) / FILE_NAME
    return cache_folder() / model.replace("/", "--") / FILE_NAME


def cache_folder() -> Path:
    """The user's, for what is measured of models."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "xkv"


def find_profile(model: str) -> Profile | None:
    """The profile in a model's place; None if there is none.

    Raises:
        InputError: If there is one that cannot be read.
    """
    path = profile_path(model)
    return load_profile(path) if path.is_file() else None


def load_profile(path_or_model: str | Path) -> Profile:
    """Read a profile.

    Args:
        path_or_model: A file, or a model's directory or repository, whose own profile is taken.

    Raises:
        InputError: If there is none, or it is not one.
    """
    path = Path(path_or_model)
    if not path.is_file():
        path = profile_path(str(path_or_model))
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"there is no profile {path_or_model}: make one with python -m xkv.calibrate"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a profile: {error}") from error
    try:
        return _parse(about, str(path))
    except InputError as error:
        raise InputError(f"{path} is no profile that can be used: {error}") from error


def _parse(about: Any, source: str) -> Profile:
    """A profile from its JSON object."""
    if not isinstance(about, dict) or about.get("xkv_profile") != FORMAT:
        raise InputError(
            f"it is not of format {FORMAT}; make it again with python -m xkv.calibrate"
        )
    try:
        model = ModelIdentity(
            str(about["model"]["model_type"]),
            *(int(about["model"][name]) for name in _NUMBERS),
        )
        groups = tuple(tuple(int(layer) for layer in group) for group in about["groups"])
        return Profile(model, groups, str(about.get("note", "")), source)
    except KeyError as error:
        raise InputError(f"it has no {error}") from error
    except TypeError as error:
        raise InputError(f"a value has the wrong type: {error}") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"a value is no number: {error}") from error


_NUMBERS = ("n_layers", "n_kv_heads", "key_dim", "value_dim")
