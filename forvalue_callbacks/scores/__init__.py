"""What is known about rows; knows no model."""

from typing import Any

from .scores import ForValueScores

__all__ = ["ForValueScores"]


def __getattr__(name: str) -> Any:
    if name == "auc":  # where those who know which rows are noisy look for it; scores alone need no torch
        from ..core.stats import auc

        return auc
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
