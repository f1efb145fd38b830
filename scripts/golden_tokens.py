"""Greedy answers that are kept, and whether today's are the same.

    python -m scripts.golden_tokens
    python -m scripts.golden_tokens --model SMOLLM2

Each prompt is answered out of the full cache and out of ours in its exact form (full rank, every
row attended to), in float32. ``--write`` keeps the answers of PyTorch's full cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from xkv.cli.engine import Engine, Sampling, load_engine
from xkv.cli.terminal import user_errors
from xkv.config import XKVConfig
from xkv.errors import InputError
from xkv.evaluation.prefills import checkpoint_code
from xkv.evaluation.tasks import multiquery
from xkv.tiny import CHECKPOINT_DIR, make_document
from xkv.tiny.documents import count_tokens

FOLDER = Path(__file__).parents[1] / "tests" / "golden"
BACKENDS = "torch", "mlx"
MAX_TOKENS, LEAST_TOKENS = 48, 8
LEAST_MARGIN = 1e-2
"""Between the two largest logits of a token that is kept: sums in another order move them less."""
EXACT = XKVConfig(rank_k="full", rank_v="full", window=16, attention="exact")

_DOCUMENT = make_document(seed=7, n_tokens=1000)
_FIRST, _SECOND = _DOCUMENT.facts[3], _DOCUMENT.facts[11]
_NUMBERS = multiquery.make(7, 600, count_tokens)
_CODE = '''\
def read_lines(path):
    """Lines of a file, without the empty ones."""
    with open(path) as file:
        return [line.strip() for line in file if line.strip()]


def count_words(path):
    """How often each word of a file comes."""
'''
PROMPTS: dict[str, str | list[str]] = {
    "chat": ["What is the capital of France, and what is it known for?"],
    "document": [f"{_DOCUMENT.text}\n\n{_FIRST.question}"],
    "code": _CODE,
    "second turn": [f"{_DOCUMENT.text}\n\n{_FIRST.question}", _FIRST.answer, _SECOND.question],
    "numbers": [f"{_NUMBERS.context}\n\n{_NUMBERS.questions[0].text}"],
}
"""A text to go on with, or messages and replies in turn."""


@dataclass(frozen=True)
class Golden:
    """One prompt's greedy answer.

    Args:
        name: Of the prompt.
        n_prompt: Its tokens.
        limit: Most tokens of the answer.
        tokens: Of the answer, an end token left out.
        text: The answer.
        margin: Least difference of the two largest logits where a token, or the end, was chosen.
    """

    name: str
    n_prompt: int
    limit: int
    tokens: list[int]
    text: str
    margin: float


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.golden_tokens",
        description="Compare greedy answers, of the full cache and of ours in its exact form, with "
        "those that are kept in tests/golden.",
    )
    parser.add_argument(
        "--model", help="folder of SmolLM2 (scripts.real_model); the bundled model if left out"
    )
    parser.add_argument("--backend", choices=BACKENDS, help="only this one")
    parser.add_argument("--write", action="store_true", help="keep the answers of this machine")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = setup_arg_parser().parse_args(argv)
    folder = args.model or str(CHECKPOINT_DIR)
    with user_errors():
        if args.write:
            write(folder)
        differing = [
            line
            for backend in ([args.backend] if args.backend else BACKENDS)
            for line in differences(load(backend, folder), read(folder))
        ]
    print("\n".join(differing) or "all answers are those that are kept")
    sys.exit(bool(differing))


def load(backend: str, folder: str) -> Engine:
    """A model that computes in float32.

    Raises:
        InputError: If it cannot be loaded.
    """
    engine: Any = load_engine(backend, folder)
    if backend == "torch":
        engine.model.float()
    else:
        import mlx.core as mx

        engine.model.set_dtype(mx.float32)
    return engine


def golden_path(folder: str) -> Path:
    """Where a model's answers are kept."""
    return FOLDER / ("bundled.json" if Path(folder) == CHECKPOINT_DIR else "smollm2.json")


def read(folder: str) -> list[Golden]:
    """The answers that are kept.

    Raises:
        InputError: If they are of other weights.
    """
    path = golden_path(folder)
    if json.loads(path.read_text(encoding="utf-8"))["checkpoint"] != checkpoint_code(folder):
        raise InputError(
            f"{folder} has other weights than the model whose answers are kept: make them anew "
            "with --write"
        )
    return answers_of(path)


def answers_of(path: Path) -> list[Golden]:
    """The answers in a file."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    return [Golden(**each) for each in kept["answers"]]


def differences(engine: Engine, kept: Sequence[Golden]) -> list[str]:
    """What is not as it is kept, a line each."""
    found = []
    for golden in kept:
        prompt = encode(engine, PROMPTS[golden.name])
        if len(prompt) != golden.n_prompt:
            found.append(f"{golden.name}: {len(prompt)} tokens, not {golden.n_prompt}")
            continue
        for form, config in (("full cache", None), ("exact form", EXACT)):
            tokens = greedy(engine, prompt, config, golden.limit)
            if tokens != golden.tokens:
                both = enumerate(zip_longest(tokens, golden.tokens))
                at = next(i for i, (mine, its) in both if mine != its)
                said = engine.tokenizer.decode(tokens)
                where = f"{type(engine).__name__}, {form}, {golden.name}"
                found.append(f"{where}: {said!r}, not {golden.text!r}, from token {at} on")
    return found


def greedy(
    engine: Engine, prompt: Sequence[int], config: XKVConfig | None, limit: int
) -> list[int]:
    """Tokens of an answer.

    Raises:
        InputError: If the cache could not be compressed as asked.
    """
    answer = engine.generate(prompt, config, Sampling(max_tokens=limit))
    if answer.notice is not None:
        raise InputError(answer.notice)
    return list(answer.tokens)


def encode(engine: Engine, prompt: str | Sequence[str]) -> list[int]:
    """Token ids of a prompt."""
    if isinstance(prompt, str):
        return engine.encode(prompt, use_chat_template=False)
    roles = "user", "assistant"
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(prompt)]
    text = engine.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return list(engine.tokenizer.encode(text, add_special_tokens=False))


def write(folder: str) -> None:
    """Keep what PyTorch's full cache answers, up to the first near tie."""
    engine = load("torch", folder)
    answers = []
    for name, prompt in PROMPTS.items():
        tokens = encode(engine, prompt)
        answer = greedy(engine, tokens, None, MAX_TOKENS)
        apart = margins(engine, tokens, answer)
        is_tie = apart < LEAST_MARGIN
        limit = int(is_tie.argmax()) if is_tie.any() else MAX_TOKENS
        if limit < LEAST_TOKENS:
            print(f"{name} is not usable: a near tie after {limit} tokens", file=sys.stderr)
            continue
        text, margin = engine.tokenizer.decode(answer[:limit]), apart[:limit].min()
        kept = Golden(name, len(tokens), limit, answer[:limit], text, round(float(margin), 5))
        answers.append(asdict(kept))
    about = {
        "checkpoint": checkpoint_code(folder),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "answers": answers,
    }
    golden_path(folder).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def margins(engine: Any, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """Differences of the two largest logits where the answer's tokens, and its end, were chosen."""
    import torch

    n_chosen = min(len(answer) + 1, MAX_TOKENS)
    with torch.inference_mode():
        tokens = torch.tensor([[*prompt, *answer]])
        logits = engine.model(input_ids=tokens).logits[0, len(prompt) - 1 :][:n_chosen]
    largest = np.sort(logits.numpy())[:, -2:]
    return largest[:, 1] - largest[:, 0]


if __name__ == "__main__":
    main()
