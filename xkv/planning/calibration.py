"""A basis of the model's own, measured once on mixed texts.

Texts go through the model layer by layer. Of each group's keys, and values, the sum of outer
products is kept, and nothing of the rows; their eigenvectors are the basis. What an error costs is
measured by gradients: the Fisher information of the next tokens' distribution, feature by feature.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xkv.cache.group import GroupState
from xkv.cache.lowrank_cache import LowRankCache
from xkv.cache.rows import LayerRows
from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.types import Array
from xkv.planning.cache_plan import CachePlan
from xkv.planning.moments import Moments
from xkv.store.model_basis import Directions
from xkv.store.store import joined
from xkv.store.svd import gram_matrix, leading_directions

PIECE_TOKENS = 2048
"""Tokens that go through the model at once."""

MIN_TOKENS = 256
"""Of a piece: fewer have no context to speak of."""

CONTEXT_TOKENS, PREDICTED_TOKENS = 768, 256
"""Of a piece whose gradients are taken: rows that errors are put into, and tokens after them."""

GRADIENT_PIECES = 12
"""Pieces, at most, whose gradients are taken."""

WEIGHT_FLOOR = 1e-3
"""Of a layer's mean weight: no feature counts less."""

TEXTS = ("prose.txt", "code.txt", "languages.txt", "tables.txt")
CHATS = "chat.json"

Progress = Callable[[int, int], None]
"""Called with pieces done and in all."""


class Subject(Protocol):
    """A model on one backend, as calibration uses it."""

    backend: Backend
    plan: CachePlan
    fingerprint: str

    def at_full_speed(self) -> AbstractContextManager[None]:
        """Inside, the model computes as fast as it can on this device."""

    def fill(self, cache: LowRankCache, tokens: Sequence[int]) -> Any:
        """Run tokens through the model, layer by layer where it can, into a compressed cache.

        Returns:
            The model's caches.
        """

    def log_probabilities(self, caches: Any, tokens: Sequence[int]) -> np.ndarray:
        """Of what follows each token, ``[L, vocabulary]``; the caches are as before."""

    def gradients(
        self, tokens: Sequence[int], n_context: int, seed: int
    ) -> dict[int, tuple[Array, Array]]:
        """By layer: of log probabilities of sampled tokens after a context, with random signs.

        Returns:
            With respect to the context's rotated keys and its values, ``[1, n_kv_heads, L, dim]``.
        """


N_PIECES = 23
"""Pieces of the package's texts, at most, that are measured or held out."""


def calibration_pieces(tokenizer: Any, files: Sequence[str] = ()) -> list[list[int]]:
    """Pieces of the texts that come with the package, and of all of a user's."""
    texts = calibration_texts(tokenizer, files)
    n_ours = len(texts) - len(files)
    ours = pieces_of(texts[:n_ours])[:N_PIECES]
    return ours + (pieces_of(texts[n_ours:]) if files else [])


def calibration_texts(tokenizer: Any, files: Sequence[str] = ()) -> list[list[int]]:
    """Tokens of the texts that come with the package, and of a user's.

    Args:
        tokenizer: The model's; chats go through its template where it has one.
        files: Names of text files.

    Raises:
        InputError: If a file cannot be read, or is too short.
    """
    folder = resources.files("xkv.planning") / "texts"
    texts = [(folder / name).read_text(encoding="utf-8") for name in TEXTS]
    chats = json.loads((folder / CHATS).read_text(encoding="utf-8"))
    texts.append("".join(_chat(tokenizer, messages) for messages in chats))
    for name in files:
        try:
            texts.append(Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {name}: {error}") from error
    found = [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    for name, tokens in zip(files, found[-len(files) :] if files else [], strict=True):
        if len(tokens) < MIN_TOKENS:
            raise InputError(
                f"{name} has {len(tokens)} tokens, and calibration needs at least {MIN_TOKENS}"
            )
    return found


def _chat(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages) + "\n\n"


def pieces_of(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Pieces of :data:`PIECE_TOKENS`, those of different texts in turn, none too short."""
    cut = [
        [list(text[i : i + PIECE_TOKENS]) for i in range(0, len(text), PIECE_TOKENS)]
        for text in texts
    ]
    n_most = max(map(len, cut))
    in_turn = [pieces[i] for i in range(n_most) for pieces in cut if i < len(pieces)]
    return [piece for piece in in_turn if len(piece) >= MIN_TOKENS]


class RecordingCache(LowRankCache):
    """Hands out a group's rows when its last layer is done, and forgets them.

    Args:
        record: Called with the number of the group and its dense rows.
    """

    def __init__(
        self, backend: Backend, plan: CachePlan, record: Callable[[int, GroupState], None]
    ) -> None:
        shape = plan.probe.cache_shape(plan.groups)
        super().__init__(backend, plan.config, plan.groups, shape=shape)
        self._record = record

    def settle_group(self, number: int) -> None:
        group = self.groups[number]
        if group.state.is_in_step:
            self._record(number, group.state)
            group.state = GroupState((LayerRows(),) * len(group.layers))


def gather(
    subject: Subject, pieces: Sequence[Sequence[int]], moments: Moments, on_progress: Progress
) -> None:
    """Sum what is needed of all pieces that are not done yet.

    Raises:
        InputError: If rows or gradients are not finite.
    """
    n_done = moments.done["pieces"]
    on_progress(n_done, len(pieces))
    for number in range(n_done, len(pieces)):
        piece = pieces[number]
        _gather_rows(subject, piece, moments)
        n_gradients = 0
        long_enough = len(piece) >= CONTEXT_TOKENS + PREDICTED_TOKENS
        if long_enough and number < GRADIENT_PIECES:
            _gather_gradients(subject, piece, moments, number)
            n_gradients = CONTEXT_TOKENS
        moments.commit(pieces=1, rows=len(piece), gradient_rows=n_gradients)
        on_progress(number + 1, len(pieces))


def _gather_rows(subject: Subject, piece: Sequence[int], moments: Moments) -> None:
    backend, sinks = subject.backend, subject.plan.config.sinks

    def record(number: int, state: GroupState) -> None:
        shape = subject.plan.probe.cache_shape(subject.plan.groups).groups[number]
        n_rows = state.layers[0].offset - sinks
        for part, name in enumerate(("keys", "values")[: 1 if shape.has_dense_values else 2]):
            rows = joined(backend, state.reader(backend, name, sinks)(0, n_rows))
            gram = backend.to_numpy(gram_matrix(backend, rows, state.layers[0].keys.rows.dtype)[0])
            if not np.isfinite(gram).all():
                raise InputError(
                    "the model's keys or values hold NaN or infinity on the calibration texts: it "
                    "cannot be calibrated; run it with the full cache, or in bfloat16"
                )
            moments.add(f"rows.{number}.{part}", gram)

    cache = RecordingCache(backend, subject.plan, record)
    subject.fill(cache, piece)
    cache.settle()


def _gather_gradients(subject: Subject, piece: Sequence[int], moments: Moments, seed: int) -> None:
    backend = subject.backend
    tokens = piece[: CONTEXT_TOKENS + PREDICTED_TOKENS]
    for layer_idx, pair in subject.gradients(tokens, CONTEXT_TOKENS, seed).items():
        for part, gradient in enumerate(pair):
            wide = backend.xp.astype(gradient, backend.xp.float32)
            squares = backend.to_numpy(backend.xp.sum(wide * wide, axis=(0, 2)))
            if not np.isfinite(squares).all():
                raise InputError(
                    "the model's gradients hold NaN or infinity on the calibration texts: it "
                    "cannot be calibrated"
                )
            moments.add(f"gradients.{layer_idx}.{part}", squares.astype(np.float64))


def find_directions(subject: Subject, moments: Moments) -> tuple[tuple[Directions, ...], ...]:
    """The basis of every group, out of what was gathered."""
    shapes = subject.plan.probe.cache_shape(subject.plan.groups).groups
    found = []
    for number, (layers, shape) in enumerate(zip(subject.plan.groups, shapes, strict=True)):
        parts = []
        for part in range(1 if shape.has_dense_values else 2):
            weights = np.concatenate([_weights(subject, moments, i, part) for i in layers])
            gram = moments.load(f"rows.{number}.{part}") / moments.done["rows"]
            scales = np.sqrt(weights)
            # numbers that 16 bits hold; the unit goes into the energies
            unit = np.sqrt((scales**2).mean())
            scales = (scales / unit).astype(np.float32)
            scaled = subject.backend.from_numpy((gram * scales * scales[:, None])[None])
            right, energies = leading_directions(subject.backend, scaled, len(scales))
            rows = subject.backend.to_numpy(right)[0].T / scales
            dim = shape.key_dim if part == 0 else shape.value_dim
            parts.append(
                Directions(
                    rows.astype(np.float16),
                    scales,
                    subject.backend.to_numpy(energies)[0].astype(np.float64) * unit**2,
                    (len(layers), shape.n_kv_heads, dim),
                )
            )
        found.append(tuple(parts))
    return tuple(found)


def _weights(subject: Subject, moments: Moments, layer_idx: int, part: int) -> np.ndarray:
    """How much a squared error in each feature of a layer counts, ``[n_kv_heads * dim]``."""
    squares = moments.load(f"gradients.{layer_idx}.{part}") / moments.done["gradient_rows"]
    if part == 0:
        squares = _over_pairs(squares, subject.plan.probe.caches[layer_idx].rope)
    return (squares + WEIGHT_FLOOR * squares.mean() + 1e-30).reshape(-1)


def _over_pairs(squares: np.ndarray, rope: Any) -> np.ndarray:
    """Means over the two features of each pair that a rotation mixes: rows are un-rotated."""
    dims = getattr(rope, "dims", 0)
    if not dims:
        return squares
    half, even = squares.copy(), dims // 2
    if getattr(rope, "traditional", False):
        pairs = squares[..., :dims].reshape(*squares.shape[:-1], even, 2)
        half[..., :dims] = np.repeat(pairs.mean(-1), 2, axis=-1)
    else:
        pairs = squares[..., :dims].reshape(*squares.shape[:-1], 2, even)
        half[..., :dims] = np.tile(pairs.mean(-2), 2)
    return half
