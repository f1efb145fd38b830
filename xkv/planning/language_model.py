"""A model that prefills documents and answers questions out of given layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xkv.cache.lowrank_cache import LowRankCache
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.backend import Backend
from xkv.ops.loading import load_backend_module
from xkv.ops.types import Array, Rope
from xkv.planning.basis_file import find_basis
from xkv.planning.document import Document, DocumentLayer
from xkv.planning.grouping import make_groups
from xkv.planning.profile import ModelIdentity
from xkv.store.model_basis import ModelBasis

PREFILL_STEP = 512
"""Tokens of a document that are processed at a time."""


@dataclass(frozen=True)
class ChatFrame:
    """What the chat template writes around messages, as text.

    Args:
        opening: Before the first message.
        reply: Between a message and the reply to it.
        turn: Between a reply and the next message.
    """

    opening: str
    reply: str
    turn: str

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFrame | None:
        """Read off the template; None if there is none."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        marks = "@@1", "@@2", "@@3"
        roles = "user", "assistant", "user"
        messages = [
            {"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        try:
            opening, rest = text.split(marks[0])
            _, rest = rest.split(marks[1])
            turn, reply = rest.split(marks[2])
        except ValueError:
            raise InputError(
                "the model's chat template changes the messages, so that a document cannot be told "
                "from the question after it"
            ) from None
        return cls(opening, reply, turn)


class LanguageModel(ABC):
    """A model with its tokenizer on one backend.

    Args:
        name: As the user gave it.
        backend: Does the arithmetic.
        tokenizer: transformers' or mlx-lm's.
        ropes: What rotates each layer's keys; as many as layers, all with a full KV cache.
        kv_dtype: In which the model's cache is held, and counted.
        dtype: In which attention is computed.
    """

    def __init__(
        self,
        name: str,
        backend: Backend,
        tokenizer: Any,
        ropes: Sequence[Rope | None],
        kv_dtype: Any,
        dtype: Any,
    ) -> None:
        self.name, self.backend, self.tokenizer = name, backend, tokenizer
        self.ropes, self.kv_dtype, self.dtype = tuple(ropes), kv_dtype, dtype
        self._frame = ChatFrame.of(tokenizer)
        self._bases: dict[Any, ModelBasis] = {}

    @abstractmethod
    def forward(
        self, tokens: Sequence[Sequence[int]], layers: Sequence[Any], last_only: bool
    ) -> Array:
        """Logits after tokens ``[B, L]``, ``[B, L or 1, vocabulary]``; the layers take them up.

        Args:
            tokens: As many for each question.
            layers: :class:`xkv.planning.document.PromptLayer` or
                :class:`xkv.cache.lowrank_cache.LayerCache`, one a model layer.
            last_only: Whether the logits of the last token are enough.
        """

    @property
    @abstractmethod
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""

    @property
    @abstractmethod
    def identity(self) -> ModelIdentity:
        """What a profile of this model agrees with."""

    @property
    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of what computes."""

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens of their own."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encode(text))

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def context_tokens(self, context: str) -> list[int]:
        """The beginning of a prompt: all that comes before a question."""
        if self._frame is None:
            return list(self.tokenizer.encode(f"{context}\n\n"))
        return self.encode(f"{self._frame.opening}{context}\n\n")

    def question_tokens(
        self, text: str, prefix: str, message: str = "", turn: int = 0
    ) -> list[int]:
        """A question after a context, or in a later turn, and the beginning of its answer."""
        text = f"{message}\n\n{text}" if message else text
        if self._frame is None:
            before, reply = ("\n\n" if turn else "", "\n")
        else:
            before, reply = (self._frame.turn if turn else "", self._frame.reply)
        return self.encode(f"{before}{text}{reply}{prefix}")

    def prefill(self, tokens: Sequence[int], seed: int) -> Document:
        """Run a document through the model; its rows are held in the KV dtype."""
        layers = [DocumentLayer(self.backend) for _ in self.ropes]
        # calls of equal size: a short last one would count as the end of a prompt
        n_calls = -(-len(tokens) // PREFILL_STEP)
        ends = tuple(len(tokens) * (i + 1) // n_calls for i in range(n_calls))
        for start, end in zip((0, *ends), ends, strict=False):
            self.forward([tokens[start:end]], layers, last_only=True)
            self.backend.evaluate(*(x for layer in layers for x in layer.arrays()))
        astype = self.backend.xp.astype
        keys, values = (
            tuple(astype(getattr(layer, name), self.kv_dtype) for layer in layers)
            for name in ("keys", "values")
        )
        self.backend.evaluate(*keys, *values)
        return Document(
            self.backend,
            keys,
            values,
            tuple(layer.queries for layer in layers),
            self.ropes,
            ends,
            layers[0].scale,
            self.dtype,
            seed,
            self.make_cache,
        )

    @abstractmethod
    def subject(self, config: XKVConfig) -> Any:
        """The model as :mod:`xkv.planning.calibration` uses it."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of the model's weights."""

    def make_cache(self, config: XKVConfig) -> LowRankCache:
        """An empty low-rank cache for the model's layers."""
        groups = make_groups(config, len(self.ropes))
        n_dense = len(self.ropes) - sum(map(len, groups))
        if groups not in self._bases and config.wants_model_basis:
            found = find_basis(self.fingerprint, groups, config, self.backend)
            if found is not None:
                self._bases[groups] = found
        basis = self._bases.get(groups)
        return LowRankCache(self.backend, config, groups, n_dense, basis=basis)

    def generate(
        self, tokens: Sequence[Sequence[int]], layers: Sequence[Any], max_tokens: int
    ) -> list[list[int]]:
        """Greedy answers to a batch of questions of the same length.

        Args:
            tokens: ``[B, L]``.
            layers: Take up the questions and all tokens of the answers but the last.
            max_tokens: Of each answer.

        Returns:
            Token ids of each answer up to its end, which is left out.
        """
        answers: list[list[int]] = [[] for _ in tokens]
        is_open = [True] * len(tokens)
        step = [list(row) for row in tokens]
        for _ in range(max_tokens):
            choices = self._choose(self.forward(step, layers, last_only=True))
            for i, token in enumerate(choices):
                is_open[i] = is_open[i] and token not in self.end_tokens
                if is_open[i]:
                    answers[i].append(token)
            if not any(is_open):
                break
            step = [[token] for token in choices]
        return answers

    def _choose(self, logits: Array) -> list[int]:
        choices = self.backend.xp.argmax(logits[:, -1], axis=-1)
        return self.backend.to_numpy(choices).tolist()

    def log_probabilities(
        self, tokens: Sequence[int], layers: Sequence[Any], one_by_one: bool
    ) -> np.ndarray:
        """Log probabilities of what follows each token, ``[L, vocabulary]`` float32."""
        pieces = [[token] for token in tokens] if one_by_one else [list(tokens)]
        rows = []
        for piece in pieces:
            logits = self.backend.xp.astype(
                self.forward([piece], layers, last_only=False)[0], self.backend.xp.float32
            )
            rows.append(self.backend.to_numpy(logits))
        logits = np.concatenate(rows)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def load_language_model(backend: str, model: str, **options: Any) -> LanguageModel:
    """Load a model for evaluation.

    Args:
        backend: "mlx" or "torch".
        model: A local directory or a Hugging Face repository.
        options: ``trust_remote_code``.

    Raises:
        InputError: If the framework is missing, the model cannot be loaded, or its cache is of
            another kind than the methods compress.
    """
    return load_backend_module(backend).load_language_model(model, **options)
