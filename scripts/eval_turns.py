"""A conversation of many turns with the bundled model, full cache beside compressed ones.

    python -m scripts.eval_turns --conversations 4

The first message is a long document; every later one states new facts and asks for an old or a new
one. Replies are the model's own and stay in the conversation. Reported are exact answers by where
the fact was stated, and what the cache holds in the end against a fresh compression of the same
tokens.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

import xkv
from xkv import InputError, XKVConfig
from xkv.evaluate import FIRST_SEED
from xkv.tiny import CHECKPOINT_DIR, make_document
from xkv.tiny.documents import Fact, ask

MAX_ANSWER = 8


class Turn(NamedTuple):
    """A user's message, the answer to it, and where its fact was stated."""

    message: str
    answer: str
    source: str


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--cache",
        action="append",
        type=parse_cache,
        help="fields of XKVConfig, name=value separated by commas; may be given several times",
    )
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of the document")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--turn-tokens", type=int, default=40, help="new text in each message")
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--prefill-step-size", type=int, default=1024)
    return parser


def parse_cache(text: str) -> tuple[str, XKVConfig]:
    """``"compression=4,window=64"`` as a configuration, beside its text."""

    def value(word: str) -> Any:
        for kind in (int, float):
            try:
                return kind(word)
            except ValueError:
                continue
        return word

    try:
        options = dict(part.split("=", 1) for part in text.split(","))
        return text, XKVConfig(**{name: value(word) for name, word in options.items()})
    except (InputError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_turns(seed: int, n_tokens: int, n_turns: int, turn_tokens: int) -> Iterator[Turn]:
    """The messages of a conversation; each name has one fact only."""
    random = Random(seed)
    document = make_document(seed, n_tokens, 40)
    stated: list[tuple[Fact, str]] = [(fact, "document") for fact in document.facts]
    names = {fact.name for fact in document.facts}
    for number in range(n_turns):
        text = document.text
        if number:
            while True:
                added = make_document(random.randrange(2**40), turn_tokens, 2)
                text, facts = added.text, added.facts
                if not names & {fact.name for fact in facts}:
                    break
            names |= {fact.name for fact in facts}
            stated += [(fact, "this turn") for fact in facts]
        # every other question goes back to the document, the others to an earlier or this turn
        choices = [x for x in stated if (x[1] == "document") == (number % 2 == 0)]
        fact, source = random.choice(choices)
        yield Turn(f"{text} {ask(random, fact.name)}", fact.answer, source)
        stated = [(fact, "earlier turn" if s == "this turn" else s) for fact, s in stated]


def talk(
    model: Any, tokenizer: Any, turns: list[Turn], step_size: int
) -> tuple[list[str], list[Any], list[int]]:
    """Run a conversation; returns the replies, the cache and all its tokens."""
    cache, replies, tokens = make_prompt_cache(model), [], []
    for turn in turns:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": turn.message}], add_generation_prompt=True
        )
        reply: list[int] = []
        for token, _ in generate_step(
            mx.array(prompt),
            model,
            prompt_cache=cache,
            max_tokens=MAX_ANSWER,
            prefill_step_size=step_size,
        ):
            if token == tokenizer.eos_token_id:
                break
            reply.append(token)
        tokens += [*prompt, *reply]
        replies.append(tokenizer.decode(reply, skip_special_tokens=True).strip())
    return replies, cache, tokens


def measure(model: Any, tokenizer: Any, turns: list[Turn], args: Any) -> dict[str, Any]:
    """One conversation's right answers by source, seconds and bytes."""
    began = time.perf_counter()
    replies, cache, tokens = talk(model, tokenizer, turns, args.prefill_step_size)
    seconds = time.perf_counter() - began
    right = Counter(
        turn.source for turn, reply in zip(turns, replies, strict=True) if reply == turn.answer
    )
    held = sum(layer.nbytes for layer in cache)
    n_tokens = cache[0].offset
    del cache
    gc.collect()
    fresh = make_prompt_cache(model)
    prompt = mx.array((tokens * 2)[: n_tokens + 1])
    next(generate_step(prompt, model, prompt_cache=fresh, prefill_step_size=args.prefill_step_size))
    return {
        "right": right,
        "seconds": seconds,
        "held": held,
        "fresh": sum(layer.nbytes for layer in fresh),
        "tokens": n_tokens,
    }


def main() -> None:
    args = setup_arg_parser().parse_args()
    model, tokenizer = mlx_lm.load(str(CHECKPOINT_DIR))
    row_bytes = 8 * 2 * 2 * 64 * model.model.embed_tokens.weight.dtype.size
    caches = args.cache or [parse_cache("compression=4")]
    sources = ("document", "earlier turn", "this turn")
    print(f"{'cache':24} {'tokens':>7} " + " ".join(f"{x:>14}" for x in sources), end=" ")
    print(f"{'held':>8} {'of fresh':>8} {'seconds':>8}")
    found: dict[str, list[dict[str, Any]]] = {}
    asked: Counter[str] = Counter()
    for number in tqdm(range(args.conversations), file=sys.stderr, leave=False):
        turns = list(make_turns(FIRST_SEED + number, args.tokens, args.turns, args.turn_tokens))
        asked.update(turn.source for turn in turns)
        for name, config in (("full", None), *caches):
            if config is not None:
                xkv.enable(model, config)
            found.setdefault(name, []).append(measure(model, tokenizer, turns, args))
            if config is not None:
                xkv.disable(model)
    for name, runs in found.items():
        right = sum((run["right"] for run in runs), Counter())
        n_tokens = sum(run["tokens"] for run in runs)
        held, fresh = (sum(run[key] for run in runs) for key in ("held", "fresh"))
        shares = " ".join(f"{right[x]:>8}/{asked[x]:<5}" for x in sources)
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        print(
            f"{name:24} {n_tokens // len(runs):>7} {shares} "
            f"{n_tokens * row_bytes / held:>6.2f} x {held / fresh:>8.2f} {seconds:>8.1f}"
        )


if __name__ == "__main__":
    main()
