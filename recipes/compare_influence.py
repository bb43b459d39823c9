"""For-Value against influence functions and cheap rivals on the text tasks of arXiv 2508.10180 (Table 1).

    python recipes/compare_influence.py --config recipes/compare_influence.yaml
    python recipes/compare_influence.py --seeds 1 --tasks math --losses answer

Ten classes of rows per task: a method is good if, for each validation row, the training rows of its class score
highest. AUC of `same class` against the score, and recall: the share of the n_class best-scored rows that are of the
class; mean and standard deviation over the validation rows. One convention for all gradients: labelled tokens, summed.

`answer` labels the answers alone, `full` all tokens. With `full` the prompts give the class away: read `answer` first.
LoRA methods are read at several checkpoints (0: before training). The paper reports the best one,
which nobody knows in practice: here are the best, the last, and the range.

Writes results.csv (one line per method, checkpoint and seed), results.md and results.png to `output_dir`.
"""

from __future__ import annotations

import csv
import dataclasses
import platform
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers
from influence_tasks import TASKS, task_rows
from matplotlib.figure import Figure
from scipy.stats import rankdata
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from forvalue_callbacks import TINY_MODEL, ForValueConfig, ForValueScorer, baselines
from forvalue_callbacks.baselines.batches import batches, prepared
from forvalue_callbacks.rows import RowConfig, RowPreparer

LORA_METHODS: dict[str, Callable[..., Tensor]] = {
    "Hessian-free (TracIn)": baselines.tracin,
    "DataInf": baselines.datainf,
    "HyperINF, solved": baselines.hyperinf,
    "LiSSA, 10 steps": baselines.lissa,
    "influence, exact inverse": baselines.exact_influence,
}
SCHULZ = "HyperINF, 30 Schulz steps"
TRACIN_CP = "TracIn, all checkpoints"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LOSSES = ["answer", "full"]


@dataclass
class CompareConfig:
    model: str = field(default=str(TINY_MODEL), metadata={"help": "Path or hub id of a causal language model."})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Some of the tasks."})
    losses: list[str] = field(
        default_factory=lambda: ["answer", "full"],
        metadata={"help": "'answer': the answers are labelled; 'full': all."},
    )
    seeds: int = field(default=1, metadata={"help": "Seeds 0, 1, ...: of the rows, of LoRA and of the training."})
    train_per_class: int = field(default=90, metadata={"help": "Training rows of each of the ten classes."})
    validation_per_class: int = field(default=10, metadata={"help": "Validation rows of each class."})
    epochs: int = field(default=10, metadata={"help": "Epochs of LoRA training."})
    checkpoints: list[int] = field(
        default_factory=lambda: [0, 1, 3, 10],
        metadata={"help": "Epochs after which the LoRA methods are read; 0: before training."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of LoRA, falling linearly to 0."})
    batch_size: int = field(default=16, metadata={"help": "Rows per training step."})
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA."})
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"], metadata={"help": "Modules that LoRA adapts."}
    )
    clock: str = field(
        default="wall", metadata={"help": "Time is 'wall' time, or 'cpu' time (of all threads) on a busy machine."}
    )
    output_dir: str = field(default="outputs/compare_influence", metadata={"help": "Where the results go."})

    def __post_init__(self) -> None:
        for name, values, known in (
            ("tasks", self.tasks, TASKS),
            ("losses", self.losses, LOSSES),
            ("clock", [self.clock], CLOCKS),
        ):
            for value in values:
                if value not in known:
                    raise ValueError(f"{name}: {value!r} is none of {list(known)}.")
        self.checkpoints = sorted({c for c in self.checkpoints if c < self.epochs} | {self.epochs})


class Result(NamedTuple):
    """One line of results.csv: seconds in phases, each for all the rows of both sides."""

    task: str
    loss: str
    seed: int
    method: str
    checkpoint: int | None  # epochs trained; None: no LoRA
    auc: float
    auc_std: float
    recall: float
    recall_std: float
    training_s: float
    gradients_s: float
    scoring_s: float
    evaluation_passes: float
    training_loss: float | None = None

    @property
    def seconds(self) -> float:
        return self.training_s + self.gradients_s + self.scoring_s


def quality(scores_NM: Tensor, same_NM: np.ndarray) -> dict[str, float]:
    """AUC and recall per validation row: their means and standard deviations."""
    scores = scores_NM.double().cpu().numpy()
    n_same = same_NM.sum(0)
    ranks = rankdata(scores, axis=0)  # ties share their mean rank
    aucs = ((ranks * same_NM).sum(0) - n_same * (n_same + 1) / 2) / (n_same * (len(same_NM) - n_same))
    order = np.argsort(-scores, axis=0, kind="stable")
    recalls = [same[best[: same.sum()]].mean() for same, best in zip(same_NM.T, order.T, strict=True)]
    return {
        "auc": float(np.mean(aucs)),
        "auc_std": float(np.std(aucs)),
        "recall": float(np.mean(recalls)),
        "recall_std": float(np.std(recalls)),
    }


class Stopwatch:
    """Seconds of a call, by the clock of the config."""

    def __init__(self, clock: str):
        self.now = CLOCKS[clock]

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, float]:
        started = self.now()
        out = function()
        return out, self.now() - started


def directions() -> list[str]:
    """All directions that the scorer knows."""
    (spec,) = (spec for spec in dataclasses.fields(ForValueConfig) if spec.name == "direction")
    return list(spec.metadata["choices"])


def train_epochs(model, rows, config: CompareConfig, seed: int) -> Iterator[tuple[float, float]]:
    """LoRA training by AdamW, an epoch at a time: yields the epoch's mean loss and mean learning rate."""
    items = prepared(rows)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    n_steps = config.epochs * -(-len(rows) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / n_steps, n_steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.epochs):
        losses, rates = [], []
        for chosen in torch.randperm(len(rows), generator=generator).split(config.batch_size):
            (batch,) = batches([items[i] for i in chosen], 10**9, model.device)
            model.train()
            loss = model(**batch.inputs, labels=batch.labels).loss
            loss.backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        model.eval()
        yield float(np.mean(losses)), float(np.mean(rates))


def compare(config: CompareConfig, task: str, loss: str, seed: int) -> tuple[list[Result], list[str]]:
    """All methods on one task, and notes: residuals, times of `score()`, directions without pairwise scores."""
    raw_train, raw_validation = task_rows(task, seed, config.train_per_class, config.validation_per_class)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    prepare = RowPreparer(tokenizer, RowConfig(completion_only_loss=loss == "answer"))
    train, validation = ([tokenised(prepare(row)) for row in side] for side in (raw_train, raw_validation))
    same = np.array([[row["label"] == other["label"] for other in raw_validation] for row in raw_train])
    n, m = same.shape
    results: list[Result] = []
    notes: list[str] = []

    timed = Stopwatch(config.clock)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    evaluation_s = min(timed(lambda: baselines.loss(model, [*train, *validation]))[1] for _ in range(2))

    def add(
        method: str, scores: Tensor, scoring_s: float, checkpoint=None, training=0.0, gradients=0.0, loss_now=None
    ):
        scores = scores if scores.ndim == 2 else scores[:, None].expand(n, m)
        passes = (training + gradients + scoring_s) / evaluation_s
        measured = quality(scores, same)
        results.append(
            Result(
                task, loss, seed, method, checkpoint, **measured, training_s=training, gradients_s=gradients,
                scoring_s=scoring_s, evaluation_passes=passes, training_loss=loss_now,
            )
        )  # fmt: skip
        where = "" if checkpoint is None else f" after {checkpoint} epochs"
        print(f"{task} {loss} seed {seed}: {method}{where}: AUC {measured['auc']:.3f}", flush=True)

    score_s: dict[str, float] = {}
    for direction in directions():
        scorer = ForValueScorer(model, validation, ForValueConfig(direction=direction), progress=False)
        try:
            add(f"For-Value, {direction}", *timed(partial(scorer.pairwise, train)))
        except ValueError as error:
            notes.append(f"For-Value, {direction}: no pairwise scores ({error})")
        scorer = ForValueScorer(model, validation, ForValueConfig(direction=direction), progress=False)
        _, score_s[direction] = timed(partial(scorer.score, train))
    texts, validation_texts = (
        [f"{row['prompt']}{row['completion']}" for row in side] for side in (raw_train, raw_validation)
    )
    answers, validation_answers = ([row["completion"] for row in side] for side in (raw_train, raw_validation))
    cheap = {
        "Emb": lambda: baselines.emb(model, train, validation),
        "Emb, cosine": lambda: baselines.emb(model, train, validation, cosine=True),
        "RDS+": lambda: baselines.rds_plus(model, train, validation),
        "loss": lambda: baselines.loss(model, train),
        "IFD": lambda: baselines.ifd(model, train),
        "mutual information": lambda: baselines.pmi(model, train),
        "TF-IDF of the text": lambda: baselines.tfidf(texts, validation_texts),
        "TF-IDF of the answer": lambda: baselines.tfidf(answers, validation_answers),
        "random": lambda: baselines.random_scores(n, m, seed=seed),
    }
    for method, score in cheap.items():
        add(method, *timed(score))

    torch.manual_seed(seed)
    lora = peft.LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=config.lora_targets)
    model = peft.get_peft_model(model, lora).eval()
    epochs = train_epochs(model, train, config, seed)
    training_s = all_gradients_s = 0.0
    loss_now, rates = None, list[float]()
    over_checkpoints = torch.zeros(n, m)
    for checkpoint in range(config.epochs + 1):
        if checkpoint > 0:
            (loss_now, rate), seconds = timed(partial(next, epochs))
            training_s += seconds
            rates.append(rate)
        if checkpoint not in config.checkpoints:
            continue
        sides, gradients_s = timed(lambda: tuple(baselines.gradients(model, side) for side in (train, validation)))
        residuals: dict[str, float] = {}
        published = partial(baselines.hyperinf, iterations=30, residuals=residuals)
        for method, influence in {**LORA_METHODS, SCHULZ: published}.items():
            add(method, *timed(partial(influence, *sides)), checkpoint, training_s, gradients_s, loss_now)
        values = sorted(residuals.values())
        notes.append(
            f"{task}, {loss}, seed {seed}, after {checkpoint} epochs: residuals of HyperINF's 30 Schulz steps, "
            f"median {np.median(values):.2g}, largest {values[-1]:.2g}"
        )
        if checkpoint > 0:
            # Each checkpoint stands for the epochs since the one before it.
            over_checkpoints += sum(rates) * baselines.tracin(*sides).cpu()
            rates.clear()
            all_gradients_s += gradients_s
    add(TRACIN_CP, over_checkpoints, 0.0, config.epochs, training_s, all_gradients_s, loss_now)
    datainf_s = next(r.seconds for r in reversed(results) if r.method == "DataInf")
    notes += [
        f"{task}, {loss}, seed {seed}: For-Value, {direction}: `score()`, one score per row, takes {seconds:.2f} s: "
        f"{seconds / evaluation_s:.1f} evaluation passes of {evaluation_s:.2f} s, 1/{datainf_s / seconds:.0f} of "
        "DataInf at the last checkpoint, training included"
        for direction, seconds in score_s.items()
    ]
    return results, notes


def tokenised(row) -> dict[str, list[int]]:
    if row.reason is not None:
        raise ValueError(f"a generated row cannot be scored: {row.reason}")
    return {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()}


def summary(results: list[Result]) -> list[dict[str, object]]:
    """One line per task, loss and method (LoRA ones twice: best and last checkpoint), means over the seeds."""
    lines: list[dict[str, object]] = []
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task, result.loss, result.method), []).append(result)
    for (task, loss, method), group in groups.items():
        by_checkpoint: dict[int | None, list[Result]] = {}
        for result in group:
            by_checkpoint.setdefault(result.checkpoint, []).append(result)
        means = {c: float(np.mean([r.auc for r in rs])) for c, rs in by_checkpoint.items()}
        span = f"{min(means.values()):.3f} - {max(means.values()):.3f}" if len(means) > 1 else ""
        chosen = {"": None} if None in means else {" (last)": max(means)}
        if len(means) > 1:
            best = max(means, key=means.__getitem__)
            chosen = {f" (best, {best} epochs)": best, " (last)": max(means)}
        for suffix, checkpoint in chosen.items():
            rows = by_checkpoint[checkpoint]
            lines.append(
                {
                    "task": task,
                    "loss": loss,
                    "method": method + suffix,
                    "auc": float(np.mean([r.auc for r in rows])),
                    "auc_std": float(np.mean([r.auc_std for r in rows])),
                    "auc_seeds": float(np.std([r.auc for r in rows])),
                    "recall": float(np.mean([r.recall for r in rows])),
                    "recall_std": float(np.mean([r.recall_std for r in rows])),
                    "span": span,
                    "low": min(means.values()),
                    "high": max(means.values()),
                    "training_s": float(np.median([r.training_s for r in rows])),
                    "gradients_s": float(np.median([r.gradients_s for r in rows])),
                    "scoring_s": float(np.median([r.scoring_s for r in rows])),
                    "passes": float(np.median([r.evaluation_passes for r in rows])),
                }
            )
    return lines


def markdown(config: CompareConfig, results: list[Result], notes: list[str], seconds: float) -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out = [
        "# For-Value against influence functions on generated text tasks",
        "",
        f"{10 * config.train_per_class} training and {10 * config.validation_per_class} validation rows of ten "
        f"classes, seeds 0 to {config.seeds - 1}; LoRA r={config.lora_r}, alpha={config.lora_alpha} on "
        f"{', '.join(config.lora_targets)}, learning rate {config.learning_rate:g}, {config.epochs} epochs, batches "
        f"of {config.batch_size}. Model: {Path(config.model).name}. Whole run: {seconds:.0f} s, peak memory "
        f"{peak:.0f} MiB. torch {torch.__version__}, transformers {transformers.__version__}, peft "
        f"{peft.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads; all times are {config.clock} time.",
        "",
        "AUC and recall: mean ± standard deviation over validation rows; `seeds` is the standard deviation of the "
        "mean AUC over seeds. `checkpoints` is the range of the AUC over the checkpoints, the untrained one included. "
        "Seconds are medians over seeds, for all pairs; `passes` is their sum in evaluation passes over all rows.",
    ]
    lines = summary(results)
    for task in config.tasks:
        for loss in config.losses:
            if not any((line["task"], line["loss"]) == (task, loss) for line in lines):
                continue
            out += ["", f"## {task}, {loss}", ""]
            out.append(
                "| method | AUC | seeds | recall | checkpoints | training s | gradients s | scoring s | passes |"
            )
            out.append("|---|---|---|---|---|---|---|---|---|")
            for line in lines:
                if (line["task"], line["loss"]) == (task, loss):
                    out.append(
                        "| {method} | {auc:.3f} ± {auc_std:.3f} | {auc_seeds:.3f} | {recall:.3f} ± {recall_std:.3f} | "
                        "{span} | {training_s:.2f} | {gradients_s:.2f} | {scoring_s:.2f} | {passes:.1f} |".format(
                            **line
                        )
                    )
    out += ["", "## Notes", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(out)


def picture(config: CompareConfig, results: list[Result], path: Path) -> None:
    """AUC of every method, a panel per task and loss; a line spans the checkpoints of a LoRA method."""
    lines = summary(results)
    figure = Figure(figsize=(5.5 * len(config.tasks), 5 * len(config.losses)), layout="constrained")
    panels = figure.subplots(len(config.losses), len(config.tasks), squeeze=False)
    for row, loss in enumerate(config.losses):
        for column, task in enumerate(config.tasks):
            axes = panels[row][column]
            shown = [line for line in lines if (line["task"], line["loss"]) == (task, loss)]
            shown = [line for line in shown if "(best" not in line["method"]][::-1]
            for y, line in enumerate(shown):
                color = "tab:orange" if line["method"].startswith("For-Value") else "tab:blue"
                axes.plot([line["low"], line["high"]], [y, y], color=color, alpha=0.4)
                axes.plot(line["auc"], y, "o", color=color)
            axes.set_yticks(range(len(shown)), [line["method"] for line in shown], fontsize=8)
            axes.set_title(f"{task}, {loss}")
            axes.set_xlabel("AUC (dot: last checkpoint, line: range)")
            axes.axvline(0.5, color="grey", linewidth=0.5)
    figure.savefig(path, dpi=110)


def main(config: CompareConfig) -> list[Result]:
    now = CLOCKS[config.clock]
    started = now()
    results: list[Result] = []
    notes: list[str] = []
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for seed, loss, task in product(range(config.seeds), config.losses, config.tasks):
        more, more_notes = compare(config, task, loss, seed)
        results += more
        notes += more_notes
        with open(folder / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, Result._fields)
            writer.writeheader()
            writer.writerows(result._asdict() for result in results)
        text = markdown(config, results, notes, now() - started)
        (folder / "results.md").write_text(text)
        picture(config, results, folder / "results.png")
    print(text)
    return results


if __name__ == "__main__":
    (compare_config,) = TrlParser((CompareConfig,)).parse_args_and_config()
    main(compare_config)
