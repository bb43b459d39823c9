"""Fine-tune with the good rows drawn more often: scores before the first step, a resampling sampler, all steps kept.

    accelerate launch recipes/reweight_sft.py --config recipes/reweight_sft.yaml
    accelerate launch --num_processes 2 --cpu recipes/reweight_sft.py --config recipes/reweight_sft.yaml

The same flags as `recipes/prefilter_sft.py`, and any policy: `reweight:1.0`, `drop:0.2`, `drop:0.1+reweight:0.5`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from data import DataConfig, load_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from forvalue_callbacks import TINY_MODEL, ForValueCallback, ForValueConfig
from forvalue_callbacks.policies import parse_policy


@dataclass
class ReweightConfig:
    policy: str = field(default="reweight:1.0", metadata={"help": "What to do with the scores: reweight:1.0, ..."})


def main(
    recipe: ReweightConfig, data: DataConfig, scoring: ForValueConfig, training: SFTConfig, model_config: ModelConfig
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
        callbacks=[ForValueCallback(validation, parse_policy(recipe.policy), scoring)],
    )
    before = trainer.evaluate()
    trainer.train()
    report = {k: v for k, v in trainer.state.log_history[1].items() if k.startswith("forvalue")}
    report |= {"test_loss_before": before["eval_loss"], "test_loss_after": trainer.evaluate()["eval_loss"]}
    if trainer.accelerator.is_main_process:
        print({k: round(v, 4) for k, v in report.items()})
    return report


if __name__ == "__main__":
    parser = TrlParser((ReweightConfig, DataConfig, ForValueConfig, SFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())
