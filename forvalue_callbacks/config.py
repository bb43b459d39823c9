"""ForValueConfig: how rows are scored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from .methods import LOG_ODDS, METHODS


@dataclass
class ForValueConfig:
    """How rows are scored. No field is named like one of `SFTConfig` or `ModelConfig`: `TrlParser` takes all three."""

    method: str = field(
        default="gradient",
        metadata={
            "help": "What the score of a row is. " + " ".join(f"'{m.name}': {m.help}." for m in METHODS.values()),
            "choices": list(METHODS),
        },
    )
    normalize: str = field(
        default="none",
        metadata={
            "help": "'none': sum over labelled tokens (the paper). 'length': per labelled token. 'cosine': divided by "
            "the norm of the row's own gradient.",
            "choices": ["none", "length", "cosine"],
        },
    )
    vocab: str = field(
        default="full",
        metadata={
            "help": "'full': exact. 'seen': only tokens that are labels somewhere in the data or validation rows, as "
            "in the paper's Algorithm 1; an approximation, for comparison.",
            "choices": ["full", "seen"],
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Padded tokens in one forward pass; halves itself when memory runs out. None: 1,024 on a CPU, "
            "16,384 on an accelerator."
        },
    )
    forward_dtype: str | None = field(
        default=None,
        metadata={"help": "Run the forward pass under autocast in this dtype ('bfloat16'); None: the model's own."},
    )
    direction_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder where directions are kept, by a hash of weights, validation rows and config, for other "
            "processes that score with the same (of methods that score a row by itself). As large as the head in "
            "float32 each."
        },
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            choices = spec.metadata.get("choices")
            if choices is not None and getattr(self, spec.name) not in choices:
                raise ValueError(f"{spec.name}={getattr(self, spec.name)!r}: choose one of {choices}.")
        method = METHODS[self.method]
        if self.normalize not in method.normalizations or self.vocab not in method.vocabularies:
            raise ValueError(
                f"method={self.method!r} needs normalize={_either(method.normalizations)} and "
                f"vocab={_either(method.vocabularies)}."
            )
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(f"max_tokens_per_batch={self.max_tokens_per_batch}: must be at least 1.")

    @property
    def gives_log_odds(self) -> bool:
        """Whether scores are log odds that a row is clean."""
        return METHODS[self.method].unit == LOG_ODDS


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
