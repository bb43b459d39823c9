"""Copies of token rows that go wrong in the ways in which data goes wrong. Knows no model.

What counts as the answer of a row is its longest run of labelled tokens.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from .sample import IGNORED
from .sft import Row

# Share of the words that are deleted or inserted, and of those that a truncated answer keeps: uniform within.
CHANGED, KEPT = (0.1, 0.5), (0.2, 0.8)
REPEATED = (2, 4)  # how often a repeated answer comes
WORD_LENGTHS = (2, 9)  # of words of garbage
REFUSALS = (
    "I'm sorry, I can't help with that.",
    "As an AI, I cannot answer this question.",
    "I do not have enough information to answer.",
    "Sorry, I am unable to do what you ask.",
    "I cannot provide this.",
    "There is not enough context to complete this task.",
    "Unfortunately it is not possible for me to give an answer.",
    "I am a language model and have no access to such data.",
)
BOILERPLATE = (
    "Please contact us for further details.",
    "Copyright, all rights reserved.",
    "Subscribe to our newsletter for more.",
    "Read more about this on our website.",
    "Let me know if you need anything else!",
    "This page was last updated yesterday.",
    "Share this article with your friends.",
)
DEBRIS = (
    "<p>{}</p>",
    '<div class="text">{}</div>',
    "{}<br/>&nbsp;",
    '<b>{}</b><br><a href="#">more</a>',
    "&quot;{}&quot;</td></tr>",
)

Words = list[np.ndarray]


@dataclass(frozen=True)
class Spelling:
    """How answers are spelled.

    Args:
        tokenizer: or a processor that has one.
    """

    tokenizer: Any

    @classmethod
    def of(cls, processing_class: Any) -> Spelling | None:
        """None where it cannot read and write text."""
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        able = callable(tokenizer) and hasattr(tokenizer, "decode")
        return cls(tokenizer) if able else None

    def text(self, ids: np.ndarray) -> str:
        """Without special tokens."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    def tokens(self, text: str, like: np.ndarray) -> np.ndarray:
        """Of an answer that begins with a space or without as those tokens do."""
        first = self._encoded(" " + self.text(like).strip())[:1]
        return np.asarray(self._encoded((" " if first == like[:1].tolist() else "") + text.strip()), dtype=np.int64)

    def _encoded(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_span(row: Row) -> slice:
    """The longest run of labelled tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.labels != IGNORED, [False]]).astype(np.int8)))
    starts, stops = edges[::2], edges[1::2]
    longest = int(np.argmax(stops - starts))
    return slice(int(starts[longest]), int(stops[longest]))


def word_starts(tokenizer: object, vocab_size: int) -> np.ndarray | None:
    """Which tokens begin a word (bool, (vocab_size,)): those that come with a space, by the tokenizer's own spelling.

    None where that tells nothing (no tokenizer, or one that never spells a space): then each token is a word.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return None
    size = min(vocab_size, len(tokenizer))  # type: ignore[arg-type]
    tokens = tokenizer.convert_ids_to_tokens(list(range(size)))
    starts = np.zeros(vocab_size, dtype=bool)
    starts[:size] = [str(token).startswith(("\u2581", "\u0120", " ")) for token in tokens]
    return starts if starts.any() else None


def corrupted(
    rows: Sequence[Row],
    kind: str,
    rng: np.random.Generator,
    starts: np.ndarray | None = None,
    max_length: int | None = None,
    spelling: Spelling | None = None,
    places: Sequence[int] = (),
) -> list[Row | None]:
    """A copy of each row that is wrong, or right in another form; None where the row cannot be changed that way (an
    answer of one word, a kind of `TEXT_KINDS` without a spelling). What is drawn goes in the order of the rows.

    Args:
        kind: one of `KINDS`, or of `FORMS`.
        starts: which tokens begin a word, (vocab,); max_length: rows are cut to so many tokens.
        spelling: of the answers.
        places: tokens that stand for images, which no answer echoes.
    """
    spans = [answer_span(row) for row in rows]
    answers = [row.labels[span] for row, span in zip(rows, spans, strict=True)]
    # The token that ends nearly every answer (EOS) is no word of it and stays where it is.
    lasts, counts = np.unique([answer[-1] for answer in answers], return_counts=True)
    end = int(lasts[counts.argmax()]) if counts.max() > 0.8 * len(rows) else None
    spelled = [_words(answer, end, starts) for answer in answers]
    pool = [word for words, _ in spelled for word in words]
    bodies = _prompt_bodies([row.input_ids[: span.start] for row, span in zip(rows, spans, strict=True)])
    other = _others(rows, answers, bodies, kind, rng, places)
    out: list[Row | None] = []
    for i, (row, span, answer) in enumerate(zip(rows, spans, answers, strict=True)):
        words, tail = spelled[i]
        asked = _without(row.input_ids[bodies[i]], places)
        prompt, changed = row.input_ids[: span.start], answer
        if kind == "no end":
            changed = np.concatenate(words)
        elif kind in ("swapped", "answer of a similar prompt"):
            changed = answers[other[i]]
        elif kind == "prompt echoed":
            changed = np.concatenate([asked, tail]) if len(asked) else answer
        elif kind == "prompt truncated":
            kept = _truncated(_words(asked, None, starts)[0], pool, rng) if len(asked) else None
            prompt = (
                prompt
                if kept is None
                else np.concatenate([prompt[: bodies[i].start], *kept, prompt[bodies[i].stop :]])
            )
        elif kind in TEXT_KINDS:
            if spelling is not None:
                text = _TEXTS[kind](spelling.text(np.concatenate(words)), rng)
                changed = np.concatenate([spelling.tokens(text, np.concatenate(words)), tail])
        elif (new_words := _CHANGES[kind](words, pool, rng)) is not None:
            changed = np.concatenate([*new_words, tail])
        if np.array_equal(changed, answer) and len(prompt) == span.start:
            out.append(None)
            continue
        before = row.labels[: span.start] if len(prompt) == span.start else np.full(len(prompt), IGNORED)
        ids = np.concatenate([prompt, changed, row.input_ids[span.stop :]])
        labels = np.concatenate([before, changed, row.labels[span.stop :]])
        copy = replace(row, input_ids=ids[:max_length], labels=labels[:max_length])
        out.append(copy if copy.n_labelled else None)
    return out


def _without(ids: np.ndarray, others: Sequence[int]) -> np.ndarray:
    return ids[~np.isin(ids, others)]


def _prompt_bodies(prompts: Sequence[np.ndarray]) -> list[slice]:
    """What is a prompt's own: without the tokens that all begin with and end with, those of a template."""
    shortest = min(len(prompt) for prompt in prompts)

    def shared(turn: int) -> int:
        first = prompts[0][::turn][:shortest]
        same = np.ones(shortest, dtype=bool)
        for prompt in prompts:
            same &= prompt[::turn][:shortest] == first
        return int(np.argmin(same)) if not same.all() else shortest

    start, stop = shared(1), shared(-1)
    return [slice(start, max(start, len(prompt) - stop)) for prompt in prompts]


def _others(
    rows: Sequence[Row],
    answers: Sequence[np.ndarray],
    bodies: Sequence[slice],
    kind: str,
    rng: np.random.Generator,
    places: Sequence[int],
) -> np.ndarray:
    """Whose answer each row gets: anyone's, or that of the row with the most similar prompt and another answer."""
    turn = rng.permutation(len(rows))
    other = np.zeros(len(rows), dtype=np.int64)
    other[turn] = np.roll(turn, 1)
    if kind != "answer of a similar prompt":
        return other
    if places and not any(body.stop > body.start for body in bodies):  # all prompts alike but for their images
        return other
    tokens, where = np.unique(
        np.concatenate([row.input_ids[b] for row, b in zip(rows, bodies, strict=True)]), return_inverse=True
    )
    lengths = [len(row.input_ids[b]) for row, b in zip(rows, bodies, strict=True)]
    holds = np.zeros((len(rows), len(tokens)), dtype=np.float32)
    holds[np.repeat(np.arange(len(rows)), lengths), where] = 1
    holds *= np.log(len(rows) / np.maximum(holds.sum(0), 1))
    holds /= np.maximum(np.linalg.norm(holds, axis=1, keepdims=True), 1e-9)
    near = holds @ holds.T
    names = np.array([answer.tobytes() for answer in answers], dtype=object)
    near[names[:, None] == names] = -1
    return near.argmax(1)


def _words(answer: np.ndarray, end: int | None, starts: np.ndarray | None) -> tuple[Words, np.ndarray]:
    """The words of an answer, and the token that ends it, if it does."""
    n = len(answer) - 1 if answer[-1] == end and len(answer) > 1 else len(answer)
    body = answer[:n]
    cuts = range(1, n) if starts is None else (1 + np.flatnonzero(starts[body[1:]])).tolist()
    return [body[start:stop] for start, stop in pairwise([0, *cuts, n])], answer[n:]  # np.split takes 50 times as long


def _deleted(words: Words, pool: Words, rng: np.random.Generator) -> Words | None:
    if len(words) < 2:
        return None
    n = min(len(words) - 1, max(1, round(rng.uniform(*CHANGED) * len(words))))
    kept = np.sort(rng.permutation(len(words))[n:])
    return [words[k] for k in kept]


def _inserted(words: Words, pool: Words, rng: np.random.Generator) -> Words | None:
    out = list(words)
    for _ in range(max(1, round(rng.uniform(*CHANGED) * len(words)))):
        out.insert(int(rng.integers(len(out) + 1)), pool[int(rng.integers(len(pool)))])
    return out


def _truncated(words: Words, pool: Words, rng: np.random.Generator) -> Words | None:
    return words[: max(1, round(rng.uniform(*KEPT) * len(words)))] if len(words) > 1 else None


def _repeated(words: Words, pool: Words, rng: np.random.Generator) -> Words | None:
    return list(words) * int(rng.integers(REPEATED[0], REPEATED[1] + 1))


def _shuffled(words: Words, pool: Words, rng: np.random.Generator) -> Words | None:
    return [words[k] for k in rng.permutation(len(words))] if len(words) > 2 else None


def _garbage(text: str, rng: np.random.Generator) -> str:
    letters, lengths = list(string.ascii_lowercase), range(max(2, len(text.split())))
    return " ".join("".join(rng.choice(letters, int(rng.integers(*WORD_LENGTHS)))) for _ in lengths)


_CHANGES: dict[str, Callable[[Words, Words, np.random.Generator], Words | None]] = {
    "words deleted": _deleted,
    "words inserted": _inserted,
    "truncated": _truncated,
    "words shuffled": _shuffled,
    "repeated text": _repeated,
}
_TEXTS: dict[str, Callable[[str, np.random.Generator], str]] = {
    "refusal": lambda text, rng: REFUSALS[int(rng.integers(len(REFUSALS)))],
    "boilerplate": lambda text, rng: f"{text} {BOILERPLATE[int(rng.integers(len(BOILERPLATE)))]}",
    "garbage": _garbage,
    "upper case": lambda text, rng: text.upper(),
    "markup debris": lambda text, rng: DEBRIS[int(rng.integers(len(DEBRIS)))].format(text),
    "lower case": lambda text, rng: text.lower(),
    "no full stop": lambda text, rng: text.rstrip(" .!?"),
}
# Other forms of right answers: no noise, and to be told from it.
FORMS = ("no end", "lower case", "no full stop")
# Kinds that need a tokenizer; kinds whose answers are those of rows, or a few that are always the same; those of which
# every row has a copy, the frequent ones; all kinds of noise.
TEXT_KINDS = tuple(_TEXTS)
OLD_ANSWERS = ("swapped", "answer of a similar prompt", "prompt truncated", "refusal")
MAIN_KINDS = ("swapped", *list(_CHANGES)[:3])
KINDS = (
    *MAIN_KINDS,
    "answer of a similar prompt",
    *list(_CHANGES)[3:],
    "prompt echoed",
    "prompt truncated",
    *(kind for kind in _TEXTS if kind not in FORMS),
)
