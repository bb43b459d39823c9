"""Several validation sets: one pass over the rows, a score of each row by each set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import core
from ..core import Head
from ..model.positions import Columns, Positions
from ..scores.scores import BY_SET
from .base import reasons_unless
from .gradient import HeadMethod


def score_by_sets(
    method: HeadMethod, names: Sequence[str], along: core.Along, head: Head, positions: Positions
) -> Columns:
    """What `method.score` gives by each set, (segments,) under "score_NAME".

    Args:
        names: of the K sets.
        along: theirs, as `method.along` makes it.
    """
    found = core.measure(
        head,
        along,
        positions.hidden_TD,
        positions.target_T,
        positions.lengths,
        squares=method.normalize == "cosine",
    )
    lengths, weights = np.array(positions.lengths), positions.weights
    values_NK = weights[:, None] * positions.sum(method.scores_along(found))
    log_p = weights * positions.sum(found.log_likelihood_T)
    if method.normalize == "length":
        values_NK = values_NK / lengths[:, None]
    elif method.normalize == "cosine":
        values_NK = values_NK / found.squares_NK[:, 1:].clamp(min=1e-30).sqrt().cpu().numpy()
    finite = np.isfinite(values_NK).all(1) & np.isfinite(log_p)
    by_set = {f"{BY_SET}{name}": values_NK[:, k] for k, name in enumerate(names)}
    known = {"log_likelihood": log_p, "n_labelled": lengths.astype(np.int64)}
    return {**by_set, **known, "reason": reasons_unless(finite)}
