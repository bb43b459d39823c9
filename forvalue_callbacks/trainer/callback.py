"""ForValueCallback for `Trainer(callbacks=[...])`, and `prefilter(trainer)` for fewer steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.reading import kept
from ..data.sft import RowConfig
from ..policies import Policy, as_policy
from ..progress import Progress, speaking
from ..report.words import lines, numbers
from ..scorer import ForValueConfig, ForValueScorer
from ..scores.scores import PARTS, ForValueScores, grouped_reasons, make_folder
from .refusals import groups_of, refuse_other_length, refuse_other_rows, refuse_policy, refuse_trainer, shortener
from .sampler import INSTEAD, find_sampler, install_sampler
from .trackers import report

logger = logging.getLogger(__name__)

SCORES_FILE = "forvalue_scores.parquet"


class ForValueCallback(TrainerCallback):
    """Score the training rows before the first step, then draw the good ones more often and the bad ones never.

    `on_train_begin` scores every row of the training set and replaces the sampler inside the training data loader by
    one of the same length that draws row i `w_i * N / sum(w)` times per epoch. Steps, learning-rate schedule and
    resuming stay as configured: the places of dropped rows go to kept rows. For fewer steps instead, call `prefilter`
    before `trainer.train()`.

    The scores lie in `output_dir/forvalue_scores.parquet` and in every checkpoint. A resumed run reuses them, since
    its weights are no longer those that the scores came from; a new run reuses them if nothing has changed. What is
    done and found is said on the first rank, and the numbers are in `state.log_history`, TensorBoard and W&B.

    Args:
        validation_dataset: clean rows of the kind that the model should become good at, in any form that the scorer
            takes; prepared by the trainer's own settings (`max_length`, `completion_only_loss`, ...).
        policy: scores to weights, as a `Policy` or its text ("drop:auto"); `Drop(0.2)` by default.
        config: `ForValueConfig`; `forward_dtype` is the trainer's precision if not given.
        scores: scores of exactly the trainer's training rows, or the path of their file, in place of scoring.
        groups: group of each training row, (N,), for a policy with a `group_column` that the trainer has removed.
        verbose: say what is done and found, with a bar where the trainer's own bars are shown.

    After scoring, `scores` (`ForValueScores`) and `weights` (float64 (N,)) can be read.

    Raises:
        TypeError: a policy or config that is none.
        ValueError: (from `trainer.train()`, before any row is scored) packed rows, streaming data, rows that are no
            labelled answers (DPO, GRPO, ...), a loader that cannot draw by weight, `Drop("auto")` without log odds,
            groups that do not fit, scores of other rows, an output folder that cannot be written, a second
            `ForValueCallback`, a model whose head cannot be described; (once scored) a policy that drops all.
    """

    _living: ClassVar[WeakSet[ForValueCallback]] = WeakSet()

    def __init__(
        self,
        validation_dataset: Iterable[Mapping[str, Any]],
        policy: Policy | str | None = None,
        config: ForValueConfig | None = None,
        *,
        scores: ForValueScores | str | Path | None = None,
        groups: Sequence[Any] | None = None,
        verbose: bool = True,
    ):
        self.validation_dataset = kept(validation_dataset)
        self.policy = as_policy(policy)
        self.config = _checked(config)
        self.scores = scores if isinstance(scores, ForValueScores) or scores is None else ForValueScores.load(scores)
        self.groups = groups
        self.weights: np.ndarray | None = None
        self.verbose = verbose
        self._given = self.scores is not None
        self._running = False
        self._control: TrainerControl | None = None
        self._state: TrainerState | None = None
        if validation_dataset is None and not self._given:
            raise TypeError("the validation_dataset is None: give clean rows of the kind to become good at")
        refuse_policy(self.policy, self._log_odds)
        self._living.add(self)

    @property
    def _log_odds(self) -> bool:
        return (
            self.config.gives_log_odds if not self._given or self.scores is None else "noise" in self.scores.metadata
        )

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._control = control

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
        with speaking(args.process_index == 0):
            self._score_and_install(args, state, control, model, train_dataloader, processing_class)

    def _score_and_install(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        train_dataloader: Any,
        processing_class: Any,
    ) -> None:
        first = args.process_index == 0
        self._refuse_another(state)
        if not hasattr(train_dataloader, "dataset"):
            raise ValueError(f"a {type(train_dataloader).__name__} as data loader has no dataset. {INSTEAD}")
        dataset = train_dataloader.dataset
        refuse_trainer(args, dataset)
        refuse_policy(self.policy, self._log_odds)
        find_sampler(train_dataloader, len(dataset))
        groups = groups_of(self.policy, dataset, self.groups)
        progress = _progress(args, self.verbose)
        file = _scores_file(args)
        made_anew, started = False, time.perf_counter()
        scorer = ForValueScorer(
            model,
            self.validation_dataset,
            **settings_of(args, self.config, train_dataloader.collate_fn),
            processing_class=processing_class,
            data_collator=train_dataloader.collate_fn,
            progress=progress,
        )
        again = self._began_again(args, scorer, dataset)
        if self._given:
            assert self.scores is not None
            refuse_other_rows(self.scores, scorer, dataset)
        elif not again:
            saved = _kept_scores(args, state, scorer, dataset, self.scores, progress)
            made_anew = saved is None
            self.scores = scorer.score(dataset) if saved is None else saved
        assert self.scores is not None
        self._running = True
        if first:
            self.scores.save(file)  # before a policy can refuse them
        seconds = time.perf_counter() - started
        self.weights = apply_policy(self.policy, self.scores, dataset, groups)
        install_sampler(train_dataloader, self.weights, seed=args.seed if args.data_seed is None else args.data_seed)
        found = numbers(self.scores, self.weights, seconds)
        state.log_history.append({**found, "epoch": state.epoch or 0.0, "step": state.global_step})
        if again:
            progress.say("For-Value: the run begins again, with the scores made before its first step")
            return
        _warn_of_unscored(self.scores)
        if first:
            report(args, state.global_step, found)
        progress.say(lines(self.scores, self.weights, self.policy, seconds if made_anew else None, drawn=True))

    def _refuse_another(self, state: TrainerState) -> None:
        """Callbacks cannot see each other: those of one trainer know it by the objects that it shows them all."""
        for other in self._living:
            together = self._control is not None and self._control is other._control  # as Trainer(callbacks=[...])
            if other is not self and (together or other._state is state):
                self._control = None  # the trainer may go on without the other
                raise ValueError(
                    "two ForValueCallbacks in one trainer undo each other: chain their policies (a.then(b))."
                )
        self._state = state

    def _began_again(self, args: TrainingArguments, scorer: ForValueScorer, dataset: Any) -> bool:
        """Whether `auto_find_batch_size` has begun the run anew, with weights trained since: the scores hold."""
        if not (self._running and args.auto_find_batch_size) or self.scores is None:
            return False
        return self._given or self.scores.metadata["provenance"]["data"] == scorer.hash_rows(dataset)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = _folder(args) / f"checkpoint-{state.global_step}"
        if args.process_index == 0 and self.scores is not None and checkpoint.is_dir():
            self.scores.save(checkpoint / SCORES_FILE)


def prefilter(
    trainer: Trainer,
    validation_dataset: Iterable[Mapping[str, Any]] | None = None,
    policy: Policy | str | None = None,
    config: ForValueConfig | None = None,
    *,
    groups: Sequence[Any] | None = None,
    verbose: bool = True,
) -> ForValueScores:
    """Shorten `trainer.train_dataset` to the rows that the policy keeps; call it before `trainer.train()`.

    Unlike `ForValueCallback`, which keeps the number of steps, training then takes fewer steps.

    Args:
        validation_dataset: clean rows; the trainer's `eval_dataset` by default (its loss is then no longer an
            independent measure of the result).
        policy, groups, verbose: as for `ForValueCallback`. Policies that weight rows (`Reweight`) need the callback.

    Returns:
        The scores of all rows, also kept in `output_dir/forvalue_scores.parquet`.

    Raises:
        TypeError: a policy or config that is none.
        ValueError: (before any row is scored) no training rows or none that can be had by their place, what
            `ForValueCallback` refuses, no validation rows, a reweighting policy; (once scored) a policy that drops
            all.
    """
    args: Any = trainer.args
    with speaking(args.process_index == 0):
        return _prefilter(trainer, validation_dataset, as_policy(policy), _checked(config), groups, verbose)


def _prefilter(
    trainer: Any, validation_dataset: Any, policy: Policy, config: ForValueConfig, groups: Any, verbose: bool
) -> ForValueScores:
    args, dataset = trainer.args, trainer.train_dataset
    refuse_trainer(args, dataset)
    refuse_policy(policy, config.gives_log_odds)
    if policy.reweights:
        raise ValueError(_WEIGHTS.format(policy))
    groups = groups_of(policy, dataset, groups)
    shorten = shortener(dataset)
    file = _scores_file(args)
    if validation_dataset is None:
        validation_dataset = trainer.eval_dataset
        if validation_dataset is None or isinstance(validation_dataset, dict):
            raise ValueError("prefilter needs a validation_dataset: the trainer has no single eval_dataset.")
        logger.warning("selecting rows by the trainer's eval_dataset: its loss no longer measures the result fairly")
    progress = _progress(args, verbose)
    started = time.perf_counter()
    scorer = ForValueScorer(
        trainer.model,
        validation_dataset,
        **settings_of(args, config, trainer.data_collator),
        processing_class=trainer.processing_class,
        data_collator=trainer.data_collator,
        progress=progress,
    )
    scores = scorer.score(dataset)
    if args.process_index == 0:
        scores.save(file)  # before a policy can refuse them
    _warn_of_unscored(scores)
    seconds = time.perf_counter() - started
    weights = apply_policy(policy, scores, dataset, groups)
    if len(np.unique(weights[weights > 0])) > 1:  # a policy of the caller's own
        raise ValueError(_WEIGHTS.format(policy))
    trainer.train_dataset = shorten(np.flatnonzero(weights))
    progress.say(lines(scores, weights, policy, seconds, drawn=False))
    return scores


_WEIGHTS = "{} weights rows, and prefilter can only keep or drop them: use ForValueCallback."


def settings_of(args: TrainingArguments, config: ForValueConfig, data_collator: Any) -> dict[str, Any]:
    """`config` and `rows` of a scorer that prepares rows and runs forward passes as the trainer does."""
    options = {field.name: getattr(args, field.name) for field in fields(RowConfig) if hasattr(args, field.name)}
    if "max_length" not in options or (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        options["max_length"] = None  # nothing but SFTTrainer's own preparation truncates
    if options.get("completion_only_loss") is None and hasattr(data_collator, "completion_only_loss"):
        # Before trl 1.0 the collator labels rows that have lost the columns by which the trainer has decided.
        options["completion_only_loss"] = data_collator.completion_only_loss
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
    refuse_policy(policy, "noise" in scores.metadata)
    return policy(scores.values, groups_of(policy, dataset, groups))


def _checked(config: ForValueConfig | None) -> ForValueConfig:
    if config is not None and not isinstance(config, ForValueConfig):
        raise TypeError(f"config is of type {type(config).__name__}: give one like ForValueConfig(method='auto')")
    return config or ForValueConfig()


def _progress(args: TrainingArguments, verbose: bool) -> Progress:
    speaks = verbose and args.process_index == 0
    return Progress(lines=speaks, bars=speaks and not args.disable_tqdm)


def _warn_of_unscored(scores: ForValueScores) -> None:
    reasons = grouped_reasons(scores.reasons)
    if reasons:
        n = sum(count for count, _ in reasons)
        listed = "; ".join(f"{count} x {reason}" for count, reason in reasons[:3])
        logger.warning("%d rows have no score and are not trained on: %s", n, listed)


def _folder(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def _scores_file(args: TrainingArguments) -> Path:
    """Where the scores of a run are kept, tried out by the rank that writes them."""
    file = _folder(args) / SCORES_FILE
    if args.process_index == 0:
        make_folder(file.parent)
        if file.is_dir():
            raise ValueError(f"{file} is a folder, and the scores go into a file of that name: move it away.")
    return file


def _kept_scores(
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
    found: list[ForValueScores | None] = [None]
    if args.process_index == 0:
        kept: list[tuple[Any, ForValueScores]] = [] if last is None else [("the last run", last)]
        for folder in (_folder(args), _folder(args) / f"checkpoint-{state.global_step}"):
            file = folder / SCORES_FILE
            if file.is_file() and (last is None or folder != _folder(args)):
                try:
                    kept.insert(0, (file, ForValueScores.load(file)))
                except (OSError, ValueError) as error:
                    logger.warning("%s cannot be read as scores: %s", file, error)
        expected = {**scorer.provenance(), "data": scorer.hash_rows(dataset)} if kept else {}
        if state.global_step > 0:
            expected.pop("weights", None)
        for name, scores in kept:
            provenance = scores.metadata.get("provenance", {})
            other = [PARTS.get(part, part) for part in expected if provenance.get(part) != expected[part]]
            if not other:
                found[0] = scores
                progress.say(f"For-Value: the scores are those of {name}")
                break
            trained = "; the model has been trained since" if other == ["weights"] and scores is last else ""
            logger.warning(
                "the scores of %s are not used again, they were made of other %s%s: the rows are scored anew",
                name,
                " and ".join(other),
                trained,
            )
        if found[0] is None and state.global_step > 0:
            logger.warning("no usable scores beside the checkpoint: scoring with the partly trained weights")
    if args.world_size > 1:
        broadcast_object_list(found)
    return found[0]
