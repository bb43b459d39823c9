"""Rows worth reading, where there are none that are trusted and answers do not repeat."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..data.files import DataError
from ..data.sample import Sample
from ..scorer import ForValueScorer
from ..validation import WORTH_READING, AnswersDifferError
from .inputs import Inputs
from .options import ScoringOptions, beside
from .writing import write_rows


def worth_reading(samples: Iterable[Sample], n: int) -> list[int]:
    """Places of n rows, spread over the lengths; the same rows whatever their order.

    Of rows that are the same one counts. By length they make n groups of one size, and of each the row with the least
    hash is taken, which is one at random.
    """
    first: dict[str, tuple[int, int]] = {}  # length, place
    for sample in samples:
        if sample.reason is None:
            first.setdefault(sample.digest, (sample.n_read, sample.index))
    order = sorted(first, key=lambda digest: (first[digest][0], digest))
    groups = np.array_split(np.array(order), min(n, len(order)) or 1)
    return sorted(first[str(min(group))][1] for group in groups if len(group))


def refuse_without_trust(scorer: ForValueScorer, inputs: Inputs, options: ScoringOptions) -> None:
    """Raises DataError where nothing says which rows are right; rows to read are then in a file beside the result.

    A file that is there stays: somebody may have read it.
    """
    try:
        scorer.validation.look_at(inputs.rows)
    except AnswersDifferError as error:
        if options.dry_run:
            raise DataError(f"{error.why}: without --dry-run, rows worth reading are written to a file.") from error
        path = beside(options.out, "to_read", inputs.source.suffix)
        if options.overwrite or not path.exists():
            chosen = worth_reading(scorer.run.reader.samples(inputs.rows), WORTH_READING)
            write_rows(inputs.source, path, chosen)
        raise DataError(
            f"{error.why}. Rows worth reading are in {path}: read them, keep those that are right, and give them as "
            f"--validation {path}."
        ) from error
