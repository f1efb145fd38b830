"""The task ``kl``: how far next-token distributions move when a prompt's cache is compressed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xkv.errors import InputError
from xkv.evaluation.methods.method import Compressed
from xkv.evaluation.prefills import BLOCK, Prefill, Prefills
from xkv.evaluation.run import Progress, Setting
from xkv.evaluation.store import Key, Store
from xkv.evaluation.tasks.qa import read_text
from xkv.planning.language_model import LanguageModel

KL = "kl"

METHODS = (
    *(f"quantized:bits={bits}" for bits in (8, 4, 3, 2)),
    *(f"lloydmax:bits={bits}" for bits in (4, 3, 2)),
    "xkv:attention=exact",
    "xkv:compression=8",
    "xkv:latent_bits=16,compression=8,attention=exact",
    "svd:compression=8,attention=exact",
)
"""Beside the full cache, where none are asked for."""

RATIOS = (4.0, 6.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True)
class Text:
    """A text in tokens.

    Args:
        name: For people.
        tokens: With the special tokens that begin every prompt of the model.
        code: Tells it from other texts.
    """

    name: str
    tokens: tuple[int, ...]
    code: int


def read_texts(paths: Sequence[str], model: LanguageModel, n_needed: int) -> list[Text]:
    """Texts of files, each once.

    Args:
        paths: UTF-8 text files.
        model: Its tokenizer is used.
        n_needed: Tokens that each has to have.

    Raises:
        InputError: If a file cannot be read or is too short.
    """
    names = [Path(path).name for path in paths]
    texts: dict[int, Text] = {}
    for path, name in zip(paths, names, strict=True):
        content = read_text(path)
        tokens = tuple(model.tokenizer.encode(content))
        if len(tokens) < n_needed:
            raise InputError(
                f"{path} has {len(tokens)} tokens, and kl needs {n_needed}, which are the longest "
                "of --lengths and --continuation together: shorten them or name a longer text"
            )
        code = zlib.crc32(content.encode())
        texts.setdefault(code, Text(name if names.count(name) == 1 else path, tokens, code))
    return list(texts.values())


@dataclass(frozen=True)
class Divergence:
    """What is measured.

    The beginning of a text is prefilled, each method compresses it, and the next tokens of the
    same text are run over what it gives back. After each of them the next-token distribution is
    compared with the full cache's, whose rows are as the model computed them.

    Args:
        model: The model.
        texts: Each is long enough.
        lengths: Tokens that are compressed.
        settings: Methods; the full cache, in the KV dtype, is the control.
        n_next: Tokens that follow.
        prefills: Where prefills are kept.
    """

    model: LanguageModel
    texts: Sequence[Text]
    lengths: Sequence[int]
    settings: Sequence[Setting]
    n_next: int
    prefills: Prefills

    @property
    def n_answers(self) -> int:
        """Results in all."""
        return len(self.texts) * len(self.lengths) * len(self.settings)

    def run(self, store: Store, progress: Progress) -> None:
        """Do what is not done yet.

        Raises:
            InputError: If the disk is full.
        """
        for length in self.lengths:
            for text in self.texts:
                self._run_text(text, length, store, progress)

    def _run_text(self, text: Text, length: int, store: Store, progress: Progress) -> None:
        code = zlib.crc32(str(self.n_next).encode(), text.code)
        keys = {
            setting: Key(KL, length, code, setting.label, setting.ratio)
            for setting in self.settings
        }
        todo = [setting for setting, key in keys.items() if not store.is_done(key, 1)]
        progress(len(self.settings) - len(todo), f"{KL} {length} {text.name}")
        if not todo:
            return
        tokens = text.tokens[: length + self.n_next]
        prefill = self.prefills.get(tokens[:length], tokens[length:], text.code)
        for setting in todo:
            result = self._measure(setting, prefill, tokens[length:])
            store.add(keys[setting], {"text": text.name, "n_next": self.n_next, **result})
            progress(1, f"{KL} {length} {text.name}")

    def _measure(self, setting: Setting, prefill: Prefill, tokens: Sequence[int]) -> dict[str, Any]:
        method, document = setting.method, prefill.document
        try:
            if method.is_query_aware:
                raise InputError("it looks at a question, and a text to continue has none")
            compressed = method.compress(document, setting.ratio)
        except InputError as error:
            return {"problem": str(error)}
        return {
            "tokens": document.n_tokens,
            "dense_bytes": document.dense_bytes,
            "held_bytes": compressed.held_bytes,
            "detail": compressed.detail,
            **self._compare(compressed, prefill.reference, tokens, method.is_stepwise),
        }

    def _compare(
        self, compressed: Compressed, reference: np.ndarray, tokens: Sequence[int], one_by_one: bool
    ) -> dict[str, float]:
        """Block by block, so that no second array of all tokens and words is made."""
        layers = compressed.layers(one_by_one)
        found: list[tuple[np.ndarray, ...]] = []
        for start in range(0, len(tokens), BLOCK):
            block = slice(start, start + BLOCK)
            rows = self.model.log_probabilities(tokens[block], layers, one_by_one)
            found.append(compare(reference[block], rows, tokens[start + 1 : start + BLOCK + 1]))
        kl, is_same, nll, full_nll = map(np.concatenate, zip(*found, strict=True))
        return {
            "kl": float(kl.mean()),
            "kl_median": float(np.median(kl)),
            "kl_q99": float(np.quantile(kl, 0.99)),
            "same_top": float(is_same.mean()),
            "nll": float(nll.mean()),
            "full_nll": float(full_nll.mean()),
        }


def compare(
    full: np.ndarray, rows: np.ndarray, following: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Next-token distributions beside the full cache's.

    Args:
        full: Log probabilities, ``[L, vocabulary]``.
        rows: As many of a method.
        following: The text's own next tokens, as many or one less.

    Returns:
        Kullback-Leibler divergences KL(full || rows) ``[L]`` in nats, whether the likeliest token
        is the same ``[L]``, and minus the log probability of each following token out of ``rows``
        and ``full``.
    """
    # float64, and sums of one: float32 would leave a floor of its own, of either sign
    wide, other = (x.astype(np.float64) for x in (full, rows))
    wide, other = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (wide, other))
    kl = (np.exp(wide) * (wide - other)).sum(-1)
    is_same = wide.argmax(-1) == other.argmax(-1)
    at = np.arange(len(following)), np.asarray(following, dtype=int)
    return kl, is_same, -other[at], -wide[at]
