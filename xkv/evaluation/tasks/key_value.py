"""Key-value retrieval: the whole context is pairs of UUIDs, and one key's value is asked for."""

from __future__ import annotations

from random import Random

from xkv.errors import InputError
from xkv.evaluation.tasks.haystack import draw_uuid
from xkv.evaluation.tasks.sample import Count, Question, Sample

N_QUESTIONS = 16
INTRO = "Here are keys with their values. Remember them."


def make(seed: int, n_tokens: int, count: Count) -> Sample:
    """As many pairs as fit; up to 16 of them are asked for.

    Source: Lost in the Middle, arXiv:2307.03172; RULER's niah_multikey_3, arXiv:2404.06654.
    """
    random = Random(f"key_value {seed} {n_tokens}")
    pairs: list[tuple[str, str]] = []
    lines = [INTRO]
    total = count(INTRO)
    while True:
        pair = (draw_uuid(random), draw_uuid(random))
        line = f"{pair[0]}: {pair[1]}."
        total += count(f"\n{line}")
        if total > n_tokens:
            break
        pairs.append(pair)
        lines.append(line)
    if not pairs:
        raise InputError(f"a length of {n_tokens} tokens is too short for key_value")
    asked = random.sample(pairs, min(N_QUESTIONS, len(pairs)))
    questions = [
        Question(f"What is the value of {key}?", f"{key}:", f"{value}.", (value,))
        for key, value in asked
    ]
    return Sample("key_value", seed, "\n".join(lines), tuple(questions))
