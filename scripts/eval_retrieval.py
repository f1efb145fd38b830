"""Exact-match accuracy of the bundled model on unseen documents, full cache beside compressed ones.

    python scripts/eval_retrieval.py --cache compression=4 --cache compression=8,group_size=8

Each document is prefilled once and every cache is made from the same keys and values, before any
question is known. Seeds start where training never went.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache as make_native_cache
from mlx_lm.models.cache import trim_prompt_cache
from tqdm import tqdm

from xkv import InputError, XKVConfig
from xkv.backends.mlx_metal import MLXBackend, attention_seam, make_prompt_cache
from xkv.tiny import CHECKPOINT_DIR, make_document

FIRST_SEED = 900_000
MAX_ANSWER = 8


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
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 3000, 4000])
    parser.add_argument("--documents", type=int, default=7, help="documents of each length")
    parser.add_argument("--questions", type=int, default=16, help="questions a document")
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


def answer(model: Any, cache: list[Any], question: list[int], end: int) -> list[int]:
    """The greedy answer, after which the cache is as before."""
    start, tokens, x = cache[0].offset, [], mx.array([question])
    while len(tokens) < MAX_ANSWER and end not in tokens:
        x = mx.argmax(model(x, cache=cache)[:, -1:], axis=-1)
        tokens.append(x.item())
    trim_prompt_cache(cache, cache[0].offset - start)
    return tokens


def main() -> None:
    args = setup_arg_parser().parse_args()
    model, tokenizer = mlx_lm.load(str(CHECKPOINT_DIR))
    model.set_dtype(mx.float32)
    backend = MLXBackend(kernels="auto" if mx.metal.is_available() else "off")
    caches = args.cache or [parse_cache("compression=4")]
    print(f"{'tokens':>7} {'questions':>9} {'right':>6} {'as full':>7} {'held':>7}  cache")
    for n_tokens in args.lengths:
        scores = {name: [0, 0, 0.0] for name in ("full", *dict(caches))}
        n_questions = 0
        for i in tqdm(range(args.documents), desc=str(n_tokens), leave=False, file=sys.stderr):
            document = make_document(FIRST_SEED + i, n_tokens)
            message = {"role": "user", "content": f"{document.text} @@"}
            text = tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            )
            head, tail = text.split(" @@")
            tokens = tokenizer.encode(head, add_special_tokens=False)
            full = make_native_cache(model)
            for start in range(0, len(tokens), args.prefill_step_size):
                model(mx.array([tokens[start : start + args.prefill_step_size]]), cache=full)
                mx.eval([layer.state for layer in full])
            step = max(1, len(document.facts) // args.questions)
            facts = document.facts[::step][: args.questions]
            questions = [
                tokenizer.encode(fact.question + tail, add_special_tokens=False) for fact in facts
            ]
            n_questions += len(facts)
            want = [answer(model, full, question, tokenizer.eos_token_id) for question in questions]
            for name, config in (("full", None), *caches):
                said, ratio = want, 1.0
                if config is not None:
                    cache = make_prompt_cache(model, config, backend=backend)
                    for mine, native in zip(cache, full, strict=True):
                        rows = (x[..., : native.offset, :] for x in (native.keys, native.values))
                        mine.update_and_fetch(*rows)
                    for group in cache[0].layer.group.cache.groups:
                        group.settle()
                    lowrank = cache[0].layer.group.cache
                    ratio = lowrank.dense_bytes() / lowrank.held_bytes()
                    with attention_seam():
                        said = [
                            answer(model, cache, question, tokenizer.eos_token_id)
                            for question in questions
                        ]
                texts = [tokenizer.decode(x, skip_special_tokens=True).strip() for x in said]
                scores[name][0] += sum(x == f.answer for x, f in zip(texts, facts, strict=True))
                scores[name][1] += sum(x == y for x, y in zip(said, want, strict=True))
                scores[name][2] += ratio / args.documents
        for name, (right, same, ratio) in scores.items():
            print(
                f"{n_tokens:>7} {n_questions:>9} {right / n_questions:>6.1%} "
                f"{same / n_questions:>7.1%} {ratio:>5.2f} x  {name}",
                flush=True,
            )


if __name__ == "__main__":
    main()
