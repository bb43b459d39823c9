"""The evaluation rows of a trainer as validation rows."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerState

from ..data.packed import has_packs, taken_apart

logger = logging.getLogger(__name__)

EVAL = "eval"


def refuse_other_text(validation_dataset: Any) -> None:
    """Raises ValueError for text in place of validation rows, unless it names evaluation rows."""
    if isinstance(validation_dataset, str) and validation_dataset.partition(":")[0] != EVAL:
        raise ValueError(
            f"validation_dataset is the text {validation_dataset[:40]!r}: give rows, or 'eval' for the trainer's own "
            "evaluation rows ('eval:NAME' where it has several sets)."
        )


def validation_rows(validation_dataset: Any, trainer: Trainer) -> Any:
    """The rows given, or where they are "eval" or "eval:NAME" the trainer's `eval_dataset` as it has prepared it: one
    set, or all of several by their names.

    Raises:
        ValueError: the trainer has none, or none of that name.
    """
    if not isinstance(validation_dataset, str):
        return validation_dataset
    refuse_other_text(validation_dataset)
    rows, name = trainer.eval_dataset, validation_dataset.partition(":")[2]
    if rows is None:
        raise ValueError("there are no validation rows: give a validation_dataset, or the trainer an eval_dataset.")
    several = dict(rows) if isinstance(rows, Mapping) else {}
    if several and name and name not in several:
        ways = " or ".join(repr(f"{EVAL}:{other}") for other in several)
        raise ValueError(f"the trainer's eval_dataset has no set {name!r}: give 'eval' for all, or {ways}.")
    if name and not several:
        raise ValueError(f"the trainer's eval_dataset is one set, without names: give 'eval', not 'eval:{name}'.")
    logger.warning("selecting rows by the trainer's eval_dataset: its loss no longer measures the result fairly")
    sets = several if several and not name else {name: several.get(name, rows)}
    sets = {name: taken_apart(chosen) if has_packs(chosen) else chosen for name, chosen in sets.items()}
    return sets if several and not name else sets[name]


def trainer_of(state: TrainerState) -> Trainer:
    """The trainer that is asking its callbacks at this moment.

    It hands them all that it has but itself and its evaluation rows, so it is looked up among the callers.

    Raises:
        ValueError: the callback is not called by a trainer.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and getattr(caller, "state", None) is state:
            return caller
        frame = frame.f_back
    raise ValueError("no trainer is calling: give rows as the validation_dataset, in place of 'eval'.")
