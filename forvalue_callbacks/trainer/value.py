"""value(model, dataset, ...): weights of rows, for a training loop of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..config import ForValueConfig
from ..data.sft import RowConfig
from ..model.ranks import together, world
from ..policies import Policy, as_policy
from ..progress import Progress, speaking
from ..report.words import lines
from ..scorer import ForValueScorer
from .refusals import groups_of, refuse_policy
from .settings import apply_policy, checked_config, warn_of_unscored


def value(
    model: nn.Module,
    dataset: Any,
    validation_dataset: Iterable[Mapping[str, Any]] | None,
    policy: Policy | str | None = None,
    config: ForValueConfig | None = None,
    *,
    processing_class: Any = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    row_config: RowConfig | None = None,
    groups: Sequence[Any] | None = None,
    path: str | Path | None = None,
    verbose: bool = True,
) -> np.ndarray:
    """Weights of a data set's rows by their For-Value scores, for a loop without a Trainer::

        weights = value(model, rows, validation, "drop:auto", ForValueConfig(method="auto"))
        install_sampler(loader, weights, seed=0)  # as many steps as before; fewer: rows.select(weights.nonzero()[0])

    Args:
        model, validation_dataset, config, processing_class, data_collator, row_config: as for `ForValueScorer`.
        dataset: the rows of the loader, in their order.
        policy, groups, verbose: as for `ForValueCallback`.
        path: a file for the scores.

    Returns:
        (N,) float64, the same on every rank: 0 for rows to leave out.

    Raises:
        TypeError: a policy or config that is none.
        ValueError: `Drop("auto")` without log odds, groups that do not fit, `Relabel`, what the scorer refuses; (once
            scored) a policy that drops all.
    """
    first = world()[0] == 0
    with speaking(first), together("weighting rows"):
        policy, config = as_policy(policy), checked_config(config)
        if policy.relabels:
            raise ValueError(f"{policy} gives rows other answers, and weights cannot: use prefilter.")
        refuse_policy(policy, config.gives_log_odds)
        groups = groups_of(policy, dataset, groups)
        progress = Progress(*[verbose and first] * 2)
        started = time.perf_counter()
        scorer = ForValueScorer(
            model,
            validation_dataset,
            config,
            processing_class=processing_class,
            data_collator=data_collator,
            row_config=row_config,
            progress=progress,
        )
        scores = scorer.score(dataset, path)
        warn_of_unscored(scores)
        seconds = time.perf_counter() - started
        weights = apply_policy(policy, scores, dataset, groups)
        progress.say(lines(scores, weights, policy, seconds, drawn=False))
        return weights
