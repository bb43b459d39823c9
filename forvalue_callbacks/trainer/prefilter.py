"""prefilter(trainer): fewer rows, and so fewer steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import Trainer

from ..config import ForValueConfig
from ..data.formats import rewritten
from ..model.ranks import together
from ..policies import Policy, Swap, as_policy
from ..progress import speaking
from ..report.words import lines
from ..scorer import ForValueScorer
from ..scores.scores import ForValueScores
from .page import write_report
from .refusals import groups_of, has_preferences, refuse_policy, refuse_trainer, shortener
from .settings import apply_policy, checked_config, progress_of, scores_file, settings_of, warn_of_unscored

logger = logging.getLogger(__name__)


def prefilter(
    trainer: Trainer,
    validation_dataset: Iterable[Mapping[str, Any]] | None = None,
    policy: Policy | str | None = None,
    config: ForValueConfig | None = None,
    *,
    groups: Sequence[Any] | None = None,
    verbose: bool = True,
    dry_run: bool = False,
) -> ForValueScores:
    """Shorten `trainer.train_dataset` to the rows that the policy keeps; call it before `trainer.train()`.

    Unlike `ForValueCallback`, which keeps the number of steps, training then takes fewer steps.

    Args:
        validation_dataset: clean rows; the trainer's `eval_dataset` by default (its loss is then no longer an
            independent measure of the result).
        policy, groups, verbose: as for `ForValueCallback`. Policies that weight rows (`Reweight`) need the callback;
            `Relabel` and `Swap`, which give rows other answers, need this.
        dry_run: score, report, and leave all rows where they are; it is said what the policy would drop.

    Returns:
        The scores of all rows, also kept in `output_dir/forvalue_scores.parquet`; beside it lies the report.

    Raises:
        TypeError: a policy or config that is none.
        ValueError: (before any row is scored) no training rows or none that can be had by their place, what
            `ForValueCallback` refuses, no validation rows, a reweighting policy; (once scored) a policy that drops
            all.
    """
    args: Any = trainer.args
    with speaking(args.process_index == 0):
        chosen = as_policy(policy), checked_config(config)
        return _prefilter(trainer, validation_dataset, *chosen, groups, verbose, dry_run)


@together("shortening the training rows")
def _prefilter(
    trainer: Any,
    validation_dataset: Any,
    policy: Policy,
    config: ForValueConfig,
    groups: Any,
    verbose: bool,
    dry_run: bool,
) -> ForValueScores:
    args, dataset = trainer.args, trainer.train_dataset
    refuse_trainer(args, dataset)
    refuse_policy(policy, config.gives_log_odds)
    if policy.reweights:
        raise ValueError(_WEIGHTS.format(policy))
    groups = groups_of(policy, dataset, groups)
    shorten = shortener(dataset)
    if policy.relabels and not (hasattr(dataset, "map") or isinstance(dataset, list)):
        raise ValueError(
            f"{policy} gives rows other answers, which a {type(dataset).__name__} bears not: make it a list."
        )
    if isinstance(policy, Swap) and not has_preferences(dataset):
        raise ValueError(f"{policy} turns preference rows round, and the trainer's rows are none: leave Swap out.")
    file = scores_file(args)
    if validation_dataset is None:
        validation_dataset = trainer.eval_dataset
        if validation_dataset is None or isinstance(validation_dataset, dict):
            raise ValueError("prefilter needs a validation_dataset: the trainer has no single eval_dataset.")
        logger.warning("selecting rows by the trainer's eval_dataset: its loss no longer measures the result fairly")
    progress = progress_of(args, verbose)
    started = time.perf_counter()
    scorer = ForValueScorer(
        trainer.model,
        validation_dataset,
        **settings_of(args, config, trainer.data_collator),
        processing_class=trainer.processing_class,
        data_collator=trainer.data_collator,
        progress=progress,
    )
    scores = scorer.score(dataset, file)  # kept before a policy can refuse them
    warn_of_unscored(scores, dry_run)
    seconds = time.perf_counter() - started
    weights = apply_policy(policy, scores, dataset, groups)
    if len(np.unique(weights[weights > 0])) > 1:  # a policy of the caller's own
        raise ValueError(_WEIGHTS.format(policy))
    others = policy.other_answers(weights, scores)
    weights[list(others)] = 1.0
    if not dry_run:
        changed = {row: rewritten(dataset.__getitem__, row, other) for row, other in others.items()}
        places = np.flatnonzero(weights)
        trainer.train_dataset = _changed(shorten(places), [changed.get(place) for place in places.tolist()])
    options = {"drawn": False, "dry_run": dry_run, "preferences": has_preferences(dataset)}
    progress.say(lines(scores, weights, policy, seconds, **options))
    if policy.relabels:
        what = "are turned round" if isinstance(policy, Swap) else "have the answer of another row"
        progress.say(f"relabelled  {len(others):,} of the kept rows {what}")
    if verbose:
        write_report(args, scorer, scores, dataset, weights)
    return scores


def _changed(dataset: Any, rows: Sequence[Any]) -> Any:
    """A data set with other rows where there are any."""
    if not any(rows):
        return dataset
    if isinstance(dataset, list):
        return [new or old for new, old in zip(rows, dataset, strict=True)]
    return dataset.map(
        lambda row, i: rows[i] or row, with_indices=True, features=dataset.features, load_from_cache_file=False
    )


_WEIGHTS = "{} weights rows, and prefilter can only keep or drop them: use ForValueCallback."
