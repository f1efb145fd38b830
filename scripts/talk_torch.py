"""A long conversation with the bundled model in transformers, at full rank and beside a full cache.

    python -m scripts.talk_torch --turns 60

Every turn brings a document and a question. Twice an earlier message is edited, which cuts the
conversation back, and once the cache is saved and loaded. Each answer has to be that of a fresh
``DynamicCache`` that is given all the tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import xkv
from xkv.tiny import CHECKPOINT_DIR, make_document

OPTIONS = {"rank_k": "full", "rank_v": "full", "attention": "exact"}


class Turn(NamedTuple):
    """A turn, and whether its answer was right."""

    number: int
    n_tokens: int
    did: str
    is_same: bool


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default=str(CHECKPOINT_DIR))
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--shortest", type=int, default=100, help="tokens of a message's document")
    parser.add_argument("--longest", type=int, default=400)
    parser.add_argument("--max-tokens", "-m", type=int, default=4, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    return parser


@torch.no_grad()
def talk(
    model_name: str = str(CHECKPOINT_DIR),
    n_turns: int = 60,
    lengths: tuple[int, int] = (100, 400),
    max_tokens: int = 4,
    seed: int = 0,
    **options: Any,
) -> Iterator[Turn]:
    """Talk, and compare each answer.

    Args:
        model_name: A directory.
        n_turns: How long.
        lengths: Fewest and most tokens of a message's document.
        max_tokens: Of each answer.
        seed: Of documents and lengths.
        options: Of the compressed cache, at full rank.
    """
    model, plain = (
        AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
        for _ in range(2)
    )
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    cache, random = xkv.torch_cache(model, **OPTIONS, **options), Random(seed)
    tokens: list[int] = []
    starts: list[int] = []

    def answer(which: Any, its_cache: Any) -> list[int]:
        ids = torch.tensor([tokens])
        output = which.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
            cache=its_cache,
        )  # fmt: skip
        return output[0, len(tokens) :].tolist()

    for number in range(n_turns):
        did = []
        if number in (n_turns // 3, 2 * n_turns // 3):
            edited = random.randrange(len(starts) // 2)
            del tokens[starts[edited] :], starts[edited:]
            cache.crop(len(tokens) - cache.get_seq_length())
            did.append(f"edited message {edited}")
        if number == n_turns // 2:
            with tempfile.TemporaryDirectory() as folder:
                name = str(Path(folder) / "talk.safetensors")
                xkv.save_prompt_cache(name, cache)
                cache = xkv.load_torch_cache(model, name)
            did.append("loaded")
        starts.append(len(tokens))
        document = make_document(1000 * seed + number, random.randint(*lengths), 2)
        text = f"{document.text} {random.choice(document.facts).question}"
        tokens += tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        if number % 3 == 1:
            xkv.torch_prefill(model, cache, torch.tensor([tokens]))
            did.append("layer by layer")
        got, want = answer(model, cache), answer(plain, DynamicCache(config=plain.config))
        yield Turn(number, len(tokens), ", ".join(did), got == want)
        tokens += want


def main() -> None:
    args = setup_arg_parser().parse_args()
    n_wrong = 0
    for turn in talk(
        args.model, args.turns, (args.shortest, args.longest), args.max_tokens, args.seed
    ):
        n_wrong += not turn.is_same
        said = "ok" if turn.is_same else "WRONG"
        print(f"turn {turn.number + 1}: {turn.n_tokens} tokens, {said} {turn.did}", flush=True)
    print(f"{args.turns - n_wrong} of {args.turns} answers are those of the full cache")
    sys.exit(n_wrong > 0)


if __name__ == "__main__":
    main()
