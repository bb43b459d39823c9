"""The words of the made-up world, which are data in `world.json`, and how they are inflected.

There are twelve topics with their own words; some words belong to two topics (court, key, mouse, bill).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

# Words that stand in a row are one text there, with spaces between them; words in pairs have a slash.
WORLD = json.loads((Path(__file__).parent / "world.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Topic:
    """The words of one topic. Verbs are in their base form and take an object."""

    people: list[str]
    places: list[str]
    things: list[str]
    verbs: list[str]
    adjectives: list[str]


def words(name: str) -> list[str]:
    """The words that the world has under a name."""
    return WORLD[name].split()


def pairs(name: str) -> list[list[str]]:
    """The pairs of words that the world has under a name."""
    return [pair.split("/") for pair in words(name)]


TOPICS: dict[str, Topic] = {
    name: Topic(**{kind: text.split() for kind, text in kinds.items()}) for name, kinds in WORLD["topics"].items()
}
# What somebody wants with a message: beginnings and endings.
INTENTS: dict[str, tuple[list[str], list[str]]] = {
    name: (parts["beginnings"], parts["endings"]) for name, parts in WORLD["intents"].items()
}
MOODS = tuple(words("moods"))
NAMES, COLOURS, DAYS, MONTHS, NUMBERS = map(words, ("names", "colours", "days", "months", "numbers"))
OPPOSITES = pairs("opposites")
_PAST, _PLURAL = dict(pairs("irregular past")), dict(pairs("irregular plural"))
_DOUBLED = words("doubled in the past")


def past(verb: str) -> str:
    """The past tense of one of the world's verbs."""
    if verb in _PAST:
        return _PAST[verb]
    if verb in _DOUBLED:
        return f"{verb}{verb[-1]}ed"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ied"
    return f"{verb}d" if verb.endswith("e") else f"{verb}ed"


def plural(noun: str) -> str:
    """The plural of one of the world's nouns."""
    if noun in _PLURAL:
        return _PLURAL[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"
