"""The words and sentences that synthetic documents are made of."""


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

# Fields in braces are drawn from FIELDS.
# Templates of 3, 4 and 5 tokens let every length from 3 on be filled exactly.
TEMPLATES = (
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
DISTRACTORS = (
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
LETTERS = "ghjklmnpqrstvwxzBCDFGHJKLMNPQRSTVWXZéüñøß字語λж"

FIELDS: dict[str, tuple[str, ...]] = {
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
