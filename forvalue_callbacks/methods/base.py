"""What a method is: validation samples -> a state; positions -> numbers per sample.

To add one: a class here beside the others, a line in `METHODS`, and a test that compares it with its formula.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..core import Head
from ..data.reasons import NotFiniteError
from ..data.sample import Sample, Segment
from ..model.positions import Columns, Positions
from ..model.ranks import of_all_ranks
from ..model.run import Run, Window
from ..progress import Pass, Plan, aside
from ..scores.judgements import Judgements
from ..scores.noise import NoiseEstimate
from ..scores.scores import ForValueScores
from ..scores.writer import ScoreWriter

logger = logging.getLogger(__name__)

NATS, LOG_ODDS = "nats", "log odds"
OVERFLOW = "hidden states or logits overflow; try forward_dtype='bfloat16' or float32 weights"
NOT_FINITE = f"non-finite score: {OVERFLOW}"
# Rows that a method with `needs_all_rows` learns from at most: what it keeps in memory of them.
MAX_ROWS = 16384
# The passes that all methods have, by name.
VALIDATION, FIRST, ROWS = "validation rows", "first rows", "rows to score"

State = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """Columns of all rows of a data set that could be scored, a window at a time.

    Args:
        windows: gives them anew at each call.
        digests: of the rows, in their order: what is drawn by chance follows them, and not the order.
    """

    windows: Callable[[], Iterator[Columns]]
    digests: np.ndarray

    @property
    def n(self) -> int:
        """How many rows there are."""
        return len(self.digests)

    def column(self, name: str) -> np.ndarray:
        """One column of all rows."""
        return np.concatenate([columns[name] for columns in self.windows()])

    def some(self) -> np.ndarray:
        """Places of the rows to learn from, in the order of their digests: all, or the `MAX_ROWS` first, which are
        drawn at random since digests are hashes. They judge the others."""
        return np.argsort(self.digests, kind="stable")[:MAX_ROWS]

    def take(self, rows: np.ndarray, names: Sequence[str]) -> Columns:
        """Some rows (places among those found, in any order) of some columns."""
        order = np.argsort(rows, kind="stable")
        ascending, parts, start = rows[order], [], 0
        for columns in self.windows():
            n = len(columns[names[0]])
            here = ascending[(ascending >= start) & (ascending < start + n)] - start
            parts.append({name: columns[name][here] for name in names})
            start += n
        back = np.argsort(order, kind="stable")
        return {name: np.concatenate([part[name] for part in parts])[back] for name in names}


def found_in(window: Window) -> Columns:
    """Columns of the rows of a window that could be scored, their places in the data set under "index" and their
    digests under "digest"."""
    good = np.array([reason is None for reason in window.reasons], dtype=bool)
    found = {"index": window.start + np.flatnonzero(good), "digest": np.array(window.digests, dtype="U16")[good]}
    return {**found, **{name: values[good] for name, values in window.columns.items()}}


def finite_positions(
    run: Run, validation: Sequence[Sample], method: Method, name: str, *, all_ranks: bool = False
) -> Iterator[Positions]:
    """Forward passes over validation rows, `Run.positions`.

    Raises:
        NotFiniteError: on every rank and after the last, where states of rows are not finite: no method can learn from
            these rows, and one that learns from the others is fitted anew.
    """
    bad: set[int] = set()
    for batch in run.positions(validation, method, name, all_ranks=all_ranks):
        bad |= batch.not_finite
        yield batch
    bad = bad.union(*of_all_ranks(bad, "looking for validation rows that overflow"))
    if bad:
        raise NotFiniteError(OVERFLOW, bad)


def named(reasons: Mapping[int, str]) -> str:
    """The first rows of some, with their reasons."""
    return "; ".join(f"row {row}: {reasons[row]}" for row in list(reasons)[:3])


def warn_of_unscored(reasons: Mapping[int, str], n: int, of_set: str = "") -> None:
    """Names validation rows, of n, that nothing is learned from."""
    if reasons:
        with aside():
            logger.warning("%d of %d validation rows%s cannot be scored (%s)", len(reasons), n, of_set, named(reasons))


def measured(run: Run, method: Method, state: State, samples: Sequence[Any], name: str) -> Columns:
    """Columns of the validation rows, or copies of them, that could be scored, in their order, their places under
    "index" and their digests under "digest".

    Raises:
        ValueError: there are none.
    """
    found = run.windows(samples, method, partial(method.score, state, run.backbone.head()), name)
    windows = [window for window in found if not isinstance(window, int)]
    parts = [found_in(window) for window in windows]
    reasons = [reason for window in windows for reason in window.reasons]
    if not sum(len(part["index"]) for part in parts):
        raise ValueError(f"{name}: none of {len(reasons)} can be scored ({reasons[0] if reasons else 'no rows'}).")
    if name == VALIDATION:
        warn_of_unscored({samples[i].index: why for i, why in enumerate(reasons) if why is not None}, len(samples))
    parts = [part for part in parts if len(part["index"])]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Method:
    """A way to score rows. What it can do is said by class attributes; refusals, caches, help texts and policies
    follow from them.

    Args:
        normalize: one of its `normalizations`.

    Attributes:
        name: in `ForValueConfig(method=...)`.
        help: what the score of a row is, for the help of the config and the README.
        unit: of the scores: `NATS`, or `LOG_ODDS` that a row is clean.
        tokenwise: tokens have scores of their own, which sum to the row's, along a move of the head.
        pairwise: so have pairs of a row and a validation row, whose mean is the row's.
        needs_all_rows: scores depend on all rows that are scored together (`finish`).
        reads_prompt: the run gives the mean state of the prompt; `reads_middle`: and states of a middle layer.
        signed: rows may hold what should become less likely (preference rows): numbers of segments add up by their
            weights.
        needs_validation: else it does without validation rows where answers repeat.
        normalizations: of `ForValueConfig(normalize=...)`.
        vocabularies: of `ForValueConfig(vocab=...)`.
        parts: what is read of a row, by name; one forward pass each.
        finishing: what `finish` does, in a few words.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    unit: ClassVar[str] = NATS
    tokenwise: ClassVar[bool] = False
    pairwise: ClassVar[bool] = False
    needs_all_rows: ClassVar[bool] = False
    reads_prompt: ClassVar[bool] = False
    reads_middle: ClassVar[bool] = False
    signed: ClassVar[bool] = False
    needs_validation: ClassVar[bool] = True
    normalizations: ClassVar[tuple[str, ...]] = ("none",)
    vocabularies: ClassVar[tuple[str, ...]] = ("full",)
    parts: ClassVar[tuple[str, ...]] = ("rows",)
    finishing: ClassVar[str] = ""

    def __init__(self, normalize: str = "none"):
        self.normalize = normalize

    def chosen(self, validation: Sequence[Sample]) -> Method:
        """Itself, or the method that is right for such rows."""
        return self

    def refuse(self, samples: Iterable[Sample]) -> None:
        """Raises ValueError for rows that it has no score for."""
        for sample in samples:
            if sample.is_preference:
                self.refuse_preferences(sample.index)

    @property
    def takes_preferences(self) -> bool:
        """Whether it has a score for preference rows; a norm is of both sides, which need not run together."""
        return self.signed and self.normalize != "cosine"

    def refuse_preferences(self, row: int) -> None:
        """Raises ValueError where it has no score for preference rows, of which this is one."""
        if self.takes_preferences:
            return
        what = f"normalize={self.normalize!r}" if self.signed else f"method={self.name!r}"
        raise ValueError(
            f"{what} scores answers, and row {row} is one of preferences (a chosen and a rejected answer, or one that "
            "is marked as good or bad): score these with method='whitened', 'fitted', 'fitted_likelihood' or "
            "'gradient', and normalize='none' or 'length'."
        )

    def segments(self, sample: Sample, part: int) -> Sequence[Segment]:
        """What is run of a row for one of the `parts`."""
        return sample.segments

    def plan(self, validation: Sequence[Sample], n_rows: int | None, fitted: bool) -> Plan:
        """The passes to come; those over the validation rows are not where the state is known (`fitted`)."""
        tokens = mean_tokens(validation)
        before = [] if fitted else [Pass(VALIDATION, len(validation), tokens)]
        return Plan([*before, Pass(ROWS, n_rows, tokens)])

    def fit(self, run: Run, validation: Sequence[Sample]) -> State:
        """What the validation rows say. The same on every rank.

        A mapping of tensors alone where rows are scored by themselves: it is kept for other processes then.
        """
        raise NotImplementedError

    def fit_alone(self, run: Run, first: Sequence[Sample]) -> State:
        """What there is to know without validation rows, from the first rows of those to score; where not
        `needs_validation`."""
        raise NotImplementedError

    def shapes(self, head: Head) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that a state must have to be taken from another process: any others may be there."""
        return {}

    def score(self, state: State, head: Head, positions: Positions) -> Columns:
        """Numbers of each segment: "log_likelihood", "n_labelled" and "score" (or what `finish` makes it of), and
        under "reason" why a row has none."""
        raise NotImplementedError

    def finish(self, state: State, found: Found) -> tuple[np.ndarray, NoiseEstimate, Judgements]:
        """Scores of all rows, (found.n,), what is known of them and of each, from the columns of `score`; where
        `needs_all_rows`."""
        raise NotImplementedError

    def metric(self, state: State) -> Tensor | None:
        """M of `<h, M h'>`, in which gradients are compared; None: the identity."""
        return None

    def norms(self, state: State, head: Head, positions: Positions) -> np.ndarray:
        """Norm of the gradient of each segment in that metric, (segments,); where `pairwise`."""
        raise NotImplementedError

    def row_norms(self, state: State, head: Head, positions: Positions) -> np.ndarray:
        """The same of rows, all of whose segments are there, in the order of their first segments, (rows,)."""
        raise NotImplementedError

    def tokens(self, state: State, head: Head, positions: Positions) -> tuple[Tensor, Tensor]:
        """Score and log-likelihood of each position, (T,) both; where `tokenwise`."""
        raise NotImplementedError


def token_columns(method: Method, state: State, head: Head, positions: Positions) -> Columns:
    """Under "tokens" the scores of the positions of each segment, (segments,) of float64 (n,) by the segment's number
    in its row; `row_tokens` puts those of a row together."""
    score_T, _ = method.tokens(state, head, positions)
    tokens = np.empty(len(positions.lengths), dtype=object)
    parts = score_T.double().cpu().split(positions.lengths)
    for i, (sample, segment, values) in enumerate(zip(positions.samples, positions.segments, parts, strict=True)):
        number = next(k for k, other in enumerate(sample.segments) if other is segment)
        tokens[i] = {number: segment.weight * values.numpy()}
    return {"tokens": tokens}


def row_tokens(parts: Mapping[int, np.ndarray]) -> np.ndarray:
    """Scores of a row's positions, segment after segment, float64 (n,)."""
    return np.concatenate([parts[number] for number in sorted(parts)])


def put_together(writer: ScoreWriter, method: Method, state: State) -> ForValueScores:
    """The scores of all rows, from the windows that were written."""
    if not method.needs_all_rows:
        return ForValueScores.of_parts(writer.parts(), {})
    digests: list[str] = []
    reasons: list[str | None] = []
    for part in writer.parts():
        digests += part.digests
        reasons += part.reasons
    index = np.flatnonzero([reason is None for reason in reasons])
    if not len(index):
        why = next((reason for reason in reasons if reason is not None), "no rows")
        raise ValueError(f"{ROWS}: none of {len(reasons)} can be scored ({why}).")
    found = Found(partial(_scored, writer), np.array(digests, dtype="U16")[index])
    values, noise, judgements = method.finish(state, found)
    return ForValueScores.of_scored(
        reasons,
        index,
        values,
        found.column("log_likelihood"),
        found.column("n_labelled"),
        {"noise": noise.to_dict()},
        digests,
        judgements,
    )


def _scored(writer: ScoreWriter) -> Iterator[Columns]:
    """Columns of the rows with a score, a window at a time."""
    for part in writer.parts():
        good = np.array([reason is None for reason in part.reasons], dtype=bool)
        if good.any():
            yield {name: values[good] for name, values in part.columns.items()}


def mean_tokens(samples: Sequence[Sample]) -> float:
    """How many tokens the model reads in a row, on average."""
    return float(np.mean([sample.n_read for sample in samples]))


def reasons_unless(finite: np.ndarray) -> np.ndarray:
    """The reason of each row whose numbers are not finite, (rows,) of text or None."""
    return np.array([None if ok else NOT_FINITE for ok in finite], dtype=object)
