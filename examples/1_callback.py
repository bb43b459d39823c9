"""One line more in an SFT script: score before the first step, never draw the worst fifth."""

import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from forvalue_callbacks import TINY_MODEL, Drop, ForValueCallback
from forvalue_callbacks.tiny import instructions

train = instructions(400, seed=0, noise=0.2)  # rows with "prompt" and "completion"; a fifth of the answers is wrong
validation = instructions(100, seed=1)  # clean rows of the same kind

trainer = SFTTrainer(
    str(TINY_MODEL),  # a path or a hub id
    args=SFTConfig(output_dir="outputs/example_1", max_steps=10, use_cpu=not torch.accelerator.is_available()),
    train_dataset=train,
    peft_config=LoraConfig(r=8, target_modules="all-linear"),
    callbacks=[ForValueCallback(validation, policy=Drop(0.2))],
)
trainer.train()

log = next(entry for entry in trainer.state.log_history if "forvalue_kept" in entry)
print({name: value for name, value in log.items() if name.startswith("forvalue")})
