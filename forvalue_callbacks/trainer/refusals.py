"""What a trainer can be refused for before any row is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Subset

from ..data.packed import LENGTHS, has_packs
from ..data.preference import is_pair, is_preference
from ..data.reading import examples_of
from ..policies import Policy
from ..scores.scores import ForValueScores

_TRIPLES = (
    "are three answers that are compared at once",
    "score the pairs ('chosen' and 'rejected') among them by ForValueScorer(model, validation).score(rows), and "
    "filter by that before you make the trainer",
)
_MARKED = (
    "are answers marked as right or wrong step by step, or weighed by a classifier",
    "score the good answers as rows with 'prompt' and 'completion', by ForValueScorer(model, validation).score(rows), "
    "and filter by that before you make the trainer",
)
_PROMPTS = (
    "are prompts, whose answers are written while it trains",
    "filter the data of the supervised fine-tuning that comes before; if the prompts have reference answers, score "
    "those as rows with 'prompt' and 'completion', by ForValueScorer(model, validation).score(rows)",
)
# Arguments of TRL's trainers by name (TRL need not be here, and frameworks have classes of their own around these).
_OF_TRIPLES = "TPOConfig"
_OF_MARKED = "BCOConfig PRMConfig"
_OF_PROMPTS = """GRPOConfig AsyncGRPOConfig RLOOConfig PPOConfig OnlineDPOConfig NashMDConfig XPOConfig A2POConfig
    SDPOConfig GKDConfig GOLDConfig MiniLLMConfig SDFTConfig IWOPDConfig DistillationConfig AsyncDistillationConfig"""
_OTHER_ROWS = {
    name: what
    for names, what in ((_OF_TRIPLES, _TRIPLES), (_OF_MARKED, _MARKED), (_OF_PROMPTS, _PROMPTS))
    for name in names.split()
}


def refuse_trainer(args: Any, dataset: Any, packs: bool = False, streams: bool = False) -> None:
    """Raises ValueError for a trainer whose training rows are none or no labelled answers; or packed, unless `packs`
    may be; or streamed, unless `streams` may be."""
    config = next((cls.__name__ for cls in type(args).__mro__ if cls.__name__ in _OTHER_ROWS), None)
    if config is not None:
        what, instead = _OTHER_ROWS[config]
        raise ValueError(
            f"the rows of a trainer with {config} {what}, and a For-Value score is of a labelled answer: {instead}."
        )
    if dataset is None:
        raise ValueError("there are no training rows to score: the trainer has no train_dataset.")
    if isinstance(dataset, Mapping):
        raise ValueError("the trainer's train_dataset is a mapping of data sets: give it one of them.")
    stream = isinstance(dataset, IterableDataset)
    if (stream and not streams) or not (stream or hasattr(dataset, "__len__")):
        raise ValueError(
            "streaming data cannot be shortened, and a run takes as many rows of it as max_steps says: use "
            "ForValueCallback, or filter_stream(stream.map(ForValueTransform(...), batched=True)) before you make the "
            "trainer."
        )
    if stream and (getattr(args, "packing", False) or LENGTHS in (getattr(dataset, "column_names", None) or ())):
        raise ValueError(
            "packed rows hold several samples each, and a stream packs them as they come: set packing=False, or use "
            "filter_stream(stream.map(ForValueTransform(...), batched=True)) before you make the trainer."
        )
    if not stream and len(dataset) == 0:
        raise ValueError("there are no training rows to score: the trainer's train_dataset is empty.")
    if not packs and not stream and (getattr(args, "packing", False) or has_packs(dataset)):
        raise ValueError(
            "packed rows hold several samples each, which cannot be drawn one by one: prefilter(trainer, validation, "
            "policy) takes the packs apart and packs what it keeps; or set packing=False."
        )


def has_preferences(dataset: Any) -> bool:
    """Whether training rows are pairs of a chosen and a rejected answer, or answers marked as good or bad."""
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "label" not in columns and not is_pair(columns):
        return False
    return is_preference(next(examples_of(dataset), None))


def refuse_policy(policy: Policy, log_odds: bool) -> None:
    """Raises ValueError for `Drop("auto")` where scores are no log odds of a clean row."""
    if policy.needs_log_odds and not log_odds:
        raise ValueError(
            f"{policy} needs scores that are log odds of a clean row: score with ForValueConfig(method='auto') (or "
            "'label_model'), or give a fraction."
        )


def _column(dataset: Any, column: str, policy: Policy) -> Any:
    """A column of a data set, read row by row where it does not know its columns."""
    names = getattr(dataset, "column_names", None)
    if names is not None and column in names:
        return dataset[column]
    values = []
    for row, example in enumerate(examples_of(dataset) if names is None else [None]):
        if not isinstance(example, Mapping) or column not in example:
            which = "the training rows have" if names is not None else f"training row {row} has"
            raise ValueError(
                f"{policy}: {which} no column {column!r} here. Trainers remove columns that the model does not take: "
                "set remove_unused_columns=False, or pass the groups by hand (groups=[...])."
            )
        values.append(example[column])
    return values


def groups_of(policy: Policy, dataset: Any, groups: Sequence[Any] | None) -> list[Any] | None:
    """Group of each row, (N,), as a policy needs them: those given, or its column of the data set.

    Raises:
        ValueError: no such column, more or fewer groups than rows, groups that cannot be compared, or needless ones.
    """
    column = policy.group_column
    if column is None:
        if groups is not None:
            raise ValueError(
                f"groups are given, and {policy} has none: name them, as Drop(0.2, group_column='source')."
            )
        return None
    if groups is None:
        groups = _column(dataset, column, policy)
    listed = isinstance(groups, Iterable) and not isinstance(groups, (str, Mapping))
    values = groups.tolist() if hasattr(groups, "tolist") else list(groups) if listed else []
    if not listed or len(values) != len(dataset):
        given = f"{len(values)} groups" if listed else f"{type(groups).__name__} in place of a list"
        raise ValueError(f"{policy} needs a group for each of {len(dataset)} training rows, and there is {given}.")
    for row, value in enumerate(values):
        try:
            hash(value)
        except TypeError:
            raise ValueError(
                f"{policy}: the group of row {row} is a {type(value).__name__}: make it text or a number."
            ) from None
    return values


def refuse_other_rows(scores: ForValueScores, scorer: Any, dataset: Any) -> None:
    """Raises ValueError for scores that are not those of the data set's rows, in their order."""
    refuse_other_length(scores, dataset)
    samples = list(scorer.run.reader.samples(dataset))
    why = ""
    if scores.row_digests is not None:
        try:
            scores.check_rows([sample.digest for sample in samples])
        except ValueError as error:
            why = str(error)
    else:  # made by other means: what there is to compare are numbers of labelled tokens, where they are given
        here = np.array([sample.n_labelled for sample in samples])
        compared = (scores.n_labelled > 0) & (here > 0)
        if not np.array_equal(scores.n_labelled[compared], here[compared]):
            why = "they have other numbers of labelled tokens"
    if why:
        raise ValueError(
            "the scores given are those of other rows, of these rows in another order, or of rows prepared otherwise "
            f"(tokenizer, max_length): {why}. Score trainer.train_dataset as the trainer has prepared it."
        )


def refuse_other_length(scores: ForValueScores, dataset: Any) -> None:
    """Raises ValueError unless there are as many scores as rows."""
    if len(scores) != len(dataset):
        raise ValueError(
            f"{len(scores)} scores for {len(dataset)} training rows. SFTTrainer drops fully masked rows and shuffles "
            "if asked: score trainer.train_dataset itself."
        )


def shortener(dataset: Any) -> Callable[[np.ndarray], Any]:
    """A function from places of rows to a data set of these rows alone.

    Raises:
        ValueError: rows that cannot be had by their place.
    """
    if hasattr(dataset, "select"):
        return dataset.select
    if isinstance(dataset, (list, tuple)):
        return lambda places: [dataset[i] for i in places.tolist()]
    if hasattr(dataset, "__getitem__"):
        return lambda places: Subset(dataset, places.tolist())
    raise ValueError(f"a {type(dataset).__name__} cannot be shortened to the rows to keep: give it as a Dataset.")
