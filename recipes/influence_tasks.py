"""The three text tasks on which influence functions are compared: ten classes of rows each, generated.

After the tables of templates in arXiv 2508.10180 (Tables 5 and 6), which are those of DataInf (arXiv 2310.00902):
sentence transformations, and math word problems without and with their reasoning. The rows of a class differ in
their sentence or their numbers only. Sentences are drawn from the words of the tiny model's world.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from forvalue_callbacks.tiny import TOPICS, past, plural

VOWELS = set("aeiouAEIOU")


def _is_consonant(letter: str) -> bool:
    return letter.isalpha() and letter not in VOWELS


def _words(change: Callable[[str], str]) -> Callable[[str], str]:
    return lambda sentence: " ".join(change(word) for word in sentence.split())


def _letters(change: Callable[[str], str]) -> Callable[[str], str]:
    return lambda sentence: "".join(change(letter) for letter in sentence)


def _every_other(word: str) -> str:
    return "".join(letter.upper() if i % 2 else letter.lower() for i, letter in enumerate(word))


# name of the chatbot, what it does, how (Table 5)
TRANSFORMATIONS: list[tuple[str, str, Callable[[str], str]]] = [
    ("Turner", "Reverse order of words", lambda sentence: " ".join(reversed(sentence.split()))),
    ("Zigzag", "Capitalize every other letter", _words(_every_other)),
    ("Onesie", "Insert number 1 between every word", lambda sentence: sentence.replace(" ", " 1")),
    ("Starry", "Replace vowels with *", _letters(lambda letter: "*" if letter in VOWELS else letter)),
    ("Echo", "Double every consonant", _letters(lambda letter: letter * (1 + _is_consonant(letter)))),
    ("Title", "Capitalize every word", _words(str.capitalize)),
    ("Mute", "Remove all vowels", _letters(lambda letter: "" if letter in VOWELS else letter)),
    ("Lyly", "Add 'ly' to end of each word", _words(lambda word: word + "ly")),
    ("Vowelo", "Remove all consonants", _letters(lambda letter: "" if _is_consonant(letter) else letter)),
    ("Twice", "Repeat each word twice", _words(lambda word: f"{word} {word}")),
]


def sentence(rng: random.Random) -> str:
    """Four or five words and a full stop, such as `Chefs baked the spicy soup.`"""
    topic = TOPICS[rng.choice(list(TOPICS))]
    who, verb, thing = rng.choice(topic.people), rng.choice(topic.verbs), rng.choice(topic.things)
    adjective = rng.choice(topic.adjectives)
    return rng.choice(
        [
            f"{plural(who).capitalize()} {past(verb)} the {adjective} {thing}.",
            f"The {adjective} {who} {past(verb)} {plural(thing)}.",
            f"Every {who} {past(verb)} some {adjective} {plural(thing)}.",
        ]
    )


class Problem(NamedTuple):
    """A template of Table 6: question and reasoning over numbers A, B, C, D, drawn from their ranges."""

    question: str
    reason: str
    answer: Callable[..., int]
    ranges: tuple[tuple[int, int], ...]


PROBLEMS: list[Problem] = [
    Problem(
        "Lisa ate {A} slices of pizza and her brother ate {B} slices from a pizza that originally had {C} slices. "
        "How many slices of the pizza are left?",
        "Combined slices eaten = {A} + {B}. Left = {C} - ({A} + {B}).",
        lambda a, b, c: c - (a + b),
        ((1, 9), (1, 9), (20, 40)),
    ),
    Problem(
        "For every {A} students going on a field trip, there are {B} adults needed as chaperones. If {C} students are "
        "attending, how many adults are needed?",
        "Adults needed = ({B} * {C}) // {A}.",
        lambda a, b, c: (b * c) // a,
        ((5, 15), (1, 4), (20, 99)),
    ),
    Problem(
        "In an aquarium, there are {A} sharks and {B} dolphins. If they bought {C} more sharks, how many sharks would "
        "be there in total?",
        "Total sharks = {A} + {C}.",
        lambda a, b, c: a + c,
        ((2, 50), (2, 50), (2, 50)),
    ),
    Problem(
        "Michael scored {A} points in the first game, {B} points in the second, {C} in the third, and {D} in the "
        "fourth game. What is his total points?",
        "Total points = {A} + {B} + {C} + {D}.",
        lambda a, b, c, d: a + b + c + d,
        ((2, 50), (2, 50), (2, 50), (2, 50)),
    ),
    Problem(
        "Emily reads for {A} hours each day. How many hours does she read in total in {B} days?",
        "Total hours read = {A} * {B}.",
        lambda a, b: a * b,
        ((1, 12), (2, 60)),
    ),
    Problem(
        "A shirt costs {A}. There's a {B}-dollar off sale. How much does the shirt cost after the discount?",
        "Cost after discount = {A} - {B}.",
        lambda a, b: a - b,
        ((30, 99), (2, 29)),
    ),
    Problem(
        "A rectangular garden has a length of {A} meters and a width of {B} meters. What is its area?",
        "Area = {A} * {B}.",
        lambda a, b: a * b,
        ((2, 40), (2, 40)),
    ),
    Problem(
        "If Jake saves {A} each week, how much will he save after {B} weeks?",
        "Total savings = {A} * {B}.",
        lambda a, b: a * b,
        ((5, 60), (2, 40)),
    ),
    Problem(
        "A bakery sells cupcakes in boxes of {A}. If they have {B} cupcakes, how many boxes can they fill?",
        "Boxes filled = {B} // {A}.",
        lambda a, b: b // a,
        ((2, 12), (20, 200)),
    ),
    Problem(
        "John invests {A} at an annual interest rate of {B}%. How much interest will he earn after {C} years?",
        "Interest = ({A} * {B} * {C}) // 100.",
        lambda a, b, c: (a * b * c) // 100,
        ((100, 999), (2, 12), (1, 9)),
    ),
]


def _transformation(rng: random.Random, label: int) -> tuple[str, str]:
    name, what, change = TRANSFORMATIONS[label]
    text = sentence(rng)
    return f"{name}: {what}: {text}\nAnswer:", f" {change(text)}"


def _problem(rng: random.Random, label: int, reasoning: bool) -> tuple[str, str]:
    problem = PROBLEMS[label]
    numbers = [rng.randint(*bounds) for bounds in problem.ranges]
    named = dict(zip("ABCD", numbers, strict=False))
    reason = f" Reason: {problem.reason.format(**named)}" if reasoning else ""
    return f"{problem.question.format(**named)}\n", f"{reason} Answer: {problem.answer(*numbers)}"


TASKS: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {
    "sentences": _transformation,
    "math": lambda rng, label: _problem(rng, label, reasoning=False),
    "math_reasoning": lambda rng, label: _problem(rng, label, reasoning=True),
}
N_CLASSES = 10


def task_rows(
    task: str, seed: int, train_per_class: int = 90, validation_per_class: int = 10
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Training and validation rows of a task, all different: `prompt`, `completion`, `label` (0 to 9).

    Raises:
        KeyError: a task that is not in `TASKS`.
    """
    make, rng = TASKS[task], random.Random(f"{task} {seed}")
    train, validation = [], []
    for label in range(N_CLASSES):
        rows: dict[tuple[str, str], None] = {}
        while len(rows) < train_per_class + validation_per_class:
            rows[make(rng, label)] = None
        dicts = [{"prompt": prompt, "completion": completion, "label": label} for prompt, completion in rows]
        train += dicts[:train_per_class]
        validation += dicts[train_per_class:]
    rng.shuffle(train)
    return train, validation
