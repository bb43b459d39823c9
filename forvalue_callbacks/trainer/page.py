"""The report of a run, beside its scores."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from transformers import TrainingArguments

from ..data.reading import are_data_sets
from ..data.reasons import place_of
from ..model.ranks import together
from ..scorer import ForValueScorer
from ..scores.explanations import Explanation, tails
from ..scores.provenance import differing
from ..scores.scores import ForValueScores
from .settings import folder_of

logger = logging.getLogger(__name__)

REPORT_FILE = "forvalue_report.html"
# So many of the worst rows are explained, and as many of the best.
EXPLAINED = 20


def write_report(
    args: TrainingArguments,
    scorer: ForValueScorer,
    scores: ForValueScores,
    dataset: Any,
    weights: np.ndarray,
    policy: Any,
) -> None:
    """Writes `forvalue_report.html`, on the first rank; to be called on all, which explain rows together.

    What goes wrong is a warning: no training fails for its report.

    Args:
        weights: those of the policy, (N,).
    """
    with together("preparing to train by scores"):
        pass  # a rank that has failed before this says so here; what fails below ends nothing
    try:
        explanations = explained(scorer, scores, dataset)
    except Exception as error:
        logger.warning("the report explains no rows: %s", place_of(error))
        explanations = None
    if args.process_index > 0:
        return
    file, validation = folder_of(args) / REPORT_FILE, scorer.validation.dataset
    try:
        scores.report(
            file,
            dataset,
            validation=validation,
            explanations=explanations,
            weights=weights,
            processing_class=scorer.run.reader.prepare.processing_class,
            run={"model": scorer.backbone.causal.config.name_or_path or scorer.backbone.name, "policy": str(policy)},
        )
    except Exception as error:
        logger.warning("%s is not written: %s", file, place_of(error))


def explained(scorer: ForValueScorer, scores: ForValueScores, dataset: Any) -> list[Explanation] | None:
    """Of the worst and the best rows; None where the scores are not this model's by these validation rows, where these
    are several sets, or where the weights are sharded: ranks that fail there cannot tell each other and go on."""
    validation = scorer.validation.dataset
    if scorer.run.sharded or validation is None or are_data_sets(validation):
        return None
    if differing(scores.metadata.get("provenance", {}), scorer.provenance()):
        return None
    worst, best = tails(scores.values, EXPLAINED)
    return scorer.explain(dataset, [*worst, *best])
