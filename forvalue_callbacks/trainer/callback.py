"""ForValueCallback for `Trainer(callbacks=[...])`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import ForValueConfig
from ..data.reading import kept
from ..methods import METHODS
from ..model.ranks import of_all_ranks, together
from ..policies import Policy, as_policy
from ..progress import Progress, speaking
from ..report.words import lines, numbers
from ..scorer import ForValueScorer
from ..scores.scores import ForValueScores
from ..scores.writer import remove_parts
from .evaluation import refuse_other_text, trainer_of, validation_rows
from .page import write_report
from .refusals import has_preferences, refuse_policy
from .rows import DrawnRows, StreamedRows, rows_of
from .settings import (
    SCORES_FILE,
    checked_config,
    folder_of,
    kept_scores,
    progress_of,
    scores_file,
    settings_of,
    warn_of_unscored,
)
from .trackers import report


class ForValueCallback(TrainerCallback):
    """Score the training rows before the first step, then draw the good ones more often and the bad ones never.

    `on_train_begin` scores every row of the training set and replaces the sampler inside the training data loader by
    one of the same length that draws row i `w_i * N / sum(w)` times per epoch. Steps, learning-rate schedule and
    resuming stay as configured: the places of dropped rows go to kept rows. For fewer steps instead, call `prefilter`
    before `trainer.train()`.

    Of a stream (`IterableDataset`) the rows that the run takes are scored, and as many more as the policy says that it
    drops (`Drop(0.2)`: 1.25 times as many), before the first step too: the policy judges them together as those of a
    `Dataset`. Training then reads the stream without those dropped; should the kept ones run out, it begins there
    again. One score, reason and digest of a row are held in memory. Rows without a score stay.

    The scores lie in `output_dir/forvalue_scores.parquet` and in every checkpoint. A resumed run reuses them, since
    its weights are no longer those that the scores came from; a new run reuses them if nothing has changed. What is
    done and found is said on the first rank, and the numbers are in `state.log_history`, TensorBoard and W&B. A report
    is in `output_dir/forvalue_report.html`; to explain rows there the model runs over the validation rows again.

    Args:
        validation_dataset: clean rows of the kind that the model should become good at, in any form that the scorer
            takes; prepared by the trainer's own settings (`max_length`, `completion_only_loss`, ...). Or "eval": the
            trainer's own `eval_dataset` as it has prepared it ("eval:NAME": one of several); its loss is then no
            longer an independent measure of the result. Several sets by name: a policy sees the greatest of a row's
            scores by each, in standard deviations (`ForValueScores.values`).
        policy: scores to weights, as a `Policy` or its text ("drop:auto"); `Drop(0.2)` by default.
        config: `ForValueConfig`; `forward_dtype` is the trainer's precision if not given.
        scores: scores of exactly the trainer's training rows, or the path of their file, in place of scoring.
        groups: group of each training row, (N,), for a policy with a `group_column` that the trainer has removed.
        verbose: say what is done and found, with a bar where the trainer's own bars are shown, and write the report.
        dry_run: score, report, and train on every row as without the callback; it is said what the policy would drop.
        rescore_epochs: score all rows again after so many epochs each time, with the weights as they are then; None:
            once, before the first step, as the method is published. What was dropped may come back. Not by steps: the
            rows of an epoch are drawn as it begins.

    After scoring, `scores` (`ForValueScores`) and `weights` (float64 (N,), all one in a dry run) can be read.

    Raises:
        TypeError: a policy or config that is none.
        ValueError: (from `trainer.train()`, before any row is scored) packed rows, rows that are no labelled
            answers (GRPO, ...), a stream that cannot be read twice alike or a policy that a stream cannot
            follow, a loader that cannot draw by weight, `Drop("auto")` without log odds, no evaluation rows for
            "eval", groups that do not fit, scores of other rows, an output folder that cannot be written, a second
            `ForValueCallback`, a model whose head cannot be described; (once scored) a policy that drops all.
    """

    _living: ClassVar[WeakSet[ForValueCallback]] = WeakSet()

    def __init__(
        self,
        validation_dataset: Iterable[Mapping[str, Any]] | str,
        policy: Policy | str | None = None,
        config: ForValueConfig | None = None,
        *,
        scores: ForValueScores | str | Path | None = None,
        groups: Sequence[Any] | None = None,
        verbose: bool = True,
        dry_run: bool = False,
        rescore_epochs: int | None = None,
    ):
        refuse_other_text(validation_dataset)
        self.validation_dataset = kept(validation_dataset)
        self.policy = as_policy(policy)
        self.config = checked_config(config)
        self.scores = scores if isinstance(scores, ForValueScores) or scores is None else ForValueScores.load(scores)
        self.groups = groups
        self.weights: np.ndarray | None = None
        self.verbose = verbose
        self.dry_run = dry_run
        self.rescore_epochs = rescore_epochs
        self._given = self.scores is not None
        self._running = False
        self._control: TrainerControl | None = None
        self._state: TrainerState | None = None
        if rescore_epochs is not None and rescore_epochs < 1:
            raise ValueError(f"rescore_epochs is {rescore_epochs}: give a number of epochs, 1 or more, or None.")
        scores_rows = not self._given or rescore_epochs is not None
        if validation_dataset is None and scores_rows and METHODS[self.config.method].needs_validation:
            raise TypeError("the validation_dataset is None: give clean rows of the kind to become good at")
        refuse_policy(self.policy, self._log_odds and (not scores_rows or self.config.gives_log_odds))
        if self.policy.relabels:
            raise ValueError(f"{self.policy} gives rows other answers, and a callback cannot: use prefilter.")
        self._living.add(self)

    @property
    def _log_odds(self) -> bool:
        given = self.scores if self._given else None
        return self.config.gives_log_odds if given is None else given.noise is not None

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

    @together("preparing to train by scores")
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
        refuse_policy(self.policy, self._log_odds)
        rows = rows_of(train_dataloader, self.policy, self.groups, args, state)
        if rows.streamed and self.rescore_epochs is not None:
            raise ValueError("streaming data is scored before the first step alone: leave rescore_epochs out.")
        dataset = rows.dataset
        progress = progress_of(args, self.verbose)
        file = scores_file(args)
        made_anew, started = False, time.perf_counter()
        scorer = self._scorer(args, state, model, train_dataloader, processing_class, progress)
        rows.look(scorer.run.reader)
        again = self._began_again(args, scorer, dataset)
        if self._given:
            assert self.scores is not None
            rows.refuse_others(self.scores, scorer)
        elif not again:
            saved = kept_scores(args, state, scorer, dataset, self.scores, progress)
            made_anew = saved is None
            self.scores = scorer.score(dataset, file) if saved is None else saved
        assert self.scores is not None
        self._running = True
        if first:
            self.scores.save(file)  # before a policy can refuse them
            remove_parts(file)
        seconds = time.perf_counter() - started
        chosen = self._install(args, state, rows, scorer, seconds, new=not again)
        if again:
            progress.say("For-Value: the run begins again, with the scores made before its first step")
            return
        warn_of_unscored(self.scores, self.dry_run, rows.streamed)
        self._say(progress, rows, chosen, seconds if made_anew else None)
        if self.verbose and state.global_step == 0:  # later the weights are no longer those that were scored with
            write_report(args, scorer, self.scores, dataset, chosen, self.policy)

    def _scorer(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: Any,
        train_dataloader: Any,
        processing_class: Any,
        progress: Progress,
    ) -> ForValueScorer:
        return ForValueScorer(
            model,
            self._validation(state),
            **settings_of(args, self.config, train_dataloader.collate_fn),
            processing_class=processing_class,
            data_collator=train_dataloader.collate_fn,
            progress=progress,
        )

    def _install(
        self,
        args: TrainingArguments,
        state: TrainerState,
        rows: DrawnRows | StreamedRows,
        scorer: ForValueScorer,
        seconds: float,
        new: bool = True,
    ) -> np.ndarray:
        """Trains by the scores from here on, and logs what that means (to trackers where they are `new`).

        Returns:
            The weights of the policy, (N,), installed unless this is a dry run.
        """
        assert self.scores is not None
        chosen = rows.weights(self.scores)
        self.weights = np.ones(len(chosen)) if self.dry_run else chosen
        if not self.dry_run:
            seed = args.seed if args.data_seed is None else args.data_seed
            rows.install(scorer.run.reader, self.scores, self.weights, seed)
        found = numbers(self.scores, self.weights, seconds, chosen if self.dry_run else None, not rows.streamed)
        state.log_history.append({**found, "epoch": state.epoch or 0.0, "step": state.global_step})
        if new and args.process_index == 0:
            report(args, state.global_step, found)
        return chosen

    def _say(
        self, progress: Progress, rows: DrawnRows | StreamedRows, chosen: np.ndarray, seconds: float | None
    ) -> None:
        assert self.scores is not None
        preferences = has_preferences(rows.dataset)
        options = {"drawn": not rows.streamed, "dry_run": self.dry_run, "preferences": preferences}
        progress.say(lines(self.scores, chosen, self.policy, seconds, **options))

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        every, n_done = self.rescore_epochs, round(state.epoch or 0)
        if every is not None and n_done % every == 0 and state.global_step < state.max_steps:
            with speaking(args.process_index == 0):
                self._score_anew(args, state, model, train_dataloader, processing_class)

    @together("scoring the rows anew")
    def _score_anew(
        self, args: TrainingArguments, state: TrainerState, model: Any, train_dataloader: Any, processing_class: Any
    ) -> None:
        """Scores all rows, dropped ones too, with the weights as they are now."""
        started, progress = time.perf_counter(), progress_of(args, self.verbose)
        rows = rows_of(train_dataloader, self.policy, self.groups, args, state)
        scorer = self._scorer(args, state, model, train_dataloader, processing_class, progress)
        self.scores = scorer.score(rows.dataset)
        seconds = time.perf_counter() - started
        chosen = self._install(args, state, rows, scorer, seconds)
        self._say(progress, rows, chosen, seconds)

    def _validation(self, state: TrainerState) -> Any:
        rows: Any = self.validation_dataset
        return validation_rows(rows, trainer_of(state)) if isinstance(rows, str) else rows

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
        same = self._given or self.scores.metadata["provenance"]["data"] == scorer.hash_rows(dataset)
        return all(of_all_ranks(same, "looking at the rows again"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running = False

    @together("keeping the scores")
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = folder_of(args) / f"checkpoint-{state.global_step}"
        if args.process_index == 0 and self.scores is not None and checkpoint.is_dir():
            self.scores.save(checkpoint / SCORES_FILE)
