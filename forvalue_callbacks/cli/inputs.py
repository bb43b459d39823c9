"""What a command is given, opened: rows, rows that are trusted, model; refused where something is wrong with it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ForValueConfig
from ..data.files import DataError, Source
from ..data.formats import CHATML, Form, FormedRows, form_of, with_answers_marked
from ..data.sft import RowConfig
from ..data.sources import read
from ..methods import METHODS
from ..scorer import ForValueScorer
from .options import ScoringOptions, warn

TAKEN = "one of the validation rows (--validation-share): kept, without a score"
TRUSTED = "a validation row too: kept, without a score"


@dataclass
class Inputs:
    """Rows to score and rows to score by.

    Args:
        rows: of the training file.
        validation: rows that are trusted; None: there are none.
        taken: places of training rows that are validation rows, which are kept and not scored.
        groups: group of each row, by the column that was asked for.
    """

    rows: FormedRows
    validation: FormedRows | None
    taken: frozenset[int]
    groups: list[Any] | None

    @property
    def source(self) -> Source:
        return self.rows.source

    @property
    def sides(self) -> list[FormedRows]:
        """The one or the two that there are."""
        return [self.rows] if self.validation is None else [self.rows, self.validation]

    def take(self, rows: Sequence[int], reason: str) -> None:
        """Sets training rows aside that are validation rows."""
        self.rows = FormedRows(self.source, self.rows.form, {**self.rows.set_aside, **dict.fromkeys(rows, reason)})
        self.taken = self.taken.union(rows)


def open_rows(options: ScoringOptions, method: str, group_column: str | None = None) -> Inputs:
    """Both sides, read once from end to end; what they are is the first line that is printed.

    Raises:
        DataError: files that are not there, broken or empty, a form that is not known, no validation rows and a
            method that needs them, no column of groups.
    """
    _refuse_sides(options, METHODS[method].needs_validation)
    source = read(options.data, options.split)
    form, taken = _form(source, options), _taken(source, options)
    validation: FormedRows | None
    if options.validation is not None:
        trusted = read(options.validation, options.validation_split)
        validation = FormedRows(trusted, _form(trusted, options))
        where = f"validation {options.validation}: {len(trusted):,} rows, {trusted.kind}, {validation.form.name}"
    else:
        validation = FormedRows(source, form, places=taken) if taken else None
        where = f"validation {len(taken):,} of them" if taken else "no validation rows"
    print(f"{options.data}: {len(source):,} rows, {source.kind}, {form.name}; {where}", flush=True)
    if taken:
        warn(
            f"{len(taken):,} training rows are taken for validation: what is wrong with them hides what is wrong with "
            "others. Look through them, or give trusted rows by --validation."
        )
    groups = _look_through(source, group_column)
    return Inputs(FormedRows(source, form, dict.fromkeys(taken, TAKEN)), validation, frozenset(taken), groups)


def _refuse_sides(options: ScoringOptions, needed: bool) -> None:
    if needed and options.validation is None and options.validation_share is None:
        raise DataError(
            "rows are scored by rows that you trust: give two or three hundred of the same kind by --validation FILE. "
            "(--validation-share 0.1 takes a tenth of the training rows: only if you trust those. Without any, "
            "--method auto finds wrong answers where answers repeat.)"
        )
    if options.validation is not None and options.validation_share is not None:
        raise DataError("--validation and --validation-share exclude each other: give one.")
    if options.validation_share is not None and not 0 < options.validation_share < 1:
        raise DataError(f"--validation-share {options.validation_share}: a share between 0 and 1 is needed.")
    sides = [Path(name) for name in (options.data, options.validation) if name is not None]
    if len(sides) == 2 and sides[0].exists() and sides[1].exists() and sides[0].samefile(sides[1]):
        raise DataError(
            f"{options.validation} is both training and validation rows, and rows that judge themselves are never "
            "wrong: give trusted rows in a file of their own."
        )


def _form(source: Source, options: ScoringOptions) -> Form:
    return form_of(source, (options.prompt_template, options.completion_template), options.text_column)


def _taken(source: Source, options: ScoringOptions) -> list[int]:
    if options.validation_share is None:
        return []
    n = round(options.validation_share * len(source))
    if not 0 < n < len(source):
        raise DataError(
            f"--validation-share {options.validation_share} of {len(source):,} rows is {n:,}: give more rows, or "
            "another share."
        )
    return sorted(random.Random(options.seed).sample(range(len(source)), n))


def _look_through(source: Source, group_column: str | None) -> list[Any] | None:
    """Reads all rows, so that what is broken is known before a model is loaded; the groups, if there are any."""
    groups: list[Any] = []
    for i, row in enumerate(source):
        if group_column is not None:
            if group_column not in row:
                raise DataError(
                    f"{source.place(i)}: no column {group_column!r}, which the policy groups by (columns found: "
                    f"{', '.join(map(repr, row))})."
                )
            groups.append(row[group_column])
    return None if group_column is None else groups


# ---- the model ----


def open_scorer(options: ScoringOptions, config: ForValueConfig, inputs: Inputs) -> ForValueScorer:
    """The scorer, with the model and its tokenizer, which say how rows of both sides are read.

    Raises:
        DataError: the model cannot be loaded; no file with a chat template.
    """
    sides, tokenizer = inputs.sides, None
    with quiet():
        if any(not side.form.tokenised for side in sides):
            tokenizer = _loaded("AutoTokenizer", options.model)
        if any(side.form.chats for side in sides):
            _set_template(tokenizer, options)
        model = _model(options)
    if not options.learn_prompts:
        for side in sides:
            side.form = with_answers_marked(side.form, tokenizer)
    row_config = RowConfig(
        dataset_text_field=options.text_column,
        max_length=options.max_length,
        completion_only_loss=False if options.learn_prompts else None,
    )
    scorer = ForValueScorer(model, inputs.validation, config, processing_class=tokenizer, row_config=row_config)
    try:
        scorer.validation.samples()
    except ValueError as error:
        raise DataError(f"{options.validation or options.data}: {error}") from error
    return scorer


def _set_template(tokenizer: Any, options: ScoringOptions) -> None:
    if options.chat_template is not None:
        try:
            tokenizer.chat_template = Path(options.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"--chat-template {options.chat_template} cannot be read ({error.strerror}): give a file with a Jinja "
                "template, or leave the flag out for the tokenizer's own."
            ) from None
    elif not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
        print(f"chat template: ChatML (the tokenizer of {options.model} has none)", flush=True)


def _loaded(name: str, model: str, **options: Any) -> Any:
    import transformers

    try:
        return getattr(transformers, name).from_pretrained(model, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"the model {model} cannot be loaded ({text}): give a folder that save_pretrained has written, or the id "
            "of a causal language model on the hub, with a network (and a login, where it is private). forvalue demo "
            "needs neither."
        ) from error


def _model(options: ScoringOptions) -> Any:
    import torch

    device = {"device_map": "auto"} if torch.accelerator.is_available() else {}
    return _loaded("AutoModelForCausalLM", options.model, dtype=options.dtype, **device)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and notes of transformers while a model is loaded."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
