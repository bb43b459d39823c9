r"""What scoring costs beside the evaluation pass that everyone runs, and how that grows: all side by side in one run.

    python recipes/benchmark_speed.py --shape smollm-135m --rows 96
    python recipes/benchmark_speed.py --shape smollm-135m --rows 32 --memory true
    python recipes/benchmark_speed.py --shape tiny --sweeps rows validation length labelled vocabulary common
    python recipes/benchmark_speed.py --shape tiny --arms pairs --rows 100000 --validation_rows 1000 --memory true \
        --length 16 --shortest 1 --labelled 0.125
    python recipes/benchmark_speed.py --shape qwen2.5-7b --rows 192 --length 1024 --batch_size 16    # on a GPU

Random weights of the true shape (times do not depend on the values), float32 on a CPU, bfloat16 on an accelerator.

    backbone   forward without the head, in the scorer's own batches: the floor
    bound      floor plus two products of the labelled positions with the head: the least that an exact score costs
    scorer     ForValueScorer.score; its direction is computed before, as `direction()`
    evaluation model(**batch) with loss, rows as they come: what an evaluation pass computes
    trainer    Trainer.evaluate()
    sft        SFTTrainer.evaluate(), with its fused head
    algorithm1 the paper's Algorithm 1: errors on the tokens seen, and a matrix (tokens seen) x d for each row
    captum     TracInCPFast on the head, every labelled position an example: the same scores
    gradients  per-sample LoRA gradients (r=8, query and value), which DataInf and its like need after training
    seen       the scorer with vocab="seen", and on the tiny model how far off it is
    direction  the validation side alone: hash of the weights and ForValueScorer.direction
    kept       the same where another process has left the direction in `direction_cache`
    pairs      ForValueScorer.pairwise, to a file
    fitted, auto  all of what such a scorer does, the validation side included
    label_model   the same, on the rows with one of eight answers each; short_answers: the scorer on them

Of the scorer and the methods it is counted, too, how often the model reads a token and how many products with the head
there are for each labelled one, those of the validation side apart.

Writes benchmark_speed.md and, with sweeps, a picture to `output_dir`.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from counting import Work, counted
from data import collate
from influence_report import Meter, known
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import spearmanr
from shapes import SHAPES, random_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from trl import TrlParser

from forvalue_callbacks import TINY_MODEL, ForValueConfig, ForValueScorer, baselines
from forvalue_callbacks.model.plan import plan
from forvalue_callbacks.model.run import tokens_per_batch
from forvalue_callbacks.tiny import instructions

ARMS = ("backbone", "bound", "scorer", "evaluation", "trainer", "sft", "algorithm1", "captum", "seen", "direction")
ARMS += ("kept", "pairs", "fitted", "auto", "label_model", "short_answers")
ARMS += ("gradients",)  # changes the model
# Arms of methods, whose work is counted.
METHOD_ARMS = {"scorer": "gradient", "fitted": "fitted", "auto": "auto", "label_model": "label_model"}
# What is varied alone, all else as in the config.
SWEEPS: dict[str, tuple[str, list[Any]]] = {
    "rows": ("rows", [1000, 4000, 16000]),
    "validation": ("validation_rows", [10, 100, 1000]),
    "length": ("length", [64, 256, 1024]),
    "labelled": ("labelled", [0.1, 0.25, 0.5, 1.0]),
    "vocabulary": ("vocabulary", [32_000, 152_000, 256_000]),
    "common": ("common", [0.0, 0.25, 0.5]),
}
Rows = list[dict[str, list[int]]]


@dataclass
class BenchmarkConfig:
    shape: str = field(default="smollm-135m", metadata={"help": f"One of {sorted(SHAPES)}."})
    rows: int = field(default=32, metadata={"help": "Rows scored."})
    length: int = field(default=256, metadata={"help": "Tokens in the longest row."})
    shortest: float = field(default=0.125, metadata={"help": "Shortest row as a share of it; lengths are uniform."})
    labelled: float = field(default=0.5, metadata={"help": "Share of the tokens that are labelled."})
    common: float = field(
        default=0.0, metadata={"help": "Tokens that all rows begin with, as a share of the longest: a system prompt."}
    )
    vocabulary: int | None = field(default=None, metadata={"help": "Size of the vocabulary; None: the shape's own."})
    validation_rows: int = field(default=4, metadata={"help": "Rows of the validation set."})
    batch_size: int = field(default=8, metadata={"help": "Rows per forward pass of an evaluation, as they come."})
    repeats: int = field(default=3, metadata={"help": "Times every arm is run; medians are printed."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and rows."})
    arms: list[str] = field(default_factory=lambda: list(ARMS[:5]), metadata={"help": f"Some of {', '.join(ARMS)}."})
    sweeps: list[str] = field(
        default_factory=list, metadata={"help": f"What is varied, instead of the arms: some of {', '.join(SWEEPS)}."}
    )
    memory: bool = field(default=False, metadata={"help": "Peak memory of each arm, in a process each, not time."})
    arm: str | None = field(default=None, metadata={"help": "Run this arm once and print its peak memory (internal)."})
    output_dir: str = field(default="outputs/benchmark_speed", metadata={"help": "Where the report goes."})

    def __post_init__(self) -> None:
        known("shape", [self.shape], SHAPES)
        known("arms", self.arms, ARMS)
        known("sweeps", self.sweeps, SWEEPS)


def build(config: BenchmarkConfig) -> tuple[PreTrainedModel, Rows, Rows]:
    """Model, rows, validation rows."""
    model = random_model(config.shape, config.seed, config.vocabulary)
    rng = np.random.default_rng(config.seed)
    vocabulary = model.config.vocab_size
    beginning = rng.integers(3, vocabulary, round(config.common * config.length)).tolist()
    rows = []
    for _ in range(config.rows + config.validation_rows):
        length = round(config.length * (config.shortest + (1 - config.shortest) * rng.random()))
        n_labelled = max(1, round(config.labelled * length))
        ids = beginning + rng.integers(3, vocabulary, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) - n_labelled) + ids[len(ids) - n_labelled :]})
    return model, rows[: config.rows], rows[config.rows :]


def with_few_answers(rows: Rows) -> Rows:
    """The same prompts with one of eight answers of one token each."""
    out = []
    for row in rows:
        prompt = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
        answer = 3 + sum(prompt) % 8
        out.append({"input_ids": [*prompt, answer], "labels": [-100] * len(prompt) + [answer]})
    return out


def as_they_come(rows: Rows, batch_size: int) -> Iterator[Rows]:
    return (rows[i : i + batch_size] for i in range(0, len(rows), batch_size))


def by_length(rows: Rows, max_tokens: int) -> Iterator[Rows]:
    (batches,) = plan([len(row["input_ids"]) for row in rows], max_tokens)
    return ([rows[i] for i in batch.rows] for batch in batches)


def padding(batches: Iterator[Rows]) -> float:
    """Padded tokens for each real one."""
    lengths = [[len(row["input_ids"]) for row in batch] for batch in batches]
    return sum(len(some) * max(some) for some in lengths) / sum(map(sum, lengths))


def arms(config: BenchmarkConfig) -> dict[str, Callable[[], object]]:
    """Each arm as a function that does the whole pass over the rows once."""
    model, train, validation = build(config)
    scorer = ForValueScorer(model, validation, progress=False)
    seen = ForValueScorer(model, validation, ForValueConfig(vocab="seen"), progress=False)
    budget = tokens_per_batch(model.device)
    head = model.get_output_embeddings()
    weight = head.weight.detach()
    other = torch.randn_like(weight)  # the direction: the weight itself would still lie in the cache
    block = 2048 if weight.device.type == "cpu" else 8192

    def states_of(rows: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Last hidden states and the labels that they predict, a batch at a time."""
        for batch in by_length(rows, budget):
            inputs = {k: v.to(model.device) for k, v in collate(batch).items()}
            labels = inputs.pop("labels")[:, 1:]
            inputs = {k: v[:, :-1] for k, v in inputs.items()}  # nothing is predicted from the last token
            yield model.model(**inputs, use_cache=False).last_hidden_state, labels

    def bound() -> None:
        for states, labels in states_of(train):
            hidden = states[labels != -100]
            for lo in range(0, len(weight), block):  # in blocks: T x V must not be held
                _ = hidden @ weight[lo : lo + block].T
                _ = hidden @ other[lo : lo + block].T

    def matrix(hidden: torch.Tensor, labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        errors = -(hidden @ weight.T).float().softmax(-1)
        errors[torch.arange(len(labels)), labels] += 1
        return errors[:, tokens].T @ hidden.float()

    def algorithm1() -> list[float]:
        """Direction and rows on the tokens seen in both, from full-vocabulary probabilities in float32."""
        known_rows = [
            (h[y != -100], y[y != -100]) for batch in states_of(validation) for h, y in zip(*batch, strict=True)
        ]
        out = []
        for states, labels in states_of(train):
            tokens = torch.cat([labels[labels != -100], *(y for _, y in known_rows)]).unique()
            direction = sum(matrix(h, y, tokens) for h, y in known_rows)
            for h, y in zip(states, labels, strict=True):
                out.append(float((matrix(h[y != -100], y[y != -100], tokens) * direction).sum()))
        return out

    def captum() -> torch.Tensor:
        """Positions x validation positions, the sums over which are rows x validation rows."""
        from captum.influence import TracInCPFast

        class Positions(nn.Module):
            def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
                states = model.model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
                return head(states[:, :-1][batch["labels"][:, 1:] != -100])

        def example(batch: Rows) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
            inputs = {k: v.to(model.device) for k, v in collate(batch).items()}
            labels = inputs["labels"][:, 1:]
            return inputs, labels[labels != -100]

        batches = DataLoader([example(batch) for batch in by_length(train, budget)], batch_size=None)
        tracin = TracInCPFast(
            Positions(), head, batches, ["now"], lambda model, checkpoint: 1.0, nn.CrossEntropyLoss(reduction="sum")
        )
        return tracin.influence(example(validation))

    def validation_side(**options: str) -> None:
        fresh = ForValueScorer(model, validation, ForValueConfig(**options), progress=False)
        fresh.provenance()
        fresh.direction()

    def whole(method: str, *, few: bool = False) -> object:
        rows, known_rows = (with_few_answers(side) if few else side for side in (train, validation))
        return ForValueScorer(model, known_rows, ForValueConfig(method), progress=False).score(rows)

    adapted: list[PeftModel] = []

    def gradients() -> object:
        if not adapted:
            adapted.append(get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])))
        return baselines.gradients(adapted[0], train)

    def sft() -> object:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        arguments = {"output_dir": config.output_dir, "per_device_eval_batch_size": config.batch_size}
        arguments |= {"prediction_loss_only": True, "report_to": [], "disable_tqdm": True, "max_length": None}
        arguments |= {"bf16": weight.dtype == torch.bfloat16, "dataset_kwargs": {"skip_prepare_dataset": True}}
        few = Dataset.from_list(train[:1])
        trainer = SFTTrainer(
            model,
            SFTConfig(**arguments),
            collate,
            train_dataset=few,
            processing_class=AutoTokenizer.from_pretrained(TINY_MODEL),
        )
        return trainer.evaluate(Dataset.from_list(train))

    def evaluation() -> None:
        for batch in as_they_come(train, config.batch_size):
            float(model(**{k: v.to(model.device) for k, v in collate(batch).items()}, use_cache=False).loss)

    trainer_args = TrainingArguments(
        output_dir=config.output_dir,
        per_device_eval_batch_size=config.batch_size,
        prediction_loss_only=True,
        report_to=[],
        disable_tqdm=True,
    )
    return {
        "backbone": lambda: [None for _ in states_of(train)],
        "bound": bound,
        "scorer": lambda: (scorer.direction(), scorer.score(train)),
        "evaluation": evaluation,
        "trainer": lambda: Trainer(model, args=trainer_args, data_collator=collate).evaluate(train),
        "sft": sft,
        "algorithm1": algorithm1,
        "captum": captum,
        "seen": lambda: (seen.direction(), seen.score(train)),
        "direction": validation_side,
        "kept": lambda: validation_side(direction_cache=config.output_dir),
        "pairs": lambda: scorer.pairwise(train, Path(config.output_dir) / "pairs.npy"),
        "fitted": lambda: whole("fitted"),
        "auto": lambda: whole("auto"),
        "label_model": lambda: whole("label_model", few=True),
        "short_answers": lambda: whole("gradient", few=True),
        "gradients": gradients,
    }


def measure_time(config: BenchmarkConfig) -> dict[str, float]:
    """Median seconds of each arm, the arms taking turns."""
    runs = {name: run for name, run in arms(config).items() if name in config.arms}
    meter = Meter("wall")
    for run in runs.values():  # warm up; the direction and the hash of the weights are computed here
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(config.repeats):
        for name, run in runs.items():
            seconds[name].append(meter(run).seconds)
    return {name: statistics.median(values) for name, values in seconds.items()}


def count_work(config: BenchmarkConfig) -> list[str]:
    """A table: of the methods among the arms the tokens that the model reads and the products with the head, for each
    token and each labelled one, on the validation side and on the rows."""
    model, train, validation = build(config)
    out = ["| method | side | times each token is read | head products per labelled one |", "|---|---|---|---|"]
    for name in [name for name in METHOD_ARMS if name in config.arms]:
        sides = [with_few_answers(side) if name == "label_model" else side for side in (validation, train)]
        scorer = ForValueScorer(model, sides[0], ForValueConfig(METHOD_ARMS[name]), progress=False)
        both, rows = (counted(model, lambda: scorer.score(sides[1])) for _ in range(2))  # noqa: B023
        for side, some, work in (
            ("validation", sides[0], Work(both.tokens - rows.tokens, both.multiplications - rows.multiplications)),
            ("rows", sides[1], rows),
        ):
            n_tokens = sum(len(row["labels"]) for row in some)
            n_labelled = sum(label != -100 for row in some for label in row["labels"])
            products = work.multiplications / n_labelled / model.get_output_embeddings().weight.numel()
            out.append(f"| {METHOD_ARMS[name]} | {side} | {work.tokens / n_tokens:.2f} | {products:.2f} |")
    return out if len(out) > 2 else []


def measure_memory(config: BenchmarkConfig) -> dict[str, float]:
    """Peak memory of a process that runs one arm, MiB."""
    peaks = {}
    for name in config.arms:
        command = [sys.executable, __file__, *sys.argv[1:], "--arm", name]
        peaks[name] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return peaks


def sweep(config: BenchmarkConfig, name: str) -> list[tuple[float, float, float, float]]:
    """Value, seconds of the validation side, seconds of the rows, and peak MiB above the model, of each step."""
    parameter, values = SWEEPS[name]
    meter, steps = Meter("wall"), []
    for value in values:
        model, train, validation = build(replace(config, **{parameter: value}))
        ForValueScorer(model, validation, progress=False).score(train[:8])  # warm up
        before = meter(lambda: None).peak_mib or float("nan")
        sides, rows, peaks = [], [], []
        for _ in range(config.repeats):
            scorer = ForValueScorer(model, validation, progress=False)
            first = meter(lambda: (scorer.provenance(), scorer.direction()))  # noqa: B023
            second = meter(lambda: scorer.score(train))  # noqa: B023
            sides.append(first.seconds)
            rows.append(second.seconds)
            peaks.append(max(p for p in (first.peak_mib, second.peak_mib, 0.0) if p is not None) - before)
        steps.append((value, statistics.median(sides), statistics.median(rows), max(peaks)))
        print(f"{name} {value}: {steps[-1][1]:.3f} s + {steps[-1][2]:.3f} s, {steps[-1][3]:.0f} MiB", flush=True)
    return steps


def exponent(steps: list[tuple[float, ...]], column: int) -> str:
    """Slope of the logarithm against the logarithm, least squares."""
    x, y = (np.log([step[k] for step in steps if step[0] > 0 and step[column] > 0]) for k in (0, column))
    return f"{np.polyfit(x, y, 1)[0]:.2f}" if len(x) > 2 else ""


def error_of_seen() -> str:
    """How far vocab="seen" is from the exact score, on rows that the tiny model knows."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    train, validation = instructions(500, seed=0, noise=0.3), instructions(100, seed=1)
    exact, approximate = (
        ForValueScorer(model, validation, ForValueConfig(vocab=vocab), processing_class=tokenizer, progress=False)
        .score(train)
        .values
        for vocab in ("full", "seen")
    )
    error = np.abs(approximate - exact).max() / np.abs(exact).max()
    rank = spearmanr(exact, approximate).statistic
    return (
        f"vocab='seen' on the pretrained tiny model, 500 generated rows, 30 % noisy, 100 validation rows: largest "
        f"error {error:.3f} of the largest score, rank correlation with the exact score {rank:.3f}."
    )


def picture(sweeps: dict[str, list[tuple[float, float, float, float]]], path: Path) -> None:
    from matplotlib.figure import Figure  # here, so that machines without it can measure

    figure = Figure(figsize=(3.2 * len(sweeps), 3.2), layout="constrained")
    for axes, (name, steps) in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps.items(), strict=True):
        values, sides, rows, _ = zip(*steps, strict=True)
        axes.plot(values, rows, "o-", color="tab:orange", label="scoring")
        axes.plot(values, sides, "o-", color="tab:blue", label="validation side")
        if min(values) > 0:
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(SWEEPS[name][0])
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=80)


def where() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, float32"
    if accelerator is not None:
        machine = f"{torch.cuda.get_device_name() if accelerator.type == 'cuda' else accelerator}, bfloat16"
    return f"{machine}; torch {torch.__version__}, transformers {transformers.__version__}"


@torch.no_grad()
def main(config: BenchmarkConfig) -> str:
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if config.arm is not None:
        print(json.dumps(Meter("wall")(arms(config)[config.arm]).peak_mib))
        return ""
    out = [
        f"{config.shape}, {config.rows} rows of up to {config.length} tokens, {config.labelled:.0%} labelled, "
        f"{config.validation_rows} validation rows, seed {config.seed}; {where()}; medians of {config.repeats}.",
        "",
    ]
    if config.memory:
        peaks, shape = measure_memory(config), SHAPES[config.shape]
        heads = 2 * (config.vocabulary or shape.vocab_size) * shape.hidden_size * 4 / 2**20
        out += ["| arm | peak MiB |", "|---|---|", *(f"| {name} | {peak:.0f} |" for name, peak in peaks.items())]
        if "backbone" in peaks:
            allowed = peaks["backbone"] + heads
            out += ["", f"backbone + two heads of {heads / 2:.0f} MiB: {allowed:.0f} MiB"]
            out[-1] += f"; the scorer takes {peaks['scorer'] / allowed:.2f} of it" if "scorer" in peaks else ""
    elif config.sweeps:
        sweeps = {name: sweep(config, name) for name in config.sweeps}
        out += ["| varied | value | validation side s | scoring s | MiB above the model |", "|---|---|---|---|---|"]
        for name, steps in sweeps.items():
            out += [f"| {SWEEPS[name][0]} | {v} | {a:.3f} | {b:.3f} | {m:.0f} |" for v, a, b, m in steps]
            out.append(f"| | exponent | {' | '.join(exponent(steps, column) for column in (1, 2, 3))} |")
        picture(sweeps, folder / "benchmark_speed.png")
    else:
        medians = measure_time(config)
        _, train, _ = build(config)
        loose, tight = as_they_come(train, config.batch_size), by_length(train, tokens_per_batch(None))
        out += ["| arm | seconds | scorer / arm |", "|---|---|---|"]
        for name, value in medians.items():
            ratio = f"{medians['scorer'] / value:.2f}" if "scorer" in medians else ""
            out.append(f"| {name} | {value:.3f} | {ratio} |")
        out += [
            "",
            f"Padded tokens for each real one: {padding(loose):.2f} as they come, {padding(tight):.2f} by length.",
        ]
        out += ["", *count_work(config)]
        out += ["", error_of_seen()] if "seen" in medians else []
        if torch.accelerator.is_available():
            out += ["", f"Peak memory {torch.accelerator.max_memory_allocated() / 2**30:.1f} GiB."]
    text = "\n".join([*out, ""])
    (folder / "benchmark_speed.md").write_text(text)
    print(text)
    return text


if __name__ == "__main__":
    main(*TrlParser((BenchmarkConfig,)).parse_args_and_config())
