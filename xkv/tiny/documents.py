"""Synthetic documents with facts scattered in them, and the questions the bundled model answers.

Every word is one token of the bundled tokenizer and every punctuation mark another, so lengths can
be chosen exactly without a tokenizer. A fact is a sentence ``Name verb adjective noun.``: the key
stands directly before its value.
"""

import re
from dataclasses import dataclass
from random import Random

from xkv.tiny.words import (
    ADJECTIVES,
    DISTRACTORS,
    FIELDS,
    LEAD_INS,
    LETTERS,
    NAMES,
    NOUNS,
    QUESTIONS,
    TEMPLATES,
    VERBS,
)

_FIELD = re.compile(r"{(\w+)}")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_SHORTEST_FILLER = 3
_DISTRACTOR_SHARE = 0.1
_LEAD_IN_SHARE = 0.3


@dataclass(frozen=True)
class Fact:
    """One fact of a document: a question for it, and the answer, which is the fact's sentence."""

    name: str
    question: str
    answer: str

    @property
    def said(self) -> str:
        """The answer without the name."""
        return self.answer.removeprefix(self.name).strip()


@dataclass(frozen=True)
class Document:
    """A text and the facts stated in it, in the order of the text."""

    text: str
    facts: tuple[Fact, ...]


def make_document(seed: int, n_tokens: int, n_facts: int | None = None) -> Document:
    """Write a document that reads as English and states ``n_facts`` facts at random places.

    Args:
        seed: The same seed and lengths give the same document.
        n_tokens: Length of the text in tokens of the bundled tokenizer, met exactly; special
            tokens and questions are not counted.
        n_facts: Facts to state, at most ``len(NAMES)``. None takes one per 48 tokens, 1 to 64.

    Returns:
        The document; its facts are in the order of the text.

    Raises:
        ValueError: If ``n_facts`` is out of range or the facts do not fit into ``n_tokens``.
    """
    if n_facts is None:
        n_facts = max(1, min(64, n_tokens // 48))
    if not 0 <= n_facts <= len(NAMES):
        raise ValueError(f"n_facts={n_facts} is outside 0 to {len(NAMES)}; each needs its own name")
    random = Random(f"{seed} {n_tokens} {n_facts}")
    facts = draw_facts(random, n_facts)
    plain = [fact.answer for fact in facts]
    # Lead-ins are left out when they would leave no room, or a gap shorter than any filler.
    for stated in ([_with_lead_in(random, sentence) for sentence in plain], plain):
        n_filler = n_tokens - sum(map(count_tokens, stated))
        if n_filler == 0 or n_filler >= _SHORTEST_FILLER:
            break
    else:
        least = 5 * n_facts + _SHORTEST_FILLER
        raise ValueError(f"{n_facts} facts do not fit into n_tokens={n_tokens}; allow {least}")
    fillers = _draw_fillers(random, n_filler)
    slots = [True] * len(stated) + [False] * len(fillers)
    random.shuffle(slots)
    next_fact, next_filler = iter(stated), iter(fillers)
    sentences = [next(next_fact) if is_fact else next(next_filler) for is_fact in slots]
    return Document(_paragraphs(random, sentences), tuple(facts))


def ask(random: Random, name: str) -> str:
    """One of the question forms for a name."""
    return random.choice(QUESTIONS).format(name=name)


def count_tokens(text: str) -> int:
    """Tokens that the bundled tokenizer makes of a text written by this module.

    A word of the vocabulary, a number of two or three digits and a punctuation mark are one token
    each; any other word is one token plus one per UTF-8 byte.
    """
    return sum(_word_tokens(word) for word in _TOKEN.findall(text))


def vocabulary() -> tuple[str, ...]:
    """Every word of documents, questions and answers, in a fixed order, without punctuation."""
    return tuple(sorted(_KNOWN))


def _word_tokens(word: str) -> int:
    is_number = word.isdecimal() and 2 <= len(word) <= 3
    is_one_piece = word in _KNOWN or is_number or not word[0].isalnum()
    return 1 if is_one_piece else 1 + len(word.encode())


def draw_facts(random: Random, n_facts: int) -> list[Fact]:
    """Facts about different people, at most ``len(NAMES)``."""
    # Distinct neighbor pairs: after two words of an answer, the third is determined.
    facts, pairs = [], set()
    for name in random.sample(NAMES, n_facts):
        while True:
            verb, adjective, noun = (random.choice(words) for words in (VERBS, ADJECTIVES, NOUNS))
            if (verb, adjective) not in pairs and (adjective, noun) not in pairs:
                break
        pairs |= {(verb, adjective), (adjective, noun)}
        facts.append(Fact(name, ask(random, name), f"{name} {verb} {adjective} {noun}."))
    return facts


def _with_lead_in(random: Random, sentence: str) -> str:
    if random.random() >= _LEAD_IN_SHARE:
        return sentence
    return f"{random.choice(LEAD_INS)} {sentence}"


def filler_sentence(random: Random) -> str:
    """A sentence that states no fact."""
    is_distractor = random.random() < _DISTRACTOR_SHARE
    template = random.choice(DISTRACTORS if is_distractor else TEMPLATES)
    sentence = _FIELD.sub(lambda match: _draw_field(random, match[1]), template)
    return sentence[0].upper() + sentence[1:]


def _draw_fillers(random: Random, n_tokens: int) -> list[str]:
    fillers: list[str] = []
    while n_tokens > 0:
        sentence = filler_sentence(random)
        rest = n_tokens - count_tokens(sentence)
        if rest == 0 or rest >= _SHORTEST_FILLER:
            fillers.append(sentence)
            n_tokens = rest
    return fillers


def _draw_field(random: Random, field: str) -> str:
    if field == "word":
        return random.choice(_FREE_WORDS)
    if field == "letters":
        return "".join(random.choices(LETTERS, k=random.randint(2, 6)))
    if field == "digits":
        return str(random.randrange(1000))
    return random.choice(FIELDS[field])


def _paragraphs(random: Random, sentences: list[str]) -> str:
    paragraphs, start = [], 0
    while start < len(sentences):
        end = start + random.randint(4, 8)
        paragraphs.append(" ".join(sentences[start:end]))
        start = end
    return "\n\n".join(paragraphs)


def _known_words() -> frozenset[str]:
    fixed = (*LEAD_INS, *QUESTIONS, *TEMPLATES, *DISTRACTORS, "Noted.")
    words = set(re.findall(r"[A-Za-z]+", _FIELD.sub("", " ".join(fixed))))
    words |= {word for choices in FIELDS.values() for word in choices}
    words |= {word.capitalize() for word in FIELDS["number"]}
    return frozenset(words.union(NAMES))


_KNOWN = _known_words()
# Names are left out: a random word must not read as a fact.
_FREE_WORDS = tuple(sorted(word for word in _KNOWN if word not in NAMES))
