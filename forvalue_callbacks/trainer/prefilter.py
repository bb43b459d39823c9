"""prefilter(trainer): fewer rows, and so fewer steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import Trainer

from ..config import ForValueConfig
from ..data.answers import rewritten
from ..data.packed import LENGTHS, has_packs, packed_again, taken_apart
from ..data.reading import are_data_sets
from ..model.ranks import together
from ..policies import Policy, Swap, as_policy
from ..progress import speaking
from ..report.words import lines
from ..scorer import ForValueScorer
from ..scores.scores import ForValueScores
from .evaluation import EVAL, validation_rows
from .page import write_report
from .refusals import groups_of, has_preferences, refuse_policy, refuse_trainer, shortener
from .settings import apply_policy, checked_config, progress_of, scores_file, settings_of, warn_of_unscored


def prefilter(
    trainer: Trainer,
    validation_dataset: Iterable[Mapping[str, Any]] | str | None = EVAL,
    policy: Policy | str | None = None,
    config: ForValueConfig | None = None,
    *,
    groups: Sequence[Any] | None = None,
    verbose: bool = True,
    dry_run: bool = False,
) -> ForValueScores:
    """Shorten `trainer.train_dataset` to the rows that the policy keeps; call it before `trainer.train()`.

    Unlike `ForValueCallback`, which keeps the number of steps, training then takes fewer steps. Packed rows are taken
    apart, scored row by row, and what is kept is packed again (`packing=True` with the strategy 'bfd').

    Args:
        validation_dataset: as for `ForValueCallback`; None where there are none and answers repeat.
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
    refuse_trainer(args, dataset, packs=True)
    n_packs, longest = _packs(args, dataset)
    dataset = taken_apart(dataset) if n_packs else dataset
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
    validation_dataset = validation_rows(validation_dataset, trainer)
    if policy.relabels and are_data_sets(validation_dataset):
        raise ValueError(f"{policy} needs scores by one validation set, and several are given: give one.")
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
        kept = _changed(shorten(places), [changed.get(place) for place in places.tolist()])
        trainer.train_dataset = packed_again(kept, longest) if n_packs else kept
    options = {"drawn": False, "dry_run": dry_run, "preferences": has_preferences(dataset)}
    progress.say(lines(scores, weights, policy, seconds, **options))
    if n_packs and not dry_run:
        progress.say(f"packs       {n_packs:,} taken apart, {len(trainer.train_dataset):,} of what is kept")
    if policy.relabels:
        progress.say(_about_others(policy, len(others)))
    if verbose:
        write_report(args, scorer, scores, dataset, weights, policy)
    return scores


def _about_others(policy: Policy, n: int) -> str:
    what = "are turned round" if isinstance(policy, Swap) else "have the answer of another row"
    return f"relabelled  {n:,} of the kept rows {what}"


def _packs(args: Any, dataset: Any) -> tuple[int, int]:
    """How many packs of several rows there are, and tokens in the longest; none: 0, 0."""
    if has_packs(dataset):
        return len(dataset), max(map(sum, dataset[LENGTHS]))
    if getattr(args, "packing", False) and LENGTHS not in dataset.column_names:
        raise ValueError(_WRAPPED)
    return 0, 0


def _changed(dataset: Any, rows: Sequence[Any]) -> Any:
    """A data set with other rows where there are any."""
    if not any(rows):
        return dataset
    if isinstance(dataset, list):
        return [new or old for new, old in zip(rows, dataset, strict=True)]
    return dataset.map(
        lambda row, i: rows[i] or row, with_indices=True, features=dataset.features, load_from_cache_file=False
    )


_WRAPPED = (
    "packs of packing_strategy='wrapped' cut rows in two where they end, so that no row can be dropped: set "
    "packing_strategy='bfd', whose packs are taken apart and packed again, or filter before packing."
)
_WEIGHTS = "{} weights rows, and prefilter can only keep or drop them: use ForValueCallback."
