"""Where answers repeat: log odds that a row's answer is right, by a label model (`label_fit.py`)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from .. import core
from ..core import Head
from ..data.sample import Sample
from ..model.positions import Columns, Positions
from ..model.run import Run
from ..progress import Plan, aside
from ..scores.judgements import Judgements
from ..scores.noise import USEFUL_AUC, Evidence, NoiseEstimate
from .base import LOG_ODDS, VALIDATION, Found, Method, State, measured, reasons_unless
from .label_fit import MIN_OF_CLASS, fit_labels

logger = logging.getLogger(__name__)

# Answers repeat where so many validation rows share theirs with another.
REPEATED = 0.5
# Below such a share of training rows with an answer of the validation rows, the two are in different forms.
AGREEING = 0.1
# Rows with more features are kept as so many: the leading directions of the validation rows, and random ones.
MAX_FEATURES, MAX_LEADING = 512, 256


class LabelModel(Method):
    name = "label_model"
    help = (
        "where answers repeat: log odds that its answer is right, by a label model of validation and, untrusted, "
        "training rows"
    )
    unit = LOG_ODDS
    needs_all_rows = True
    finishing = "fitting the label model"
    reads_prompt = True

    def plan(self, validation: Sequence[Sample], n_rows: int | None, fitted: bool) -> Plan:
        plan = super().plan(validation, n_rows, fitted)
        return Plan(plan.passes, then="a label model is fitted")

    def fit(self, run: Run, validation: Sequence[Sample]) -> State:
        known = measured(run, self, {}, validation, VALIDATION)
        if (repeated := _share(known["answer"].tolist())) < REPEATED:
            raise ValueError(
                f"method='label_model' is for answers that repeat, and {repeated:.0%} of the {len(known['answer'])} "
                "validation rows share theirs with another: use method='auto'."
            )
        features = torch.from_numpy(known["features"])
        narrow = {} if features.shape[1] <= MAX_FEATURES else narrowing(features)
        order = np.argsort(known["digest"], kind="stable")  # folds follow the content of rows, not their place
        kept = {"features": narrowed(narrow, features)[order], "answer": known["answer"][order]}
        return {**narrow, **kept, "last": known["last"]}

    def score(self, state: State, head: Head, positions: Positions) -> Columns:
        assert positions.prompt_RD is not None
        log_p = positions.sum(core.log_likelihood_tokens(head, positions.hidden_TD, positions.target_T))
        features = torch.cat([positions.first_RD, positions.prompt_RD], 1).float().cpu()
        reasons = reasons_unless(torch.isfinite(features).all(1).numpy() & np.isfinite(log_p))
        for i, segment in enumerate(positions.segments):
            if segment.n_prompt == 0:
                reasons[i] = "no prompt: method='label_model' judges an answer by its prompt"
        answers = [xxhash.xxh3_64_intdigest(segment.target.tobytes()) for segment in positions.segments]
        return {
            "features": narrowed(state, features).numpy(),
            "answer": np.array(answers, dtype=np.uint64).view(np.int64),
            "last": np.array([segment.target[-1] for segment in positions.segments], dtype=np.int64),
            "log_likelihood": log_p,
            "n_labelled": np.array(positions.lengths, dtype=np.int64),
            "reason": reasons,
        }

    def finish(self, state: State, found: Found) -> tuple[np.ndarray, NoiseEstimate, Judgements]:
        answers = found.column("answer")
        _warn_of_other_forms(state, answers, found.column("last"))
        some = found.some()
        train = torch.from_numpy(found.take(some, ["features"])["features"])
        fit = fit_labels(
            state["features"],
            state["answer"],
            train,
            answers[some],
            all_observed=answers,
            standardised="directions" in state,
        )
        values = np.zeros(found.n)
        if found.n > len(some):
            parts = [fit.judge(torch.from_numpy(part["features"]), part["answer"]) for part in found.windows()]
            values = np.concatenate(parts)
        values[some] = fit.log_odds
        if fit.auc_interval[0] < USEFUL_AUC:
            with aside():
                logger.warning(
                    "on the validation rows a wrong answer is told from the right one with AUC %.2f (95 %%: %.2f to "
                    "%.2f): do not filter by this",
                    fit.flipped_auc,
                    *fit.auc_interval,
                )
        n_unjudged = int((~fit.judged(answers)).sum())
        if n_unjudged:
            with aside():
                logger.warning(
                    "%d of %d rows have an answer of fewer than %d validation rows: they are not judged, and kept",
                    n_unjudged,
                    found.n,
                    MIN_OF_CLASS,
                )
        noise = NoiseEstimate(
            fit.noise_share,
            {"flipped": Evidence(fit.flipped_auc, fit.auc_interval)},
            len(state["answer"]),
            n_answers=len(np.union1d(state["answer"], answers)),
            share_error=fit.share_error,
            n_unjudged=n_unjudged,
            likelihood=fit.likelihood,
        )
        judgements = Judgements.none(found.n)
        judgements.probability = np.where(fit.judged(answers), 1 / (1 + np.exp(values)), np.nan)
        judgements.kind = ["wrong answer" if p > 0.5 else None for p in judgements.probability]
        return values, noise, judgements


def share_repeated(validation: Sequence[Sample]) -> float:
    """Share of rows whose answer is that of another row too."""
    return _share([sample.answer for sample in validation])


def _share(answers: Sequence[object]) -> float:
    return sum(count for count in Counter(answers).values() if count > 1) / max(1, len(answers))


def narrowing(features_MF: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """How features become `MAX_FEATURES`: standardised, along the leading directions of the validation rows and along
    random ones, which keep of the rest what inner products need."""
    center, spread = features_MF.mean(0), features_MF.std(0).clamp(min=1e-9)
    z = (features_MF - center) / spread
    leading = torch.linalg.svd(z, full_matrices=False).Vh[: min(MAX_LEADING, len(z))].T
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(leading), MAX_FEATURES - leading.shape[1], generator=generator)
    directions = torch.linalg.qr(torch.cat([leading, random], 1)).Q
    return {"center": center, "spread": spread, "directions": directions}


def narrowed(state: State, features: Tensor) -> Tensor:
    """Features as they are kept."""
    if "directions" not in state:
        return features
    return (features - state["center"]) / state["spread"] @ state["directions"]


def _warn_of_other_forms(state: State, answers: np.ndarray, lasts: np.ndarray) -> None:
    """Says so where training rows have hardly an answer of the validation rows, token for token."""
    agree = int(np.isin(answers, state["answer"]).sum())
    if agree >= AGREEING * len(answers):
        return
    text = (
        "%d of %d training rows have an answer that a validation row has, token for token: the answers of both sides "
        "seem to be tokenised in different forms, and right ones are then taken for wrong ones. Prepare both alike%s."
    )
    sides = (state["last"].tolist(), lasts.tolist())
    ends = [Counter(side).most_common(1)[0] for side in sides]
    one_sided = ends[0][0] != ends[1][0] and any(n > 0.9 * len(side) for (_, n), side in zip(ends, sides, strict=True))
    hint = " (on one side nearly all answers end with the same token, as with EOS, and on the other they do not)"
    logger.warning(text, agree, len(answers), hint if one_sided else "")
