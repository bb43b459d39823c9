"""Fine-tune on the rows that For-Value keeps: score, shorten the data set, then SFT with fewer steps.

    accelerate launch recipes/prefilter_sft.py --config recipes/prefilter_sft.yaml
    accelerate launch recipes/prefilter_sft.py --config recipes/prefilter_sft.yaml \
        --model_name_or_path Qwen/Qwen2.5-0.5B --data tatsu-lab/alpaca \
        --prompt_template '{instruction}\\n{input}\\n' --completion_template '{output}' \
        --direction gradient --policy drop:0.1

Every field of `SFTConfig`, `ModelConfig` (LoRA included), `ForValueConfig` and the two classes of this recipe is a
flag and a key of the YAML file. With `--noise 0.2` a fifth of the answers is swapped first, and the recipe reports
how many of them were found.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from data import DataConfig, load_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from forvalue_callbacks import TINY_MODEL, ForValueConfig, ForValueScores, prefilter
from forvalue_callbacks.policies import parse_policy


@dataclass
class PrefilterConfig:
    policy: str = field(default="drop:0.2", metadata={"help": "What to do with the scores: drop:0.2, keep:500, ..."})
    show_rows: int = field(default=3, metadata={"help": "Print so many of the best and of the worst rows."})


def main(
    recipe: PrefilterConfig, data: DataConfig, scoring: ForValueConfig, training: SFTConfig, model_config: ModelConfig
) -> dict[str, float]:
    name = model_config.model_name_or_path or str(TINY_MODEL)
    train, validation, test = load_rows(data)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(name, dtype=model_config.dtype),
        args=training,
        train_dataset=train,
        eval_dataset=test,
        processing_class=AutoTokenizer.from_pretrained(name),
        peft_config=get_peft_config(model_config),
    )
    rows = trainer.train_dataset
    started = time.perf_counter()
    scores = prefilter(trainer, validation, parse_policy(recipe.policy), scoring)
    report = {"rows": len(rows), "scored": int(np.isfinite(scores.values).sum())}
    report["valuation_seconds"] = round(time.perf_counter() - started, 2)
    report["kept"] = len(trainer.train_dataset)
    if "is_noisy" in rows.column_names:
        report |= found(scores, rows, trainer.train_dataset)
    before = trainer.evaluate()
    started = time.perf_counter()
    trainer.train()
    report["training_seconds"] = round(time.perf_counter() - started, 2)
    report |= {"test_loss_before": before["eval_loss"], "test_loss_after": trainer.evaluate()["eval_loss"]}
    if trainer.accelerator.is_main_process:
        print(scores.summary())
        show(scores, rows, recipe.show_rows)
        Path(training.output_dir, "report.json").write_text(json.dumps(report, indent=2))
        scores.plot(Path(training.output_dir, "scores.png"))
        print(json.dumps(report, indent=2))
    return report


def found(scores: ForValueScores, rows, kept) -> dict[str, float]:
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


def show(scores: ForValueScores, rows, n: int) -> None:
    """The best and the worst rows, to be read."""
    order = [i for i in np.argsort(-scores.values) if np.isfinite(scores.values[i])]
    for title, chosen in (("best", order[:n]), ("worst", order[::-1][:n])):
        print(f"\n{title} rows")
        for i in chosen:
            noisy = " (noisy)" if "is_noisy" in rows.column_names and rows[int(i)]["is_noisy"] else ""
            columns = [c for c in ("text", "prompt", "completion", "messages") if c in rows.column_names]
            text = " -> ".join(repr(rows[int(i)][c])[:160] for c in columns)
            print(f"  {scores.values[i]:+.4g}{noisy}  {text}")


if __name__ == "__main__":
    parser = TrlParser((PrefilterConfig, DataConfig, ForValueConfig, SFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())
