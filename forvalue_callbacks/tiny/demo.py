"""The demo's rows: questions about messages of the made-up world, some of them with a wrong answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from datasets import Dataset

from .sentences import message, request, review
from .words import INTENTS, MOODS, TOPICS


def _topic_row(rng: random.Random) -> tuple[str, str, Sequence[str]]:
    answer = rng.choice(list(TOPICS))
    return f"Message: {message(rng, answer, rng.randint(1, 2))}\nThe topic is", answer, list(TOPICS)


def _mood_row(rng: random.Random) -> tuple[str, str, Sequence[str]]:
    answer = rng.choice(MOODS)
    return f"Review: {review(rng, answer)}\nThe customer was", answer, MOODS


def _intent_row(rng: random.Random) -> tuple[str, str, Sequence[str]]:
    answer = rng.choice(list(INTENTS))
    return f"Request: {request(rng, answer)}\nKind:", answer, list(INTENTS)


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
        seed: Same seed, same rows. Take another seed for validation rows.
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
