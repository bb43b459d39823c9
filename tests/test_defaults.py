"""The trainers as people set them up: every precision of the weights and of the arguments, every way to a model."""

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from forvalue_callbacks import TINY_MODEL, Drop, ForValueCallback

RAW = [{"prompt": f"what is {i}? ", "completion": f"a {i % 5}"} for i in range(8)]
IDS = [{"input_ids": [5 + i, 9, 11, 7, 3 + i % 5], "labels": [-100, -100, 11, 7, 3 + i % 5]} for i in range(8)]
OPTIONS = {"report_to": [], "max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True}
LLAMA = {
    "vocab_size": 2048,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
PRECISIONS = {"bf16": {"bf16": True}, "fp16": {"bf16": False, "fp16": True}, "neither": {"bf16": False}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama that is loaded by its path, with the tokenizer of the tiny model."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA)
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(path)
    return str(path)


def build_trainer(folder, out, trainer, weights, precision, source, adaptation, callbacks):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, weights))
    if adaptation == "kbit":
        model = peft.prepare_model_for_kbit_training(model)
    lora = None if adaptation == "full" else peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    options = {"output_dir": str(out), **OPTIONS, **PRECISIONS[precision]}
    if trainer == "SFTTrainer":
        if source == "name":
            options["model_init_kwargs"] = {"dtype": weights}
        return SFTTrainer(
            folder if source == "name" else model,
            args=SFTConfig(**options),
            train_dataset=Dataset.from_list(RAW),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=lora,
            callbacks=callbacks,
        )
    if lora is not None:
        model = peft.get_peft_model(model, lora)
    return Trainer(model, TrainingArguments(**options), train_dataset=Dataset.from_list(IDS), callbacks=callbacks)


# A model that SFTTrainer loads by its name cannot be prepared for k-bit training by hand, and Trainer takes no name.
WAYS = [
    *(("SFTTrainer", "name", x) for x in ("full", "lora")),
    *(("SFTTrainer", "object", x) for x in ("full", "lora", "kbit")),
    *(("Trainer", "object", x) for x in ("full", "lora", "kbit")),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16"])
def test_every_precision_is_scored_whichever_way_the_model_comes(weights, precision, folder, tmp_path):
    for trainer, source, adaptation in WAYS:
        way = (folder, tmp_path, trainer, weights, precision, source, adaptation)
        callback = ForValueCallback(IDS[:4] if trainer == "Trainer" else RAW[:4], Drop(0.25))
        try:
            build_trainer(*way, [callback]).train()
        except Exception as error:
            with pytest.raises(type(error)):  # the frameworks themselves refuse it: not for us to mend
                build_trainer(*way, []).train()
        assert callback.scores is not None, (trainer, source, adaptation)
        assert np.isfinite(callback.scores.values).all()
