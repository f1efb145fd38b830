"""What the command lines need of a framework: load a model, and answer a prompt with a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xkv.cli.first_use import calibrate_at_first_use
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.ops.loading import load_backend_module
from xkv.planning.calibration import Subject
from xkv.planning.profile import ModelIdentity

Progress = Callable[[str, int, int], None]
"""Called with a phase ("prefill" or "factorize"), units done and units in all."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; names and meanings are mlx-lm's. ``temp`` 0 is greedy."""

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Generation:
    """One answer and what it cost.

    Args:
        text: The answer, special tokens left out.
        tokens: Its token ids, an end token left out.
        n_prompt: Tokens of the prompt.
        prefill_seconds: Time of the prompt's forward pass, without factorization.
        factorize_seconds: Time of the compression.
        decode_tps: Generated tokens per second.
        peak_bytes: Most memory in use at any time, weights included; None where another answer's
            cache was in use too.
        dense_bytes: What the tokens in the cache take in the full cache.
        held_bytes: What they do take, by the sizes of all arrays held.
        allocated_bytes: The same by the framework's own count of live memory.
        notice: A sentence on what was not done as asked, or None.
        detail: Ranks and attention of the compressed cache, for people.
        basis_bytes: Of the model's own basis, held once for all its conversations.
        n_drafted: Tokens that a draft model proposed, None without one.
        n_taken: How many of them the model took.
    """

    text: str
    tokens: tuple[int, ...]
    n_prompt: int
    prefill_seconds: float
    factorize_seconds: float
    decode_tps: float
    peak_bytes: int | None
    dense_bytes: int
    held_bytes: int
    allocated_bytes: int
    notice: str | None = None
    detail: str | None = None
    basis_bytes: int = 0
    n_drafted: int | None = None
    n_taken: int = 0


class Engine(ABC):
    """A model and its tokenizer on one backend."""

    tokenizer: Any

    @property
    @abstractmethod
    def identity(self) -> ModelIdentity:
        """What a profile of this model agrees with."""

    def speed_up(self) -> str | None:
        """Compute as fast as this device can, where no rows are kept; what to say of it."""
        return None

    @abstractmethod
    def generate(
        self,
        prompt: Sequence[int],
        config: XKVConfig | None,
        sampling: Sampling,
        *,
        prefill_step_size: int = 2048,
        on_text: Callable[[str], None] = lambda text: None,
        on_progress: Progress = lambda phase, done, total: None,
    ) -> Generation:
        """Answer a prompt.

        Args:
            prompt: Token ids, at least one.
            config: None runs with the framework's full cache.
            sampling: How tokens are drawn.
            prefill_step_size: Prompt tokens that are processed at a time.
            on_text: Called with each new piece of the answer.
            on_progress: Called as prefill and factorization go on.
        """

    @abstractmethod
    def subject(self, config: XKVConfig) -> Subject:
        """The model as :mod:`xkv.planning.calibration` uses it."""

    def calibrate_at_first_use(self, config: XKVConfig | None, is_off: bool) -> None:
        """:func:`xkv.cli.first_use.calibrate_at_first_use`"""
        if config is not None:
            calibrate_at_first_use(lambda: self.subject(config), self.tokenizer, config, is_off)

    def encode(
        self, prompt: str, *, system_prompt: str | None = None, use_chat_template: bool = True
    ) -> list[int]:
        """Token ids of a user's message, through the chat template if there is one.

        Raises:
            InputError: If the prompt is empty.
        """
        if not prompt.strip():
            raise InputError("the prompt is empty: give some text with --prompt")
        if not use_chat_template or not getattr(self.tokenizer, "chat_template", None):
            return list(self.tokenizer.encode(prompt))
        messages = [{"role": "user", "content": prompt}]
        if system_prompt is not None:
            messages.insert(0, {"role": "system", "content": system_prompt})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def load_engine(backend: str, model: str, **options: Any) -> Engine:
    """Load a model for generation.

    Args:
        backend: "mlx" or "torch".
        model: A local directory or a Hugging Face repository.
        options: ``trust_remote_code``, ``kernels``.

    Raises:
        InputError: If the framework is missing or the model cannot be loaded.
    """
    return load_backend_module(backend).load_engine(model, **options)
