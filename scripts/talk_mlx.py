"""A long conversation with the bundled model in mlx-lm, beside a fresh cache of the same tokens.

    python -m scripts.talk_mlx --turns 60

Every turn brings a document and a question. Twice an earlier message is edited, which cuts the
conversation back, and once the cache is saved and loaded. Each answer has to be that of a fresh
cache that is given all the tokens; at full rank, unless ``--compression`` says otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

import xkv
from xkv.tiny import CHECKPOINT_DIR, make_document

FULL_RANK = {"rank_k": "full", "rank_v": "full", "attention": "exact"}


class Turn(NamedTuple):
    """A turn, and whether its answer was right."""

    number: int
    n_tokens: int
    did: str
    answer: str
    is_same: bool


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--shortest", type=int, default=100, help="tokens of a message's document")
    parser.add_argument("--longest", type=int, default=400)
    parser.add_argument("--max-tokens", "-m", type=int, default=8, help="of each answer")
    parser.add_argument("--compression", type=float, help="full rank if left out")
    parser.add_argument("--budget", type=int, default=xkv.XKVConfig.budget)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def talk(
    n_turns: int, lengths: tuple[int, int], max_tokens: int, seed: int, **options: Any
) -> Iterator[Turn]:
    """Talk, and compare each answer.

    Args:
        n_turns: How long.
        lengths: Fewest and most tokens of a message's document.
        max_tokens: Of each answer.
        seed: Of documents and lengths.
        options: Of the compressed cache.
    """
    model, tokenizer = mlx_lm.load(str(CHECKPOINT_DIR))
    model.set_dtype(mx.float32)
    xkv.enable(model, **options)
    cache, random = make_prompt_cache(model), Random(seed)
    tokens: list[int] = []
    starts: list[int] = []

    def answer(its_cache: list[Any]) -> list[int]:
        rest = tokens[its_cache[0].offset :]
        steps = mlx_lm.stream_generate(
            model, tokenizer, rest, max_tokens=max_tokens, prompt_cache=its_cache
        )
        return [step.token for step in steps]

    for number in range(n_turns):
        did = []
        if number in (n_turns // 3, 2 * n_turns // 3):
            edited = random.randrange(len(starts) // 2)
            del tokens[starts[edited] :], starts[edited:]
            did.append(f"edited message {edited}")
        if number == n_turns // 2:
            with tempfile.TemporaryDirectory() as folder:
                name = str(Path(folder) / "talk.safetensors")
                xkv.save_prompt_cache(name, cache)
                cache = xkv.load_prompt_cache(name)
            did.append("loaded")
        # what an answer left behind, and all that was edited, is forgotten
        trim_prompt_cache(cache, max(cache[0].offset - len(tokens), 0))
        starts.append(len(tokens))
        document = make_document(1000 * seed + number, random.randint(*lengths), 2)
        text = f"{document.text} {random.choice(document.facts).question}"
        tokens += tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True
        )
        got, want = answer(cache), answer(make_prompt_cache(model))
        said = tokenizer.decode(want, skip_special_tokens=True)
        yield Turn(number, len(tokens), ", ".join(did), said, got == want)
        tokens += want


def main() -> None:
    args = setup_arg_parser().parse_args()
    options = FULL_RANK if args.compression is None else {"compression": args.compression}
    n_wrong = 0
    for turn in talk(
        args.turns,
        (args.shortest, args.longest),
        args.max_tokens,
        args.seed,
        budget=args.budget,
        **options,
    ):
        n_wrong += not turn.is_same
        said = "ok" if turn.is_same else "OTHER"
        text = f"turn {turn.number + 1}: {turn.n_tokens} tokens, {said} {turn.answer!r} {turn.did}"
        print(text, flush=True)
    print(f"{args.turns - n_wrong} of {args.turns} answers are those of a fresh cache")
    sys.exit(n_wrong > 0)


if __name__ == "__main__":
    main()
