"""What is known about rows; knows no model."""

from .scores import ForValueScores

__all__ = ["ForValueScores"]
