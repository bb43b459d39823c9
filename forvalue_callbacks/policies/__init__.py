"""Policies: pure functions from scores to weights. A weight of 0 drops the row; nothing here knows a model.

    weights = Drop(0.2)(scores.values)                              # (N,) float64: 1 = kept, 0 = dropped
    weights = Drop(0.2, group_column="label")(scores.values, labels)  # a fifth of every label
    weights = Drop(0.2).then(Reweight(0.5))(scores.values)          # reweight what is left
    policy = parse_policy("drop:0.2@label+reweight:0.5")            # the same from YAML; str(policy) gives it back
    weights = keep_in_turn(scorer.pairwise(rows), 0.05)             # several aims: each validation row chooses in turn
    policy = Relabel(0.95)                                          # other answers where they are surely right
    policy = Swap(policy=Drop(0.2))                                 # pairs the other way round

Policies are frozen dataclasses: equal by value, and `repr` and `str` both say everything.
"""

from .parse import as_policy, parse_policy
from .policy import Chain, Drop, Keep, Policy, Reweight, Threshold, describe, effective_sample_size, parts
from .relabel import Relabel, Swap
from .turns import keep_in_turn

__all__ = [
    "Chain",
    "Drop",
    "Keep",
    "Policy",
    "Relabel",
    "Reweight",
    "Swap",
    "Threshold",
    "as_policy",
    "describe",
    "effective_sample_size",
    "keep_in_turn",
    "parse_policy",
    "parts",
]
