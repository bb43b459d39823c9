"""What the recipes that fine-tune several ways share: one run and what came of it, and every score for its rows."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from find_mislabels import own_probability
from influence_comparison import LORA_METHODS, train_epochs, with_lora
from influence_report import ComparisonConfig, Measured, Meter
from real_errors import Judged, bag_of_words, word_scores
from sklearn.model_selection import KFold, cross_val_predict
from torch import nn
from trl import SFTTrainer

from forvalue_callbacks import ForValueConfig, ForValueScorer, ForValueScores, baselines
from forvalue_callbacks.data.shown import shown
from forvalue_callbacks.methods import METHODS


class Outcome(NamedTuple):
    """Of a fine-tuned model, on test rows; seconds of the training alone."""

    test_loss: float
    accuracy: float
    training_seconds: float
    steps: int


def fine_tune(trainer: SFTTrainer, clock: Callable[[], float] = time.perf_counter) -> Outcome:
    """Trains, then measures on the trainer's `eval_dataset`."""
    started = clock()
    trainer.train()
    seconds = clock() - started
    return Outcome(trainer.evaluate()["eval_loss"], accuracy(trainer), seconds, trainer.state.global_step)


@torch.no_grad()
def accuracy(trainer: SFTTrainer) -> float:
    """Share of test rows whose whole answer, its end included, greedy decoding would write.

    One pass: each token is the model's first choice behind the right ones before it.
    """
    model, right = trainer.model.eval(), []
    for batch in trainer.get_eval_dataloader():
        labels = batch["labels"][:, 1:]
        best = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
        right += ((best == labels) | (labels == -100)).all(1).tolist()
    return float(np.mean(right))


def constant_scores(values: np.ndarray) -> ForValueScores:
    """Scores made by hand, for the comparisons; they know no numbers of labelled tokens."""
    n = len(values)
    return ForValueScores(values.astype(np.float64), [None] * n, np.zeros(n), np.zeros(n, dtype=np.int64))


def answers_repeat(answers: Sequence[str]) -> bool:
    """Whether they are labels: half as many different ones as rows, or fewer."""
    return 2 * len(set(answers)) <= len(answers)


@dataclass
class Job:
    """Rows to be valued, once for all runs of a seed.

    Args:
        model: before any fine-tuning; left as it is.
        train: N rows as SFTTrainer has prepared them; `raw` the same ones as they came.
        validation: M trusted rows as they came.
        influence: LoRA run that the influence functions need.
        meter: seconds of each valuation are by its clock.
    """

    model: nn.Module
    tokenizer: Any
    train: Dataset
    raw: Dataset
    validation: Dataset
    seed: int
    influence: ComparisonConfig
    meter: Meter

    def value(self, name: str) -> tuple[np.ndarray, float]:
        """Scores of the rows, (N,), higher is better, and what they took in seconds; kept for the next who asks.

        Raises:
            ValueError: what a method refuses; labels are asked for, and no answer repeats.
        """
        if name not in self._valued:
            before = 0.0
            if name in METHODS:
                measured = self.meter(lambda: self._scorer(name).score(self.train).values)
            elif name in LORA_METHODS:
                gradients = self._gradients
                measured = self.meter(lambda: LORA_METHODS[name](*gradients.value).double().cpu().numpy())
                before = gradients.seconds
            else:
                measured = self.meter(lambda: RIVALS[name](self))
            values = measured.value if measured.value.ndim == 1 else measured.value.mean(1)
            self._valued[name] = values, before + measured.seconds
        return self._valued[name]

    @cached_property
    def _valued(self) -> dict[str, tuple[np.ndarray, float]]:
        return {}

    def _scorer(self, method: str) -> ForValueScorer:
        return ForValueScorer(
            self.model, self.validation, ForValueConfig(method), processing_class=self.tokenizer, progress=False
        )

    @cached_property
    def tokens(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Training and validation rows as the baselines take them."""
        prepare = self._scorer("gradient").run.reader.prepare
        return tuple(  # type: ignore[return-value]
            [{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in map(prepare, side)]
            for side in (self.train, self.validation)
        )

    @cached_property
    def texts(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Prompt and answer of training and validation rows."""
        sides = [[shown(row) for row in side] for side in (self.raw, self.validation)]
        return tuple([(text.prompt, text.answer) for text in side] for side in sides)  # type: ignore[return-value]

    def joined(self) -> list[list[str]]:
        return [[prompt + answer for prompt, answer in side] for side in self.texts]

    def labels(self) -> list[np.ndarray]:
        """The answers of both sides.

        Raises:
            ValueError: they are no labels.
        """
        sides = [np.array([answer for _, answer in side]) for side in self.texts]
        if not all(answers_repeat(side.tolist()) for side in sides):
            raise ValueError("answers do not repeat: there are no labels to predict")
        return sides

    def trained(self, side: int) -> nn.Module:
        """The model after the LoRA run of the influence functions on the training (0) or the validation rows (1)."""
        lora = with_lora(copy.deepcopy(self.model), self.influence, self.seed)
        for _ in train_epochs(lora, self.tokens[side], self.influence, self.seed):
            pass
        return lora

    @cached_property
    def _gradients(self) -> Measured:
        def both() -> list[dict[str, torch.Tensor]]:
            lora = self.trained(0)
            return [baselines.gradients(lora, side) for side in self.tokens]

        return self.meter(both)


def _words(job: Job) -> np.ndarray:
    """Validation against training rows, of free text: the prompts are told apart by their places."""
    n = len(job.raw)
    sides = [Dataset.from_dict({"prompt": [p for p, _ in s], "completion": [a for _, a in s]}) for s in job.texts]
    return word_scores(Judged(sides[1], sides[0], np.zeros(n, dtype=bool), np.arange(n), np.arange(n)))


def _words_of_validation(job: Job) -> np.ndarray:
    """log p(observed label) by a bag of words fitted on the validation rows."""
    observed, known = job.labels()
    prompts, known_prompts = ([prompt for prompt, _ in side] for side in job.texts)
    model = bag_of_words().fit(known_prompts, known)
    return own_probability(model.classes_, model.predict_proba(prompts), observed)


def _confident_learning(job: Job) -> np.ndarray:
    """log p(observed label) by a bag of words fitted on the other folds of the rows themselves, validation unseen."""
    observed, _ = job.labels()
    folds = KFold(5, shuffle=True, random_state=0)
    prompts = [prompt for prompt, _ in job.texts[0]]
    p = cross_val_predict(bag_of_words(), prompts, observed, cv=folds, method="predict_proba")
    return own_probability(np.unique(observed), p, observed)


# Name -> scores (N,) or (N, M). Beside them there are the methods of the package and those on gradients.
RIVALS: dict[str, Callable[[Job], np.ndarray]] = {
    "random": lambda job: baselines.random_scores(len(job.train), 1, seed=job.seed)[:, 0].numpy(),
    "loss": lambda job: baselines.loss(job.model, job.tokens[0]).numpy(),
    "mutual information": lambda job: baselines.pmi(job.model, job.tokens[0]).numpy(),
    "IFD": lambda job: baselines.ifd(job.model, job.tokens[0]).numpy(),
    "RDS+": lambda job: baselines.rds_plus(job.model, *job.tokens).numpy(),
    "TF-IDF": lambda job: baselines.tfidf(*job.joined()).numpy(),
    "bag of words, validation against rows": _words,
    "bag of words, validation labels": _words_of_validation,
    "bag of words, cross-validated (cleanlab)": _confident_learning,
    "in-context approximation": lambda job: baselines.in_context(job.model, *job.tokens).numpy(),
    "RHO-loss": lambda job: baselines.rho_loss(job.model, job.trained(1), job.tokens[0]).numpy(),
}
