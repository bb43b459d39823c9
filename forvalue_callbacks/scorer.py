"""Data set in, scores out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import ForValueConfig
from .core.fit import Fit
from .data.classification import sequence_segment, token_segment
from .data.collated import OneByOne
from .data.pieces import pieces
from .data.reader import Reader
from .data.reading import kept, rows_at
from .data.seq2seq import decoder_segment
from .data.sft import RowConfig, RowPreparer
from .methods import METHODS
from .methods.base import ROWS, VALIDATION, State, put_together, row_tokens, token_columns
from .methods.explain import Explainer, nearest_by, tokens_by
from .methods.fitted import fit_of
from .methods.pairs import PAIRS, PAIRS_WITH, Pairs, pairs_file
from .model.backbone import Backbone, left_as_found
from .model.fingerprint import digest
from .model.kinds import classifies
from .model.ranks import of_first_rank, together, world
from .model.run import Run, Window
from .progress import Pass, Plan, Progress, size
from .scores.explanations import Explanation
from .scores.scores import ForValueScores
from .scores.writer import open_writer, parts_folder
from .validation import ValidationSide, validation_side

logger = logging.getLogger(__name__)

LABELS = "labels of all rows"
NAMED_ROWS = 20  # of those that are validation rows too, in the metadata of scores


class ForValueScorer:
    """For-Value scores of a data set against a validation set, by forward passes alone.

    As published (`method="gradient"`) the validation rows define a direction D (V, d) for the output head: the mean
    gradient of their log-likelihood in it. A row's score is `<D, G(row)>`, how much its own log-likelihood rises along
    D (paper, Eq. 2 averaged over the validation set), exact over the whole vocabulary. Higher is more valuable.

    Under `torch.distributed`, rows are sharded over the ranks and every rank returns all scores.

    Args:
        model: `PreTrainedModel` or `PeftModel` with an output head; left exactly as found.
        validation_dataset: clean rows of the kind that the fine-tuned model should be good at; None where there are
            none and answers repeat (`method="label_model"` or "auto"). Several sets by name, `{"math": rows, ...}`, as
            Trainer takes its `eval_dataset`: rows are scored by each of them in one pass (`ForValueScores.by_set`), by
            the methods that move the head.
        config: `ForValueConfig`.
        processing_class: tokenizer (or processor) for rows that are not tokenised yet.
        data_collator: the trainer's: it is given copies of the rows, one at a time, and what it makes of them is
            scored. Not needed for rows that `SFTTrainer` prepares, nor for token ids with labels.
        row_config: how rows are prepared, as in `SFTConfig` (`max_length`, `completion_only_loss`, ...).
        progress: say how long it will take and show a bar (on the first rank), or a `Progress` that does.

    What the validation rows say is computed once, at first use (and kept for other processes in
    `config.direction_cache`): make a new scorer for a model that has been trained since.

    Raises:
        ValueError: a model whose head cannot be described, no validation row that can be scored, unknown columns,
            ranks with other rows or weights.
    """

    def __init__(
        self,
        model: nn.Module,
        validation_dataset: Iterable[Mapping[str, Any]] | None,
        config: ForValueConfig | None = None,
        *,
        processing_class: Any = None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        row_config: RowConfig | None = None,
        progress: bool | Progress = True,
    ):
        self.config = config or ForValueConfig()
        if not isinstance(progress, Progress):
            progress = Progress(*[progress and world()[0] == 0] * 2)
        self.backbone = Backbone(model, self.config.forward_dtype)
        self.row_config = row_config or RowConfig()
        if rewards := self.backbone.kind == "reward":
            METHODS[self.config.method](self.config.normalize).refuse_preferences(0)
        prepare = RowPreparer(
            processing_class,
            self.row_config,
            max_positions=self.backbone.max_positions,
            vocab_size=self.backbone.n_tokens if rewards else self.backbone.head().vocab_size,
            takes_types="token_type_ids" in signature(type(self.backbone.causal).forward).parameters,
        )
        reader = Reader(prepare, data_collator, self._one_by_one(data_collator), rewards)
        self.run = Run(self.backbone, reader, self.config.max_tokens_per_batch, progress)
        self.validation = validation_side(self.run, validation_dataset, self.config, self.row_config)

    # ---- what users call ----

    @together("scoring rows")
    def score(self, dataset: Iterable[Mapping[str, Any]], path: str | Path | None = None) -> ForValueScores:
        """One score per row, in row order; NaN and a reason where a row cannot be scored.

        Units: nats of log-likelihood, per unit step along a direction; per labelled token with `normalize="length"`,
        per unit of gradient norm with "cosine"; log odds of clean against noisy with "auto" and "label_model". By
        several validation sets these are the units of `by_set`, and `values` are the greatest of each row in standard
        deviations.

        Args:
            path: a file for the scores (`ForValueScores.load` reads it). While they are made, what is known lies
                beside it, a window of rows at a time: a run that was killed goes on where it was.
        """
        dataset = kept(dataset) if self.config.vocab == "seen" or self.validation.dataset is None else dataset
        provenance = self.provenance()  # refuses weights that nobody can read
        with self._at_work(dataset, self._plan(dataset)), self._writer(path, dataset) as writer:
            method, state = self.validation.method, self._seen_only(self.validation.state(), dataset)

            def skip(start: int, digests: list[str]) -> bool:
                return writer is not None and writer.holds(start, digests)

            score = self.validation.scoring(state)
            n = 0
            for window in self.run.windows(dataset, method, score, ROWS, skip):
                n += len(window.samples) if isinstance(window, Window) else window
                with together("writing the scores"):
                    if writer is not None and isinstance(window, Window):
                        writer.write(window.start, window.digests, window.reasons, window.columns)
            scores = None
            with together("putting the scores together"):
                if writer is not None:
                    writer.finish(n, {})  # what a longer data set has left there goes
                    self.run.progress.now(method.finishing)
                    scores = put_together(writer, method, state)
                    scores.metadata["provenance"] = {**provenance, "data": digest("".join(scores.row_digests or []))}
                    scores.metadata |= {**self._settings(), "leakage": self._leakage(scores)}
                    if path is not None:
                        scores.save(path)
                        writer.remove()
            return of_first_rank(scores, "handing out the scores")

    @together("scoring tokens")
    def token_scores(self, dataset: Iterable[Mapping[str, Any]]) -> list[Tensor]:
        """Scores of each row's labelled tokens, float64 (n_labelled,) each, empty where a row cannot be scored.

        They sum to the row's score (with `normalize="none"`) where the method is `tokenwise`. "auto" and "label_model"
        have one number per row: the tokens' are then those of "fitted_likelihood", which sum to its score of the row.
        """
        dataset = kept(dataset) if self.config.vocab == "seen" else dataset
        out: list[Tensor] = []
        side = self.validation.under(tokens_by(self.config.method))
        with self._at_work(dataset, self._plan(dataset, side)):
            method, state = side.method, self._seen_only(side.state(), dataset)
            score = partial(token_columns, method, state, self.backbone.head())
            for window in self.run.windows(dataset, method, score, ROWS):
                assert isinstance(window, Window)
                tokens = zip(window.columns["tokens"], window.reasons, strict=True)
                out += [torch.from_numpy(np.zeros(0) if reason else row_tokens(parts)) for parts, reason in tokens]
        return out

    @together("explaining rows")
    def explain(self, dataset: Iterable[Any], rows: Sequence[int], n_nearest: int = 3) -> list[Explanation]:
        """What speaks for and against some rows: their tokens, and the validation rows nearest to them.

        Tokens have the scores of `token_scores`. Validation rows are near by the cosine of both rows' gradients: it
        finds those with the right answer of a wrong one more often than `pairwise` does, whose greatest numbers are
        those of long rows. Where the method has no scores of pairs, they are in the metric of "whitened".

        The model runs over the rows asked for alone, and over the validation rows for what is not known of them yet.

        Args:
            dataset: the data set that they are rows of.
            rows: their places in it.
            n_nearest: so many validation rows at most that speak for a row, and as many that speak against it.

        Returns:
            One explanation each, in the order of `rows`; without tokens and validation rows where a row cannot be
            scored.

        Raises:
            ValueError: a place that the data set does not have.
        """
        dataset = kept(dataset) if self.config.vocab == "seen" else dataset
        rows = [int(row) for row in rows]
        with together("reading the rows to explain"):
            examples = rows_at(dataset, rows)
        if not rows:
            return []
        name = self.config.method
        side, near = self.validation.under(tokens_by(name)), self.validation.under(nearest_by(name))
        plan, n_validation = self._plan(examples, side), len(self.validation.samples())
        if near is not side and near.known is None:
            plan.passes.insert(-1, Pass(VALIDATION, n_validation))
        plan.passes.insert(-1, Pass(PAIRS_WITH, n_validation))
        with self._at_work(examples, plan, "explaining"):
            state = self._seen_only(side.state(), dataset)
            pairs = Pairs(self.run, near.method, near.state(), near.samples(), near.n_rows)
            return Explainer(self.run, side.method, state, pairs, self._texts, n_nearest).explained(examples, rows)

    @together("scoring pairs")
    def pairwise(self, dataset: Iterable[Mapping[str, Any]], path: str | Path | None = None) -> Tensor:
        """Score of every row against every validation row, float64 (rows of dataset, rows of validation).

        `pairwise(...).nanmean(1)` equals `score(...).values` with `normalize="none"`. NaN for rows of either side that
        cannot be scored. The validation set's labelled hidden states are kept in memory: tokens x d.

        Args:
            path: a `.npy` file to write to, a window of rows at a time, for more pairs than the memory holds. The
                tensor that is returned then lies in that file, as does `numpy.load(path, mmap_mode="r")`. A run that
                was killed goes on where it was.

        Raises:
            ValueError: a method or option without pairs; a path, and a data set without a length.
        """
        self._refuse_unless(METHODS[self.config.method].tokenwise, "pairwise scores")
        if self.config.normalize != "none" or self.config.vocab != "full" or not METHODS[self.config.method].pairwise:
            able = " or ".join(repr(name) for name, method in METHODS.items() if method.pairwise)
            raise ValueError(f"pairwise scores are defined for method={able}, normalize='none', vocab='full'.")
        if path is not None and not isinstance(dataset, Sized):
            raise ValueError("pairwise(path=...) writes a file of known size: give a data set with a length.")
        side, provenance = self.validation.under(self.config.method), self.provenance()
        plan = self._plan(dataset)
        n_validation = len(side.samples())
        plan.passes[-1:] = [Pass(PAIRS_WITH, n_validation), Pass(PAIRS, size(dataset))]
        with self._at_work(dataset, plan), pairs_file(path, size(dataset), side.n_rows, provenance) as file:
            pairs = Pairs(self.run, side.method, side.state(), side.samples(), side.n_rows)
            if path is None:
                blocks = [window.columns["pairs"] for window in pairs.windows(dataset) if isinstance(window, Window)]
                return torch.from_numpy(np.concatenate([np.zeros((0, side.n_rows)), *blocks]))
            return pairs.to_file(file, path, dataset)

    @together("finding the direction")
    def direction(self) -> Tensor:
        """How the head moves, float32 (V, d) (float64 for a float64 model), computed once: D, or the fitted move."""
        self._refuse_unless(METHODS[self.config.method].tokenwise, "the head's direction")
        with left_as_found(self.backbone.model):
            return self.validation.under(self.config.method).state()["direction"]

    @property
    def fit(self) -> Fit | None:
        """How the head was fitted, with "fitted" and "fitted_likelihood"."""
        state = self.validation.known
        return fit_of(state) if state is not None and "curve" in state else None

    def provenance(self) -> dict[str, str]:
        """Hashes of what determines a score apart from the row itself: weights, validation rows, config."""
        return self.validation.provenance()

    def hash_rows(self, dataset: Iterable[Mapping[str, Any]]) -> str:
        """Hash of rows as the model sees them: what `metadata["provenance"]["data"]` is after scoring them."""
        digests = []
        with self.run.progress.part("reading rows", size(dataset)):
            for sample in self.run.reader.samples(dataset):
                digests.append(sample.digest)
                self.run.progress.update(1)
        return digest("".join(digests))

    # ---- around the work ----

    def _one_by_one(self, data_collator: Any) -> OneByOne | None:
        """How rows are read for a model that is no language model from left to right."""
        backbone, n = self.backbone, self.backbone.head().vocab_size
        if backbone.kind in ("causal", "reward"):
            return None
        segments = {
            "seq2seq": partial(decoder_segment, decoder_inputs=backbone.decoder_inputs, vocab_size=n),
            "sequence classification": partial(sequence_segment, n_classes=n),
            "token classification": partial(token_segment, n_classes=n),
        }
        columns = {*signature(type(backbone.causal).forward).parameters, "label", "label_ids"}
        main, most = backbone.causal.main_input_name, backbone.most_tokens()
        return OneByOne(data_collator, segments[backbone.kind], columns, main, most, backbone.n_tokens)

    @contextmanager
    def _at_work(self, dataset: Iterable[Any], plan: Plan, doing: str = "scoring") -> Iterator[None]:
        """The model is checked, and left as found; what is done is seen."""
        self.validation.check()
        n = size(dataset)
        rows = "a stream of rows" if n is None else f"{n:,} rows"
        n_known = len(self.validation.samples())
        by = f"by {n_known:,} validation rows" if n_known else "without validation rows"
        title = f"For-Value ({self.config.method}): {doing} {rows} {by}"
        with left_as_found(self.backbone.model), self.run.progress.over(title, plan, self.run.wait):
            yield

    def _plan(self, dataset: Iterable[Any], side: ValidationSide | None = None) -> Plan:
        side = side or self.validation
        side.look_at(dataset)
        plan = side.plan(size(dataset))
        if self.config.vocab == "seen":
            plan.passes.insert(len(plan.passes) - 1, Pass(LABELS, size(dataset), 0.0))
        return plan

    def _texts(self, predicted: Sequence[int]) -> tuple[str, ...]:
        """Of each class or token that is predicted."""
        if classifies(self.backbone.kind):
            return tuple(self.backbone.causal.config.id2label.get(place, str(place)) for place in predicted)
        return pieces(self.run.reader.prepare.processing_class, predicted)

    def _writer(self, path: str | Path | None, dataset: Iterable[Any]) -> Any:
        """Where windows go, on the first rank: beside the file of the scores, or to a folder that nobody keeps."""
        with together("opening the file of the scores"):
            if world()[0] > 0:
                return nullcontext()
            if path is not None and Path(path).is_dir():
                raise ValueError(f"{path} is a folder, and the scores go into a file of that name: choose another.")
            provenance = self.provenance()
            if path is not None and self.config.vocab == "seen":  # then a row's score depends on all the others
                provenance = {**provenance, "data": self.hash_rows(dataset)}
            return open_writer(None if path is None else parts_folder(path), provenance, self._settings())

    def _leakage(self, scores: ForValueScores) -> dict[str, Any]:
        """How many rows are validation rows too, and the first of them."""
        validation = {sample.digest for sample in self.validation.samples()}
        known = zip(scores.row_digests or [], scores.reasons, strict=True)
        rows = [row for row, (digest, reason) in enumerate(known) if reason is None and digest in validation]
        if rows:
            logger.warning(
                "%s of %s training rows are validation rows too (first: row %d): their scores, and the evidence, are "
                "better than they should be; take them out of one of the two",
                f"{len(rows):,}",
                f"{len(scores):,}",
                rows[0],
            )
        return {"n": len(rows), "rows": rows[:NAMED_ROWS]}

    def _settings(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "row_config": asdict(self.row_config),
            "version": version("forvalue-callbacks"),
        }

    def _refuse_unless(self, able: bool, what: str) -> None:
        if not able:
            raise ValueError(f"method={self.config.method!r} has one number per row: {what} need another.")

    def _seen_only(self, state: State, dataset: Iterable[Any]) -> State:
        """With `vocab="seen"`, the direction without the tokens that are no label anywhere (the paper's Algorithm 1,
        with the union over the data set in place of the batch, so that a score does not depend on its batch-mates)."""
        if self.config.vocab == "full":
            return state
        direction = state["direction"]
        seen = torch.zeros(len(direction), dtype=torch.bool)
        with self.run.progress.part(LABELS, size(dataset)):
            for sample in (*self.validation.samples(), *self.run.reader.samples(dataset)):
                for segment in sample.segments:
                    if segment.tokens is None:
                        raise ValueError(
                            "vocab='seen' needs rows of token ids, not rows that a collator makes batches of."
                        )
                    seen[segment.target] = True
        return {**state, "direction": direction * seen.to(direction.device)[:, None]}
