"""`forvalue score`, and the scores of a file: made, gone on with, used again or refused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import ForValueConfig
from ..data.duplicates import Duplicates, find_duplicates
from ..data.files import DataError
from ..probe import estimate
from ..report.words import about_duplicates, about_estimate
from ..scorer import ForValueScorer
from ..scores.files import make_folder
from ..scores.provenance import differing
from ..scores.scores import ForValueScores
from ..scores.writer import parts_folder, read_manifest, remove_parts
from .inputs import TAKEN, TRUSTED, Inputs, open_rows, open_scorer
from .options import ScoringOptions, parse, run_file, warn, write_run
from .to_read import refuse_without_trust
from .writing import alone

NAMED = 100  # groups of rows that are there twice, and rows of each, that are kept with the scores

MORE = """
The scores are one Parquet file with a row for each row of the data: score, reason where there is none, and with
method auto the probability of noise, its kind, why, and whose answer is right. While they are made, what is known lies
beside it in OUT.parts: a run that was stopped goes on there. A finished file is used again where model, rows and
settings are the same.
"""


def score(argv: Sequence[str]) -> None:
    """The command."""
    options, config = parse("score", (ScoringOptions, ForValueConfig), argv, MORE)
    inputs = open_rows(options, config.method)
    for out in (options.out, run_file(options.out)):
        refuse_place(out, options)
    if options.dry_run:
        say_estimate(options, config, inputs)
        return
    scorer = open_scorer(options, config, inputs)
    refuse_without_trust(scorer, inputs, options)
    with alone(options.out):
        run = write_run("score", options.out, options, config)
        found = look_for_duplicates(scorer, inputs)
        scores, _ = scored(scorer, inputs, found, Path(options.out), options.overwrite)
    print(scores.summary())
    print("\n".join(scores.metadata["duplicates"]["lines"]))
    print(f"scores      {options.out}\nrun         {run}")


def say_estimate(options: ScoringOptions, config: ForValueConfig, inputs: Inputs) -> None:
    """What scoring would take; nothing is written."""
    scorer = open_scorer(options, replace(config, direction_cache=None), inputs)
    refuse_without_trust(scorer, inputs, options)
    found = estimate(scorer, inputs.rows)
    print("\n".join([*about_estimate(found), "dry run     nothing is written"]))


def look_for_duplicates(scorer: ForValueScorer, inputs: Inputs) -> Duplicates:
    """What is there twice. Training rows that are validation rows too are set aside: they are trusted, and what they
    would say of the noise is known.

    Raises:
        DataError: all of them are.
    """
    samples = scorer.run.reader.samples
    found = find_duplicates(samples(inputs.rows), () if inputs.validation is None else samples(inputs.validation))
    if found.leaked_exact:
        rows = [row for row, _ in found.leaked_exact]
        inputs.take(rows, TRUSTED)
        if len(inputs.taken) == len(inputs.source):
            raise DataError(
                f"every row of {inputs.source.name} is a validation row too, and nothing is left to score: give "
                "trusted rows that are some of them, or others."
            )
        warn(
            f"{len(rows):,} training rows are validation rows too, the first is {inputs.source.place(rows[0])}: they "
            "are kept, without a score."
        )
    return found


def scored(
    scorer: ForValueScorer, inputs: Inputs, duplicates: Duplicates, path: Path, overwrite: bool
) -> tuple[ForValueScores, float | None]:
    """Scores of the training rows, kept in a file with what is there twice, and the seconds that they took; None: they
    were there.

    Raises:
        DataError: the file, or the parts of a run that was stopped, are of something else; no row can be scored.
    """
    started = time.perf_counter()
    found = None if overwrite else _found(scorer, inputs, path)
    scores = scorer.score(inputs.rows, path) if found is None else found
    lines = about_duplicates(duplicates, set_aside=True)
    facts = {"lines": lines, "counts": duplicates.counts(), "first": duplicates.first(NAMED).to_dict()}
    if scores.metadata.get("duplicates") != facts:
        scores.metadata["duplicates"] = facts
        scores.save(path)
    remove_parts(path)  # a run that was killed between the two leaves both
    bad = [i for i, reason in enumerate(scores.reasons) if reason not in (None, TAKEN, TRUSTED)]
    if not np.isfinite(scores.values).any():
        raise DataError(f"no row can be scored; {inputs.source.place(bad[0])}: {scores.reasons[bad[0]]}.")
    for i in bad[:3]:
        warn(f"{inputs.source.place(i)}: {scores.reasons[i]}")
    if len(bad) > 3:
        warn(f"{len(bad):,} rows have no score: the reasons are in {path}")
    return scores, None if found is not None else time.perf_counter() - started


def _found(scorer: ForValueScorer, inputs: Inputs, path: Path) -> ForValueScores | None:
    """Those of a finished run, refused where they are of something else, as are the parts of one that was stopped."""
    if path.is_file():
        expected = {**scorer.provenance(), "data": scorer.hash_rows(inputs.rows)}
        scores = ForValueScores.load(path)
        what, other = f"the scores in {path}", differing(scores.metadata.get("provenance", {}), expected)
    else:
        scores = None
        manifest = read_manifest(parts_folder(path)) or {"provenance": scorer.provenance()}
        what, other = f"what is in {parts_folder(path)}", differing(manifest["provenance"], scorer.provenance())
    if other:
        raise DataError(
            f"{what} was made with other {' and other '.join(other)}: go back to those, give another file, or "
            "--overwrite true."
        )
    return scores


def refuse_place(out: str | Path, options: ScoringOptions, *, ours: bool = True, is_folder: bool = False) -> None:
    """Raises DataError where a file that is to be written is one that is read, a folder, or somebody else's.

    Args:
        ours: a file that is there is looked at later.
        is_folder: a folder of `save_to_disk` is to be written.
    """
    path = Path(out)
    if not options.dry_run:
        make_folder(path.parent)
    for name in (options.data, options.validation):
        if name is not None and path.exists() and Path(name).exists() and path.samefile(name):
            raise DataError(f"{out} is what is read: give another file to write.")
    if path.is_dir() and not is_folder:
        raise DataError(f"{out} is a folder, and a file of that name is to be written: give another, or move it away.")
    if path.is_dir() and any(path.iterdir()) and not (path / "dataset_info.json").is_file():
        raise DataError(f"{out} is a folder of something else than rows, and stays: give another.")
    if not ours and path.exists() and not options.overwrite and not run_file(options.out).is_file():
        raise DataError(f"{out} is there, and no run of forvalue is beside it: give another, or --overwrite true.")
