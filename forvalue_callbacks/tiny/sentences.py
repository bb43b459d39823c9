"""What is said in the made-up world: patterns of `world.json` filled with its words.

A message often mentions something from another topic, so single words do not always give the answer away.
"""

from __future__ import annotations

import random
import re

from .words import COLOURS, DAYS, INTENTS, NAMES, NUMBERS, TOPICS, WORLD, past, plural, words

SENTENCES: list[str] = WORLD["sentences"]


def fill(rng: random.Random, pattern: str, topic: str, person: str | None = None) -> str:
    """`pattern` with its {fields} replaced by words of the topic, each time others."""
    own, name = TOPICS[topic], rng.choice(NAMES)
    thing, other = rng.sample(own.things, 2)
    verb, second_verb = rng.sample(own.verbs, 2)
    text = pattern.format(
        name=name,
        person=person or rng.choice(own.people),
        place=rng.choice(own.places),
        thing=thing,
        things=plural(rng.choice(own.things)),
        other=other,
        verb=verb,
        past=past(verb),
        past2=past(second_verb),
        adjective=rng.choice(own.adjectives),
        number=rng.choice(NUMBERS[2:]),
        colour=rng.choice(COLOURS),
        day=rng.choice(DAYS),
        topic=topic,
    )
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


def message(rng: random.Random, topic: str, n_sentences: int) -> str:
    """Sentences about a topic; every third time that there are several, one more names something of another topic."""
    sentences = [fill(rng, pattern, topic) for pattern in rng.sample(SENTENCES, n_sentences)]
    if n_sentences > 1 and rng.random() < 0.33:
        other = rng.choice([name for name in TOPICS if name != topic])
        sentences.insert(rng.randrange(len(sentences) + 1), fill(rng, rng.choice(WORLD["asides"]), other))
    return " ".join(sentences)


def _opinion(rng: random.Random, topic: str, good: bool) -> str:
    """One sentence with a mood. Now and then by negation, so that the adjective alone does not tell."""
    negated = rng.random() < 0.25
    word = rng.choice(words("good" if good != negated else "bad"))
    patterns = WORLD["negated opinions" if negated else "opinions"]
    return fill(rng, rng.choice(patterns), topic).replace("X", word)


def review(rng: random.Random, mood: str) -> str:
    """Two or three sentences. `undecided` has a good and a bad one."""
    topic = rng.choice(list(TOPICS))
    if mood == "undecided":
        first = rng.random() < 0.5
        one, two = _opinion(rng, topic, first), _opinion(rng, topic, not first)
        return f"{one} But {two[0].lower() if not two.startswith('I ') else two[0]}{two[1:]}"
    good = mood == "happy"
    parts = [_opinion(rng, topic, good), rng.choice(WORLD["good endings" if good else "bad endings"])]
    if rng.random() < 0.3:
        parts.insert(1, _opinion(rng, topic, good))
    if rng.random() < 0.3:
        parts[-1] = fill(rng, rng.choice(SENTENCES[1:4]), topic)
    rng.shuffle(parts)
    return " ".join(parts)


def request(rng: random.Random, intent: str) -> str:
    """What somebody says who wants a thing: one typical sentence, one that may be about anything."""
    topic = rng.choice(list(TOPICS))
    begin, end = INTENTS[intent]
    first = fill(rng, rng.choice(begin), topic)
    draw = rng.random()
    if draw < 0.4:
        return f"{first} {fill(rng, rng.choice(end), topic)}"
    if draw < 0.7:
        return f"{fill(rng, rng.choice(SENTENCES[:4]), topic)} {first}"
    return first
