"""True shapes of models, filled with random weights: times and memory do not depend on the values."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen2Config


def qwen(hidden: int, mlp: int, layers: int, heads: int, groups: int, tied: bool, vocabulary: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
        vocab_size=vocabulary,
    )


SHAPES: dict[str, PretrainedConfig] = {
    "tiny": LlamaConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, vocab_size=2048
    ),
    "smollm-135m": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": qwen(896, 4864, 24, 14, 2, True, 151936),
    "qwen2.5-1.5b": qwen(1536, 8960, 28, 12, 2, True, 151936),
    "qwen2.5-7b": qwen(3584, 18944, 28, 28, 4, False, 152064),
}


def random_model(shape: str, seed: int = 0, vocabulary: int | None = None) -> PreTrainedModel:
    """On the accelerator in bfloat16, where there is one; else on the CPU in float32. `vocabulary`: another size."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    torch.manual_seed(seed)
    with torch.device(accelerator or "cpu"):
        dtype = torch.float32 if accelerator is None else torch.bfloat16
        config = copy.deepcopy(SHAPES[shape])
        config.vocab_size = vocabulary or config.vocab_size
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
