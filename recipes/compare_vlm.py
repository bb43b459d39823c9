"""For-Value against influence functions and cheap rivals on tasks with images (arXiv 2508.10180, Table 2).

    python recipes/compare_vlm.py --config recipes/compare_vlm.yaml
    python recipes/compare_vlm.py --tasks subject --pretraining_rows 1000

A Llava around the tiny language model first learns to caption images drawn here, in less than three minutes; then
every method scores the rows of the tasks, as `compare_influence.py` does for text:

    subject           30 subjects, three training images each; captions name the kind of thing, not its colour
    style             cartoons, pixel art and sketches; captions do not say which
    style_named       the same pictures with captions that do
    animals_30        cats and dogs, 30 % of the training answers wrong; relevant is a clean row of the same answer
    animals_50        the same, half of the answers wrong
    captions_30       captions that hardly repeat, 30 % of them of another picture; relevant names its shape rightly

For-Value scores them through `ForValueScorer(..., data_collator=...)`. Writes compare_vlm.csv, .md and .png.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from influence_comparison import Labels, Rows, compare, train_epochs
from influence_report import CLOCKS, ComparisonConfig, Result, known, write
from torch import Tensor
from transformers import PreTrainedModel
from trl import TrlParser
from vlm_tasks import (
    Collator,
    Example,
    animal_rows,
    caption_rows,
    pretraining_rows,
    style_rows,
    subject_rows,
    untrained_vlm,
)

from forvalue_callbacks import baselines

TASKS = {
    "subject": lambda seed, config: subject_rows(seed),
    "style": lambda seed, config: style_rows(seed, config.style_rows, config.style_rows // 4),
    "style_named": lambda seed, config: style_rows(seed, config.style_rows, config.style_rows // 4, named=True),
    "animals_30": lambda seed, config: animal_rows(seed, 0.3, config.animal_rows, config.animal_rows // 4),
    "animals_50": lambda seed, config: animal_rows(seed, 0.5, config.animal_rows, config.animal_rows // 4),
    "captions_30": lambda seed, config: caption_rows(seed, 0.3, 2 * config.animal_rows),
}


@dataclass
class VLMConfig(ComparisonConfig):
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Some of the tasks."})
    pretraining_rows: int = field(default=4000, metadata={"help": "Captioned images that the model learns from."})
    pretraining_epochs: int = field(default=4, metadata={"help": "Epochs over them."})
    pretraining_rate: float = field(default=1e-3, metadata={"help": "Learning rate there, falling linearly to 0."})
    style_rows: int = field(default=200, metadata={"help": "Training rows per style; a quarter more for validation."})
    animal_rows: int = field(default=400, metadata={"help": "Training rows per animal; a quarter for validation."})

    def __post_init__(self) -> None:
        super().__post_init__()
        known("tasks", self.tasks, TASKS)


def pretrained(config: VLMConfig, collator: Collator) -> tuple[PreTrainedModel, str]:
    """The model after it has learnt to caption, its head still the tiny model's; and how well it does."""
    model = untrained_vlm(collator, seed=0)
    model.requires_grad_(True)
    settings = ComparisonConfig(epochs=config.pretraining_epochs, learning_rate=config.pretraining_rate)
    rows = collator.rows(pretraining_rows(config.pretraining_rows, seed=0))
    for epoch, (loss, _) in enumerate(train_epochs(model, rows, settings, seed=0), 1):
        print(f"pretraining, epoch {epoch}: loss {loss:.3f}", flush=True)
    unseen = collator.rows(pretraining_rows(300, seed=1))
    loss = -float(baselines.loss(model, unseen).mean())
    _, animals = animal_rows(0, 0.0, 1, 100)
    other = [{**row, "completion": f" It is a {'dog' if row['label'] == 'cat' else 'cat'}."} for row in animals]
    right, wrong = (baselines.loss(model, collator.rows(side)) for side in (animals, other))
    accuracy = float((right > wrong).double().mean())
    return model.eval(), f"test loss {loss:.3f} a token, {accuracy:.0%} of the animals named rightly"


def pixels_cosine(train: list[dict[str, Tensor]], validation: list[dict[str, Tensor]]) -> Tensor:
    """Cosine of the images themselves, the mean image taken out, (N, M)."""
    sides = [torch.stack([row["pixel_values"].flatten() for row in side]).double() for side in (train, validation)]
    mean = sides[0].mean(0)
    left, right = (torch.nn.functional.normalize(side - mean, dim=1) for side in sides)
    return left @ right.T


def labels(train: list[Example], validation: list[Example]) -> Labels:
    same = np.array([[row["label"] == other["label"] for other in validation] for row in train])
    if "clean" not in train[0]:
        return Labels(same)
    clean = np.array([row["clean"] for row in train])
    shown, true = (np.array([row["label"] for row in side]) for side in (train, validation))
    return Labels(same & clean[:, None], clean, shown, true)


def compare_task(config: VLMConfig, state: dict[str, Tensor], task: str, seed: int) -> tuple[list[Result], list[str]]:
    collator = Collator()
    model = untrained_vlm(collator, seed=0)
    model.load_state_dict(state)
    raw_train, raw_validation = TASKS[task](seed, config)
    train, validation = collator.rows(raw_train), collator.rows(raw_validation)
    texts, validation_texts = (
        [f"{row['prompt']}{row['completion']}" for row in side] for side in (raw_train, raw_validation)
    )
    cheap = {
        "Emb": lambda: baselines.emb(model, train, validation),
        "Emb, cosine": lambda: baselines.emb(model, train, validation, cosine=True),
        "RDS+": lambda: baselines.rds_plus(model, train, validation),
        "loss": lambda: baselines.loss(model, train),
        "TF-IDF of the text": lambda: baselines.tfidf(texts, validation_texts),
        "cosine of the pixels": lambda: pixels_cosine(train, validation),
        "random": lambda: baselines.random_scores(len(train), len(validation), seed=seed),
    }
    rows = Rows(train, validation, raw_train, raw_validation, collator, collator.prepare.processing_class)
    return compare(config, task, seed, model.eval(), rows, labels(raw_train, raw_validation), cheap)


def main(config: VLMConfig) -> list[Result]:
    now = CLOCKS[config.clock]
    started = now()
    model, ability = pretrained(config, Collator())
    head = (
        "# For-Value against influence functions on generated image tasks\n\n"
        f"Llava of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters, taught to caption by "
        f"{config.pretraining_rows} images in {now() - started:.0f} s: {ability}. subject: 90 and 60 rows; style: "
        f"{3 * config.style_rows} and {3 * (config.style_rows // 4)}; animals: {2 * config.animal_rows} and "
        f"{2 * (config.animal_rows // 4)}; captions: {2 * config.animal_rows} and 150."
    )
    results: list[Result] = []
    notes: list[str] = []
    for seed, task in product(range(config.seeds), config.tasks):
        more, more_notes = compare_task(config, model.state_dict(), task, seed)
        results += more
        notes += more_notes
        text = write(config, head, results, notes, now() - started, "compare_vlm")
    print(text)
    return results


if __name__ == "__main__":
    (vlm_config,) = TrlParser((VLMConfig,)).parse_args_and_config()
    main(vlm_config)
