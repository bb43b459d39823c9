"""Sample and Segment: what is run, and what is predicted where. The one place where labels are shifted.

Every kind of row is a producer of these: a row of tokens, what a data collator made, a decoder's positions, a class at
one position. Nothing that comes after knows which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

IGNORED = -100  # the label of a token that is not scored


@dataclass(frozen=True)
class Segment:
    """Run these inputs: the hidden states `at` predict `target`.

    Args:
        inputs: of one row: `input_ids`, int64 (L,), where a row is tokens and no more (`token_type_ids` beside them
            for a model that adds an embedding of type 0); else what the model takes, as tensors with a leading 1.
            Or what makes them again, where keeping them would take too much memory.
        at: int64 (T,), ascending: positions of the hidden states.
        target: int64 (T,): what is predicted there.
        n_prompt: so many of the first inputs come before anything that is learnt.
        weight: 1; -1 for what should become less likely: the rejected answer of a pair.
        read: int64 (L,), `input_ids` of a row whose inputs are more than those: they may have to be made again.
    """

    inputs: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
    at: np.ndarray
    target: np.ndarray
    n_prompt: int = 0
    weight: int = 1
    read: np.ndarray | None = None

    def load(self) -> Mapping[str, Any]:
        """The inputs, made again where they are not kept."""
        return self.inputs() if callable(self.inputs) else self.inputs

    @property
    def tokens(self) -> np.ndarray | None:
        """`input_ids` where the row is tokens and no more, int64 (L,); None where it is not."""
        ids = None if callable(self.inputs) else self.inputs.get("input_ids")
        return ids if isinstance(ids, np.ndarray) else None

    @property
    def ids(self) -> np.ndarray:
        """Token ids, int64 (L,), of a row that has such, and perhaps more."""
        ids = self.read if self.tokens is None else self.tokens
        assert ids is not None
        return ids

    @property
    def predicts_next(self) -> bool:
        """Whether what is predicted are tokens that the model reads next."""
        n = 0 if self.tokens is None and self.read is None else len(self.ids)
        return bool(self.at[-1] + 1 < n and (self.ids[self.at + 1] == self.target).all())

    @property
    def n_read(self) -> int:
        """Tokens that the model must read: nothing needs what follows the last prediction. 1 where nobody knows."""
        return 1 if self.tokens is None else int(self.at[-1]) + 1


@dataclass(frozen=True)
class Sample:
    """A row of a data set.

    Args:
        index: its place there.
        segments: what is to be run; empty where it cannot be scored.
        digest: of the row as the model sees it, 16 hex digits.
        reason: why it cannot be scored.
        set_up: the reason is one of the set-up, if no row is without such.
    """

    index: int
    segments: tuple[Segment, ...]
    digest: str
    reason: str | None = None
    set_up: bool = False

    @property
    def answer(self) -> bytes:
        """All that is predicted, as something that can be counted."""
        return b"".join(segment.target.tobytes() for segment in self.segments)

    @property
    def is_preference(self) -> bool:
        """Whether something in it should become less likely."""
        return any(segment.weight < 0 for segment in self.segments)

    @property
    def n_read(self) -> int:
        """Tokens that the model must read."""
        return sum(segment.n_read for segment in self.segments)

    @property
    def n_labelled(self) -> int:
        """Positions that predict something."""
        return sum(len(segment.at) for segment in self.segments)


def next_tokens(inputs: Mapping[str, Any] | Callable[[], Mapping[str, Any]], labels: np.ndarray) -> Segment:
    """The segment of a model that predicts each token from those before it: position t predicts `labels[t + 1]`.

    Args:
        labels: int64 (L,), aligned with the inputs (not shifted); `IGNORED` where nothing is learnt.
    """
    at = np.flatnonzero(labels[1:] != IGNORED)
    return Segment(inputs, at, labels[at + 1], n_prompt=int((labels != IGNORED).argmax()))


def answer_alone(segment: Segment, bos: int) -> Segment:
    """What a segment predicts, behind BOS and without its prompt: a segment of tokens."""
    inputs = {"input_ids": np.append(bos, segment.target)}
    if "token_type_ids" in segment.load():
        inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    return replace(segment, inputs=inputs, at=np.arange(len(segment.target)), n_prompt=1, read=None)
