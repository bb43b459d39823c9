"""Where answers repeat: log odds that a row's answer is right, by a label model (`label_fit.py`)."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from .. import core
from ..core import Head
from ..data.sample import Sample, Segment
from ..model.positions import Columns, Positions
from ..model.run import Run
from ..progress import Plan, aside
from ..scores.judgements import Judgements
from ..scores.noise import Evidence, NoiseEstimate, ValidationNoise
from .base import FIRST, LOG_ODDS, VALIDATION, Found, Method, State, measured, reasons_unless
from .label_fit import LabelFit, fit_labels
from .label_odds import MIN_OF_CLASS

logger = logging.getLogger(__name__)

# Answers repeat where so many rows share theirs with another.
REPEATED = 0.5
# Below such a share of training rows with an answer of the validation rows, the two are in different forms.
AGREEING = 0.1
# Rows with more states are kept as so many: the leading directions of the validation rows, and random ones.
MAX_FEATURES, MAX_LEADING = 512, 256
# Words and pairs of words of a prompt that are kept: those with the lowest hashes, the same in all rows.
MAX_WORDS = 128
# What answers are predicted from.
LAST, MIDDLE, WORDS = "last layer", "middle layer", "words of the prompt"
VIEWS = (LAST, MIDDLE, WORDS)
WRONG = "wrong answer"


class LabelModel(Method):
    name = "label_model"
    help = (
        "where answers repeat: log odds that its answer is right, by a label model of validation and, untrusted, "
        "training rows"
    )
    unit = LOG_ODDS
    needs_all_rows = True
    needs_validation = False
    finishing = "fitting the label model"
    reads_prompt = True
    reads_middle = True

    def plan(self, validation: Sequence[Sample], n_rows: int | None, fitted: bool) -> Plan:
        plan = super().plan(validation, n_rows, fitted)
        return Plan(plan.passes, then="a label model is fitted")

    def fit(self, run: Run, validation: Sequence[Sample]) -> State:
        state: dict[str, Any] = {"tokenizer": _tokenizer(run)}
        known = measured(run, self, state, validation, VALIDATION)
        if (repeated := _share(known["answer"].tolist())) < REPEATED:
            raise ValueError(
                f"method='label_model' is for answers that repeat, and {repeated:.0%} of the {len(known['answer'])} "
                "validation rows share theirs with another: use method='auto'."
            )
        order = np.argsort(known["digest"], kind="stable")  # folds follow the content of rows, not their place
        kept = {name: known[name][order] for name in (*VIEWS, "answer", "last") if name in known}
        kept["row"] = np.array([validation[i].index for i in known["index"][order]])
        narrowings = _narrowings(kept)
        kept |= {name: narrowed(how, torch.from_numpy(kept[name])).numpy() for name, how in narrowings.items()}
        return {**state, **narrowings, "known": kept}

    def fit_alone(self, run: Run, first: Sequence[Sample]) -> State:
        state = {"tokenizer": _tokenizer(run)}
        return {**state, **_narrowings(measured(run, self, state, first, FIRST))}

    def score(self, state: State, head: Head, positions: Positions) -> Columns:
        assert positions.prompt_RD is not None
        assert positions.middle_RE is not None
        log_p = positions.sum(core.log_likelihood_tokens(head, positions.hidden_TD, positions.target_T))
        states = {LAST: torch.cat([positions.first_RD, positions.prompt_RD], 1).float().cpu()}
        if positions.middle_RE.shape[1]:
            states[MIDDLE] = positions.middle_RE.float().cpu()
        finite = torch.stack([torch.isfinite(x).all(1) for x in states.values()]).all(0)
        reasons = reasons_unless(finite.numpy() & np.isfinite(log_p))
        for i, segment in enumerate(positions.segments):
            if segment.n_prompt == 0:
                reasons[i] = "no prompt: method='label_model' judges an answer by its prompt"
        answers = [xxhash.xxh3_64_intdigest(segment.target.tobytes()) for segment in positions.segments]
        columns = {name: narrowed(state.get(name), x).numpy() for name, x in states.items()}
        if positions.segments[0].tokens is not None:
            columns[WORDS] = np.stack([hashed_words(segment, state["tokenizer"]) for segment in positions.segments])
        return {
            **columns,
            "answer": np.array(answers, dtype=np.uint64).view(np.int64),
            "last": np.array([segment.target[-1] for segment in positions.segments], dtype=np.int64),
            "log_likelihood": log_p,
            "n_labelled": np.array(positions.lengths, dtype=np.int64),
            "reason": reasons,
        }

    def finish(self, state: State, found: Found) -> tuple[np.ndarray, NoiseEstimate, Judgements]:
        answers, some = found.column("answer"), found.some()
        taken = found.take(some, [name for name in VIEWS if name in next(found.windows())])
        train = {name: torch.from_numpy(values) for name, values in taken.items()}
        known = state.get("known", {**{name: x[:0] for name, x in taken.items()}, "answer": answers[:0]})
        if len(known["answer"]):
            _warn_of_other_forms(known, answers, found.column("last"))
        views = {name: torch.from_numpy(known[name]) for name in train}
        fit = fit_labels(views, known["answer"], train, answers[some], all_observed=answers)
        columns = np.zeros((3, found.n))
        if found.n > len(some):
            parts = [
                fit.judge({name: torch.from_numpy(part[name]) for name in train}, part["answer"])
                for part in found.windows()
            ]
            columns = np.concatenate([np.stack(part) for part in parts], 1)
        columns[:, some] = fit.log_odds, fit.suggested, fit.suggested_p
        values, suggested, likely = columns
        judgements = _judged(fit, values, answers, fit.names(suggested.astype(np.int64)), likely)
        noise = _estimate(fit, known, answers, judgements)
        _warn(noise, found.n)
        _warn_of_lost_answers(values, answers)
        return values, noise, judgements


def _narrowings(columns: Columns) -> dict[str, dict[str, Tensor]]:
    """How states that are too many are kept."""
    wide = [name for name in (LAST, MIDDLE) if name in columns and columns[name].shape[1] > MAX_FEATURES]
    return {name: narrowing(torch.from_numpy(columns[name])) for name in wide}


def _judged(
    fit: LabelFit, values: np.ndarray, answers: np.ndarray, suggested: np.ndarray, likely: np.ndarray
) -> Judgements:
    """What is said of each row; a suggested answer is that of the row that is surest to have it."""
    out, judged = Judgements.none(len(values)), fit.judged(answers)
    noisy = 1 / (1 + np.exp(np.clip(values, -50, 50)))
    out.probability = np.where(judged, noisy, np.nan)
    out.kind = [WRONG if value < 0 else None for value in values]
    out.why = [None if ok else "too few rows are known to have this answer" for ok in judged]
    best: dict[int, int] = {}
    for row in np.argsort(values, kind="stable").tolist():
        best[int(answers[row])] = row
    for row in np.flatnonzero(judged & (noisy > 0.5)).tolist():
        if (other := best.get(int(suggested[row]))) is not None:
            out.suggested_row[row], out.suggested_probability[row] = other, noisy[row] * likely[row]
            out.why[row] = "another answer is likelier for such a prompt"
    return out


def _estimate(fit: LabelFit, known: Columns, answers: np.ndarray, judgements: Judgements) -> NoiseEstimate:
    validation = None
    if n := len(known["answer"]):
        doubted = np.argsort(fit.known_log_odds, kind="stable")[: int((fit.known_log_odds < 0).sum())]
        rows, log_odds = known["row"][doubted].tolist(), fit.known_log_odds[doubted].tolist()
        validation = ValidationNoise(*fit.known_share, tuple(rows), tuple(log_odds))
    return NoiseEstimate(
        fit.share,
        {"flipped": Evidence(fit.told.auc, fit.told.interval)},
        n,
        n_answers=len(np.union1d(known["answer"], answers)),
        share_error=fit.share_error,
        n_unjudged=int((~judgements.judged).sum()),
        likelihood=fit.likelihood,
        views=fit.weights,
        validation=validation,
    )


def _warn(noise: NoiseEstimate, n: int) -> None:
    """What a user should know before rows go."""
    with aside():
        found = noise.evidence["flipped"]
        if not found.useful:
            logger.warning("a wrong answer is told from the right one with AUC %s: do not filter by this", found)
        if noise.n_unjudged:
            logger.warning(
                "%d of %d rows have an answer that fewer than %d known rows have: they are not judged, and kept",
                noise.n_unjudged,
                n,
                MIN_OF_CLASS,
            )
        warn_of_validation(noise)


def warn_of_validation(noise: NoiseEstimate) -> None:
    """Names validation rows that look wrong themselves."""
    if noise.validation is not None and noise.validation.surely:
        rows = noise.validation.rows
        logger.warning(
            "%d validation rows look wrong themselves (rows %s): what is said rests on them, so mend them first",
            len(rows),
            ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else ""),
        )


def _warn_of_lost_answers(values: np.ndarray, answers: np.ndarray) -> None:
    """Names answers of which more than half of the rows look wrong, by a row that has them."""
    _, first, which, counts = np.unique(answers, return_index=True, return_inverse=True, return_counts=True)
    lost = np.bincount(which, weights=values < 0)
    many = np.flatnonzero((lost > counts / 2) & (counts >= MIN_OF_CLASS))
    if len(many):
        with aside():
            logger.warning(
                "more than half of the rows of %d answers look wrong, as of the %s: look at them before they go",
                len(many),
                " and the ".join(f"{counts[k]} rows with the answer of scored row {first[k]}" for k in many[:3]),
            )


def _tokenizer(run: Run) -> Any:
    made = run.reader.prepare.processing_class
    tokenizer = getattr(made, "tokenizer", made)  # a processor's
    return tokenizer if hasattr(tokenizer, "decode") else None


def hashed_words(segment: Segment, tokenizer: Any) -> np.ndarray:
    """Hashes of the words of a prompt and of pairs of them, (`MAX_WORDS`,) int64, -1 where there are fewer; of its
    tokens, where no tokenizer is known."""
    assert segment.tokens is not None
    prompt = segment.tokens[: segment.n_prompt].tolist()
    text = " ".join(map(str, prompt)) if tokenizer is None else tokenizer.decode(prompt, skip_special_tokens=True)
    words = re.findall(r"\w+", text.lower())
    once = {*words, *(f"{a} {b}" for a, b in pairwise(words))}
    # Of 31 bits, so that -1 is none of them.
    hashes = sorted(xxhash.xxh32_intdigest(word.encode("utf-8", "replace")) >> 1 for word in once)[:MAX_WORDS]
    return np.array(hashes + [-1] * (MAX_WORDS - len(hashes)), dtype=np.int64)


def share_repeated(validation: Sequence[Sample]) -> float:
    """Share of rows whose answer is that of another row too."""
    return _share([sample.answer for sample in validation])


def _share(answers: Sequence[object]) -> float:
    return sum(count for count in Counter(answers).values() if count > 1) / max(1, len(answers))


def narrowing(features_MF: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """How states become `MAX_FEATURES`: standardised, along the leading directions of the validation rows and along
    random ones, which keep of the rest what inner products need."""
    center, spread = features_MF.mean(0), features_MF.std(0).clamp(min=1e-9)
    z = (features_MF - center) / spread
    leading = torch.linalg.svd(z, full_matrices=False).Vh[: min(MAX_LEADING, len(z))].T
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(leading), MAX_FEATURES - leading.shape[1], generator=generator)
    directions = torch.linalg.qr(torch.cat([leading, random], 1)).Q
    return {"center": center, "spread": spread, "directions": directions}


def narrowed(how: dict[str, Tensor] | None, features: Tensor) -> Tensor:
    """Features as they are kept."""
    return features if how is None else (features - how["center"]) / how["spread"] @ how["directions"]


def _warn_of_other_forms(known: Columns, answers: np.ndarray, lasts: np.ndarray) -> None:
    """Says so where training rows have hardly an answer of the validation rows, token for token."""
    agree = int(np.isin(answers, known["answer"]).sum())
    if agree >= AGREEING * len(answers):
        return
    text = (
        "%d of %d training rows have an answer that a validation row has, token for token: the answers of both sides "
        "seem to be tokenised in different forms, and right ones are then taken for wrong ones. Prepare both alike%s."
    )
    sides = (known["last"].tolist(), lasts.tolist())
    ends = [Counter(side).most_common(1)[0] for side in sides]
    one_sided = ends[0][0] != ends[1][0] and any(n > 0.9 * len(side) for (_, n), side in zip(ends, sides, strict=True))
    hint = " (on one side nearly all answers end with the same token, as with EOS, and on the other they do not)"
    logger.warning(text, agree, len(answers), hint if one_sided else "")
