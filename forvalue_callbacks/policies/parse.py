"""Policies from text, for YAML and the command line."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from .policy import Chain, Drop, Keep, Policy, Reweight, Threshold
from .relabel import Relabel, Swap


def as_policy(policy: Policy | str | None) -> Policy:
    """A policy as callers give it: one, the text of one, or None for `Drop(0.2)`.

    Raises:
        TypeError: anything else, with what to write.
        ValueError: text that names no policy.
    """
    if policy is None:
        return Drop(0.2)
    if isinstance(policy, str):
        return parse_policy(policy)
    if not isinstance(policy, Policy):
        given = f"the class {policy.__name__}" if isinstance(policy, type) else f"of type {type(policy).__name__}"
        raise TypeError(f"the policy is {given}: give one like Drop(0.2), Drop('auto') or Reweight(), or 'drop:0.2'")
    return policy


def parse_policy(text: str) -> Policy:
    """The policy that `str(policy)` names, for YAML and the command line.

    `drop:0.2`, `drop:auto`, `keep:500` (a count), `keep:0.5` (a fraction), `threshold:0.0`, `reweight:1.0`; `@column`
    sets the group column (`drop:0.2@label`); `+` chains (`drop:0.2+reweight:1.0`), and `+relabel:0.95` or `+swap:0.0`
    at the end is `Relabel(0.95)` or `Swap(0.0)` of what stands before it. All but `drop` and `keep` have defaults.

    Raises:
        ValueError: an unknown name or a number that does not parse.
    """
    texts = re.split(r"\+(?=\s*[a-z])", text)  # not the plus of 1e+3
    *parts, last = map(_parse_one, texts)
    if not parts:
        return last
    if isinstance(last, (Relabel, Swap)):
        return replace(last, policy=parts[0] if len(parts) == 1 else Chain(tuple(parts)))
    return Chain((*parts, last))


def _parse_one(text: str) -> Policy:
    match = re.fullmatch(r"\s*(drop|keep|threshold|reweight|relabel|swap)(?::([^@]+))?(?:@(.+?))?\s*", text)
    kinds: dict[str, Any] = {"drop": Drop, "keep": Keep, "threshold": Threshold, "reweight": Reweight}
    kinds |= {"relabel": Relabel, "swap": Swap}
    try:
        if match is None:
            raise ValueError("not of the form name:number or name:number@column")
        name, number, column = match.groups()
        if number is None:
            return kinds[name](group_column=column)
        if (name, number.strip()) == ("drop", "auto"):
            return Drop("auto", group_column=column)
        return kinds[name](int(number) if number.strip().isdigit() else float(number), group_column=column)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"cannot read the policy {text!r} ({error}); write for example drop:0.2, drop:auto, keep:500, keep:0.5, "
            "threshold:0.0, reweight:1.0, drop:0.2@label, drop:0.2+reweight:1.0, drop:auto+relabel:0.95 or "
            "threshold:0.0+swap:0.0"
        ) from None
