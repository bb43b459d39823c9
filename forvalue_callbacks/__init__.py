"""Prefilter fine-tuning data with For-Value (arXiv 2508.10180): forward-only data valuation for LLMs and VLMs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ForValueConfig
    from .policies import Drop, Keep, Relabel, Reweight, Swap, Threshold
    from .scorer import ForValueScorer
    from .scores.scores import ForValueScores
    from .streaming import filter_stream
    from .tiny import TINY_MODEL
    from .trainer.callback import ForValueCallback
    from .trainer.prefilter import prefilter
    from .trainer.sampler import ResamplingSampler, install_sampler
    from .trainer.value import value
    from .transform import ForValueTransform

__version__ = "0.2.0"

# Imported when first asked for, so that `forvalue_callbacks.core` needs torch alone.
_HOME = {
    "TINY_MODEL": "tiny",
    "Drop": "policies",
    "ForValueCallback": "trainer.callback",
    "ForValueConfig": "config",
    "ForValueScorer": "scorer",
    "ForValueScores": "scores.scores",
    "ForValueTransform": "transform",
    "Keep": "policies",
    "Relabel": "policies",
    "ResamplingSampler": "trainer.sampler",
    "Swap": "policies",
    "Reweight": "policies",
    "Threshold": "policies",
    "filter_stream": "streaming",
    "install_sampler": "trainer.sampler",
    "prefilter": "trainer.prefilter",
    "value": "trainer.value",
}

__all__ = [
    "TINY_MODEL",
    "Drop",
    "ForValueCallback",
    "ForValueConfig",
    "ForValueScorer",
    "ForValueScores",
    "ForValueTransform",
    "Keep",
    "Relabel",
    "ResamplingSampler",
    "Reweight",
    "Swap",
    "Threshold",
    "filter_stream",
    "install_sampler",
    "prefilter",
    "value",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
