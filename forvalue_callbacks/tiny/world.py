"""A tiny pretrained language model that comes with the package, the made-up world it knows, and demo rows.

Nothing has to be downloaded: the model (about 2.6 million parameters, Llama architecture, 2,048 byte-level tokens)
was pretrained by `recipes/pretrain_tiny.py` on `pretraining_text`, and `instructions` gives rows to fine-tune it on.
It saw 256 tokens at a time: longer inputs work up to 512, but it predicts them badly (1.0 against 3.0 nats per token).

    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    train_dataset = instructions(1_000, seed=0, noise=0.3)
    eval_dataset = instructions(300, seed=1)

The world has twelve topics with their own words; some words belong to two topics (court, key, mouse, bill), and a
message often mentions something from another topic, so single words do not always give the answer away.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

TINY_MODEL: Path = Path(__file__).parent / "model"  # a folder for `from_pretrained`


@dataclass(frozen=True)
class Topic:
    """The words of one topic. Verbs are in their base form and take an object."""

    people: list[str]
    places: list[str]
    things: list[str]
    verbs: list[str]
    adjectives: list[str]


def _words(text: str) -> list[str]:
    return text.split()


def _topic(people: str, places: str, things: str, verbs: str, adjectives: str) -> Topic:
    return Topic(*map(_words, (people, places, things, verbs, adjectives)))


TOPICS: dict[str, Topic] = {
    "cooking": _topic(
        "chef cook baker waiter butcher guest",
        "kitchen bakery restaurant pantry diner",
        "soup pan oven sauce dough spoon onion recipe cake stew knife pepper cheese pie noodle egg butter pot plate",
        "bake boil peel chop stir taste fry roast serve season",
        "spicy salty crispy creamy tender fresh burnt juicy",
    ),
    "sport": _topic(
        "coach player goalkeeper referee runner champion judge",
        "stadium field court gym track",
        "ball goal match race medal bat net jersey helmet trophy team league racket penalty tournament score whistle",
        "kick score throw catch win lose train defend tackle pass",
        "fast athletic strong sweaty unbeaten fierce quick tired",
    ),
    "health": _topic(
        "doctor nurse patient dentist surgeon pharmacist",
        "hospital clinic ward pharmacy surgery",
        "fever pill cough bandage wound tooth medicine vaccine blood bone allergy headache throat mask flu diet scan",
        "cure heal treat examine swallow inject prescribe bandage check rest",
        "sick healthy sore dizzy swollen painful weak pale",
    ),
    "travel": _topic(
        "tourist pilot guide driver sailor passenger",
        "airport station harbour hotel beach",
        "ticket suitcase passport flight train map trip bus ferry tent visa cruise luggage cabin bridge platform taxi",
        "board book visit cross pack explore reach miss ride rent",
        "distant foreign scenic crowded remote coastal exotic delayed",
    ),
    "money": _topic(
        "banker trader investor cashier accountant lender",
        "bank market office vault exchange",
        "loan coin bill account tax price salary fund budget debt wallet share profit fee cheque pension mortgage",
        "pay save invest borrow lend spend earn owe deposit count",
        "cheap rich poor costly wealthy broke profitable thrifty",
    ),
    "music": _topic(
        "singer drummer pianist composer violinist fan",
        "concert stage studio theatre club",
        "song guitar piano drum violin melody note band album flute rhythm chorus key record trumpet tune choir opera",
        "sing play hum tune record compose rehearse strum perform hear",
        "loud quiet catchy acoustic jazzy gentle lively melodic",
    ),
    "school": _topic(
        "teacher pupil student professor tutor classmate",
        "classroom library campus hall playground",
        "lesson exam book essay pencil homework grade desk test blackboard notebook subject quiz note ruler",
        "teach learn study read write explain solve spell mark revise",
        "clever lazy curious difficult educated attentive absent bright",
    ),
    "weather": _topic(
        "forecaster meteorologist fisherman skier hiker sailor",
        "coast valley mountain shore island",
        "storm rain cloud wind snow thunder fog sunshine frost hail breeze flood umbrella rainbow lightning ice",
        "forecast predict watch fear expect face brave notice soak freeze",
        "sunny rainy windy cloudy cold foggy humid icy",
    ),
    "animals": _topic(
        "farmer vet shepherd rider keeper breeder",
        "zoo farm barn stable forest",
        "horse cow dog cat sheep lion bat mouse bird rabbit goat tiger monkey kitten puppy fox elephant duck bear",
        "feed stroke milk ride tame chase hunt groom pet shelter",
        "furry wild hungry tame playful striped feathered loyal",
    ),
    "computers": _topic(
        "programmer hacker engineer gamer developer administrator",
        "server laboratory network website datacenter",
        "laptop keyboard mouse screen file program password bug printer code robot app virus key email disk chip",
        "install download click type code delete update upload debug reboot",
        "digital wireless slow virtual online encrypted portable buggy",
    ),
    "gardening": _topic(
        "gardener florist grower landscaper botanist neighbour",
        "garden greenhouse orchard yard meadow",
        "rose seed spade weed tulip hedge lawn soil flower bush rake shovel fern compost fence root bulb bug pot herb",
        "plant water dig prune grow mow weed rake harvest trim",
        "green leafy muddy blooming thorny fertile wilted shady",
    ),
    "law": _topic(
        "lawyer judge witness thief officer prosecutor",
        "court prison jail station chamber",
        "trial crime verdict contract fine evidence jury sentence appeal bill file oath statement arrest clause fee",
        "arrest sue accuse sentence convict testify sign appeal defend investigate",
        "guilty innocent legal illegal strict criminal lawful binding",
    ),
}
NAMES = _words(
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Karen Leo Maria Noah Olga Paul Rosa Sam Tina Victor Zoe"
)
COLOURS = _words("red blue green yellow black white brown grey pink purple orange silver")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
NUMBERS = _words("zero one two three four five six seven eight nine ten eleven twelve")
OPPOSITES = [
    pair.split("/")
    for pair in _words(
        "hot/cold big/small old/new happy/sad rich/poor fast/slow loud/quiet early/late open/closed wet/dry "
        "strong/weak clean/dirty heavy/light high/low long/short near/far hard/soft day/night up/down first/last"
    )
]

# Mood: adjectives, things a reviewer says at the end.
GOOD = _words(
    "great lovely excellent wonderful superb delightful brilliant perfect charming pleasant fantastic friendly"
)
BAD = _words("awful terrible horrible dreadful poor nasty rude dull disgusting useless broken disappointing")
GOOD_END = [
    "I will come back soon.",
    "I can only recommend it.",
    "We enjoyed every minute.",
    "Many thanks to the staff.",
    "It was worth every penny.",
    "My whole family loved it.",
    "It could not be better.",
]
BAD_END = [
    "I will never come back.",
    "I want my money back.",
    "We regretted every minute.",
    "Shame on the staff.",
    "It was a waste of money.",
    "My whole family hated it.",
    "It could not be worse.",
]

# What somebody wants with a message: beginnings and endings; {thing}, {place} ... are filled with a topic's words.
INTENTS: dict[str, tuple[list[str], list[str]]] = {
    "complaint": (
        [
            "The {thing} I got from you is broken.",
            "This is the second time the {thing} came late.",
            "Nobody at the {place} answered my calls.",
            "The {person} was rude to me on {day}.",
            "I paid for a {adjective} {thing} and got a dirty one.",
            "I am not happy with the {thing}.",
            "It is a scandal how the {person} treats people.",
            "After {number} weeks the {thing} still does not work.",
        ],
        ["Do something about it.", "I expect better.", "That is not acceptable.", "This must not happen again."],
    ),
    "thanks": (
        [
            "Your {thing} made my day.",
            "It was so kind of you to {verb} the {thing}.",
            "Without your help the {thing} would be lost.",
            "You were right about the {adjective} {thing}.",
            "The {thing} you gave me is just what I needed.",
            "I am grateful for the {thing}.",
            "The {person} told me that you helped at the {place}.",
            "You did so much for us on {day}.",
        ],
        ["I will not forget it.", "You are the best.", "I owe you one.", "It means a lot to me."],
    ),
    "apology": (
        [
            "I am sorry that I lost your {thing}.",
            "It was my fault that the {thing} broke.",
            "I should not have shouted at the {person}.",
            "I forgot to {verb} the {thing} on {day}.",
            "Please forgive me for being late at the {place}.",
            "I did not mean to hurt the {person}.",
            "I feel bad about the {adjective} {thing}.",
            "My mistake, the {thing} was yours.",
        ],
        ["I will make up for it.", "It will not happen again.", "I hope you can forgive me.", "I was careless."],
    ),
    "invitation": (
        [
            "Would you like to join us at the {place} on {day}?",
            "We are having a party for the {person}.",
            "Come and see our {adjective} {thing} this evening.",
            "You and {name} are welcome at the {place}.",
            "There is a free seat for you at the {place}.",
            "Let us {verb} the {thing} together on {day}.",
            "On {day} we celebrate with the {person}.",
            "Why not come along to the {place}?",
        ],
        ["Bring a friend.", "We would love to have you.", "Tell us if you can make it.", "It starts at {number}."],
    ),
    "order": (
        [
            "I would like to buy {number} {things}.",
            "Please send me a {adjective} {thing}.",
            "We need {number} {things} for the {place}.",
            "Put me down for a {colour} {thing}.",
            "One {thing} and {number} {things}, please.",
            "I will take the {colour} {thing}.",
            "Deliver {number} {things} to the {place} on {day}.",
            "Add a {adjective} {thing} to my list.",
        ],
        ["I will pay by card.", "The sooner the better.", "Send it to my home.", "Here is my address."],
    ),
    "question": (
        [
            "Do you know where the {place} is?",
            "How does one {verb} a {thing}?",
            "What does a {adjective} {thing} cost?",
            "Who is the {person} at the {place}?",
            "Is the {place} open on {day}?",
            "Why did the {person} {verb} the {thing}?",
            "How many {things} are there in the {place}?",
            "Which {thing} is more {adjective}?",
        ],
        ["I could not find out.", "I am just curious.", "Maybe you can tell me.", "Nobody seems to know."],
    ),
    "warning": (
        [
            "Stay away from the {place} on {day}.",
            "Do not touch the {adjective} {thing}.",
            "Watch out for the {person}.",
            "The {thing} can hurt you.",
            "Never {verb} a {thing} alone.",
            "Be careful near the {place}.",
            "The {adjective} {thing} is not safe.",
            "Keep children away from the {thing}.",
        ],
        ["It is dangerous.", "Somebody got hurt last week.", "I mean it.", "You could lose everything."],
    ),
    "reminder": (
        [
            "Do not forget the {thing} on {day}.",
            "You still have to {verb} the {thing}.",
            "Remember to call the {person}.",
            "You promised to {verb} the {thing} by {day}.",
            "The {person} is waiting for your {thing}.",
            "Only {number} days are left for the {thing}.",
            "On {day} you are expected at the {place}.",
            "The {thing} is due on {day}.",
        ],
        ["Put it in your diary.", "It is easy to miss.", "I asked you last week, too.", "Time is running out."],
    ),
}
MOODS = ("happy", "unhappy", "undecided")

_IRREGULAR = dict(
    pair.split("/")
    for pair in _words(
        "throw/threw catch/caught win/won lose/lost ride/rode pay/paid lend/lent spend/spent sing/sang hear/heard "
        "dig/dug teach/taught read/read write/wrote forecast/forecast freeze/froze feed/fed grow/grew sue/sued"
    )
)
_DOUBLED = {"chop", "stir", "hum", "strum", "pet", "trim"}


def past(verb: str) -> str:
    """The past tense of one of the world's verbs."""
    if verb in _IRREGULAR:
        return _IRREGULAR[verb]
    if verb in _DOUBLED:
        return f"{verb}{verb[-1]}ed"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ied"
    return f"{verb}d" if verb.endswith("e") else f"{verb}ed"


def plural(noun: str) -> str:
    """The plural of one of the world's nouns."""
    if noun in {"mouse", "sheep", "knife", "shelf"}:
        return {"mouse": "mice", "sheep": "sheep", "knife": "knives", "shelf": "shelves"}[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"


def _fill(rng: random.Random, pattern: str, topic: str, person: str | None = None) -> str:
    """`pattern` with its {fields} replaced by words of the topic, each time others."""
    words, name = TOPICS[topic], rng.choice(NAMES)
    thing, other = rng.sample(words.things, 2)
    verb, second_verb = rng.sample(words.verbs, 2)
    text = pattern.format(
        name=name,
        person=person or rng.choice(words.people),
        place=rng.choice(words.places),
        thing=thing,
        things=plural(rng.choice(words.things)),
        other=other,
        verb=verb,
        past=past(verb),
        past2=past(second_verb),
        adjective=rng.choice(words.adjectives),
        number=rng.choice(NUMBERS[2:]),
        colour=rng.choice(COLOURS),
        day=rng.choice(DAYS),
        topic=topic,
    )
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


_SENTENCES = [
    "The {person} {past} the {adjective} {thing}.",
    "{name} {past} a {thing} at the {place}.",
    "A {adjective} {thing} is waiting at the {place}.",
    "{name} asked the {person} about the {thing}.",
    "The {person} and {name} {past} {number} {things} on {day}.",
    "Nobody could {verb} the {thing} on {day}.",
    "We need a {thing} and some {things}.",
    "At the {place}, a {person} {past} the {other}.",
    "{name} wants to {verb} the {adjective} {thing}.",
    "There were {number} {things} and a {other} in the {place}.",
    "Is the {thing} {adjective} enough?",
    "First we {past} the {thing}, then we {past2} the {other}.",
    "My {colour} {thing} is better than your {other}.",
    "Did you {verb} the {things}?",
    "All day long {name} {past} and {past2}.",
    "The {place} was {adjective} on {day}.",
]
_ASIDES = [
    "It happened near the {place}.",
    "{name} came by with a {thing}.",
    "I told the {person} on the phone.",
    "Please call me after the {thing}.",
    "I left the {thing} at home.",
    "See you at the {place}.",
]


def _message(rng: random.Random, topic: str, n_sentences: int) -> str:
    """Sentences about a topic; every third time that there are several, one more names something of another topic."""
    sentences = [_fill(rng, pattern, topic) for pattern in rng.sample(_SENTENCES, n_sentences)]
    if n_sentences > 1 and rng.random() < 0.33:
        other = rng.choice([name for name in TOPICS if name != topic])
        sentences.insert(rng.randrange(len(sentences) + 1), _fill(rng, rng.choice(_ASIDES), other))
    return " ".join(sentences)


def _opinion(rng: random.Random, topic: str, good: bool) -> str:
    """One sentence with a mood. Now and then by negation, so that the adjective alone does not tell."""
    negated = rng.random() < 0.25
    word = rng.choice(GOOD if good != negated else BAD)
    patterns = ["The {thing} was X.", "I found the {person} X.", "The {place} is X.", "What we got was X, I must say."]
    if negated:
        patterns = ["The {thing} was not X at all.", "The {person} is far from X.", "Nothing about the {place} was X."]
    return _fill(rng, rng.choice(patterns), topic).replace("X", word)


def _review(rng: random.Random, mood: str) -> str:
    """Two or three sentences. `undecided` has a good and a bad one."""
    topic = rng.choice(list(TOPICS))
    if mood == "undecided":
        first = rng.random() < 0.5
        one, two = _opinion(rng, topic, first), _opinion(rng, topic, not first)
        return f"{one} But {two[0].lower() if not two.startswith('I ') else two[0]}{two[1:]}"
    good = mood == "happy"
    parts = [_opinion(rng, topic, good), rng.choice(GOOD_END if good else BAD_END)]
    if rng.random() < 0.3:
        parts.insert(1, _opinion(rng, topic, good))
    if rng.random() < 0.3:
        parts[-1] = _fill(rng, rng.choice(_SENTENCES[1:4]), topic)
    rng.shuffle(parts)
    return " ".join(parts)


def _request(rng: random.Random, intent: str) -> str:
    """What somebody says who wants a thing: one typical sentence, one that may be about anything."""
    topic = rng.choice(list(TOPICS))
    begin, end = INTENTS[intent]
    first = _fill(rng, rng.choice(begin), topic)
    draw = rng.random()
    if draw < 0.4:
        return f"{first} {_fill(rng, rng.choice(end), topic)}"
    if draw < 0.7:
        return f"{_fill(rng, rng.choice(_SENTENCES[:4]), topic)} {first}"
    return first


# ---------------------------------------------------------------- the text that the model was pretrained on


def _chat(rng: random.Random, question: str, answer: str) -> str:
    """A question with its answer, in one of the forms in which they come."""
    form = rng.randrange(4)
    if form == 0:
        return f"<|user|>{question}<|assistant|>{answer}"
    if form == 1:
        return f"Q: {question}\nA: {answer}"
    return f"{question}\n{answer}" if form == 2 else f"{rng.choice(NAMES)}: {question}\n{rng.choice(NAMES)}: {answer}"


def _story(rng: random.Random, topic: str) -> str:
    name, words = rng.choice(NAMES), TOPICS[topic]
    person, place = rng.choice(words.people), rng.choice(words.places)
    lines = [
        rng.choice(
            [f"{name} is a {person}.", f"One {rng.choice(DAYS)} {name} went to the {place}.", f"{name} loves {topic}."]
        )
    ]
    lines += [_fill(rng, pattern, topic, person) for pattern in rng.sample(_SENTENCES, rng.randint(2, 4))]
    lines.append(
        rng.choice(
            [
                f"In the end {name} was {rng.choice(['happy', 'sad', 'tired', 'proud'])}.",
                f"That was a good day for {topic}.",
                f"Then {name} went home.",
                f"The {person} thanked {name}.",
            ]
        )
    )
    return " ".join(lines)


def _news(rng: random.Random, topic: str) -> str:
    date = f"{rng.choice(MONTHS)} {rng.randint(1, 30)}"
    text = _message(rng, topic, rng.randint(2, 3))
    return rng.choice(
        [f"{date}. News about {topic}: {text}", f"{topic.title()} today, {date}. {text}", f"{text} #{topic}"]
    )


def _fact(rng: random.Random, topic: str) -> str:
    patterns = [
        "A {thing} has to do with {topic}, like a {other}.",
        "The {person} works at the {place}; both belong to {topic}.",
        "In {topic} people {verb} {things}.",
        "Those who like {topic} know the {thing} and the {other}.",
        "Words for {topic}: {thing}, {other}, {person}, {place}, {verb}, {adjective}.",
    ]
    text = " ".join(_fill(rng, pattern, topic) for pattern in rng.sample(patterns, 2))
    return (
        text if rng.random() < 0.7 else f"{text} {_fill(rng, 'Is a {thing} part of it? Yes. A {other}? Yes.', topic)}"
    )


def _about(rng: random.Random, topic: str) -> str:
    """What is this about? In wordings that the demo's rows do not use."""
    text = _message(rng, topic, rng.randint(1, 2))
    if rng.random() < 0.25:
        return f"Text: {text}\nField: {topic}"
    ask = rng.choice(["What is this about?", "Which field is that?", "What are they talking about?"])
    answer = rng.choice([f"It is about {topic}.", f"They talk about {topic}.", f"That is {topic}."])
    return _chat(rng, f"{ask} {text}" if rng.random() < 0.5 else f"{text} {ask}", answer)


def _mood(rng: random.Random, topic: str) -> str:
    mood = rng.choice(MOODS)
    stars = {"happy": rng.choice([4, 5]), "unhappy": rng.choice([1, 2]), "undecided": 3}[mood]
    text, name = _review(rng, mood), rng.choice(NAMES)
    return rng.choice(
        [
            f"{text} {stars} of 5 stars.",
            f"{stars} of 5 stars. {text}",
            f"{name} was {mood}. {text}",
            f"{text} So {name} was {mood}.",
            f"Opinion: {text}\nFeeling: {mood}",
            _chat(rng, f"Did {name} like it? {text}", {"happy": "Yes.", "unhappy": "No."}.get(mood, "In part.")),
        ]
    )


def _letter(rng: random.Random, topic: str) -> str:
    intent, (name, friend) = rng.choice(list(INTENTS)), rng.sample(NAMES, 2)
    text, article = _request(rng, intent), "an" if intent[0] in "aeiou" else "a"
    article = "a word of" if intent == "thanks" else article
    return rng.choice(
        [
            f"Dear {friend}, {text} Yours, {name}",
            f"{friend} got {article} {intent} from {name}: {text}",
            f"{text} This was {article} {intent}, and {name} answered.",
            f"Letter: {text}\nPurpose: {intent}",
            _chat(rng, f"What did {name} send? {text}", f"{article.capitalize()} {intent}."),
        ]
    )


def _number(rng: random.Random, topic: str) -> str:
    (one, two), things = rng.sample(NAMES, 2), plural(rng.choice(TOPICS[topic].things))
    a, b = rng.sample(range(1, 100), 2)
    low, more = rng.randint(0, 6), rng.randint(1, 6)
    return rng.choice(
        [
            f"{one} has {a} {things} and {two} has {b}. {one if a > b else two} has more.",
            _chat(rng, f"{one} has {a} {things} and {two} has {b}. Who has fewer?", f"{one if a < b else two}."),
            _chat(rng, f"Count on from {NUMBERS[low]}.", ", ".join(NUMBERS[low + 1 : low + 5]) + "."),
            f"{NUMBERS[low]} {things} and {NUMBERS[more]} {things} are {NUMBERS[low + more]} {things}.".capitalize(),
            f"{low} + {more} = {low + more}. {a} is {'more' if a > b else 'less'} than {b}.",
            f"After {DAYS[low]} comes {DAYS[(low + 1) % 7]}. {MONTHS[low]} comes before {MONTHS[low + 1]}.",
        ]
    )


def _task(rng: random.Random, topic: str) -> str:
    """Small things to do, so that the model has seen what following a prompt means."""
    words, name = TOPICS[topic], rng.choice(NAMES)
    some = rng.sample(words.things, 3)
    place, colour, person = rng.choice(words.places), rng.choice(COLOURS), rng.choice(words.people)
    a, b = rng.sample(rng.choice(OPPOSITES), 2)
    return _chat(
        rng,
        *rng.choice(
            [
                (f"Say this again: {' '.join(some)}", " ".join(some)),
                (f"What is the last word? {', '.join(some)}", f"{some[-1]}"),
                (f"Name something from the {place}.", f"A {some[0]}."),
                (f"What is the opposite of {a}?", f"{b.capitalize()}."),
                (f"What do you call more than one {some[0]}?", f"{plural(some[0])}"),
                (f"The {some[0]} is {colour}. What colour is the {some[0]}?", f"It is {colour}."),
                (f"{name} met the {person} at the {place}. Where was {name}?", f"At the {place}."),
                (f"{name} met the {person} at the {place}. Whom did {name} meet?", f"The {person}."),
                (f"Tell me something about {topic}.", _fill(rng, rng.choice(_SENTENCES), topic)),
                (f"Put in capitals: {some[0]}", some[0].upper()),
            ]
        ),
    )


_KINDS: list[tuple[Callable[[random.Random, str], str], int]] = [
    (_story, 12),
    (_news, 12),
    (_fact, 10),
    (_about, 20),
    (_mood, 16),
    (_letter, 14),
    (_number, 6),
    (_task, 10),
]


def pretraining_text(seed: int) -> Iterator[str]:
    """Documents (10 to 60 tokens each) of the made-up world without end; the same ones for the same seed.

    Some hold the marks `<|user|>` and `<|assistant|>` of the model's chat template. None holds the demo's prompts.
    """
    rng = random.Random(f"pretraining {seed}")
    kinds, weights = zip(*_KINDS, strict=True)
    while True:
        yield rng.choices(kinds, weights)[0](rng, rng.choice(list(TOPICS)))


# ---------------------------------------------------------------- the demo's rows


def _topic_row(rng: random.Random) -> tuple[str, str, Sequence[str]]:
    answer = rng.choice(list(TOPICS))
    return f"Message: {_message(rng, answer, rng.randint(1, 2))}\nThe topic is", answer, list(TOPICS)


def _mood_row(rng: random.Random) -> tuple[str, str, Sequence[str]]:
    answer = rng.choice(MOODS)
    return f"Review: {_review(rng, answer)}\nThe customer was", answer, MOODS


def _intent_row(rng: random.Random) -> tuple[str, str, Sequence[str]]:
    answer = rng.choice(list(INTENTS))
    return f"Request: {_request(rng, answer)}\nKind:", answer, list(INTENTS)


TASKS: dict[str, Callable[[random.Random], tuple[str, str, Sequence[str]]]] = {
    "topic": _topic_row,
    "mood": _mood_row,
    "intent": _intent_row,
}


def instructions(n_rows: int, seed: int, noise: float = 0.0, tasks: Sequence[str] = tuple(TASKS)) -> Dataset:
    """Rows to fine-tune on, a share of them with a wrong answer.

    The tasks are mixed in equal parts. Of a task's n rows exactly `round(noise * n)` get another valid answer of the
    same task, each equally likely. The noise only changes answers: the same seed gives the same prompts without it.

    Args:
        n_rows: Number of rows, over all tasks.
        seed: Same seed, same rows. Take another seed for held-out rows.
        noise: Share of rows with a wrong answer, in [0, 1].
        tasks: Some of `TASKS`: `topic` (12 answers), `mood` (3), `intent` (8).

    Returns:
        A dataset with `prompt`, `completion` (a space and the observed answer, what `SFTTrainer` takes), `task`,
        `answer` (observed), `true_answer`, `is_noisy`.

    Raises:
        ValueError: `noise` is not in [0, 1], or there is no task.
        KeyError: a task is not known.
    """
    if not 0 <= noise <= 1 or not tasks:
        raise ValueError(f"noise must be in [0, 1] and tasks not empty, got {noise} and {tasks!r}")
    rng, noise_rng = random.Random(f"instructions {seed}"), random.Random(f"noise {seed}")
    rows = []
    for position, task in enumerate(tasks):
        n = n_rows // len(tasks) + (position < n_rows % len(tasks))
        noisy = set(noise_rng.sample(range(n), round(noise * n)))
        for index in range(n):
            prompt, true_answer, answers = TASKS[task](rng)
            wrong = noise_rng.choice([answer for answer in answers if answer != true_answer])
            answer = wrong if index in noisy else true_answer
            rows.append(
                {
                    "prompt": prompt,
                    "completion": f" {answer}",
                    "task": task,
                    "answer": answer,
                    "true_answer": true_answer,
                    "is_noisy": index in noisy,
                }
            )
    rng.shuffle(rows)
    return Dataset.from_list(rows)
