"""What scoring costs beside the evaluation pass that everyone runs: medians and ratios, side by side in one run.

    python recipes/benchmark_speed.py --shape smollm-135m --rows 32 --repeats 3
    python recipes/benchmark_speed.py --shape smollm-135m --rows 32 --memory true
    python recipes/benchmark_speed.py --shape qwen2.5-7b --rows 256 --length 1024 --batch_size 16    # on a GPU

Random weights of the true shape (times do not depend on the values), float32 on a CPU, bfloat16 on an accelerator.

    backbone   forward without the head, rows sorted by length: the floor
    bound      floor plus two products of the labelled positions with the head: the least that an exact score costs
    scorer     ForValueScorer.score
    evaluation model(**batch) with loss, rows as they come: what an evaluation pass computes
    trainer    Trainer.evaluate()
    sft        SFTTrainer.evaluate(), with its fused head
    algorithm1 the paper's Algorithm 1: errors on the tokens seen, and a matrix (tokens seen) x d for each row
    gradients  per-sample LoRA gradients (r=8, query and value), which DataInf and its like need after training
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shapes import SHAPES, random_model
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from forvalue_callbacks import TINY_MODEL, ForValueConfig, ForValueScorer, baselines

ARMS = ("backbone", "bound", "scorer", "evaluation", "trainer", "sft", "algorithm1", "gradients")


@dataclass
class BenchmarkConfig:
    shape: str = field(default="smollm-135m", metadata={"help": f"One of {sorted(SHAPES)}."})
    rows: int = field(default=32, metadata={"help": "Rows scored."})
    length: int = field(default=256, metadata={"help": "Tokens in the longest row."})
    shortest: float = field(default=0.125, metadata={"help": "Shortest row as a share of it; lengths are uniform."})
    labelled: float = field(default=0.5, metadata={"help": "Share of the tokens that are labelled."})
    validation_rows: int = field(default=4, metadata={"help": "Rows of the validation set (not timed)."})
    batch_size: int = field(default=8, metadata={"help": "Rows per forward pass, in every arm."})
    repeats: int = field(default=3, metadata={"help": "Times every arm is run; medians are printed."})
    seed: int = field(default=0, metadata={"help": "Seed of weights and rows."})
    arms: list[str] = field(default_factory=lambda: list(ARMS[:5]), metadata={"help": f"Some of {', '.join(ARMS)}."})
    memory: bool = field(default=False, metadata={"help": "Peak memory of each arm, in a process each, not time."})
    arm: str | None = field(default=None, metadata={"help": "Run this arm once and print its peak memory (internal)."})


def build(config: BenchmarkConfig) -> tuple[PreTrainedModel, list[dict[str, list[int]]]]:
    model = random_model(config.shape, config.seed)
    rows = []
    for _ in range(config.rows + config.validation_rows):
        length = round(config.length * (config.shortest + (1 - config.shortest) * float(torch.rand(()))))
        ids = torch.randint(3, SHAPES[config.shape].vocab_size, (length,)).tolist()
        prompt = round(length * (1 - config.labelled))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return model, rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": pad("input_ids", 0), "attention_mask": mask, "labels": pad("labels", -100)}


def arms(config: BenchmarkConfig) -> dict[str, Callable[[], object]]:
    """Each arm as a function that does the whole pass over the rows once."""
    model, rows = build(config)
    train, validation = rows[: config.rows], rows[config.rows :]

    def batched(rows):
        for i in range(0, len(rows), config.batch_size):
            yield {k: v.to(model.device) for k, v in collate(rows[i : i + config.batch_size]).items()}

    by_length = sorted(train, key=lambda row: len(row["input_ids"]))
    settings = ForValueConfig(max_tokens_per_batch=config.batch_size * config.length)
    scorer = ForValueScorer(model, validation, settings, progress=False)
    weight = model.get_output_embeddings().weight.detach()
    block = 2048 if weight.device.type == "cpu" else 8192

    def hidden_states():
        for batch in batched(by_length):
            labels = batch.pop("labels")
            yield model.model(**batch, use_cache=False).last_hidden_state[:, :-1][labels[:, 1:] != -100]

    def bound():
        for hidden in hidden_states():
            for lo in range(0, len(weight), block):  # in blocks: T x V must not be held
                _ = hidden @ weight[lo : lo + block].T
                _ = hidden @ weight[lo : lo + block].T

    def algorithm1():
        """Direction and rows on the tokens seen in both, from full-vocabulary probabilities in float32."""
        known, out = [rows_of(batch) for batch in batched(validation)], []
        for batch in batched(by_length):
            states, labels = rows_of(batch)
            seen = torch.cat([*labels, *(label for _, some in known for label in some)]).unique()
            direction = sum(matrix(h, y, seen) for some, theirs in known for h, y in zip(some, theirs, strict=True))
            out += [float((matrix(h, y, seen) * direction).sum()) for h, y in zip(states, labels, strict=True)]
        return out

    def rows_of(batch):
        labels = batch.pop("labels")[:, 1:]
        states = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
        return [h[y != -100] for h, y in zip(states, labels, strict=True)], [y[y != -100] for y in labels]

    def matrix(hidden, labels, seen):
        errors = -(hidden @ weight.T).float().softmax(-1)
        errors[torch.arange(len(labels)), labels] += 1
        return errors[:, seen].T @ hidden.float()

    adapted: list[PeftModel] = []

    def gradients():
        if not adapted:  # the last arm: it changes the model
            adapted.append(get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])))
        return baselines.gradients(adapted[0], train, max_tokens_per_batch=config.batch_size * config.length)

    def sft():
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        arguments = {"output_dir": "outputs/benchmark", "per_device_eval_batch_size": config.batch_size}
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

    trainer_args = TrainingArguments(
        output_dir="outputs/benchmark",
        per_device_eval_batch_size=config.batch_size,
        prediction_loss_only=True,
        report_to=[],
        disable_tqdm=True,
    )
    return {
        "backbone": lambda: [None for _ in hidden_states()],
        "bound": bound,
        "scorer": lambda: (scorer.direction(), scorer.score(train)),
        "evaluation": lambda: [float(model(**batch, use_cache=False).loss) for batch in batched(train)],
        "trainer": lambda: Trainer(model, args=trainer_args, data_collator=collate).evaluate(train),
        "sft": sft,
        "algorithm1": algorithm1,
        "gradients": gradients,
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_time(config: BenchmarkConfig) -> dict[str, float]:
    runs = {name: run for name, run in arms(config).items() if name in config.arms}

    def finish() -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    for run in runs.values():  # warm up; the direction is computed here
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(config.repeats):
        for name, run in runs.items():
            finish()
            started = time.perf_counter()
            run()
            finish()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_memory(config: BenchmarkConfig) -> dict[str, float]:
    """Peak resident memory of a process that runs one arm, MiB."""
    peaks = {}
    for name in config.arms:
        command = [sys.executable, __file__, *sys.argv[1:], "--arm", name]
        peaks[name] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return peaks


@torch.no_grad()
def main(config: BenchmarkConfig) -> dict[str, float]:
    if config.arm is not None:
        arms(config)[config.arm]()
        print(json.dumps(peak_mib()))
        return {}
    where = torch.accelerator.current_accelerator(check_available=True) or f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{config.shape}, {config.rows} rows of up to {config.length} tokens, {config.labelled:.0%} labelled, {where}"
    )
    if config.memory:
        peaks = measure_memory(config)
        shape = SHAPES[config.shape]
        head = shape.vocab_size * shape.hidden_size * 4 / 2**20
        print("| arm | peak MiB |\n|---|---|\n" + "\n".join(f"| {k} | {v:.0f} |" for k, v in peaks.items()))
        print(
            f"allowed for the scorer: evaluation + two heads of {head:.0f} MiB = {peaks['evaluation'] + 2 * head:.0f}"
        )
        return peaks
    medians = measure_time(config)
    if torch.cuda.is_available():
        print(
            f"{torch.cuda.get_device_name()}, peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB in all"
        )
    print("| arm | seconds | scorer / arm |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.3f} | {medians['scorer'] / value:.2f} |")
    return medians


if __name__ == "__main__":
    main(*HfArgumentParser(BenchmarkConfig).parse_args_into_dataclasses())
