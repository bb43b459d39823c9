"""Log odds that a row is clean: 0 is where it is as likely noisy as clean.

Where answers repeat, the label model. Else copies of the validation rows are corrupted in the ways in which data goes
wrong, and what tells the copies from the clean rows is learned there, cross-fitted, and used on the training rows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from ..core import Head
from ..data.copies import answer_can_change, copy_of
from ..data.corruption import FORMS, KINDS, MAIN_KINDS, OLD_ANSWERS, TEXT_KINDS, Spelling, corrupted, word_starts
from ..data.reader import row_of
from ..data.sample import Sample, Segment, answer_alone
from ..data.sft import Row
from ..model.positions import Columns, Positions, concatenate
from ..model.ranks import together
from ..model.run import Run
from ..progress import Pass, Plan, aside
from ..scores.judgements import Judgements
from ..scores.noise import USEFUL_AUC, NoiseEstimate
from .base import (
    LOG_ODDS,
    NOT_FINITE,
    ROWS,
    VALIDATION,
    Found,
    Method,
    State,
    finite_positions,
    mean_tokens,
    measured,
    warn_of_unscored,
)
from .label_model import REPEATED, LabelModel, share_repeated, warn_of_validation
from .measures import Half, Reference, answers_alone, leading, n_grams, whole_rows
from .weighing import Weighing, fold_of
from .whitened import WHITENING_RIDGE

logger = logging.getLogger(__name__)

MIN_ROWS = 40
# Copies of a kind that is not frequent: of a third of the rows, and of so many at least.
MIN_COPIES = 60
# A part of the training rows that is not judged, from which on there is a warning.
MANY_UNJUDGED = 0.05
INSTEAD = "Use method='whitened' or 'fitted', and drop a fraction of the rows, as Drop(0.2)"
ALONE, COPIES = "answers alone", "copies of them"
HALVES = ("first half of the validation rows", "second half")


class Auto(Method):
    name = "auto"
    help = (
        "log odds that it is clean: that where answers repeat, else by what tells validation rows from copies of them "
        "corrupted on purpose"
    )
    unit = LOG_ODDS
    needs_all_rows = True
    needs_validation = False
    finishing = "weighing the evidence"
    reads_prompt = True
    parts: ClassVar[tuple[str, ...]] = ("rows", ALONE)
    bos = 0

    def chosen(self, validation: Sequence[Sample]) -> Method:
        if not validation or share_repeated(validation) >= REPEATED:
            return LabelModel()
        _refuse_unless_judged_by_tokens(validation)
        return self

    def segments(self, sample: Sample, part: int) -> Sequence[Segment]:
        return sample.segments if part == 0 else tuple(answer_alone(s, self.bos) for s in sample.segments)

    def plan(self, validation: Sequence[Sample], n_rows: int | None, fitted: bool) -> Plan:
        n, tokens = len(validation), mean_tokens(validation)
        labelled = float(np.mean([sample.n_labelled for sample in validation]))
        n_copies = sum(_n_copies(n, kind) for kind in (*KINDS, *FORMS))
        n_alone = n + sum(_n_copies(n, kind) for kind in (*KINDS, *FORMS) if kind not in OLD_ANSWERS)
        before = [Pass(half, n // 2, tokens) for half in HALVES]
        before += [Pass(ALONE, n_alone, labelled), *[Pass(COPIES, n_copies // 2, tokens) for _ in HALVES]]
        passes = [] if fitted else before
        what = f"{VALIDATION}, {n_copies:,} corrupted {COPIES}, {ROWS}; of each the {ALONE} too"
        passes = [*passes, Pass(ROWS, None if n_rows is None else 2 * n_rows, (tokens + labelled) / 2)]
        return Plan(passes, probe=0 if fitted else len(HALVES), what=what)

    def fit(self, run: Run, validation: Sequence[Sample]) -> State:
        self.bos = run.backbone.bos
        _refuse_labelled_places(validation, run.backbone.places)
        validation = sorted(validation, key=lambda sample: sample.digest)
        digests = np.array([sample.digest for sample in validation])
        # Rows alike are in the same half, and what is drawn follows the content of the rows.
        half, fold = np.unique(digests, return_inverse=True)[1] % 2, fold_of(digests)
        places = [np.flatnonzero(half == h) for h in (0, 1)]
        head = run.backbone.head()
        halves, kept = [], []
        with together("scoring the validation rows", run.sharded):
            for rows, name in zip(places, HALVES, strict=True):
                here = [validation[int(i)] for i in rows]
                kept.append(list(finite_positions(run, here, self, name, all_ranks=True)))
                halves.append(Half.of(head, concatenate(kept[-1]), WHITENING_RIDGE))
        frequency: list[Counter[tuple[int, ...]]] = [Counter(), Counter()]
        for sample, h in zip(validation, half, strict=True):
            frequency[h].update(n_grams(sample.segments[0].ids))
        spelling = Spelling.of(run.reader.prepare.processing_class)
        reference = Reference(halves, [len(rows) for rows in places], frequency, spelling)
        # Each half is judged by the other one.
        others = [reference.half(1), reference.half(0)]
        judged_by = zip(others, kept, strict=True)
        whole = [whole_rows(other, head, batch) for other, batches in judged_by for batch in batches]
        index = [i for batches in kept for batch in batches for i in batch.index]
        del kept
        kinds, copies = _copies(run, validation, places, spelling)
        changed, rows = [copy for _, _, copy in copies], np.array([row for row, _, _ in copies])
        alone = _Answers.of(run, self.bos, reference, [*validation, *changed])
        clean = _clean(validation, half, whole, index, alone)
        sides = torch.from_numpy(clean["prompt"]).double(), torch.from_numpy(clean["answer"]).double()
        if (bases := leading(*sides)) is not None:
            reference, *others = (replace(one, bases=bases) for one in (reference, *others))
            alone.columns["answer"] = alone.columns["answer"] @ bases[1].float().numpy()
            for name, side, basis in zip(("prompt", "answer"), sides, bases, strict=True):
                clean[name] = (side @ basis).numpy()
        found = self._of_copies(run, others, half[rows], rows, changed)
        found = {name: values[alone.place[len(validation) + found["index"]] >= 0] for name, values in found.items()}
        rows, classes = rows[found["index"]], np.array([kind for _, kind, _ in copies])[found["index"]]
        found |= alone.by_the_other_half(len(validation) + found["index"], half[rows])
        clean["place"] = np.array([validation[int(i)].index for i in clean["index"]])
        place = np.full(len(validation), -1)
        place[clean["index"]] = np.arange(len(clean["index"]))
        return {
            "reference": reference,
            "kinds": kinds,
            "clean": {**clean, "half": half[clean["index"]], "fold": fold[clean["index"]]},
            "copies": {**found, "class": classes, "row": place[rows], "half": half[rows], "fold": fold[rows]},
        }

    def _of_copies(
        self, run: Run, others: Sequence[Reference], half: np.ndarray, rows: np.ndarray, copies: Sequence[Sample]
    ) -> Columns:
        """Columns of copies of validation rows, whole, each judged by the half that its row is not in, in their order.

        Args:
            half, rows: (copies,), of each the half and the place of the row that it is made from.
        """
        parts = []
        for h, other in enumerate(others):
            # Those of a row follow one another: they share its prompt, which is run once.
            here = np.flatnonzero(half == h)
            here = here[np.argsort(rows[here], kind="stable")]
            part = measured(run, _Whole(), {"reference": other}, [copies[int(i)] for i in here], COPIES)
            parts.append({**part, "index": here[part["index"]]})
        order = np.argsort(np.concatenate([part["index"] for part in parts]))
        return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}

    def score(self, state: State, head: Head, positions: Positions) -> Columns:
        measure = whole_rows if positions.part == 0 else answers_alone
        return measure(state["reference"], head, positions)

    def finish(self, state: State, found: Found) -> tuple[np.ndarray, NoiseEstimate, Judgements]:
        along = state["reference"].bases is not None
        weighing = Weighing(state["clean"], state["copies"], state["kinds"], found, along)
        values, noise, judgements = weighing.result()
        with aside():
            _warn(noise, found.n)
        return values, noise, judgements


class _Whole(Auto):
    """The whole rows."""

    parts = ("rows",)


class _Alone(Auto):
    """The answers alone."""

    parts = (ALONE,)
    reads_prompt = False

    def __init__(self, bos: int):
        super().__init__()
        self.bos = bos

    def segments(self, sample: Sample, part: int) -> Sequence[Segment]:
        return super().segments(sample, 1)

    def score(self, state: State, head: Head, positions: Positions) -> Columns:
        return answers_alone(state["reference"], head, positions)


@dataclass(frozen=True)
class _Answers:
    """Measures of the answers alone of validation rows and their copies, each different answer once: many copies have
    that of a row, or one of few.

    Args:
        place: (rows,), of the answer of a row in the columns; -1 where it cannot be scored.
        columns: by both halves of the validation rows.
    """

    place: np.ndarray
    columns: Columns

    @classmethod
    def of(cls, run: Run, bos: int, reference: Reference, samples: Sequence[Sample]) -> _Answers:
        numbers: dict[bytes, int] = {}
        which = np.array([numbers.setdefault(sample.answer, len(numbers)) for sample in samples])
        different = [samples[int(i)] for i in np.unique(which, return_index=True)[1]]
        columns = measured(run, _Alone(bos), {"reference": reference}, different, ALONE)
        place = np.full(len(numbers), -1)
        place[columns.pop("index")] = np.arange(len(columns.pop("digest")))
        return cls(place[which], columns)

    def by_the_other_half(self, rows: np.ndarray, half: np.ndarray) -> Columns:
        """Of some rows, each by the half that it is not in."""
        out = {name: values[self.place[rows]] for name, values in self.columns.items()}
        return {**out, "alone, fitted": out["alone, fitted"][np.arange(len(rows)), 1 - half]}


def _clean(
    validation: Sequence[Sample], half: np.ndarray, whole: Sequence[Columns], index: Sequence[int], alone: _Answers
) -> Columns:
    """Columns of the validation rows that could be scored, whole and their answers alone, in their order, and their
    places under "index".

    Args:
        whole: of batches of whole rows, which have the places `index` in their data set.

    Raises:
        ValueError: there are none.
    """
    columns = {name: np.concatenate([part[name] for part in whole]) for name in whole[0]}
    reasons, at = columns.pop("reason"), {i: k for k, i in enumerate(index)}
    scored = np.flatnonzero(alone.place[: len(validation)] >= 0)
    place = np.array([at[validation[int(i)].index] for i in scored], dtype=np.int64)
    good = np.array([reason is None for reason in reasons[place]], dtype=bool)
    if not good.any():
        why = reasons[0] or f"not their {ALONE}"
        raise ValueError(f"{VALIDATION}: none of {len(reasons)} can be scored ({why}).")
    scored = scored[good]
    left = [validation[int(i)].index for i in np.delete(np.arange(len(validation)), scored)]
    warn_of_unscored({i: reasons[at[i]] or NOT_FINITE for i in left}, len(reasons))
    columns = {name: values[place[good]] for name, values in columns.items()}
    return {**columns, **alone.by_the_other_half(scored, half[scored]), "index": scored}


def _warn(noise: NoiseEstimate, n_rows: int) -> None:
    """Says what limits the judgement."""
    warn_of_validation(noise)
    if hidden := [kind for kind, known in noise.evidence.items() if known.auc < USEFUL_AUC]:
        logger.warning(
            "on the validation rows no score finds %s: do not filter by this against it", " or ".join(hidden)
        )
    for difference in noise.differences:
        logger.warning(
            "the two sides differ in form: %s. That is no noise: such rows are not judged. Prepare both alike",
            difference,
        )
    if noise.n_unjudged > MANY_UNJUDGED * n_rows:
        logger.warning(
            "%d of %d rows are of another kind or form than the validation rows: they are not judged, and kept. Give "
            "validation rows of their kind",
            noise.n_unjudged,
            n_rows,
        )


def _refuse_unless_judged_by_tokens(validation: Sequence[Sample]) -> None:
    """Raises ValueError unless something can corrupt the rows and there are enough."""
    segments = [segment for sample in validation for segment in sample.segments]
    if not all(answer_can_change(segment) for segment in segments):
        raise ValueError(
            "method='auto' needs rows whose answers are tokens that the model reads, or answers that repeat: nothing "
            "can corrupt answers in rows of encoder-decoders and of classifiers, and in those that a collator gives a "
            f"mask or positions of its own. {INSTEAD}."
        )
    if len(validation) < MIN_ROWS:
        raise ValueError(
            f"method='auto' learns from the validation rows and has {len(validation)}: give at least {MIN_ROWS} "
            "(a few hundred are better), or choose another method."
        )


def _refuse_labelled_places(validation: Sequence[Sample], places: Collection[int]) -> None:
    """Raises ValueError where what is learnt holds places of images, which go wrong with it."""
    there = [any(np.isin(s.target, sorted(places)).any() for s in sample.segments) for sample in validation]
    if n := sum(there):
        raise ValueError(
            f"method='auto' puts wrong answers in the place of those of validation rows, and in {n} of {len(there)} "
            "what is learnt holds places of images: label the answers alone (completion_only_loss with 'prompt' and "
            f"'completion', or assistant_only_loss). Or: {INSTEAD[0].lower()}{INSTEAD[1:]}."
        )


def _n_copies(n_validation: int, kind: str) -> int:
    """How many validation rows have a copy of a kind: all, or of the less frequent kinds a part."""
    return n_validation if kind in MAIN_KINDS else min(n_validation, max(MIN_COPIES, n_validation // 3))


def _copies(
    run: Run, validation: Sequence[Sample], places: Sequence[np.ndarray], spelling: Spelling | None
) -> tuple[list[str], list[tuple[int, int, Sample]]]:
    """The kinds of noise that validation rows can have, and copies of them: place of the row, class (1 for the first
    kind), the copy."""
    prepare, images = run.reader.prepare, sorted(run.backbone.places)
    with_more = any(segment.tokens is None for sample in validation for segment in sample.segments)
    starts = word_starts(prepare.processing_class, run.backbone.head().vocab_size)
    rng = np.random.default_rng(0)
    kinds: list[str] = []
    out: list[tuple[int, int, Sample]] = []
    for kind in (*KINDS, *FORMS):
        if (kind in TEXT_KINDS and spelling is None) or (kind == "prompt truncated" and with_more):
            continue  # in a prompt lie the places of its images
        made: list[tuple[int, Row]] = []
        for half in places:  # an answer comes from the same half, or the other half would know it
            rows = [row_of(validation[int(i)].segments[0]) for i in half]
            longest = None if with_more else prepare.config.max_length  # what a collator makes is not cut off
            changed = corrupted(rows, kind, rng, starts, longest, spelling, images)
            made += [(int(i), row) for i, row in zip(half, changed, strict=True) if row is not None]
        if len(made) < MIN_ROWS // 2:
            if kind in FORMS:  # the rows have it already
                continue
            with aside():
                logger.warning("too few validation rows can be %s: this kind of noise is not looked for", kind)
            continue
        kinds.append(kind)
        chosen = rng.permutation(len(made))[: _n_copies(len(validation), kind)]
        for i, row in (made[k] for k in sorted(chosen.tolist())):
            out.append((i, len(kinds), copy_of(replace(validation[i], index=i), row)))
    return kinds, out
