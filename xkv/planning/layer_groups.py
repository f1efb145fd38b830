"""Which of a model's layers are alike, measured on one prompt."""

from __future__ import annotations

import os
import sys

from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.types import Array
from xkv.planning.document import Document
from xkv.planning.grouping import make_groups
from xkv.planning.language_model import LanguageModel, load_language_model
from xkv.planning.profile import Profile, find_profile, load_profile
from xkv.planning.similarity import best_partition, cka, within_similarity
from xkv.tiny import make_document

BUILT_IN_SEED, BUILT_IN_TOKENS = 77, 3500

MIN_TOKENS = 256
"""Fewer tokens make all layers look alike."""


def read_prompt(prompt: str | None) -> str:
    """The text that a ``--prompt`` of calibrate or inspect means: a file's, stdin's, or itself."""
    if prompt is None:
        return make_document(BUILT_IN_SEED, BUILT_IN_TOKENS).text
    if prompt == "-":
        return sys.stdin.read()
    if not os.path.isfile(prompt):
        return prompt
    try:
        with open(prompt, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {prompt}: {error}") from error


def n_groups_of(group_size: int, n_layers: int) -> int:
    """Groups that consecutive ones of this size would be."""
    return len(make_groups(XKVConfig(group_size), n_layers))


def measure_groups(model: LanguageModel, text: str, n_groups: int) -> Profile:
    """Find the best groups of a model's layers for one text.

    The similarity of two layers is the mean of their keys' and their values' CKA, as both are
    factored in the same groups. The first tokens, which stay dense, are left out.

    Args:
        model: The model.
        text: Hundreds of tokens, better more than a layer has columns.
        n_groups: Groups to make.

    Raises:
        InputError: If the text is too short, there are more groups than layers, or the model's rows
            hold NaN or infinity.
    """
    document = model.prefill(prompt_tokens(model, text), seed=0)
    keys, values = (plain_layers(document, name) for name in ("keys", "values"))
    similarity = (cka(document.backend, keys) + cka(document.backend, values)) / 2
    groups = best_partition(similarity, n_groups)
    note = f"{document.n_tokens} tokens; mean similarity within groups "
    note += f"{within_similarity(similarity, groups):.3f}"
    return Profile(model.identity, groups, note, "this measurement")


def prompt_tokens(model: LanguageModel, text: str) -> list[int]:
    """A text as the beginning of a prompt.

    Raises:
        InputError: If it is too short to measure anything.
    """
    tokens = model.context_tokens(text)
    if len(tokens) < MIN_TOKENS:
        raise InputError(
            f"the prompt has {len(tokens)} tokens, and at least {MIN_TOKENS} are needed to measure "
            "how layers relate: give a longer text with --prompt"
        )
    return tokens


def plain_layers(document: Document, name: str) -> list[Array]:
    """Every layer's "keys", un-rotated, or "values", ``[L, width]``, without the sinks."""
    layers = range(len(document.keys))
    return [document.plain_rows(name, layer)[XKVConfig.sinks :] for layer in layers]


def choose_profile(
    grouping: str | None,
    group_size: int | None,
    model: str,
    backend: str,
    *,
    trust_remote_code: bool = False,
) -> Profile | None:
    """The profile that a command's flags mean; says on stderr which one.

    Args:
        grouping: ``--grouping``: None takes the model's own profile if there is one,
            "consecutive" none, "cka" measures one now on the built-in text, anything else is a
            file.
        group_size: ``--group-size`` where it was given: wins over the model's own profile, and says
            how many groups "cka" makes.
        model: A local directory or a Hugging Face repository.
        backend: "mlx" or "torch".
        trust_remote_code: For the tokenizer.

    Raises:
        InputError: If the profile cannot be read or measured.
    """
    if grouping == "consecutive" or (grouping is None and group_size is not None):
        return None
    if grouping == "cka":
        measured = load_language_model(backend, model, trust_remote_code=trust_remote_code)
        size = XKVConfig.group_size if group_size is None else group_size
        n_groups = n_groups_of(size, len(measured.ropes))
        profile: Profile | None = measure_groups(measured, read_prompt(None), n_groups)
    else:
        profile = find_profile(model) if grouping is None else load_profile(grouping)
    if profile is not None:
        print(f"Layers grouped by {profile.source}: {profile}", file=sys.stderr)
    return profile
