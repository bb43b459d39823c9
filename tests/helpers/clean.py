"""Clean rows of many kinds, made from words: nothing in them is wrong, so none of them should go.

What draws a row gives its prompt, its completion and its group: its class, its language, what it is about.
"""

import random
from functools import partial

from forvalue_callbacks.tiny import INTENTS, MOODS, TOPICS, plural
from forvalue_callbacks.tiny.sentences import SENTENCES, fill, message, request, review
from forvalue_callbacks.tiny.words import NAMES

MINORITY = 0.07
_USUAL = list(TOPICS)[:-3]
_NOUNS = ["der Hund", "die Lampe", "das Boot", "der Korb", "die Uhr", "das Rad", "der Mantel", "die Geige", "das Brot"]
_PEOPLE = ["die Bäckerin", "der Nachbar", "die Ärztin", "der Gärtner", "die Lehrerin", "der Maler", "die Köchin"]
_PLACES = ["im Garten", "am See", "in der Küche", "auf dem Markt", "vor dem Haus", "hinter der Schule", "im Zug"]
_VERBS = ["sieht", "sucht", "trägt", "kauft", "malt", "findet", "holt", "verliert"]
_GOOD = ["gut", "schön", "prima", "herrlich", "schnell"]
_BAD = ["schlecht", "kaputt", "langsam", "teuer", "hässlich"]


def _capital(text):
    return text[0].upper() + text[1:]


def _words(rng):
    return TOPICS[rng.choice(list(TOPICS))]


def short(rng):
    """Two words of four."""
    things = rng.sample(_words(rng).things, 4)
    return f"What are the first two? {', '.join(things)}\nAnswer:", f" {things[0]} and {things[1]}", "short"


def told(rng, topics=_USUAL, sentences=(1, 2)):
    """What somebody does of whom the prompt speaks; its group is the topic."""
    topic, name = rng.choice(topics), rng.choice(NAMES)
    person, thing = rng.choice(TOPICS[topic].people), rng.choice(TOPICS[topic].things)
    said = [fill(rng, pattern, topic, person) for pattern in rng.sample(SENTENCES, rng.randint(*sentences))]
    answer = f" {name} the {person} has a {thing}. {' '.join(said)}"
    return f"Tell me about {name}, a {person}, and a {thing}.\n", answer, topic


def long(rng):
    return *told(rng, sentences=(3, 5))[:2], "long"


def code(rng):
    thing, (a, b) = rng.choice(_words(rng).things), rng.sample(range(2, 60), 2)
    word, sign = rng.choice([("add", "+"), ("subtract", "-"), ("multiply", "*")])
    if rng.random() < 0.5:
        prompt = f"Write a function that takes the {plural(thing)} and does {word} {a}.\n"
        return prompt, f" def {word}_{thing}(x):\n    return x {sign} {a}", "code"
    prompt = f"Print each of the {plural(thing)} {a} and {b}, with {word} {b}.\n"
    return prompt, f" {thing} = [{a}, {b}]\nfor x in {thing}:\n    print(x {sign} {b})", "code"


def maths(rng):
    (a, b), c, things = rng.sample(range(11, 90), 2), rng.randint(2, 10), plural(rng.choice(_words(rng).things))
    prompt = f"{rng.choice(NAMES)} has {a} {things}, gets {b} more and loses {c}. How many are left?\n"
    return prompt, f" {a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}. The answer is {a + b - c}.", "maths"


def german(rng):
    (person, noun, place), again = map(rng.choice, (_PEOPLE, _NOUNS, _PLACES)), rng.choice(_VERBS)
    answer = f" {_capital(person)} {rng.choice(_VERBS)} es {place}. {_capital(noun)} ist {rng.choice(_GOOD + _BAD)}."
    if rng.random() < 0.5:
        answer += f" {_capital(person)} {again} es nicht."
    return f"Was ist mit {person} {place}? Es geht um {noun}.\n", answer, "German"


def of(rng, *kinds):
    return rng.choice(kinds)(rng)


def mostly(rng, usual, rare, share=MINORITY):
    return (rare if rng.random() < share else usual)(rng)


def classified(rng, names, prompt, share=MINORITY):
    """One of some answers, the last of them that of a share of the rows."""
    answer = list(names)[-1] if rng.random() < share else rng.choice(list(names)[:-1])
    return prompt(rng, answer), f" {answer}", answer


def _topic(rng, topic):
    return f"Message: {message(rng, topic, 2)}\nThe topic is"


def _mood(rng, mood):
    return f"Review: {review(rng, mood)}\nThe customer was"


def _intent(rng, intent):
    return f"Request: {request(rng, intent)}\nKind:"


def _mood_in_german(rng):
    mood, good, bad = rng.choice(MOODS), rng.choice(_GOOD), rng.choice(_BAD)
    said = {"happy": good, "unhappy": bad}.get(mood, f"{good}, aber auch {bad}")
    prompt = f"Review: {_capital(rng.choice(_NOUNS))} {rng.choice(_PLACES)} war {said}.\nThe customer was"
    return prompt, f" {mood}", "German"


# Free answers, which `auto` judges, and few ones, which `label_model` does; the training rows of one kind of the first
# are about more than the validation rows are.
FREE = {
    "short answers": short,
    "long answers": long,
    "long and short": lambda rng: of(rng, short, long),
    "code": code,
    "maths": maths,
    "another language": german,
    "another topic": told,
    "all sorts": lambda rng: of(rng, short, long, code, maths, german, told),
    "minority language": lambda rng: mostly(rng, told, german),
}
FEW = {
    "moods, minority class": lambda rng: classified(rng, MOODS, _mood),
    "topics, minority class": lambda rng: classified(rng, TOPICS, _topic, MINORITY / 2),
    "intents, minority class": lambda rng: classified(rng, INTENTS, _intent),
    "moods, minority language": lambda rng: mostly(
        rng, lambda rng: classified(rng, MOODS, _mood, 0.3), _mood_in_german
    ),
}
OF_TRAINING = {"another topic": partial(told, topics=list(TOPICS))}


def rows_of(kind, n, seed, validation=False):
    """Rows (prompt, completion, group), each prompt once."""
    draw = {**FREE, **FEW}[kind] if validation else {**FREE, **FEW, **OF_TRAINING}[kind]
    rng, made = random.Random(f"{kind} {validation} {seed}"), {}
    while len(made) < n:
        prompt, *rest = draw(rng)
        made.setdefault(prompt, rest)
    return [{"prompt": prompt, "completion": answer, "group": group} for prompt, (answer, group) in made.items()]


def wrong(rows, share, seed, few):
    """Some rows have the answers of others, or of few answers another one; and which."""
    rng, answers = random.Random(seed), [row["completion"] for row in rows]
    chosen = rng.sample(range(len(rows)), round(share * len(rows)))
    out = [dict(row) for row in rows]
    for i, j in zip(chosen, [*chosen[1:], *chosen[:1]], strict=True):
        out[i]["completion"] = rng.choice(sorted({*answers} - {answers[i]})) if few else answers[j]
    return out, [row["completion"] != answer for row, answer in zip(out, answers, strict=True)]
