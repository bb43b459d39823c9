"""What For-Value costs beside DataInf on the true shapes of language models (the paper's Figure 4).

    python recipes/compare_influence_cost.py
    python recipes/compare_influence_cost.py --shapes tiny --rows 64 --validation_rows 8

Random weights and random tokens: times do not depend on the values. bfloat16 on an accelerator (torch 2.9 or later); a
CPU runs the tiny shape alone, in float32, and the table says of the others that they were not run. Medians over the
repeats, everything side by side in one process.

DataInf's cost comes in three phases: LoRA training, per-sample gradients of both sides at its end, and the influence
itself. One epoch is trained and its time multiplied by the number of epochs, which are alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from influence_comparison import train_epochs, with_lora
from influence_report import ComparisonConfig, Measured, Meter, known
from shapes import SHAPES, random_model
from trl import TrlParser

from forvalue_callbacks import ForValueScorer, baselines

# Padded tokens in one backward pass: the activations of a 7B model leave room for no more on 80 GB.
GRADIENT_TOKENS = 4096


@dataclass
class CostConfig:
    shapes: list[str] = field(default_factory=lambda: list(SHAPES), metadata={"help": f"Some of {list(SHAPES)}."})
    rows: int = field(default=900, metadata={"help": "Training rows."})
    validation_rows: int = field(default=100, metadata={"help": "Validation rows."})
    length: int = field(default=64, metadata={"help": "Tokens in the longest row; lengths are uniform from half."})
    labelled: float = field(default=1 / 3, metadata={"help": "Share of a row's tokens that are its answer."})
    epochs: int = field(default=10, metadata={"help": "Epochs of LoRA training that DataInf is charged with."})
    repeats: int = field(default=3, metadata={"help": "Times everything is run; medians are printed."})
    output: str | None = field(default=None, metadata={"help": "File that the table is written to as well."})

    def __post_init__(self) -> None:
        known("shapes", self.shapes, SHAPES)


def random_rows(config: CostConfig, vocab_size: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(config.rows + config.validation_rows):
        length = int(torch.randint(config.length // 2, config.length + 1, (), generator=generator))
        ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        prompt = round(length * (1 - config.labelled))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


class Medians:
    """Median seconds, and the largest peak of memory in GiB, of each named call."""

    def __init__(self) -> None:
        self.meter = Meter("wall")
        self.calls: dict[str, list[Measured]] = {}

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        measured = self.meter(function)
        self.calls.setdefault(name, []).append(measured._replace(value=None))
        return measured.value

    def median(self, name: str) -> float:
        return statistics.median(call.seconds for call in self.calls[name])

    def peak(self, *names: str) -> float | None:
        peaks = [call.peak_mib for name in names for call in self.calls[name] if call.peak_mib is not None]
        return max(peaks) / 1024 if peaks else None


def measure(config: CostConfig, shape: str) -> list[tuple[str, float, float | None]]:
    """Rows of the table: what, seconds, GiB."""
    model = random_model(shape)
    rows = random_rows(config, SHAPES[shape].vocab_size)
    train, validation = rows[: config.rows], rows[config.rows :]
    meter = Medians()

    def scorer() -> ForValueScorer:  # a new one each time: the validation side is part of the cost
        return ForValueScorer(model, validation, progress=False)

    scorer().score(train[:8])  # warm up
    for _ in range(config.repeats):
        meter("evaluation", lambda: baselines.loss(model, rows))
        meter("score", lambda: scorer().score(train))
        meter("pairs", lambda: scorer().pairwise(train))
    lora = with_lora(model, ComparisonConfig(), seed=0)
    epochs = train_epochs(lora, train, ComparisonConfig(epochs=config.repeats + 1), seed=0)
    next(epochs)  # warm up

    def gradients() -> list[dict[str, torch.Tensor]]:
        return [baselines.gradients(lora, side, max_tokens_per_batch=GRADIENT_TOKENS) for side in (train, validation)]

    def gradients_and_influence() -> None:  # a function, so that no gradients are kept while the next are computed
        meter("influence", partial(baselines.datainf, *meter("gradients", gradients)))

    for _ in range(config.repeats):
        meter("epoch", lambda: next(epochs))
        gradients_and_influence()
    training = config.epochs * meter.median("epoch")
    whole = training + meter.median("gradients") + meter.median("influence")
    return [
        ("one evaluation pass", meter.median("evaluation"), meter.peak("evaluation")),
        ("For-Value, score()", meter.median("score"), meter.peak("score")),
        ("For-Value, pairwise", meter.median("pairs"), meter.peak("pairs")),
        (f"DataInf, training ({config.epochs} times one epoch)", training, meter.peak("epoch")),
        ("DataInf, gradients", meter.median("gradients"), meter.peak("gradients")),
        ("DataInf, influence", meter.median("influence"), meter.peak("influence")),
        ("DataInf, whole", whole, meter.peak("epoch", "gradients", "influence")),
    ]


def main(config: CostConfig) -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    where = f"CPU, {torch.get_num_threads()} threads, float32"
    if accelerator is not None:
        where = f"{torch.cuda.get_device_name() if accelerator.type == 'cuda' else accelerator}, bfloat16"
    out = [
        f"{config.rows} x {config.validation_rows} rows of {config.length // 2} to {config.length} tokens, "
        f"{config.labelled:.0%} labelled; {where}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}; medians of {config.repeats}.",
        "",
        "| shape | what | seconds | evaluation passes | DataInf, whole / this | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for shape in config.shapes:
        if accelerator is None and shape != "tiny":
            out.append(f"| {shape} | not run: no accelerator | | | | |")
            continue
        lines = measure(config, shape)
        passes, whole = lines[0][1], lines[-1][1]
        for what, seconds, peak in lines:
            memory = "not measured" if peak is None else f"{peak:.1f}"
            out.append(
                f"| {shape} | {what} | {seconds:.3f} | {seconds / passes:.2f} | {whole / seconds:.1f} | {memory} |"
            )
            print(out[-1], flush=True)
    text = "\n".join([*out, ""])
    print(f"\n{text}")
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text(text)
    return text


if __name__ == "__main__":
    main(*TrlParser((CostConfig,)).parse_args_and_config())
