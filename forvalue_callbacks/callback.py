"""ForValueCallback for `Trainer(callbacks=[...])`, and `prefilter(trainer)` for fewer steps."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .policies import Drop, Policy, describe
from .reading import kept
from .rows import RowConfig
from .sampler import install_sampler
from .scorer import ForValueConfig, ForValueScorer
from .scores import ForValueScores

logger = logging.getLogger(__name__)

SCORES_FILE = "forvalue_scores.parquet"


class ForValueCallback(TrainerCallback):
    """Score the training rows before the first step, then draw the good ones more often and the bad ones never.

    `on_train_begin` scores every row of the training set and replaces the sampler inside the training data loader by
    one of the same length that draws row i `w_i * N / sum(w)` times per epoch. Steps, learning-rate schedule and
    resuming stay as configured: the places of dropped rows go to kept rows. For fewer steps instead, call `prefilter`
    before `trainer.train()`.

    The scores lie in `output_dir/forvalue_scores.parquet` and in every checkpoint. A resumed run reuses them, since
    its weights are no longer those that the scores came from; a new run reuses them if nothing has changed.

    Args:
        validation_dataset: clean rows of the kind that the model should become good at, in any form that the scorer
            takes; prepared by the trainer's own settings (`max_length`, `completion_only_loss`, ...).
        policy: scores to weights, `Drop(0.2)` by default.
        config: `ForValueConfig`; `forward_dtype` is the trainer's precision if not given.
        scores: scores of exactly the trainer's training rows, or the path of their file, in place of scoring.
        groups: group of each training row, (N,), for a policy with a `group_column` that the trainer has removed.

    After scoring, `scores` (`ForValueScores`) and `weights` (float64 (N,)) can be read.

    Raises (from `trainer.train()`):
        ValueError: packed rows, streaming data, a model whose head cannot be described, a policy that drops all.
    """

    def __init__(
        self,
        validation_dataset: Iterable[Mapping[str, Any]],
        policy: Policy | None = None,
        config: ForValueConfig | None = None,
        *,
        scores: ForValueScores | str | Path | None = None,
        groups: Sequence[Any] | None = None,
    ):
        self.validation_dataset = kept(validation_dataset)
        self.policy = policy if policy is not None else Drop(0.2)
        self.config = config or ForValueConfig()
        self.scores = scores if isinstance(scores, ForValueScores) or scores is None else ForValueScores.load(scores)
        self.groups = groups
        self.weights: np.ndarray | None = None
        self._given = self.scores is not None
        self._to_print: dict[str, float] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        dataset = train_dataloader.dataset
        _refuse(dataset, args)
        started = time.perf_counter()
        if not self._given:
            scorer = ForValueScorer(
                model,
                self.validation_dataset,
                **settings_of(args, self.config),
                processing_class=processing_class,
                data_collator=train_dataloader.collate_fn,
            )
            saved = _saved_scores(args, state, scorer, dataset)
            self.scores = scorer.score(dataset) if saved is None else saved
        assert self.scores is not None
        seconds = time.perf_counter() - started
        self.weights = apply_policy(self.policy, self.scores, dataset, self.groups)
        install_sampler(train_dataloader, self.weights, seed=args.seed if args.data_seed is None else args.data_seed)
        if args.process_index == 0:
            self.scores.save(_folder(args) / SCORES_FILE)
        _warn_of_unscored(self.scores)
        facts = describe(self.weights)
        logs = {f"forvalue_{key}": value for key, value in facts.items()}
        logs |= {"forvalue_unscored": int(np.isnan(self.scores.values).sum()), "forvalue_seconds": round(seconds, 3)}
        # A callback cannot call `Trainer.log`: it writes the entry itself, and lets the first print-out carry it too.
        state.log_history.append({**logs, "epoch": state.epoch or 0.0, "step": state.global_step})
        self._to_print = logs
        logger.info(
            "For-Value: %d rows in %.1f s; %s keeps %d and drops %d; a kept row is now drawn %.2f times an epoch (at "
            "most %.2f); effective sample size %.0f\n%s",
            len(self.scores),
            seconds,
            self.policy,
            facts["kept"],
            facts["dropped"],
            facts["draws_per_kept_row_mean"],
            facts["draws_per_kept_row_max"],
            facts["effective_sample_size"],
            self.scores.summary(),
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._to_print is not None and logs is not None:
            logs.update(self._to_print)
            self._to_print = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = _folder(args) / f"checkpoint-{state.global_step}"
        if args.process_index == 0 and self.scores is not None and checkpoint.is_dir():
            self.scores.save(checkpoint / SCORES_FILE)


def prefilter(
    trainer: Trainer,
    validation_dataset: Iterable[Mapping[str, Any]] | None = None,
    policy: Policy | None = None,
    config: ForValueConfig | None = None,
) -> ForValueScores:
    """Shorten `trainer.train_dataset` to the rows that the policy keeps; call it before `trainer.train()`.

    Unlike `ForValueCallback`, which keeps the number of steps, training then takes fewer steps.

    Args:
        validation_dataset: clean rows; the trainer's `eval_dataset` by default (its loss is then no longer an
            independent measure of the result).
        policy: `Drop(0.2)` by default. Policies that weight rows (`Reweight`) need the callback.

    Returns:
        The scores of all rows, also kept in `output_dir/forvalue_scores.parquet`.

    Raises:
        ValueError: packed rows, streaming data, no validation rows, a reweighting policy.
    """
    args: Any = trainer.args
    dataset: Any = trainer.train_dataset
    model: Any = trainer.model
    _refuse(dataset, args)
    if validation_dataset is None:
        validation_dataset = trainer.eval_dataset  # type: ignore[assignment]
        if validation_dataset is None or isinstance(validation_dataset, dict):
            raise ValueError("prefilter needs a validation_dataset: the trainer has no single eval_dataset.")
        logger.warning("selecting rows by the trainer's eval_dataset: its loss no longer measures the result fairly")
    scorer = ForValueScorer(
        model,
        validation_dataset,
        **settings_of(args, config or ForValueConfig()),
        processing_class=trainer.processing_class,
        data_collator=trainer.data_collator,
    )
    scores = scorer.score(dataset)
    policy = policy if policy is not None else Drop(0.2)
    weights = apply_policy(policy, scores, dataset)
    if len(np.unique(weights[weights > 0])) > 1:
        raise ValueError(f"{policy} weights rows, and prefilter can only keep or drop them: use ForValueCallback.")
    trainer.train_dataset = dataset.select(np.flatnonzero(weights))
    if args.process_index == 0:
        scores.save(_folder(args) / SCORES_FILE)
    _warn_of_unscored(scores)
    logger.info("For-Value: %s keeps %d of %d rows\n%s", policy, (weights > 0).sum(), len(weights), scores.summary())
    return scores


def settings_of(args: TrainingArguments, config: ForValueConfig) -> dict[str, Any]:
    """`config` and `rows` of a scorer that prepares rows and runs forward passes as the trainer does."""
    options = {field.name: getattr(args, field.name) for field in fields(RowConfig) if hasattr(args, field.name)}
    if "max_length" not in options or (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        options["max_length"] = None  # nothing but SFTTrainer's own preparation truncates
    rows = RowConfig(**options)
    if config.forward_dtype is None and (args.bf16 or args.fp16):
        config = replace(config, forward_dtype="bfloat16" if args.bf16 else "float16")
    return {"config": config, "rows": rows}


def apply_policy(
    policy: Policy, scores: ForValueScores, dataset: Any, groups: Sequence[Any] | None = None
) -> np.ndarray:
    """Weights (N,) of the data set's rows.

    Raises:
        ValueError: as many scores as rows are needed, the policy's group column, and log odds for `Drop("auto")`.
    """
    if len(scores) != len(dataset):
        raise ValueError(
            f"{len(scores)} scores for {len(dataset)} training rows. SFTTrainer drops fully masked rows and shuffles "
            "if asked: score trainer.train_dataset itself."
        )
    if policy.needs_log_odds and "noise" not in scores.metadata:
        raise ValueError(
            f"{policy} needs scores that are log odds of a clean row: score with ForValueConfig(direction='auto') (or "
            "'labels'), or give a fraction."
        )
    column = policy.group_column
    if column is None:
        return policy(scores.values)
    if groups is None:
        if column not in getattr(dataset, "column_names", ()):
            raise ValueError(
                f"{policy}: the training rows have no column {column!r} here. Trainers remove columns that the model "
                "does not take: set remove_unused_columns=False, or pass ForValueCallback(groups=[...])."
            )
        groups = dataset[column]
    return policy(scores.values, list(groups))


def _warn_of_unscored(scores: ForValueScores) -> None:
    reasons = Counter(reason for reason in scores.reasons if reason is not None)
    if reasons:
        listed = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
        logger.warning("%d rows have no score and are not trained on: %s", reasons.total(), listed)


def _folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def _refuse(dataset: Any, args: TrainingArguments) -> None:
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            "streaming data cannot be scored before training: map it with ForValueTransform and filter on its "
            "'forvalue_score' column, or load it as a Dataset."
        )
    if getattr(args, "packing", False) or "seq_lengths" in getattr(dataset, "column_names", ()):
        raise ValueError(
            "packed rows hold several samples each and cannot be dropped: score before packing with "
            "ForValueTransform (dataset.map, then filter), or set packing=False."
        )


def _saved_scores(
    args: TrainingArguments, state: TrainerState, scorer: ForValueScorer, dataset: Any
) -> ForValueScores | None:
    """Scores that this run or a checkpoint of it has kept, if made of the same rows and config.

    After the first step the weights have moved on, so they need not match any more; before it they must.
    """
    found: list[ForValueScores | None] = [None]
    if args.process_index == 0:
        folders = (_folder(args) / f"checkpoint-{state.global_step}", _folder(args))
        files = [folder / SCORES_FILE for folder in folders if (folder / SCORES_FILE).is_file()]
        expected = {**scorer.made_of(), "data": scorer.hash_rows(dataset)} if files else {}
        if state.global_step > 0:
            expected.pop("weights", None)
        for file in files:
            try:
                found[0] = ForValueScores.load(file, expected=expected)
                logger.info("For-Value: reusing the scores in %s", file)
                break
            except ValueError as error:
                logger.warning("not reusing %s: %s", file, error)
        if found[0] is None and state.global_step > 0:
            logger.warning("no usable scores beside the checkpoint: scoring with the partly trained weights")
    if args.world_size > 1:
        broadcast_object_list(found)
    return found[0]
