"""`forvalue report`, `worst` and `compare`: what is looked at before anything is deleted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.stats import spearman
from ..data.files import DataError, Source
from ..data.formats import Form, answer_of, form_of
from ..data.sources import read
from ..policies import parse_policy
from ..scores.scores import ForValueScores
from .options import parse

if TYPE_CHECKING:
    from .inputs import Inputs

LONGEST = 100  # letters of a text that is shown


@dataclass
class LookOptions:
    """Scores, and the rows that they are of."""

    scores: str = field(metadata={"help": "File of scores, as score and select write it."})
    data: str = field(metadata={"help": "The rows that were scored, in the same order."})
    split: str = field(default="train", metadata={"help": "Split of --data, where it has several."})
    text_column: str = field(default="text", metadata={"help": "Column of rows that are text."})
    prompt_template: str | None = field(default=None, metadata={"help": "As it was for score or select."})
    completion_template: str | None = field(default=None, metadata={"help": "As it was for score or select."})


@dataclass
class ReportOptions:
    """The report."""

    out: str = field(metadata={"help": "The file to write (.html)."})
    policy: str = field(default="drop:auto", metadata={"help": "Shows what this would drop."})


@dataclass
class WorstOptions:
    """Which rows."""

    n: int = field(default=20, metadata={"help": "So many rows."})
    best: bool = field(default=False, metadata={"help": "The best rows in place of the worst."})


@dataclass
class CompareOptions:
    """Scores of the same rows."""

    scores: list[str] = field(metadata={"help": "Two files of scores or more."})
    share: float = field(default=0.2, metadata={"help": "How far the sets of this share of worst rows are the same."})


def report(argv: Sequence[str]) -> None:
    """The command."""
    options, choice = parse("report", (LookOptions, ReportOptions), argv)
    scores, source, form = _opened(options)
    policy = parse_policy(choice.policy)
    groups = None
    if policy.group_column is not None:
        groups = [row.get(policy.group_column) for row in source]
    weights = policy(scores.values, groups)
    print(scores.summary())
    print(f"report      {_write(Path(choice.out), scores, source, form, weights)}")


def write_report(path: Path, scores: ForValueScores, inputs: Inputs, weights: np.ndarray) -> Path:
    """The report of scores that have just been made; where it is."""
    return _write(path, scores, inputs.source, inputs.rows.form, weights)


def _write(path: Path, scores: ForValueScores, source: Source, form: Form, weights: np.ndarray) -> Path:
    """One HTML file; a picture of the scores, as long as the package has no HTML report."""
    html = f"{__name__.split('.')[0]}.report.html"
    if find_spec(html) is None:
        path = path.with_suffix(".png")
        scores.plot(path, weights=weights)
        return path
    import_module(html).write_report(path, scores, source)
    return path


def worst(argv: Sequence[str]) -> None:
    """The command."""
    options, choice = parse("worst", (LookOptions, WorstOptions), argv)
    scores, source, form = _opened(options)
    scored = np.flatnonzero(np.isfinite(scores.values))
    order = scored[np.argsort(scores.values[scored], kind="stable")]
    chosen = (order[::-1] if choice.best else order)[: choice.n].tolist()
    found = scores.judgements
    suggested = {} if found is None else {row: int(found.suggested_row[row]) for row in chosen}
    rows = source.pick(sorted({*chosen, *(other for other in suggested.values() if other >= 0)}))
    for row in chosen:
        facts = [f"{scores.values[row]:+.4g}"]
        if found is not None and found.kind[row] is not None:
            facts += [f"{found.kind[row]} ({found.probability[row]:.2f})", found.why[row] or ""]
        print(f"{source.place(row)}  {'  '.join(filter(None, facts))}")
        print(f"    {shown(rows[row], form)}")
        if found is not None and suggested[row] >= 0:
            answer = _cut(answer_of(rows[suggested[row]], form.answer) or "")
            print(f"    rather {answer} ({found.suggested_probability[row]:.2f})")


def compare(argv: Sequence[str]) -> None:
    """The command."""
    (options,) = parse("compare", (CompareOptions,), argv)
    if len(options.scores) < 2:
        raise DataError("one file of scores cannot be compared: give two or more.")
    if not 0 < options.share < 1:
        raise DataError(f"--share {options.share}: a share between 0 and 1 is needed.")
    every = {name: ForValueScores.load(name) for name in options.scores}
    first = every[options.scores[0]]
    for name, scores in every.items():
        try:
            scores.check_rows(first.row_digests or [""] * len(first))
        except ValueError as error:
            raise DataError(f"{name} is not of the rows of {options.scores[0]}: {error}.") from None
    print(f"{len(first):,} rows; rank correlation, and how many of the worst {options.share:.0%} are the same")
    for one, other in combinations(options.scores, 2):
        a, b = every[one].values, every[other].values
        both = np.isfinite(a) & np.isfinite(b)
        n = max(1, round(options.share * both.sum()))
        same = len(set(np.argsort(a[both])[:n]) & set(np.argsort(b[both])[:n]))
        print(f"{one}  {other}  {spearman(a[both], b[both]):+.3f}  {same:,} of {n:,}")


def _opened(options: LookOptions) -> tuple[ForValueScores, Source, Form]:
    scores, source = ForValueScores.load(options.scores), read(options.data, options.split)
    if len(scores) != len(source):
        raise DataError(
            f"{options.scores} has scores of {len(scores):,} rows, and {options.data} has {len(source):,}: give the "
            "rows that were scored."
        )
    form = form_of(source, (options.prompt_template, options.completion_template), options.text_column)
    return scores, source, form


def shown(row: dict[str, Any], form: Form) -> str:
    """What is asked and answered in a row, or its text, long ones without their middle."""
    row = dict(form.convert(row))
    turns = row.get("completion") or next((row[c] for c in form.answer if c in row), None)
    turns = turns or next((value for value in row.values() if isinstance(value, str)), None)
    parts = [row["prompt"], turns] if "completion" in row else turns
    parts = parts[-2:] if isinstance(parts, list) else [parts]
    texts = [part[-1] if isinstance(part, list) and part else part for part in parts]
    texts = [text.get("content", text.get("value")) if isinstance(text, dict) else text for text in texts]
    return " -> ".join(_cut(str(text)) for text in texts)


def _cut(text: str) -> str:
    return repr(text) if len(text) <= LONGEST else f"{text[:60]!r} ... {text[-30:]!r}"
