"""Are pairs whose chosen and rejected answers are swapped found? Rows that come along, a share of them swapped.

    python recipes/swapped_pairs.py
    python recipes/swapped_pairs.py --train_rows 1000 --seeds 5 --validation_rows 150

A pair is a question of the demo, its right answer as the chosen one and another valid answer as the rejected one.
Reported is the AUC of pairs that are the right way round against those that are swapped, mean and standard deviation
over seeds (which rows, which are swapped, which validate), and the share of pairs whose score has the right sign.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from forvalue_callbacks import TINY_MODEL, ForValueConfig, ForValueScorer
from forvalue_callbacks.core.stats import auc
from forvalue_callbacks.tiny import instructions


@dataclass
class PairsConfig:
    model: str = field(default=str(TINY_MODEL), metadata={"help": "Path or hub id of the model."})
    train_rows: int = field(default=600, metadata={"help": "Pairs that are scored."})
    validation_rows: int = field(default=300, metadata={"help": "Pairs that are the right way round, to score by."})
    share: float = field(default=0.3, metadata={"help": "Share of the pairs that are swapped."})
    seeds: int = field(default=3, metadata={"help": "So many seeds."})
    methods: list[str] = field(
        default_factory=lambda: ["gradient", "whitened", "fitted"], metadata={"help": "Methods to score with."}
    )


def pairs(n_rows: int, seed: int, share: float = 0.0) -> tuple[list[dict[str, str]], np.ndarray]:
    """Pairs with 'prompt', 'chosen' and 'rejected', and which of them are swapped."""
    right, wrong = (instructions(n_rows, seed, noise).to_list() for noise in (0.0, 1.0))
    swapped = np.random.default_rng(seed).permutation(n_rows) < round(share * n_rows)
    rows = []
    for good, bad, turned in zip(right, wrong, swapped, strict=True):
        chosen, rejected = (bad, good) if turned else (good, bad)
        rows.append({name: row[key] for name, row, key in (
            ("prompt", good, "prompt"), ("chosen", chosen, "completion"), ("rejected", rejected, "completion")
        )})  # fmt: skip
    return rows, swapped


def main(config: PairsConfig) -> str:
    """The table."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    lines = ["| method | AUC | right sign |", "|---|---|---|"]
    sides = [
        (*pairs(config.train_rows, seed, config.share), pairs(config.validation_rows, seed + 10_001)[0])
        for seed in range(config.seeds)
    ]
    for method in config.methods:
        found = []
        for rows, swapped, validation in sides:
            scorer = ForValueScorer(
                model, validation, ForValueConfig(method=method), processing_class=tokenizer, progress=False
            )
            scores = scorer.score(rows).values
            found.append((auc(scores[~swapped], scores[swapped]), float(((scores < 0) == swapped).mean())))
        (mean, signs), (spread, _) = np.mean(found, 0), np.std(found, 0)
        lines.append(f"| {method} | {mean:.3f} ± {spread:.3f} | {signs:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(main(*HfArgumentParser(PairsConfig).parse_args_into_dataclasses()))
