"""`forvalue select`: rows to keep and rows to drop, as they came."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ForValueConfig
from ..data.files import DataError, Source
from ..data.formats import answer_of, with_answer_of
from ..data.sources import KINDS
from ..policies import Policy, Relabel, parse_policy
from ..report.words import about_duplicates, lines
from ..scores.files import whole_file
from ..scores.scores import ForValueScores
from ..trainer.refusals import refuse_policy
from .inputs import Inputs, open_rows, open_scorer
from .look import write_report
from .options import ScoringOptions, SelectOptions, beside, parse, write_run
from .scoring import look_for_duplicates, refuse_place, say_estimate, scored
from .to_read import refuse_without_trust
from .writing import write_rows

MORE = """
Kept and dropped rows are written in the form they came in and in their order: lines of JSONL, records of CSV and
elements of a JSON list byte for byte, rows of Parquet with their values and schema (a folder of files becomes one file
of their form). So that the dropped rows stay as they came too, what is known of them lies in a file of its own, one
line of JSON for each, in the same order: kept.dropped.reasons.jsonl, with row, line, score, probability of noise,
kind, why and the suggested answer. With --relabel a row that gets another answer is among the kept rows with it, and
among the dropped ones as it came.

Beside kept.jsonl: kept.dropped.jsonl, kept.dropped.reasons.jsonl, kept.scores.parquet, kept.run.yaml.
"""


def select(argv: Sequence[str]) -> None:
    """The command."""
    classes = (ScoringOptions, SelectOptions, ForValueConfig)
    options, choice, config = parse("select", classes, argv, MORE, method="auto")
    run_select(options, choice, config)


def run_select(options: ScoringOptions, choice: SelectOptions, config: ForValueConfig) -> tuple[list[int], list[int]]:
    """Scores, decides and writes; the places of the kept and of the dropped rows, none after a dry run.

    Raises:
        DataError: what `open_rows` and `scored` refuse, files of another form than the rows, or that somebody else
            has written.
        ValueError: a policy that is none, or that these scores are not for.
    """
    policy = parse_policy(choice.policy)
    if choice.relabel is not None:
        policy = Relabel(choice.relabel, policy)
    refuse_policy(policy, config.gives_log_odds)
    if policy.reweights:
        raise DataError(f"{policy} weights rows, and files hold a row or do not: use drop, keep or threshold.")
    inputs = open_rows(options, config.method, policy.group_column)
    dropped = choice.dropped or str(beside(options.out, "dropped"))
    path = Path(choice.scores or beside(options.out, "scores", ".parquet"))
    _refuse_outputs(inputs.source, options, dropped)
    for other in filter(None, (str(path), choice.report)):
        refuse_place(other, options)
    if options.dry_run:
        say_estimate(options, config, inputs)
        return [], []
    scorer = open_scorer(options, config, inputs)
    refuse_without_trust(scorer, inputs, options)
    run = write_run("select", options.out, options, choice, config)
    duplicates = look_for_duplicates(scorer, inputs)
    scores, seconds = scored(scorer, inputs, duplicates, path, options.overwrite)
    weights, others = decide(policy, scores, inputs)
    print(lines(scores, weights, policy, seconds, drawn=False))
    print("\n".join(about_duplicates(duplicates, set_aside=True)))

    kept = np.flatnonzero(weights).tolist()
    gone = sorted(set(range(len(scores))) - set(kept) | set(others))
    changed = _changed(inputs, others)
    reasons = beside(dropped, "reasons", ".jsonl")
    with whole_file(reasons) as file:
        file.write_bytes(b"".join(_reasons(inputs, scores, gone, others)))
    write_rows(inputs.source, Path(dropped), gone)
    write_rows(inputs.source, Path(options.out), kept, changed)
    print(f"kept        {options.out} ({len(kept):,} rows" + (f", {len(others):,} relabelled)" if others else ")"))
    print(f"dropped     {dropped} ({len(gone):,} rows; why: {reasons})")
    print(f"scores      {path}\nrun         {run}")
    if choice.report is not None:
        print(f"report      {write_report(Path(choice.report), scores, inputs, weights)}")
    return kept, gone


def decide(policy: Policy, scores: ForValueScores, inputs: Inputs) -> tuple[np.ndarray, dict[int, int]]:
    """Weights (N,), and the rows that get another answer with the rows whose answer that is.

    Validation rows that were taken from the training rows stay.
    """
    refuse_policy(policy, scores.noise is not None)
    weights = policy(scores.values, inputs.groups)
    others = policy.other_answers(weights, scores.judgements) if isinstance(policy, Relabel) else {}
    weights[sorted(inputs.taken)] = 1.0
    weights[sorted(others)] = 1.0
    return weights, others


def _refuse_outputs(source: Source, options: ScoringOptions, dropped: str) -> None:
    """Outputs must be of the rows' form; and nothing of somebody else's is written over."""
    if not source.suffix and Path(options.out).suffix == ".parquet":
        source.suffix = ".parquet"
    for out in (options.out, dropped):
        suffix = Path(out).suffix
        if suffix != source.suffix if source.suffix else suffix in KINDS:
            wanted = f"a name that ends in {source.suffix}" if source.suffix else "a folder, or a name in .parquet"
            raise DataError(f"{out}: rows are written in the form they came in ({source.kind}): give {wanted}.")
        refuse_place(out, options, ours=False)
    if Path(options.out).absolute() == Path(dropped).absolute():
        raise DataError(f"{dropped} is where the kept rows go: give another file for the dropped ones.")


def _changed(inputs: Inputs, others: Mapping[int, int]) -> dict[int, dict[str, Any]]:
    rows = inputs.source.pick(sorted({*others, *others.values()}))
    answer = inputs.rows.form.answer
    return {row: with_answer_of(rows[row], rows[other], answer) for row, other in others.items()}


def _reasons(inputs: Inputs, scores: ForValueScores, rows: Sequence[int], others: Mapping[int, int]) -> list[bytes]:
    """What is known of each dropped row, a line of JSON each."""
    found = scores.judgements
    suggested = [] if found is None else [int(i) for i in found.suggested_row[list(rows)] if i >= 0]
    answers = inputs.source.pick(sorted(set(suggested)))
    out = []
    for row in rows:
        facts: dict[str, Any] = {"row": row, "line": inputs.source.line(row)}
        facts["score"] = _number(scores.values[row])
        facts["reason"] = scores.reasons[row]
        if found is not None:
            facts |= {"probability": _number(found.probability[row]), "kind": found.kind[row], "why": found.why[row]}
            if (other := int(found.suggested_row[row])) >= 0:
                facts["suggested_row"] = other
                facts["suggested_probability"] = _number(found.suggested_probability[row])
                facts["suggested_answer"] = answer_of(answers[other], inputs.rows.form.answer)
        if row in others:
            facts["relabelled"] = True
        out.append((json.dumps(facts) + "\n").encode())
    return out


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
