"""Log odds that a row is clean: 0 is where it is as likely noisy as clean.

Where answers repeat, the label model. Else copies of the validation rows are corrupted in the ways in which data goes
wrong, and what tells the copies from the clean rows is learned there, cross-fitted, and used on the training rows.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..core import Head
from ..core.stats import auc
from ..data.corruption import KINDS, corrupted, word_starts
from ..data.reader import row_of, sample_of
from ..data.sample import Sample, Segment, answer_alone
from ..model.positions import Columns, Positions, concatenate
from ..model.ranks import together
from ..model.run import Run
from ..progress import Pass, Plan, aside
from ..scores.judgements import Judgements
from ..scores.noise import USEFUL_AUC, Evidence, NoiseEstimate
from .base import LOG_ODDS, ROWS, VALIDATION, Found, Method, State, mean_tokens, measured
from .calibration import Classifier, fit_classifier, log_odds, shares
from .label_model import REPEATED, LabelModel, share_repeated
from .measures import CANDIDATES, FOLDS, Half, Match, Reference, answers_alone, features, leading, n_grams, whole_rows
from .whitened import WHITENING_RIDGE

logger = logging.getLogger(__name__)

MIN_ROWS = 40
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
    parts = ("rows", "answers alone")
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
        # Of a row and of its answer alone.
        both = (tokens + float(np.mean([sample.n_labelled for sample in validation]))) / 2
        before = [Pass(half, n // 2, tokens) for half in HALVES]
        before += [Pass(name, 2 * n, both) for name in (VALIDATION, *KINDS)]
        passes = [] if fitted else before
        what = f"{VALIDATION}, {len(KINDS)} kinds of corrupted copies of them, {ROWS}; of each the answers alone too"
        passes = [*passes, Pass(ROWS, None if n_rows is None else 2 * n_rows, both)]
        return Plan(passes, probe=0 if fitted else len(HALVES), what=what)

    def fit(self, run: Run, validation: Sequence[Sample]) -> State:
        self.bos = run.backbone.bos
        head, rng = run.backbone.head(), np.random.default_rng(0)
        places = [np.arange(h, len(validation), 2) for h in (0, 1)]
        halves = []
        with together("scoring the validation rows", run.sharded):
            for half, name in zip(places, HALVES, strict=True):
                batches = run.positions([validation[int(i)] for i in half], self, name, all_ranks=True)
                halves.append(Half.of(head, concatenate(batches), WHITENING_RIDGE))
        frequency: Counter[tuple[int, ...]] = Counter()
        for sample in validation:
            frequency.update(n_grams(_tokens(sample)))
        reference = Reference(halves, len(validation), frequency)
        clean = measured(run, self, {"reference": reference}, validation, VALIDATION)
        sides = torch.from_numpy(clean["prompt"]).double(), torch.from_numpy(clean["answer"]).double()
        if (bases := leading(*sides)) is not None:
            reference = replace(reference, bases=bases)
            for name, side, basis in zip(("prompt", "answer"), sides, bases, strict=True):
                clean[name] = (side @ basis).numpy()
        copies = {}
        for kind in KINDS:
            rows = _copies(run, validation, places, kind, rng)
            kept = np.array([i for i, row in enumerate(rows) if row is not None])
            if len(kept) < MIN_ROWS // 2:
                with aside():
                    logger.warning("too few validation rows can be %s: this kind of noise is not looked for", kind)
                continue
            found = measured(run, self, {"reference": reference}, [row for row in rows if row is not None], kind)
            copies[kind] = {**found, "row": kept[found["index"]]}
        return {"reference": reference, "clean": {**clean, "row": clean["index"]}, "copies": copies, "rng": rng}

    def score(self, state: State, head: Head, positions: Positions) -> Columns:
        measure = whole_rows if positions.part == 0 else answers_alone
        return measure(state["reference"], head, positions)

    def finish(self, state: State, found: Found) -> tuple[np.ndarray, NoiseEstimate, Judgements]:
        clean, copies, rng = state["clean"], state["copies"], copy.deepcopy(state["rng"])
        train_fold = rng.integers(FOLDS, size=found.n)
        match = _match(clean, found, train_fold)

        def of_validation(measured: Columns) -> np.ndarray:
            """Features of validation rows and their copies: judged by the half that they are not in."""
            row = measured["row"]
            return features(measured, 1 - row % 2, match(*_means(measured), row % FOLDS))

        parts = {"clean": of_validation(clean)}
        parts |= {kind: of_validation(measured) for kind, measured in copies.items()}
        rows = np.concatenate([clean["row"], *(measured["row"] for measured in copies.values())])
        classes = np.repeat(np.arange(len(parts)), [len(part) for part in parts.values()])
        classifier, out_of_fold = fit_classifier(np.concatenate(list(parts.values())), classes, rows)
        combined = log_odds(out_of_fold, np.full(len(parts), 1 / len(parts)))
        evidence = {
            kind: _evidence(parts["clean"], parts[kind], combined[classes == 0], combined[classes == k])
            for k, kind in enumerate(copies, 1)
        }
        log_p = _of_training_rows(classifier, found, match, train_fold)
        useful = [0, *(k for k, kind in enumerate(evidence, 1) if evidence[kind].auc >= USEFUL_AUC)]
        share = np.zeros(len(parts))
        share[useful] = shares(log_p[:, useful], len(clean["row"]))
        if hidden := [kind for kind, known in evidence.items() if known.auc < USEFUL_AUC]:
            with aside():
                logger.warning(
                    "on the validation rows no score finds %s: do not filter by this against it", " or ".join(hidden)
                )
        by_kind = dict(zip(evidence, share[1:].tolist(), strict=True))
        values = log_odds(log_p, share)
        judgements = Judgements.none(found.n)
        judgements.probability = 1 / (1 + np.exp(values))
        kinds, likely = list(evidence), (log_p + np.log(np.maximum(share, 1e-9)))[:, 1:].argmax(1)
        judgements.kind = [kinds[k] if value < 0 else None for k, value in zip(likely, values, strict=True)]
        return values, NoiseEstimate(float(1 - share[0]), evidence, len(clean["row"]), by_kind), judgements


def _refuse_unless_judged_by_tokens(validation: Sequence[Sample]) -> None:
    """Raises ValueError unless something can corrupt the rows and there are enough."""
    if any(segment.tokens is None for sample in validation for segment in sample.segments):
        raise ValueError(
            "method='auto' needs rows of token ids, or answers that repeat: nothing can corrupt answers in "
            "rows that a collator makes batches of (images, rows of encoder-decoders and of classifiers). Use "
            "method='whitened' or 'fitted', and drop a fraction of the rows, as Drop(0.2)."
        )
    if len(validation) < MIN_ROWS:
        raise ValueError(
            f"method='auto' learns from the validation rows and has {len(validation)}: give at least {MIN_ROWS} "
            "(a few hundred are better), or choose another method."
        )


def _tokens(sample: Sample) -> np.ndarray:
    (segment,) = sample.segments
    assert segment.tokens is not None
    return segment.tokens


def _copies(
    run: Run, validation: Sequence[Sample], places: Sequence[np.ndarray], kind: str, rng: np.random.Generator
) -> list[Sample | None]:
    """A corrupted copy of each row, None where it cannot be changed that way."""
    prepare = run.reader.prepare
    starts = word_starts(prepare.processing_class, run.backbone.head().vocab_size)
    out: list[Sample | None] = [None] * len(validation)
    for half in places:  # an answer comes from the same half, or the other half would know it
        rows = [row_of(validation[int(i)].segments[0]) for i in half]
        for i, row in zip(half, corrupted(rows, kind, rng, starts, prepare.config.max_length), strict=True):
            out[i] = None if row is None else sample_of(int(i), row)
    return out


def _means(measured: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(measured["prompt"]).double(), torch.from_numpy(measured["answer"]).double()


def _match(clean: Columns, found: Found, train_fold: np.ndarray) -> Match:
    """The match, learned from clean and training rows."""
    some = found.some()
    sides = _means(clean), _means(found.take(some, ["prompt", "answer"]))
    prompts, answers = (torch.cat(side) for side in zip(*sides, strict=True))
    return Match(prompts, answers, np.concatenate([clean["row"] % FOLDS, train_fold[some]]))


def _evidence(clean: np.ndarray, noisy: np.ndarray, clean_odds: np.ndarray, noisy_odds: np.ndarray) -> Evidence:
    """How well one kind of copies is told from the clean rows, by the log odds and by the measures, (rows, F) each."""
    single = {name: auc(clean[:, c], noisy[:, c]) for c, name in enumerate(CANDIDATES) if name != "length"}
    best = max(single, key=lambda name: single[name])
    return Evidence(auc(clean_odds, noisy_odds), None, best, single[best], single["mean log-likelihood"])


def _of_training_rows(classifier: Classifier, found: Found, match: Match, train_fold: np.ndarray) -> np.ndarray:
    """log p of the classes of the training rows, (found.n, K + 1), the mean over both halves."""
    parts, start = [], 0
    for columns in found.windows():
        fold = train_fold[start : start + len(columns["length"])]
        matches = match(*_means(columns), fold)
        parts.append(np.mean([classifier.log_p(features(columns, half, matches)) for half in (0, 1)], 0))
        start += len(fold)
    return np.concatenate(parts)
