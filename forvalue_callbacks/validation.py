"""The validation side: samples, what they are made of, and what a method learns from them, each once."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch

from .config import ForValueConfig
from .data.preference import is_preference
from .data.reading import are_data_sets, examples_of, kept
from .data.reasons import NotFiniteError
from .data.sample import Sample
from .data.sft import RowConfig
from .methods import METHODS, Method
from .methods.base import OVERFLOW, State, named, warn_of_unscored
from .methods.gradient import HeadMethod
from .methods.label_model import REPEATED, share_repeated
from .methods.sets import score_by_sets
from .model.backbone import left_as_found
from .model.fingerprint import digest, hash_weights
from .model.positions import Columns, Positions, collated, predicted
from .model.ranks import of_all_ranks, refuse_other, refuse_other_rows, refuse_other_settings, together, world
from .model.run import Run
from .progress import Plan
from .scores.cache import load_state, save_state
from .scores.files import make_folder

logger = logging.getLogger(__name__)

# A row to check a model on should have so many tokens that it can be seen whether they change what came before them.
ENOUGH_TOKENS = 16
# So many rows are tried at most before a model is said to overflow over all of them.
CHECKED_ROWS = 8
# Without validation rows so many of the rows to score say what they are like; so many are to be read by hand.
FIRST_ROWS, WORTH_READING = 256, 300


class AnswersDifferError(ValueError):
    """There are no validation rows, and answers do not repeat: the way out is to read some rows.

    Args:
        why: without the way out.
    """

    def __init__(self, why: str):
        self.why = why
        super().__init__(
            f"{why}: read {WORTH_READING} rows, chosen at random, and give those that are right as the "
            "validation_dataset."
        )


class ValidationSide:
    """Validation rows, and the state that a method makes of them.

    Args:
        run: runs the model.
        dataset: validation rows; None: there are none.
        config, row_config: those of the scorer.
        of_set: what is said behind "validation rows" where there are several sets.
    """

    def __init__(
        self,
        run: Run,
        dataset: Iterable[Any] | None,
        config: ForValueConfig,
        row_config: RowConfig,
        of_set: str = "",
    ):
        self.run, self.config, self.row_config, self.of_set = run, config, row_config, of_set
        self.dataset = dataset
        self.first: list[Sample] = []
        self.known: State | None = None
        self.n_rows = 0
        self._samples: list[Sample] | None = None
        self._method: Method | None = None
        self._provenance: dict[str, str] | None = None
        self._others: dict[str, ValidationSide] = {}
        self._checked, self._complete = False, True

    def under(self, name: str) -> ValidationSide:
        """The same rows as another method sees them, by its plain settings; itself where it is that method's."""
        if name == self.config.method:
            return self
        if name not in self._others:
            self.check()
            plain = replace(self.config, method=name, normalize="none", vocab="full")
            other = ValidationSide(self.run, self.dataset, plain, self.row_config)
            other._samples, other.n_rows, other._checked = self.samples(), self.n_rows, True
            self._others[name] = other
        return self._others[name]

    def samples(self) -> list[Sample]:
        """The rows that can be scored.

        Raises:
            ValueError: there are none, and the method needs some.
        """
        if self._samples is None:
            refuse_other_settings(self._settings())
            if self.dataset is None:
                self._refuse_without()
                self._samples = []
                return self._samples
            with together("reading the validation rows") as work:
                rows = list(self.run.reader.samples(self.dataset))
                bad = {row.index: row.reason for row in rows if row.reason is not None}
                warn_of_unscored(bad, len(rows), self.of_set)
                if len(bad) == len(rows):
                    given = f"{len(rows)} rows; {named(bad) or 'none given'}"
                    name = self.run.backbone.name
                    raise ValueError(f"no validation row{self.of_set} can be scored by {name} ({given}).")
                refuse_other_rows(work.exchange([(row.digest, row.reason) for row in rows]), 0, "validation ")
            METHODS[self.config.method](self.config.normalize).refuse(rows)
            self._samples, self.n_rows = [row for row in rows if row.reason is None], len(rows)
        return self._samples

    def _refuse_without(self) -> None:
        """Raises ValueError where the method needs validation rows."""
        if METHODS[self.config.method].needs_validation:
            able = " or ".join(repr(name) for name, method in METHODS.items() if not method.needs_validation)
            raise ValueError(
                f"method={self.config.method!r} needs a validation_dataset, clean rows of the kind to become good at; "
                f"without one, method={able} finds wrong answers where answers repeat."
            )

    @property
    def method(self) -> Method:
        """The one of the config, or what is right for these rows in its place."""
        if self._method is None:
            self._method = METHODS[self.config.method](self.config.normalize).chosen(self.samples())
        return self._method

    def provenance(self) -> dict[str, str]:
        """Hashes of what determines a score apart from the row itself: weights, validation rows, config.

        Raises:
            ValueError: they are others on another rank.
        """
        if self._provenance is None:
            config = self._settings()
            del config["max_tokens_per_batch"]  # changes no score
            samples = self.samples()
            with together("reading the weights", self.run.sharded):
                weights = hash_weights(self.run.backbone.holder)
            self._provenance = {
                "weights": weights,
                "validation": digest("".join(sample.digest for sample in samples)),
                "config": digest(repr(sorted(config.items()))),
            }
            refuse_other("weights", weights)
        return self._provenance

    def _settings(self) -> dict[str, Any]:
        """Those that scores depend on, and how the work is shared out among ranks."""
        config = {**asdict(self.config), **asdict(self.row_config), "max_tokens_per_batch": self.run.max_tokens}
        del config["direction_cache"]
        return config

    def look_at(self, dataset: Iterable[Any]) -> None:
        """The first rows of those to score, where no validation rows can say what they are like.

        Raises:
            AnswersDifferError: answers do not repeat.
            ValueError: none can be scored; preference rows, and a method that has no score for them.
        """
        method = METHODS[self.config.method](self.config.normalize)
        if not method.takes_preferences and not isinstance(dataset, Iterator):
            with together("reading the first row"):
                if is_preference(next(examples_of(dataset), None)):
                    method.refuse_preferences(0)
        if self.dataset is not None or self.first:
            return
        with together("reading the first rows"):
            rows = list(islice(self.run.reader.samples(dataset), FIRST_ROWS))
            first = [row for row in rows if row.reason is None]
            if not first:
                raise ValueError(
                    f"none of the first {len(rows)} rows can be scored ({rows[0].reason if rows else ''})."
                )
            method.refuse(first)
            if (repeated := share_repeated(first)) < REPEATED:
                raise AnswersDifferError(
                    "without validation rows only wrong answers among answers that repeat can be found, and "
                    f"{repeated:.0%} of the first {len(first)} rows share theirs with another"
                )
            self.first = first

    def check(self) -> None:
        """Before anything is computed: finds out how the model is to be run, or refuses it."""
        if self._checked:
            return
        if world()[1] > 1:
            self.provenance()  # compares the weights
        with together("checking the model", self.run.sharded) as work:
            file = self._file()
            if file is not None and world()[0] == 0 and not os.path.isdir(file.parent):
                make_folder(file.parent)  # one that is there and cannot be written costs a warning, later
            rows = sorted(self.samples() or self.first, key=lambda row: abs(row.n_read - ENOUGH_TOKENS))
            bad = set[int]().union(*work.exchange(self._check_by(rows)))
        if bad and self.dataset is not None:
            self._leave_out(NotFiniteError(OVERFLOW, bad))
        self._checked = True

    def _check_by(self, rows: Sequence[Sample]) -> list[int]:
        """Runs the whole model over the first row over which it does not overflow; the places of those before."""
        bad: list[int] = []
        for row in rows:
            short = row.segments[0]
            if short.tokens is None and not self.run.sharded:  # if the model does not take it, the row is named
                with left_as_found(self.run.backbone.model):
                    list(self.run.positions([row], METHODS["gradient"](), all_ranks=True))
            inputs = collated([short])
            ids = inputs.get(self.run.backbone.ids_name)
            try:
                self.run.backbone.check(inputs, predicted(short, ids) if isinstance(ids, torch.Tensor) else None)
                break
            except NotFiniteError:
                bad.append(row.index)
                if len(bad) == min(CHECKED_ROWS, len(rows)):
                    raise
        return bad

    def _leave_out(self, error: NotFiniteError) -> None:
        """Goes on without validation rows over which the model overflows, and names them.

        Raises:
            ValueError: there are no others.
        """
        self.provenance()  # scores are made of what was given
        left = [row for row in self.samples() if row.index not in error.rows]
        if not left:
            raise ValueError(f"no validation row{self.of_set} can be scored: {error}.") from error
        warn_of_unscored({row: str(error) for row in error.rows}, self.n_rows, self.of_set)
        self._samples, self._complete = left, False

    def state(self) -> State:
        """What the method makes of the rows, computed once, or found in `config.direction_cache`."""
        self.check()
        if self.known is None:
            file = self._file()
            head = self.run.backbone.head()
            arrays = None if file is None else load_state(file, self.method.shapes(head), ("ridge", "curve"))
            if all(of_all_ranks(arrays is not None, "looking for the direction")) and arrays is not None:
                logger.info("the validation direction is that in %s", file)
                self.known = {name: torch.from_numpy(array).to(head.weight.device) for name, array in arrays.items()}
            else:
                with left_as_found(self.run.backbone.model):
                    self.known = self._fitted()
                # Kept for others only with all rows, or nobody would be told again of those that are left out.
                if file is not None and world()[0] == 0 and self._complete:
                    save_state(file, {name: tensor.cpu().numpy() for name, tensor in self.known.items()})
        return self.known

    def plan(self, n_rows: int | None) -> Plan:
        """The passes to come over validation rows and so many others."""
        return self.method.plan(self.samples() or self.first, n_rows, self.known is not None)

    def scoring(self, state: State) -> Callable[[Positions], Columns]:
        """What gives the numbers of rows."""
        return partial(self.method.score, state, self.run.backbone.head())

    def _fitted(self) -> State:
        method = self.method
        while samples := self.samples():
            try:
                return method.fit(self.run, samples)
            except NotFiniteError as error:
                self._leave_out(error)
        return method.fit_alone(self.run, self.first)

    def _file(self) -> Path | None:
        if self.config.direction_cache is None or self.method.needs_all_rows:
            return None
        made_of = repr((version("forvalue-callbacks"), sorted(self.provenance().items())))
        return Path(self.config.direction_cache) / f"direction-{digest(made_of)}.safetensors"


class ValidationSets(ValidationSide):
    """Several validation sets by name, each a side of its own; rows are scored by all of them in one pass.

    Args:
        datasets: validation rows by the name of their set.

    Raises:
        ValueError: a method or option that takes one set.
    """

    def __init__(self, run: Run, datasets: Mapping[str, Any], config: ForValueConfig, row_config: RowConfig):
        super().__init__(run, datasets, config, row_config)
        self.names = [str(name) for name in datasets]
        if not issubclass(METHODS[config.method], HeadMethod) or config.vocab != "full":
            able = " or ".join(repr(name) for name, method in METHODS.items() if issubclass(method, HeadMethod))
            self._refuse(f"method={config.method!r} with vocab={config.vocab!r} takes one", f"or use method={able}")
        self.sides = [
            ValidationSide(run, rows, config, row_config, f" of {name!r}") for name, rows in datasets.items()
        ]

    def _refuse(self, what: str, otherwise: str) -> NoReturn:
        raise ValueError(
            f"{len(self.names)} validation sets are given, and {what}: give one of {', '.join(map(repr, self.names))} "
            f"or all rows as one list, {otherwise}."
        )

    def under(self, name: str) -> ValidationSide:
        self._refuse("this is by one", "or take ForValueScorer.score, which has a score by each")

    def samples(self) -> list[Sample]:
        return [sample for side in self.sides for sample in side.samples()]

    @property
    def method(self) -> Method:
        return self.sides[0].method

    def provenance(self) -> dict[str, str]:
        each = [side.provenance() for side in self.sides]
        rows = zip(self.names, (made_of["validation"] for made_of in each), strict=True)
        return {**each[0], "validation": digest(repr(list(rows)))}

    def check(self) -> None:
        for side in self.sides:
            side.check()

    def state(self) -> State:
        if self.known is None:
            method = self.method
            assert isinstance(method, HeadMethod)
            self.known = {"along": method.along([side.state() for side in self.sides])}
        return self.known

    def plan(self, n_rows: int | None) -> Plan:
        plan = super().plan(n_rows)
        if self.known is None:
            plan.passes[:1] = [side.plan(n_rows).passes[0] for side in self.sides if side.known is None]
        return plan

    def scoring(self, state: State) -> Callable[[Positions], Columns]:
        method = self.method
        assert isinstance(method, HeadMethod)
        return partial(score_by_sets, method, self.names, state["along"], self.run.backbone.head())


def validation_side(
    run: Run, dataset: Iterable[Any] | None, config: ForValueConfig, row_config: RowConfig
) -> ValidationSide:
    """The side of one validation set, or of several by name."""
    dataset = None if dataset is None else kept(dataset)
    if are_data_sets(dataset):
        return ValidationSets(run, dataset, config, row_config)
    return ValidationSide(run, dataset, config, row_config)
