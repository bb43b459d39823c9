"""Fine-tune with the good rows drawn more often: scores before the first step, a resampling sampler, all steps kept.

    accelerate launch recipes/reweight_sft.py --config recipes/reweight_sft.yaml
    accelerate launch --num_processes 2 --cpu recipes/reweight_sft.py --config recipes/reweight_sft.yaml
    accelerate launch recipes/reweight_sft.py --config recipes/reweight_sft.yaml \
        --model_name_or_path Qwen/Qwen2.5-0.5B --data my_rows.jsonl --validation_data my_trusted_rows.jsonl

The same rows and flags as `recipes/prefilter_sft.py`, and any policy: `reweight:1.0`, `drop:0.2`,
`drop:0.1+reweight:0.5`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from data import DataConfig, load_rows
from sft import make_trainer, parse, policy_of, without_traceback
from trl import ModelConfig, SFTConfig

from forvalue_callbacks import ForValueCallback, ForValueConfig


@dataclass
class ReweightConfig:
    policy: str = field(default="reweight:1.0", metadata={"help": "What to do with the scores: reweight:1.0, ..."})


def main(
    recipe: ReweightConfig, data: DataConfig, scoring: ForValueConfig, training: SFTConfig, model_config: ModelConfig
) -> dict[str, float]:
    policy = policy_of(recipe.policy)
    rows = load_rows(data, training.dataset_text_field)
    callback = ForValueCallback(rows.validation, policy, scoring)
    trainer = make_trainer(rows, training, model_config, [callback])
    before = None if rows.test is None else trainer.evaluate()["eval_loss"]
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "forvalue_kept" in entry)
    report = {key: value for key, value in logged.items() if key.startswith("forvalue")}
    if before is not None:
        report |= {"test_loss_before": before, "test_loss_after": trainer.evaluate()["eval_loss"]}
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        print({k: round(v, 4) for k, v in report.items()})
    return report


if __name__ == "__main__":
    with without_traceback():
        main(*parse(ReweightConfig, DataConfig, ForValueConfig, SFTConfig, ModelConfig))
