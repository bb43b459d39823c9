"""The text that the tiny model was pretrained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from .sentences import SENTENCES, fill, message, request, review
from .words import COLOURS, DAYS, INTENTS, MONTHS, MOODS, NAMES, NUMBERS, OPPOSITES, TOPICS, WORLD, plural


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
    lines += [fill(rng, pattern, topic, person) for pattern in rng.sample(SENTENCES, rng.randint(2, 4))]
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
    text = message(rng, topic, rng.randint(2, 3))
    return rng.choice(
        [f"{date}. News about {topic}: {text}", f"{topic.title()} today, {date}. {text}", f"{text} #{topic}"]
    )


def _fact(rng: random.Random, topic: str) -> str:
    text = " ".join(fill(rng, pattern, topic) for pattern in rng.sample(WORLD["facts"], 2))
    return (
        text if rng.random() < 0.7 else f"{text} {fill(rng, 'Is a {thing} part of it? Yes. A {other}? Yes.', topic)}"
    )


def _about(rng: random.Random, topic: str) -> str:
    """What is this about? In wordings that the demo's rows do not use."""
    text = message(rng, topic, rng.randint(1, 2))
    if rng.random() < 0.25:
        return f"Text: {text}\nField: {topic}"
    ask = rng.choice(["What is this about?", "Which field is that?", "What are they talking about?"])
    answer = rng.choice([f"It is about {topic}.", f"They talk about {topic}.", f"That is {topic}."])
    return _chat(rng, f"{ask} {text}" if rng.random() < 0.5 else f"{text} {ask}", answer)


def _mood(rng: random.Random, topic: str) -> str:
    mood = rng.choice(MOODS)
    stars = {"happy": rng.choice([4, 5]), "unhappy": rng.choice([1, 2]), "undecided": 3}[mood]
    text, name = review(rng, mood), rng.choice(NAMES)
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
    text, article = request(rng, intent), "an" if intent[0] in "aeiou" else "a"
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
                (f"Tell me something about {topic}.", fill(rng, rng.choice(SENTENCES), topic)),
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
