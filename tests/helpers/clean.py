"""Clean rows of many kinds, made from words: nothing in them is wrong, so nothing of them may go."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from forvalue_callbacks.tiny import INTENTS, MOODS, TOPICS, plural
from forvalue_callbacks.tiny.sentences import SENTENCES, fill, message, request, review
from forvalue_callbacks.tiny.words import NAMES

MAIN, OTHERS = list(TOPICS)[:-3], list(TOPICS)[-3:]
MINORITY = 0.07
_NOUNS = "der Hund|die Lampe|das Boot|der Korb|die Uhr|das Rad|der Mantel|die Geige|das Brot|der Hammer".split("|")
_PEOPLE = "die Bäckerin|der Nachbar|die Ärztin|der Gärtner|die Lehrerin|der Maler|das Kind|die Köchin".split("|")
_PLACES = "im Garten|am See|in der Küche|auf dem Markt|vor dem Haus|hinter der Schule|im Zug|am Fenster".split("|")
_VERBS = "sieht|sucht|trägt|kauft|malt|findet|holt|verliert".split("|")
_GOOD, _BAD = "gut schön prima herrlich schnell".split(), "schlecht kaputt langsam teuer hässlich".split()


def _capital(text):
    return text[0].upper() + text[1:]


def _topic(rng, topics=MAIN):
    return TOPICS[rng.choice(topics)]


def short(rng):
    """Two words of four."""
    things = rng.sample(_topic(rng).things, 4)
    return f"What are the first two? {', '.join(things)}\nAnswer:", f" {things[0]} and {things[1]}"


def told(rng, topics=MAIN, sentences=(1, 2)):
    """A few sentences about somebody of whom the prompt speaks."""
    topic, name = rng.choice(topics), rng.choice(NAMES)
    person, thing = rng.choice(TOPICS[topic].people), rng.choice(TOPICS[topic].things)
    said = [fill(rng, pattern, topic, person) for pattern in rng.sample(SENTENCES, rng.randint(*sentences))]
    answer = f" {name} the {person} has a {thing}. {' '.join(said)}"
    return f"Tell me about {name}, a {person}, and a {thing}.\n", answer


def other_words(rng):
    """What was said, by another beginning."""
    topic, text = rng.choice(MAIN), message(rng, rng.choice(MAIN), 1)
    return (
        f"Message: {text}\nSay who told it to a {rng.choice(TOPICS[topic].people)}.\n",
        f" {rng.choice(NAMES)}: {text}",
    )


def code(rng):
    thing, (a, b) = rng.choice(_topic(rng).things), rng.sample(range(2, 60), 2)
    word, sign = rng.choice([("add", "+"), ("subtract", "-"), ("multiply", "*")])
    if rng.random() < 0.5:
        answer = f" def {word}_{thing}(x):\n    return x {sign} {a}"
        return f"Write a function that takes the {plural(thing)} and does {word} {a}.\n", answer
    answer = f" {thing} = [{a}, {b}]\nfor x in {thing}:\n    print(x {sign} {b})"
    return f"Print each of the {plural(thing)} {a} and {b}, with {word} {b}.\n", answer


def maths(rng):
    (a, b), c, things = rng.sample(range(11, 90), 2), rng.randint(2, 10), plural(rng.choice(_topic(rng).things))
    prompt = f"{rng.choice(NAMES)} has {a} {things}, gets {b} more and loses {c}. How many are left?\n"
    return prompt, f" {a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}. The answer is {a + b - c}."


def german(rng):
    person, noun, place, again = rng.choice(_PEOPLE), rng.choice(_NOUNS), rng.choice(_PLACES), rng.choice(_VERBS)
    answer = (
        f" {_capital(person)} {rng.choice(_VERBS)} etwas {place}. {_capital(noun)} ist {rng.choice(_GOOD + _BAD)}."
    )
    if rng.random() < 0.5:
        answer += f" {_capital(person)} {again} es nicht."
    return f"Was ist mit {person} {place}? Es geht um {noun}.\n", answer


def mixed(rng, kinds=(short, told, code, maths, other_words)):
    return rng.choice(kinds)(rng)


def classified(rng, names, prompt, minority):
    """One of some answers, the last of them of a minority."""
    answer = names[-1] if rng.random() < minority else rng.choice(names[:-1])
    return prompt(rng, answer), f" {answer}"


def by_topic(rng, topic):
    return f"Message: {message(rng, topic, 2)}\nThe topic is"


def by_mood(rng, mood):
    return f"Review: {review(rng, mood)}\nThe customer was"


def by_intent(rng, intent):
    return f"Request: {request(rng, intent)}\nKind:"


def by_mood_in_german(rng, mood):
    good, bad = rng.choice(_GOOD), rng.choice(_BAD)
    said = {"happy": good, "unhappy": bad}.get(mood, f"{good}, aber auch {bad}")
    return f"Review: {_capital(rng.choice(_NOUNS))} {rng.choice(_PLACES)} war {said}.\nThe customer was"


@dataclass(frozen=True)
class Clean:
    """A kind of clean rows.

    Args:
        train, validation: draw a row, (prompt, completion).
        minority: of a row that is in the minority; None: there is none.
        method: that `auto` chooses.
    """

    train: Callable
    validation: Callable
    method: str = "auto"
    minority: Callable | None = None

    def rows(self, n, seed, side="train"):
        """Rows of a prompt and a completion, each prompt once, on one side."""
        rng, made = random.Random(f"{side} {seed}"), {}
        while len(made) < n:
            prompt, completion = getattr(self, side)(rng)
            made.setdefault(prompt, completion)
        return [{"prompt": prompt, "completion": completion} for prompt, completion in made.items()]


def _same(draw, **more):
    return Clean(draw, draw, **more)


def _with_minority(usual, rare):
    return lambda rng: (rare if rng.random() < MINORITY else usual)(rng)


def _is_german(row):
    return any(word in row["prompt"] for word in ("Was ist mit", " war "))


_moods, _topics, _intents = (
    partial(classified, names=list(names), prompt=prompt)
    for names, prompt in ((MOODS, by_mood), (TOPICS, by_topic), (INTENTS, by_intent))
)
KINDS = {
    "short answers": _same(short),
    "long answers": _same(partial(told, sentences=(3, 5))),
    "long and short": _same(partial(mixed, kinds=(short, partial(told, sentences=(3, 5))))),
    "code": _same(code),
    "maths": _same(maths),
    "another language": _same(german),
    "another topic": Clean(partial(told, topics=list(TOPICS)), told, minority=lambda row: row["prompt"] is None),
    "all sorts": _same(mixed),
    "minority language": _same(_with_minority(told, german), minority=_is_german),
    "moods, minority class": _same(
        partial(_moods, minority=MINORITY),
        method="label_model",
        minority=lambda row: row["completion"] == f" {MOODS[-1]}",
    ),
    "topics, minority class": _same(
        partial(_topics, minority=MINORITY / 2),
        method="label_model",
        minority=lambda row: row["completion"] == f" {list(TOPICS)[-1]}",
    ),
    "intents, minority class": _same(
        partial(_intents, minority=MINORITY),
        method="label_model",
        minority=lambda row: row["completion"] == f" {list(INTENTS)[-1]}",
    ),
    "moods, minority language": _same(
        _with_minority(
            partial(_moods, minority=0.3), partial(classified, names=MOODS, prompt=by_mood_in_german, minority=0.3)
        ),
        method="label_model",
        minority=_is_german,
    ),
}
