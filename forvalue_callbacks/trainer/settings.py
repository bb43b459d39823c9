"""What a scorer takes from a trainer, and where a run keeps its scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState, TrainingArguments

from ..config import ForValueConfig
from ..data.collated import inner
from ..data.sft import RowConfig
from ..model.ranks import of_first_rank
from ..policies import Policy
from ..progress import Progress
from ..scorer import ForValueScorer
from ..scores.files import make_folder
from ..scores.provenance import differing
from ..scores.scores import ForValueScores, grouped_reasons
from .refusals import groups_of, refuse_other_length, refuse_policy

logger = logging.getLogger(__name__)

SCORES_FILE = "forvalue_scores.parquet"


def settings_of(args: TrainingArguments, config: ForValueConfig, data_collator: Any) -> dict[str, Any]:
    """`config` and `rows` of a scorer that prepares rows and runs forward passes as the trainer does."""
    options = {field.name: getattr(args, field.name) for field in fields(RowConfig) if hasattr(args, field.name)}
    if "max_length" not in options or (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        options["max_length"] = None  # nothing but SFTTrainer's own preparation truncates
    if options.get("completion_only_loss") is None and hasattr(inner(data_collator), "completion_only_loss"):
        # Before trl 1.0 the collator labels rows that have lost the columns by which the trainer has decided.
        options["completion_only_loss"] = inner(data_collator).completion_only_loss
    row_config = RowConfig(**options)
    if config.forward_dtype is None and (args.bf16 or args.fp16):
        config = replace(config, forward_dtype="bfloat16" if args.bf16 else "float16")
    return {"config": config, "row_config": row_config}


def apply_policy(
    policy: Policy, scores: ForValueScores, dataset: Any, groups: Sequence[Any] | None = None
) -> np.ndarray:
    """Weights (N,) of the data set's rows.

    Raises:
        ValueError: as many scores as rows are needed, the policy's groups, and log odds for `Drop("auto")`.
    """
    refuse_other_length(scores, dataset)
    refuse_policy(policy, scores.noise is not None)
    return policy(scores.values, groups_of(policy, dataset, groups))


def checked_config(config: ForValueConfig | None) -> ForValueConfig:
    if config is not None and not isinstance(config, ForValueConfig):
        raise TypeError(f"config is of type {type(config).__name__}: give one like ForValueConfig(method='auto')")
    return config or ForValueConfig()


def progress_of(args: TrainingArguments, verbose: bool) -> Progress:
    speaks = verbose and args.process_index == 0
    return Progress(lines=speaks, bars=speaks and not args.disable_tqdm)


def warn_of_unscored(scores: ForValueScores, dry_run: bool = False, streamed: bool = False) -> None:
    """Says how many rows have no score and why, and that they are not trained on, but for those of streams."""
    reasons = grouped_reasons(scores.reasons)
    if reasons:
        n = sum(count for count, _ in reasons)
        listed = "; ".join(f"{count} x {reason}" for count, reason in reasons[:3])
        what = "would not be trained on but for the dry run" if dry_run else "are not trained on"
        what = "are trained on" if streamed else what
        logger.warning("%d rows have no score and %s: %s", n, what, listed)


def folder_of(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def scores_file(args: TrainingArguments) -> Path:
    """Where the scores of a run are kept, tried out by the rank that writes them."""
    file = folder_of(args) / SCORES_FILE
    if args.process_index == 0:
        make_folder(file.parent)
        if file.is_dir():
            raise ValueError(f"{file} is a folder, and the scores go into a file of that name: move it away.")
    return file


def kept_scores(
    args: TrainingArguments,
    state: TrainerState,
    scorer: ForValueScorer,
    dataset: Any,
    last: ForValueScores | None,
    progress: Progress,
) -> ForValueScores | None:
    """Scores that the last run of the callback, this run or a checkpoint of it has kept, if made of the same parts.

    After the first step the weights have moved on, so they need not match any more; before it they must.
    """
    found: ForValueScores | None = None
    provenance = scorer.provenance()  # on every rank: it compares them
    if args.process_index == 0:
        kept: list[tuple[Any, ForValueScores]] = [] if last is None else [("the last run", last)]
        for folder in (folder_of(args), folder_of(args) / f"checkpoint-{state.global_step}"):
            file = folder / SCORES_FILE
            if file.is_file() and (last is None or folder != folder_of(args)):
                try:
                    kept.insert(0, (file, ForValueScores.load(file)))
                except (OSError, ValueError) as error:
                    logger.warning("%s cannot be read as scores: %s", file, error)
        expected = {**provenance, "data": scorer.hash_rows(dataset)} if kept else {}
        if state.global_step > 0:
            expected.pop("weights", None)
        for name, scores in kept:
            other = differing(scores.metadata.get("provenance", {}), expected)
            if not other:
                found = scores
                progress.say(f"For-Value: the scores are those of {name}")
                break
            trained = "; the model has been trained since" if other == ["weights"] and scores is last else ""
            logger.warning(
                "the scores of %s are not used again, they were made of other %s%s: the rows are scored anew",
                name,
                " and ".join(other),
                trained,
            )
        if found is None and state.global_step > 0:
            logger.warning("no usable scores beside the checkpoint: scoring with the partly trained weights")
    return of_first_rank(found, "looking for kept scores")
