"""What the SFT recipes share: flags, and the trainer as TRL's own script makes it, with the model by its name."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from data import Rows
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from forvalue_callbacks import TINY_MODEL
from forvalue_callbacks.data.files import DataError
from forvalue_callbacks.policies import Policy, parse_policy


def parse(*classes: type) -> tuple[Any, ...]:
    """Flags, and the YAML file of `--config`, as objects of dataclasses; on a CPU where there is nothing else."""
    parser = TrlParser(classes)
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # bf16, TRL's default, is refused without
    return parser.parse_args_and_config()


def policy_of(text: str) -> Policy:
    """What `parse_policy` reads.

    Raises:
        DataError: it cannot.
    """
    try:
        return parse_policy(text)
    except ValueError as error:
        raise DataError(str(error)) from None


def make_trainer(
    rows: Rows, training: SFTConfig, model_config: ModelConfig, callbacks: Sequence[TrainerCallback] = ()
) -> SFTTrainer:
    """SFTTrainer on the training rows, once their warnings are said; the tiny model where none is named.

    Raises:
        DataError: conversations, and a tokenizer without a chat template.
    """
    name = model_config.model_name_or_path or str(TINY_MODEL)
    options = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        "quantization_config": get_quantization_config(model_config),
    }
    options = {key: value for key, value in options.items() if value is not None}
    training.model_init_kwargs = options | (training.model_init_kwargs or {})
    for text in rows.warnings if training.process_index == 0 else []:
        print(f"warning: {text}", file=sys.stderr, flush=True)
    needed = training.chat_template_path is None and _conversations(rows.train)
    if needed and not AutoTokenizer.from_pretrained(name).chat_template:
        raise DataError(f"the tokenizer of {name} has no chat template: give one as --chat_template_path FILE.")
    set_seed(training.seed)  # older versions of TRL make adapters before they do
    return SFTTrainer(
        name,
        args=training,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        peft_config=get_peft_config(model_config),
        callbacks=list(callbacks),
    )


def _conversations(rows: Dataset) -> bool:
    return any(isinstance(rows[0].get(column), list) for column in ("prompt", "messages", "conversations"))


@contextmanager
def without_traceback() -> Iterator[None]:
    """What is wrong with the files or the flags is said, and the script ends."""
    try:
        yield
    except DataError as error:
        sys.exit(f"error: {error}")
