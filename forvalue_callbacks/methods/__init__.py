"""Validation samples -> a state; positions -> numbers per sample."""

from .auto import Auto
from .base import LOG_ODDS, NATS, Method
from .fitted import Fitted, FittedLikelihood
from .gradient import Gradient
from .label_model import LabelModel
from .whitened import Whitened

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Gradient, Whitened, Fitted, FittedLikelihood, LabelModel, Auto)
}

__all__ = ["LOG_ODDS", "METHODS", "NATS", "Method"]
