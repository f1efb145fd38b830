"""Synthetic documents with facts scattered in them, and the questions the bundled model answers.

Every word is one token of the bundled tokenizer and every punctuation mark another, so lengths can
be chosen exactly without a tokenizer. A fact is a sentence ``Name verb adjective noun.``: the key
stands directly before its value.
"""

import re
from dataclasses import dataclass
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
Aaron Abigail Adele Agnes Albert Alice Amelia Andrew Anita Anton Arthur Astrid Barbara Beatrice
Benjamin Bernard Bertha Bianca Boris Bruno Camilla Carl Carmen Cecilia Charles Clara Claudia Conrad
Cora Daniel Daphne David Deborah Dennis Diana Dora Edgar Edith Edmund Eleanor Elias Ella Emil Emma
Erika Ernest Esther Eugene Eva Fabian Felix Fiona Flora Frances Frank Frederick George Gerda Gilbert
Gloria Greta Gustav Hannah Harold Harriet Hector Helen Henry Herman Hilda Hugo Ida Igor Ingrid Irene
Isaac Ivan Jacob Janet Jasper Joanna Joel Jonas Joseph Judith Julia Karen Kaspar Kevin Klara Laura
Leo Leonard Lillian Linda Louis Lucas Lydia Magnus Marcus Margaret Marta Martin Matilda Maurice Max
Miriam Monica Nadia Nathan Nicholas Nina Nora Olga Oliver Oscar Otto Paula Peter Philip Quentin
Rachel Ralph Rebecca Robert Rosa Rupert Samuel Sarah Sophie Stefan
""")

VERBS = _words("""
admired altered answered arranged assembled auctioned baked balanced blessed borrowed bought brought
brushed built buried burned carried carved chased cleaned collected copied counted covered crafted
damaged decorated delivered described designed discovered displayed donated drew dropped emptied
examined exchanged filled finished fixed folded forgot found framed gathered guarded hid hired
imported inspected invented inherited kept labeled lifted lost loved measured mended mixed moved
named noticed offered opened ordered packed painted photographed planned planted polished pulled
pushed raised recorded refused rented repaired replaced restored returned saved searched sewed
sharpened shipped sketched sold sorted stole stored studied tested traded twisted unpacked washed
weighed wrapped
""")

ADJECTIVES = _words("""
amber ancient antique azure beige bitter blank blue bold brass brittle broken bronze brown cheap
chipped clever coarse copper cracked crimson crooked curved damp dark delicate dented dusty elegant
enormous faded famous fancy fine flat foreign fragile frozen gentle giant gilded glossy golden gray
green hairy heavy hollow huge humble indigo iron ivory jagged lavender light little long magnetic
maroon metallic modern muddy narrow noble odd orange oval pale pink plain pointed precious purple
rare red rough round royal rusty salty scarlet shiny silver simple slender smooth soft solid sour
spotted square striped sturdy sweet tall tiny velvet violet wooden yellow
""")

NOUNS = _words("""
anchors apples arrows badges balloons barrels baskets beads bells belts benches blankets boots
bottles bowls boxes bracelets bricks brooms brushes buckets buttons cabinets cakes candles carpets
carts chairs chains clocks coats coins combs compasses crowns cups curtains daggers diaries dishes
dolls drums engines fans feathers figs flags flutes forks gloves guitars hammers harps hats helmets
jackets jars kettles keys kites knives ladders lamps lanterns lemons lenses letters maps masks
medals mirrors needles notebooks paddles pearls pencils pianos pillows plates pots puppets radios
ribbons rings ropes rugs saddles scarves shields shoes spoons stamps statues stools swords tables
teapots tents tools towels toys trumpets umbrellas vases violins wagons whistles
""")

PLACES = _words("""
harbor valley village station river forest bridge market square tower castle garden island meadow
mountain museum library mill orchard palace port road school shore stable street temple theater town
wall
""")
ANIMALS = _words("""
bears birds cats cows crows deer dogs doves ducks eagles foxes frogs geese goats hens horses owls
rabbits sheep swans wolves
""")
PEOPLE = _words("""
bakers children clerks farmers fishermen guests merchants miners monks neighbors painters pilots
sailors shepherds singers soldiers students teachers travelers workers
""")
WEATHER = _words("clouds fog frost hail mist rain snow storm sunshine thunder wind")
MOODS = _words("""
busy calm cheerful cold crowded empty friendly happy lively lonely nervous patient peaceful proud
quiet silent sleepy strange tired warm
""")
TIMES = _words("morning afternoon evening night winter summer spring autumn week month")
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ADVERBS = _words("again early late often rarely slowly together twice quickly once")
ACTIVITIES = _words("""
danced laughed listened played rested sang slept talked traveled waited walked worked
""")
NUMBERS = _words("two three four five six seven eight nine ten twelve twenty thirty")

LEAD_INS = (
    "Yesterday",
    "Years ago",
    "In the morning,",
    "In the evening,",
    "Last summer",
    "Last winter",
    "Before the storm,",
    "After the market closed,",
    "It is said that",
    "People remember that",
    "Everyone knows that",
    "The book says that",
    "One day",
    "Later",
    "Without a word,",
)

QUESTIONS = (
    "What did {name} do?",
    "Tell me what {name} did.",
    "What do we know about {name}?",
    "What does the text say about {name}?",
    "What is said about {name}?",
    "Please tell me about {name}.",
    "Do you remember what {name} did?",
    "And what did {name} do?",
    "What about {name}?",
    "Which fact mentions {name}?",
)

# Fields in braces are drawn from _FIELDS.
# Templates of 3, 4 and 5 tokens let every length from 3 on be filled exactly.
_TEMPLATES = (
    "Time passed.",
    "Nothing changed.",
    "The {weather} came.",
    "{number} days passed.",
    "The {place} was {mood}.",
    "The {animals} were {mood}.",
    "The {people} {activity} {adverb}.",
    "On {weekday} the {people} {activity}.",
    "There was {weather} over the {place}.",
    "It was a {mood} {time} near the {place}.",
    "The {people} {activity} near the {place} all {time}.",
    "Many {animals} lived between the {place} and the {place}.",
    "When the {weather} came, the {people} {activity} {adverb}.",
    "The road from the {place} to the {place} was {mood}.",
    "Some of the {people} were {mood}, but the {animals} were not.",
    "Every {weekday} the {people} came to the {place}.",
    "After {number} days of {weather}, the {place} was {mood}.",
    "Nobody in the {place} had seen so much {weather} before.",
    "The {place} stood between the {place} and the old {place}.",
    "In the {time} the {animals} {activity} by the {place}.",
    "That {time} the {people} {activity} until the {weather} stopped.",
    "The {people} and the {people} {activity} together on {weekday}.",
    "There were {number} {animals} behind the {place}.",
    "At the {place}, {number} {people} {activity} under the trees.",
    "Who can say why the {animals} were so {mood}?",
    "From the {place} one could see the {place} and the hills.",
    "The {time} was {mood} and the {place} almost {mood}.",
    "By {weekday} the {weather} had reached the {place}.",
    "The {mood} {people} looked at the {weather} and {activity}.",
    "As always, the {place} closed when the {time} was over.",
)

# These use the words of facts without stating one, or words outside the vocabulary.
_DISTRACTORS = (
    "The {adjective} {nouns} near the {place} were {mood}.",
    "There were {adjective} {nouns} behind the {place}.",
    "Nobody knew who {verb} the {adjective} {nouns}.",
    "The {people} talked about {nouns} and {adjective} {nouns}.",
    "Most of the {nouns} in the {place} were {adjective}.",
    "The {people} {verb} {adjective} {nouns} all {time}.",
    "The {word} {word} {word} {word} {word}.",
    "The sign at the {place} read {letters}.",
    "On the wall of the {place} was written {letters} {digits}.",
    "The bell of the {place} rang {digits} times.",
)
_LETTERS = "ghjklmnpqrstvwxzBCDFGHJKLMNPQRSTVWXZéüñøß字語λж"

_FIELDS: dict[str, tuple[str, ...]] = {
    "place": PLACES,
    "animals": ANIMALS,
    "people": PEOPLE,
    "weather": WEATHER,
    "mood": MOODS,
    "time": TIMES,
    "weekday": WEEKDAYS,
    "adverb": ADVERBS,
    "activity": ACTIVITIES,
    "number": NUMBERS,
    "verb": VERBS,
    "adjective": ADJECTIVES,
    "nouns": NOUNS,
}
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
    template = random.choice(_DISTRACTORS if is_distractor else _TEMPLATES)
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
        return "".join(random.choices(_LETTERS, k=random.randint(2, 6)))
    if field == "digits":
        return str(random.randrange(1000))
    return random.choice(_FIELDS[field])


def _paragraphs(random: Random, sentences: list[str]) -> str:
    paragraphs, start = [], 0
    while start < len(sentences):
        end = start + random.randint(4, 8)
        paragraphs.append(" ".join(sentences[start:end]))
        start = end
    return "\n\n".join(paragraphs)


def _known_words() -> frozenset[str]:
    fixed = (*LEAD_INS, *QUESTIONS, *_TEMPLATES, *_DISTRACTORS, "Noted.")
    words = set(re.findall(r"[A-Za-z]+", _FIELD.sub("", " ".join(fixed))))
    words |= {word for choices in _FIELDS.values() for word in choices}
    words |= {word.capitalize() for word in _FIELDS["number"]}
    return frozenset(words.union(NAMES))


_KNOWN = _known_words()
# Names are left out: a random word must not read as a fact.
_FREE_WORDS = tuple(sorted(word for word in _KNOWN if word not in NAMES))
