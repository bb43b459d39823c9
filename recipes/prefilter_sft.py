"""Fine-tune on the rows that For-Value keeps: score, say what was found, shorten the data set, then SFT.

    accelerate launch recipes/prefilter_sft.py --config recipes/prefilter_sft.yaml
    accelerate launch recipes/prefilter_sft.py --config recipes/prefilter_sft.yaml \
        --model_name_or_path Qwen/Qwen2.5-0.5B --data my_rows.jsonl --validation_data my_trusted_rows.jsonl
    python recipes/prefilter_sft.py --config recipes/prefilter_sft.yaml --train false \
        --data alpaca.json --validation_data trusted.json \
        --prompt_template '{instruction}\\n{input}\\n' --completion_template '{output}'

Rows are those that SFTTrainer takes: prompt and completion, messages, ShareGPT's conversations, text, or columns that
templates make into a prompt and a completion. `output_dir` gets the kept and the dropped rows as they came
(kept.jsonl, dropped.jsonl for a jsonl file), and `rows.csv` with the place, score and fate of every row.

Every field of `SFTConfig`, `ModelConfig` (LoRA included), `ForValueConfig` and the two classes of this recipe is a
flag and a key of the YAML file. With `--noise 0.2` a fifth of your own answers is swapped first, and the recipe
reports how many of them were found.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from data import ROW, DataConfig, Rows, load_rows
from datasets import Dataset
from sft import make_trainer, parse, policy_of, without_traceback
from trl import ModelConfig, SFTConfig, SFTTrainer

from forvalue_callbacks import ForValueConfig, ForValueScores, prefilter
from forvalue_callbacks.data.shown import short, shown


@dataclass
class PrefilterConfig:
    policy: str = field(default="drop:0.2", metadata={"help": "What to do with the scores: drop:0.2, keep:500, ..."})
    train: bool = field(default=True, metadata={"help": "Fine-tune on the kept rows. false: score and write only."})
    show_rows: int = field(default=3, metadata={"help": "Print so many of the worst and of the best rows."})


def main(
    recipe: PrefilterConfig, data: DataConfig, scoring: ForValueConfig, training: SFTConfig, model_config: ModelConfig
) -> dict[str, Any]:
    policy = policy_of(recipe.policy)
    rows = load_rows(data, training.dataset_text_field)
    trainer = make_trainer(rows, training, model_config)
    prepared = trainer.train_dataset
    started = time.perf_counter()
    scores = prefilter(trainer, rows.validation, policy, scoring)
    seconds = round(time.perf_counter() - started, 2)
    fates = decide(scores, prepared[ROW], trainer.train_dataset[ROW], rows, recipe.policy)
    kept = [fate.row for fate in fates if fate.what == "kept"]
    report: dict[str, Any] = {"rows": len(prepared), "scored": int(np.isfinite(scores.values).sum())}
    report |= {"kept": len(kept), "valuation_seconds": seconds}
    if "is_noisy" in prepared.column_names:
        report |= found(scores, prepared, trainer.train_dataset)
    if trainer.accelerator.is_main_process:
        show(fates, rows, recipe.show_rows)
        write(fates, rows, Path(training.output_dir), trial=bool(data.data and data.noise))
    if recipe.train:
        report |= train(trainer)
    if trainer.accelerator.is_main_process:
        Path(training.output_dir, "report.json").write_text(json.dumps(report, indent=2))
        print("\n" + json.dumps(report, indent=2), flush=True)
    return report


def train(trainer: SFTTrainer) -> dict[str, float]:
    """Fine-tunes, and keeps the model; the loss on the test rows before and after, where there are any."""
    report = {}
    if trainer.eval_dataset is not None:
        report["test_loss_before"] = trainer.evaluate()["eval_loss"]
    started = time.perf_counter()
    trainer.train()
    report["training_seconds"] = round(time.perf_counter() - started, 2)
    if trainer.eval_dataset is not None:
        report["test_loss_after"] = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    return report


@dataclass
class Fate:
    """What became of a row of the training file.

    Args:
        row: its place there, counted from 0.
        what: "kept", "dropped" or "not used".
        score: None: it was not scored.
        reason: why it is not trained on; empty: it is.
    """

    row: int
    what: str
    score: float | None
    reason: str


def decide(scores: ForValueScores, scored: Sequence[int], kept: Sequence[int], rows: Rows, policy: str) -> list[Fate]:
    """The fate of every row of the file: `scored` and `kept` are places of the rows scored and trained on."""
    trained, chosen = set(kept), set(rows.train[ROW])
    found = dict(zip(scored, zip(scores.values.tolist(), scores.reasons, strict=True), strict=True))
    fates = []
    for row in range(len(rows.source)):
        value, reason = found.get(row, (float("nan"), None))
        score = value if np.isfinite(value) else None
        if row in trained:
            fates.append(Fate(row, "kept", score, ""))
        elif row in rows.unusable:
            fates.append(Fate(row, "dropped", None, rows.unusable[row]))
        elif row not in chosen:
            fates.append(Fate(row, "not used", None, "drawn for validation or test, or beyond max_train_rows"))
        elif row not in found:
            fates.append(Fate(row, "dropped", None, "left out by SFTTrainer: max_length cuts off all that is learnt"))
        else:
            fates.append(Fate(row, "dropped", score, reason or f"score {value:.4g}: dropped by {policy}"))
    return fates


def found(scores: ForValueScores, rows: Dataset, kept: Dataset) -> dict[str, float]:
    """AUC of clean against noisy rows, and the share of noisy rows among the dropped and the kept."""
    from sklearn.metrics import roc_auc_score  # only to check the filter against a known truth

    noisy, scored = np.array(rows["is_noisy"]), np.isfinite(scores.values)
    n_noisy, n_noisy_kept = int(noisy.sum()), int(np.sum(kept["is_noisy"]))
    if n_noisy == 0:
        return {}
    dropped = max(1, len(rows) - len(kept))
    return {
        "noisy": n_noisy,
        "auc_clean_against_noisy": round(float(roc_auc_score(~noisy[scored], scores.values[scored])), 4),
        "noisy_share_of_dropped": round((n_noisy - n_noisy_kept) / dropped, 4),
        "noisy_share_of_kept": round(n_noisy_kept / len(kept), 4),
    }


def show(fates: list[Fate], rows: Rows, n: int) -> None:
    """The worst and the best rows, to be read."""
    at = {row: i for i, row in enumerate(rows.train[ROW])}
    best = sorted((fate for fate in fates if fate.score is not None), key=lambda fate: -fate.score)  # type: ignore
    for title, chosen in (("worst", best[::-1][:n]), ("best", best[:n])):
        print(f"\n{title} rows of {rows.source.name}")
        for fate in chosen:
            row = rows.train[at[fate.row]]
            noisy = ", noisy" if row.get("is_noisy") else ""
            print(f"  {rows.source.place(fate.row)} ({fate.what}{noisy})  {fate.score:+.4g}  {_line(row)}")


def _line(row: dict[str, Any]) -> str:
    text = shown({name: value for name, value in row.items() if name not in (ROW, "is_noisy")})
    return " -> ".join(short(side) for side in (text.prompt, text.answer) if side)


def write(fates: list[Fate], rows: Rows, folder: Path, trial: bool) -> None:
    """Kept and dropped rows as they came, and a table of every row; the table alone after a trial."""
    source = rows.source
    folder.mkdir(parents=True, exist_ok=True)
    print()
    if not trial:
        kept = [fate.row for fate in fates if fate.what == "kept"]
        dropped = [fate.row for fate in fates if fate.what == "dropped"]
        source.suffix = source.suffix or ".parquet"  # rows of no file
        for name, chosen in (("kept", kept), ("dropped", dropped)):
            path = folder / f"{name}{source.suffix}"
            source.write(path, chosen)
            print(f"{f'{name} rows':13} {path} ({len(chosen):,})")
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["row", "line", "what", "score", "reason"])
        for fate in fates:
            table.writerow([fate.row, source.line(fate.row), fate.what, fate.score, fate.reason])  # None is empty
    print(f"every row     {folder / 'rows.csv'} (place, score, fate)", flush=True)


if __name__ == "__main__":
    with without_traceback():
        main(*parse(PrefilterConfig, DataConfig, ForValueConfig, SFTConfig, ModelConfig))
