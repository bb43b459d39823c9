"""`forvalue report`, `worst` and `compare`: what is looked at before anything is deleted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from ..core.stats import spearman
from ..data.answers import answer_of
from ..data.files import DataError, Source
from ..data.formats import Form, form_of
from ..data.shown import short, shown
from ..data.sources import read
from ..policies import parse_policy
from ..scores.scores import ForValueScores
from .options import parse


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
    scores, source, _ = _opened(options)
    policy = parse_policy(choice.policy)
    groups = None
    if policy.group_column is not None:
        groups = [row.get(policy.group_column) for row in source]
    weights = policy(scores.values, groups)
    print(scores.summary())
    run = {"data": options.data, "policy": choice.policy}
    scores.report(choice.out, source, weights=weights, findings=findings(scores), run=run)
    print(f"report      {choice.out}")


def findings(scores: ForValueScores) -> list[tuple[str, list[int]]]:
    """What is there twice, as it was said when the rows were scored."""
    lines = scores.metadata.get("duplicates", {}).get("lines", [])
    return [(line.partition(" ")[2].strip(), []) for line in lines]


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
        text = shown(form.convert(rows[row]))
        print("    " + " -> ".join(short(side) for side in (text.prompt, text.answer) if side))
        if found is not None and suggested[row] >= 0:
            answer = short(answer_of(rows[suggested[row]], form.answer) or "")
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
