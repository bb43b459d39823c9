"""Data set in, scores out."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import core
from .core.fit import Fit, fit_head
from .data.corruption import word_starts
from .data.reading import kept
from .data.sft import RowConfig, RowPreparer
from .methods.auto import (
    REPEATED,
    ROWS,
    VALIDATION,
    plan_auto,
    plan_labels,
    score_auto,
    score_labels,
    share_repeated,
)
from .methods.measures import OVERFLOW
from .model.backbone import Backbone, left_as_found
from .model.fingerprint import digest, hash_weights
from .model.run import Batcher, Item, Labelled, concatenate, joined, of_all_ranks, world
from .progress import Pass, Plan, Progress, aside, size
from .scores.scores import ForValueScores, make_folder

logger = logging.getLogger(__name__)

# Share of the mean diagonal that is added to the second moment before it is inverted.
WHITENING_RIDGE = 0.01
# A row to check a model on should have so many tokens that it can be seen whether they change what came before them.
ENOUGH_TOKENS = 16
# The passes that are not in `auto.py`, by name.
LABELS, PAIRS_WITH, PAIRS = "labels of all rows", "validation rows, for pairs", "pairs"


@dataclass
class ForValueConfig:
    """How rows are scored. No field is named like one of `SFTConfig` or `ModelConfig`: `TrlParser` takes all three."""

    method: str = field(
        default="gradient",
        metadata={
            "help": "How the validation rows move the head. 'gradient': along their mean gradient (For-Value as "
            "published, arXiv 2508.10180). 'whitened': that times the inverse second moment of the hidden states. "
            "'fitted': to the head fitted on them; the score is a row's log-likelihood after minus before. "
            "'fitted_likelihood': the same head; the score is the log-likelihood after. 'auto': what tells clean rows "
            "from noisy ones is learned from the validation rows and copies of them corrupted on purpose; the score "
            "is the log odds that a row is clean. 'label_model': where answers repeat, a model of the answer, fitted "
            "on the validation rows and, untrusted, on the training rows; the score is the log odds that a row's "
            "answer is right ('auto' is this where answers repeat).",
            "choices": ["gradient", "whitened", "fitted", "fitted_likelihood", "auto", "label_model"],
        },
    )
    normalize: str = field(
        default="none",
        metadata={
            "help": "'none': sum over labelled tokens (the paper). 'length': per labelled token. 'cosine': divided by "
            "the norm of the row's own gradient.",
            "choices": ["none", "length", "cosine"],
        },
    )
    vocab: str = field(
        default="full",
        metadata={
            "help": "'full': exact. 'seen': only tokens that are labels somewhere in the data or validation rows, as "
            "in the paper's Algorithm 1; an approximation, for comparison.",
            "choices": ["full", "seen"],
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Padded tokens in one forward pass; halves itself when memory runs out. None: 1,024 on a CPU, "
            "16,384 on an accelerator."
        },
    )
    forward_dtype: str | None = field(
        default=None,
        metadata={"help": "Run the forward pass under autocast in this dtype ('bfloat16'); None: the model's own."},
    )
    direction_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder where directions are kept, by a hash of weights, validation rows and config, for other "
            "processes that score with the same (of methods that score a row by itself). As large as the head in "
            "float32 each."
        },
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            choices = spec.metadata.get("choices")
            if choices is not None and getattr(self, spec.name) not in choices:
                raise ValueError(f"{spec.name}={getattr(self, spec.name)!r}: choose one of {choices}.")
        if self.fits_head and (self.normalize == "cosine" or self.vocab != "full"):
            raise ValueError(f"method={self.method!r} needs normalize='none' or 'length', and vocab='full'.")
        if self.gives_log_odds and (self.normalize != "none" or self.vocab != "full"):
            raise ValueError(f"method={self.method!r} needs normalize='none' and vocab='full'.")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(f"max_tokens_per_batch={self.max_tokens_per_batch}: must be at least 1.")

    @property
    def fits_head(self) -> bool:
        """Whether the head takes a finite step, to where it is fitted."""
        return self.method.startswith("fitted")

    @property
    def gives_log_odds(self) -> bool:
        """Whether scores are log odds that a row is clean, which depend on all the rows that are scored together."""
        return self.method in ("auto", "label_model")


class ForValueScorer:
    """For-Value scores of a data set against a validation set, by forward passes alone.

    The validation rows define a direction D (V, d) for the output head: the mean gradient of their log-likelihood in
    it. A row's score is `<D, G(row)>`, how much its own log-likelihood rises along D (paper, Eq. 2 averaged over the
    validation set), exact over the whole vocabulary. Higher is more valuable.

    Under `torch.distributed`, rows are sharded over the ranks and every rank returns all scores.

    Args:
        model: `PreTrainedModel` or `PeftModel` with an output head; left exactly as found.
        validation_dataset: clean rows of the kind that the fine-tuned model should be good at.
        config: `ForValueConfig`.
        processing_class: tokenizer (or processor) for rows that are not tokenised yet.
        data_collator: the trainer's: it is given copies of the rows, one at a time, and what it makes of them is
            scored. Not needed for rows that `SFTTrainer` prepares, nor for token ids with labels.
        row_config: how rows are prepared, as in `SFTConfig` (`max_length`, `completion_only_loss`, ...).
        progress: say how long it will take and show a bar (on the first rank), or a `Progress` that does.

    The direction is computed once, at first use (and kept for other processes in `config.direction_cache`): make a
    new scorer for a model that has been trained since.

    Raises:
        ValueError: a model whose head cannot be described, no validation row that can be scored, unknown columns.
    """

    def __init__(
        self,
        model: nn.Module,
        validation_dataset: Iterable[Mapping[str, Any]],
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
        self.validation_dataset = kept(validation_dataset)
        self.row_config = row_config or RowConfig()
        self.prepare = RowPreparer(
            processing_class,
            self.row_config,
            max_positions=self.backbone.max_positions,
            vocab_size=self.backbone.head().vocab_size,
            takes_types="token_type_ids" in signature(type(self.backbone.causal).forward).parameters,
        )
        self.batcher = Batcher(
            self.backbone, self.prepare, data_collator, self.config.max_tokens_per_batch, progress=progress
        )
        self._provenance: dict[str, str] | None = None
        self._direction: Tensor | None = None
        self.fit: Fit | None = None  # how the head was fitted, with "fitted" and "fitted_likelihood"
        self._second_moment: Tensor | None = None
        self._validation_items: list[Item] | None = None
        self._checked = False

    # ---- what users call ----

    def score(self, dataset: Iterable[Mapping[str, Any]]) -> ForValueScores:
        """One score per row, in row order; NaN and a reason where a row cannot be scored.

        Units: nats of log-likelihood, per unit step along "gradient" and "whitened"; per labelled token with
        `normalize="length"`, per unit of gradient norm with "cosine"; log odds of clean against noisy with "auto"
        and "labels".
        """
        if self.config.gives_log_odds:
            return self._score_log_odds(dataset)
        dataset, provenance = self._readable_twice(dataset), self.provenance()  # refuses weights that nobody can read
        self._check()
        with left_as_found(self.backbone.model), self._passes(dataset, ROWS):
            head, direction = self.backbone.head(), self._seen_only(self.direction(), dataset)
            metric = self._metric()

            def score(batch: Labelled) -> list[tuple[float, float, int]]:
                score_T, log_p_T = self._score_tokens(head, direction, batch)
                values, log_p = batch.sum(score_T), batch.sum(log_p_T)
                if self.config.normalize == "length":
                    values = values / np.array(batch.lengths)
                elif self.config.normalize == "cosine":
                    metric_TD = None if metric is None else batch.hidden_TD.to(metric) @ metric
                    square = core.squared_norms(
                        head, batch.hidden_TD, batch.labels_T, batch.lengths, metric_TD=metric_TD
                    )
                    values = values / square.clamp(min=1e-30).sqrt().cpu().numpy()
                return list(zip(values.tolist(), log_p.tolist(), batch.lengths, strict=True))

            results, reasons, data_hash = self.batcher.map(
                dataset, score, ROWS, positions=core.tile_for(head.weight.device)
            )
        values = np.full(len(reasons), np.nan)
        log_likelihood = np.full(len(reasons), np.nan)
        n_labelled = np.zeros(len(reasons), dtype=np.int64)
        for i, (value, log_p, length) in results.items():
            n_labelled[i] = length
            if np.isfinite(value) and np.isfinite(log_p):
                values[i], log_likelihood[i] = value, log_p
            else:
                reasons[i] = f"non-finite score: {OVERFLOW}"
        metadata = {"provenance": {**provenance, "data": data_hash}, "config": asdict(self.config)}
        return ForValueScores(values, reasons, log_likelihood, n_labelled, metadata)

    def _score_log_odds(self, dataset: Iterable[Mapping[str, Any]]) -> ForValueScores:
        items, provenance = self._validation(), self.provenance()
        self._check()
        with left_as_found(self.backbone.model):
            head = self.backbone.head()
            if self.config.method == "label_model" or share_repeated(items) >= REPEATED:
                with self._over(dataset, plan_labels(items, dataset)):
                    scores, data_hash = score_labels(self.batcher, head, items, dataset)
            else:
                with self._over(dataset, plan_auto(items, dataset)):
                    scores, data_hash = score_auto(
                        self.batcher,
                        head,
                        items,
                        dataset,
                        starts=word_starts(self.prepare.processing_class, head.vocab_size),
                        bos=self.backbone.bos,
                        max_length=self.row_config.max_length,
                        ridge=WHITENING_RIDGE,
                    )
        scores.metadata |= {"provenance": {**provenance, "data": data_hash}, "config": asdict(self.config)}
        return scores

    def token_scores(self, dataset: Iterable[Mapping[str, Any]]) -> list[Tensor]:
        """Scores of each row's labelled tokens, float64 (n_labelled,) each, empty where a row cannot be scored.

        They sum to the row's score (with `normalize="none"`).
        """
        self._refuse_log_odds("token scores")
        dataset = self._readable_twice(dataset)
        self._check()
        with left_as_found(self.backbone.model), self._passes(dataset, ROWS):
            head, direction = self.backbone.head(), self._seen_only(self.direction(), dataset)

            def score(batch: Labelled) -> list[Tensor]:
                score_T, _ = self._score_tokens(head, direction, batch)
                return list(score_T.double().cpu().split(batch.lengths))

            results, reasons, _ = self.batcher.map(dataset, score, ROWS, positions=core.tile_for(head.weight.device))
        return [results.get(i, torch.zeros(0, dtype=torch.float64)) for i in range(len(reasons))]

    def pairwise(self, dataset: Iterable[Mapping[str, Any]], path: str | Path | None = None) -> Tensor:
        """Score of every row against every validation row, float64 (rows of dataset, rows of validation).

        `pairwise(...).nanmean(1)` equals `score(...).values` with `normalize="none"`. NaN for rows of either side that
        cannot be scored. The validation set's labelled hidden states are kept in memory: tokens x d.

        Args:
            path: a `.npy` file to write to, 4,096 rows at a time, for more pairs than the memory holds. The tensor
                that is returned then lies in that file, as does `numpy.load(path, mmap_mode="r")`.

        Raises:
            ValueError: a direction or option without pairs; a path, and a data set without a length.
        """
        self._refuse_log_odds("pairwise scores")
        if self.config.normalize != "none" or self.config.vocab != "full" or self.config.fits_head:
            raise ValueError(
                "pairwise scores are defined for method='gradient' or 'whitened', normalize='none', vocab='full'."
            )
        if path is not None and not isinstance(dataset, Sized):
            raise ValueError("pairwise(path=...) writes a file of known size: give a data set with a length.")
        self._check()
        with left_as_found(self.backbone.model), self._passes(dataset, PAIRS_WITH, PAIRS):
            head = self.backbone.head()
            self.direction()  # prepares what follows, the metric included
            metric = self._metric()
            items = self._validation()
            validation = concatenate(self.batcher.labelled(items, PAIRS_WITH, all_ranks=True, states=False))
            metric_TD = None if metric is None else validation.hidden_TD.to(metric) @ metric

            def score(batch: Labelled) -> list[Tensor]:
                return list(
                    core.score_pairs(
                        head,
                        batch.hidden_TD,
                        batch.labels_T,
                        batch.rows_T,
                        len(batch.lengths),
                        validation.hidden_TD,
                        validation.labels_T,
                        validation.rows_T,
                        len(validation.lengths),
                        other_metric_TD=metric_TD,
                    ).cpu()
                )

            first_rank = world()[0] == 0
            if path is not None and first_rank:
                assert isinstance(dataset, Sized)
                open_memmap(path, "w+", np.float64, (len(dataset), self._n_validation))
            blocks, n = [torch.zeros(0, self._n_validation, dtype=torch.float64)], 0
            for window, results in self.batcher.windows(dataset, score, PAIRS, positions=core.PAIR_TILE):
                block = torch.full((len(window), self._n_validation), torch.nan, dtype=torch.float64)
                for i, row in results.items():
                    block[i - n, validation.index] = row
                if path is None:
                    blocks.append(block)
                elif first_rank:  # opened anew for each window: pages that stay mapped would count as memory
                    open_memmap(path, "r+")[n : n + len(window)] = block.numpy()
                n += len(window)
        if path is None:
            return torch.cat(blocks)
        if world()[1] > 1:
            torch.distributed.barrier()  # until the first rank has written
        return torch.from_numpy(open_memmap(path, "r+"))

    def direction(self) -> Tensor:
        """How the head moves, float32 (V, d) (float64 for a float64 model), computed once: D, or the fitted move."""
        self._refuse_log_odds("the head's direction")
        self._check()
        if self._direction is None:
            file = self._direction_file()
            if file is not None and all(of_all_ranks({world()[0]: file.is_file()}).values()):
                self._direction = self._read_direction(file)
            else:
                with left_as_found(self.backbone.model):
                    self._direction = self._fit()
                if file is not None and world()[0] == 0:
                    self._write_direction(file, self._direction)
        return self._direction

    def provenance(self) -> dict[str, str]:
        """Hashes of what determines a score apart from the row itself: weights, validation rows, config."""
        if self._provenance is None:
            config = {**asdict(self.config), **asdict(self.row_config)}
            del config["max_tokens_per_batch"], config["direction_cache"]  # change no score
            self._provenance = {
                "weights": hash_weights(self.backbone.model),
                "validation": digest("".join(item.hash() for item in self._validation())),
                "config": digest(repr(sorted(config.items()))),
            }
        return self._provenance

    def hash_rows(self, dataset: Iterable[Mapping[str, Any]]) -> str:
        """Hash of rows as the model sees them: what `metadata["provenance"]["data"]` is after scoring them."""
        hashes = []
        with self.batcher.progress.part("reading rows", size(dataset)):
            for item, _ in self.batcher.items(dataset):
                hashes.append(item.hash())
                self.batcher.progress.update(1)
        return digest("".join(hashes))

    def _passes(self, dataset: Iterable[Mapping[str, Any]], *names: str) -> AbstractContextManager[None]:
        """What is seen of passes along a direction: those that it takes and, over the rows, those of these names."""
        items = self._validation()
        tokens = float(np.mean([item.tokens for item in items]))
        before = [VALIDATION] if self._direction is None else []
        passes = [Pass(name, len(items), tokens) for name in (*before, *names[:-1])]
        if self.config.vocab == "seen":
            passes.append(Pass(LABELS, size(dataset), 0.0))
        return self._over(dataset, Plan([*passes, Pass(names[-1], size(dataset), tokens)]))

    def _over(self, dataset: Iterable[Mapping[str, Any]], plan: Plan) -> AbstractContextManager[None]:
        n = size(dataset)
        rows = "a stream of rows" if n is None else f"{n:,} rows"
        title = f"For-Value ({self.config.method}): scoring {rows} by {len(self._validation()):,} validation rows"
        return self.batcher.progress.over(title, plan, self.batcher.wait)

    def _refuse_log_odds(self, what: str) -> None:
        if self.config.gives_log_odds:
            raise ValueError(f"method={self.config.method!r} has one number per row: {what} need another.")

    def _score_tokens(self, head: core.Head, direction: Tensor, batch: Labelled) -> tuple[Tensor, Tensor]:
        """Score and log-likelihood of each labelled position, (T,) both."""
        if not self.config.fits_head:
            return core.score_tokens(head, direction, batch.hidden_TD, batch.labels_T)
        gain_T, log_p_T = core.gain_tokens(head, direction, batch.hidden_TD, batch.labels_T)
        return (gain_T if self.config.method == "fitted" else gain_T + log_p_T), log_p_T

    # ---- the validation side ----

    def _validation(self) -> list[Item]:
        if self._validation_items is None:
            items, bad, n = [], [], 0
            for item, reason in self.batcher.items(self.validation_dataset):
                n += 1
                if reason is None:
                    items.append(item)
                else:
                    bad.append(f"row {item.index}: {reason}")
            if bad:
                logger.warning("%d of %d validation rows cannot be scored (%s)", len(bad), n, "; ".join(bad[:3]))
            if not items:
                raise ValueError(f"no validation row can be scored ({n} rows; {'; '.join(bad[:3]) or 'none given'}).")
            self._validation_items, self._n_validation = items, n
        return self._validation_items

    def _check(self) -> None:
        """Before anything is computed: the check finds out how the model is to be run."""
        if not self._checked:
            file = self._direction_file()
            if file is not None and world()[0] == 0 and not file.is_file():
                make_folder(file.parent)
            short = min(self._validation(), key=lambda item: abs(item.tokens - ENOUGH_TOKENS))
            self.backbone.check(self.batcher.collate([short]))
            self._checked = True

    def _fit(self) -> Tensor:
        """Mean gradient over the validation rows, times the inverse second moment if asked for; or the fitted move."""
        items = self._validation()
        head = self.backbone.head()
        if self.config.fits_head:
            # Every rank fits for itself: validation sets are small, and the same fit needs no exchange.
            positions = concatenate(self.batcher.labelled(items, VALIDATION, all_ranks=True, states=False))
            self.batcher.progress.now("fitting the head")
            self.fit = fit_head(head, positions.hidden_TD, positions.labels_T, positions.rows_T)
            if self.fit.ridge == np.inf:
                with aside():
                    logger.warning("no move of the head predicts held-out validation rows better: choose another way")
            return self.fit.move_VD
        dtype = core.working_dtype(head.weight)
        total_VD = torch.zeros(head.weight.shape, dtype=dtype, device=head.weight.device)
        whiten = self.config.method == "whitened"
        moment_DD = torch.zeros(
            head.weight.shape[1], head.weight.shape[1], dtype=torch.float64, device=total_VD.device
        )
        n_rows = n_tokens = 0
        batches = self.batcher.labelled(items, VALIDATION, states=False)
        for batch in joined(batches, core.tile_for(head.weight.device)):
            core.add_gradient(total_VD, head, batch.hidden_TD, batch.labels_T)
            n_rows += len(batch.index)
            if whiten:
                hidden = batch.hidden_TD.double()
                moment_DD.addmm_(hidden.T, hidden)
                n_tokens += len(hidden)
        if world()[1] > 1:
            counts = torch.tensor([n_rows, n_tokens], device=total_VD.device)
            for tensor in (total_VD, moment_DD, counts):
                torch.distributed.all_reduce(tensor)
            n_rows, n_tokens = counts.tolist()
        total_VD /= n_rows
        if not torch.isfinite(total_VD).all():
            raise ValueError(f"the validation direction is not finite: {OVERFLOW}")
        if whiten:
            self._second_moment = moment_DD / n_tokens
        metric = self._metric()
        return total_VD if metric is None else total_VD @ metric.to(total_VD)

    def _direction_file(self) -> Path | None:
        if self.config.direction_cache is None:
            return None
        provenance = repr((version("forvalue-callbacks"), sorted(self.provenance().items())))
        return Path(self.config.direction_cache) / f"direction-{digest(provenance)}.safetensors"

    def _write_direction(self, file: Path, direction: Tensor) -> None:
        tensors = {"direction": direction.contiguous()}
        if self._second_moment is not None:
            tensors["second_moment"] = self._second_moment
        fit = {} if self.fit is None else {"ridge": self.fit.ridge, "curve": list(self.fit.curve.items())}
        part = file.with_suffix(f".{os.getpid()}")
        save_file(tensors, part, {"fit": json.dumps(fit)})
        part.replace(file)  # at once: another process never reads half of it

    def _read_direction(self, file: Path) -> Tensor:
        logger.info("the validation direction is that in %s", file)
        tensors = load_file(file, device=str(self.backbone.head().weight.device))
        self._second_moment = tensors.get("second_moment")
        with safe_open(file, "pt") as opened:
            fit = json.loads(opened.metadata()["fit"])
        if fit:
            self.fit = Fit(tensors["direction"], fit["ridge"], dict(map(tuple, fit["curve"])))
        return tensors["direction"]

    def _metric(self) -> Tensor | None:
        """M of `<h, M h'>`: inverse of the ridged second moment for "whitened", None (the identity) otherwise."""
        if self._second_moment is None:
            return None
        return core.inverse_with_ridge(self._second_moment, WHITENING_RIDGE)

    def _readable_twice(self, dataset: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
        """The data set, a generator's rows kept where `_seen_only` reads them before they are scored."""
        return kept(dataset) if self.config.vocab == "seen" else dataset

    def _seen_only(self, direction: Tensor, dataset: Iterable[Mapping[str, Any]]) -> Tensor:
        """With `vocab="seen"`, the direction without the tokens that are no label anywhere (the paper's Algorithm 1,
        with the union over the data set in place of the batch, so that a score does not depend on its batch-mates)."""
        if self.config.vocab == "full":
            return direction
        seen = torch.zeros(len(direction), dtype=torch.bool)
        with self.batcher.progress.part(LABELS, size(dataset)):
            for item, reason in (*((item, None) for item in self._validation()), *self.batcher.items(dataset)):
                if item.row is None:
                    raise ValueError(
                        "vocab='seen' needs rows of token ids, not rows that a collator makes batches of."
                    )
                if reason is None:
                    labels = item.row.labels[1:]
                    seen[labels[labels != -100]] = True
        return direction * seen.to(direction.device)[:, None]
