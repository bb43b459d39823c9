"""`forvalue select`: rows to keep and rows to drop, as they came."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ForValueConfig
from ..data.answers import answer_of, rewritten
from ..data.files import DataError, Source
from ..data.sources import KINDS
from ..policies import Policy, Relabel, Swap, parse_policy
from ..report.card import CARD, card_text, is_card, push
from ..report.words import lines
from ..scorer import ForValueScorer
from ..scores.files import whole_file
from ..scores.scores import ForValueScores
from ..trainer.page import explained
from ..trainer.refusals import refuse_policy
from .inputs import Inputs, open_rows, open_scorer
from .look import findings
from .options import ScoringOptions, SelectOptions, beside, parse, run_file, typed, write_run
from .scoring import look_for_duplicates, refuse_place, say_estimate, scored
from .to_read import refuse_without_trust
from .writing import alone, write_rows

MORE = """
Kept and dropped rows are written in the form they came in and in their order: lines of JSONL, records of CSV and
elements of a JSON list byte for byte, rows of Parquet with their values and schema (a folder of files becomes one file
of their form). So that the dropped rows stay as they came too, what is known of them lies in a file of its own, one
line of JSON for each, in the same order: kept.dropped.reasons.jsonl, with row, line, score, probability of noise,
kind, why and the suggested answer. With --relabel a row that gets another answer is among the kept rows with it, and
among the dropped ones as it came.

Beside kept.jsonl: kept.dropped.jsonl, kept.dropped.reasons.jsonl, kept.scores.parquet, kept.run.yaml; with --card or
--push-to-hub README.md, a card of the data set.
"""


def select(argv: Sequence[str]) -> None:
    """The command."""
    classes = (ScoringOptions, SelectOptions, ForValueConfig)
    options, choice, config = parse("select", classes, argv, MORE)
    run_select(options, choice, config)


@dataclass(frozen=True)
class Outputs:
    """Files of a result; None: not asked for."""

    kept: Path
    dropped: Path
    reasons: Path
    scores: Path
    report: Path | None
    card: Path | None

    @classmethod
    def of(cls, options: ScoringOptions, choice: SelectOptions) -> Outputs:
        """Where they go."""
        kept, dropped = Path(options.out), choice.dropped or str(beside(options.out, "dropped"))
        return cls(
            kept,
            Path(dropped),
            beside(dropped, "reasons", ".jsonl"),
            Path(choice.scores or beside(options.out, "scores", ".parquet")),
            None if choice.report is None else Path(choice.report),
            kept.parent / CARD if choice.card or choice.push_to_hub else None,
        )


def run_select(options: ScoringOptions, choice: SelectOptions, config: ForValueConfig) -> tuple[list[int], list[int]]:
    """Scores, decides and writes; the places of the kept and of the dropped rows, none after a dry run.

    Raises:
        DataError: what `open_rows` and `scored` refuse, files of another form than the rows, or that somebody else
            has written.
        ValueError: a policy that is none, or that these scores are not for.
    """
    policy = _policy(choice, config)
    inputs, outputs = open_rows(options, config.method, policy.group_column), Outputs.of(options, choice)
    if isinstance(policy, Swap) and not inputs.rows.form.preferences:
        raise DataError(f"{policy} turns preference rows round, and {options.data} has none: leave +swap out.")
    _refuse_outputs(inputs.source, options, outputs)
    if options.dry_run:
        say_estimate(options, config, inputs)
        return [], []
    with alone(options.out):
        return _selected(options, choice, config, policy, inputs, outputs)


def _selected(
    options: ScoringOptions,
    choice: SelectOptions,
    config: ForValueConfig,
    policy: Policy,
    inputs: Inputs,
    outputs: Outputs,
) -> tuple[list[int], list[int]]:
    scorer = open_scorer(options, config, inputs)
    refuse_without_trust(scorer, inputs, options)
    run = write_run("select", options.out, options, choice, config)
    duplicates = look_for_duplicates(scorer, inputs)
    scores, seconds = scored(scorer, inputs, duplicates, outputs.scores, options.overwrite)
    weights, others = decide(policy, scores, inputs)
    print(lines(scores, weights, policy, seconds, drawn=False, preferences=inputs.rows.form.preferences))
    print("\n".join(scores.metadata["duplicates"]["lines"]))

    kept = np.flatnonzero(weights).tolist()
    gone = sorted(set(range(len(scores))) - set(kept) | set(others))
    changed = _changed(inputs, others)
    with whole_file(outputs.reasons) as file:
        file.write_bytes(b"".join(_reasons(inputs, scores, gone, others)))
    write_rows(inputs.source, outputs.dropped, gone)
    write_rows(inputs.source, outputs.kept, kept, changed)
    print(f"kept        {outputs.kept} ({len(kept):,} rows" + (f", {len(others):,} relabelled)" if others else ")"))
    print(f"dropped     {outputs.dropped} ({len(gone):,} rows; why: {outputs.reasons})")
    print(f"scores      {outputs.scores}\nrun         {run}")
    facts = {key: value for group in (options, choice, config) for key, value in asdict(group).items()}
    facts["command"] = typed("select", options, choice, config)
    if outputs.report is not None:
        _report(outputs.report, scorer, scores, inputs, weights, facts)
    if outputs.card is not None:
        _publish(outputs, choice, scores, facts, {outputs.kept: len(kept), outputs.dropped: len(gone)})
    return kept, gone


def _policy(choice: SelectOptions, config: ForValueConfig) -> Policy:
    """Raises ValueError for one that is none, DataError for one that weights rows."""
    policy = parse_policy(choice.policy)
    if choice.relabel is not None:
        policy = Relabel(choice.relabel, policy)
    refuse_policy(policy, config.gives_log_odds)
    if policy.reweights:
        raise DataError(f"{policy} weights rows, and files hold a row or do not: use drop, keep or threshold.")
    return policy


def _report(
    path: Path,
    scorer: ForValueScorer,
    scores: ForValueScores,
    inputs: Inputs,
    weights: np.ndarray,
    facts: Mapping[str, Any],
) -> None:
    trusted = inputs.validation
    validation: Any = None if trusted is None else trusted.source
    if trusted is not None and trusted.places is not None:
        validation = [row for _, row in sorted(trusted.source.pick(trusted.places).items())]
    scores.report(
        path,
        inputs.source,
        validation=validation,
        explanations=explained(scorer, scores, inputs.rows),
        weights=weights,
        findings=findings(scores),
        run={key: facts[key] for key in ("data", "validation", "model", "policy", "command")},
    )
    print(f"report      {path}")


def _publish(
    outputs: Outputs,
    choice: SelectOptions,
    scores: ForValueScores,
    facts: Mapping[str, Any],
    rows: Mapping[Path, int],
) -> None:
    """The card, and on the hub those files of the result that lie beside it."""
    assert outputs.card is not None
    paths = (outputs.kept, outputs.dropped, outputs.reasons, outputs.scores, outputs.report)
    folder = outputs.card.parent
    files = {path.name: rows.get(path, 0) for path in paths if path is not None and path.parent == folder}
    with whole_file(outputs.card) as file:
        file.write_text(card_text(scores, facts, files), encoding="utf-8")
    print(f"card        {outputs.card}")
    if choice.push_to_hub is not None:
        print(f"hub         {push(folder, choice.push_to_hub, private=choice.private, names=list(files))}")


def decide(policy: Policy, scores: ForValueScores, inputs: Inputs) -> tuple[np.ndarray, dict[int, int]]:
    """Weights (N,), and the rows that get another answer with the rows whose answer that is.

    Validation rows that were taken from the training rows stay.
    """
    refuse_policy(policy, scores.noise is not None)
    weights = policy(scores.values, inputs.groups)
    others = policy.other_answers(weights, scores)
    weights[sorted(inputs.taken)] = 1.0
    weights[sorted(others)] = 1.0
    return weights, others


def _refuse_outputs(source: Source, options: ScoringOptions, outputs: Outputs) -> None:
    """Outputs must be of the rows' form; and nothing of somebody else's is written over."""
    if not source.suffix and outputs.kept.suffix == ".parquet":
        source.suffix = ".parquet"
    for out in (outputs.kept, outputs.dropped):
        if out.suffix != source.suffix if source.suffix else out.suffix in KINDS:
            wanted = f"a name that ends in {source.suffix}" if source.suffix else "a folder, or a name in .parquet"
            raise DataError(f"{out}: rows are written in the form they came in ({source.kind}): give {wanted}.")
        refuse_place(out, options, ours=False, is_folder=not source.suffix)
    if outputs.kept.absolute() == outputs.dropped.absolute():
        raise DataError(f"{outputs.dropped} is where the kept rows go: give another file for the dropped ones.")
    for other in filter(None, (outputs.reasons, outputs.scores, outputs.report, run_file(options.out))):
        refuse_place(other, options)
    if outputs.card is not None and outputs.card.exists() and not is_card(outputs.card):
        raise DataError(f"{outputs.card} is no card of forvalue and stays: give --out a folder of its own.")


def _changed(inputs: Inputs, others: Mapping[int, int]) -> dict[int, dict[str, Any]]:
    rows = inputs.source.pick(sorted({*others, *others.values()}))
    answer = inputs.rows.form.answer
    return {row: rewritten(rows.__getitem__, row, other, answer) for row, other in others.items()}


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
        if inputs.rows.form.preferences and scores.values[row] < 0:  # NaN is not
            facts |= {"kind": "swapped", "why": "validation rows speak for what it rejects"}
        if row in others:
            facts["swapped" if others[row] == row else "relabelled"] = True
        out.append((json.dumps(facts) + "\n").encode())
    return out


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
