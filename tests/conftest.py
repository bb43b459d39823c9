"""Tiny models built in code, one per way in which an architecture turns hidden states into logits."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

VOCAB = 67
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_EIGHT = {**_COMMON, "head_dim": 8}
ARCHITECTURES = {
    "llama": ("LlamaConfig", _COMMON),
    "llama-tied": ("LlamaConfig", {**_COMMON, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3": ("Qwen3Config", _EIGHT),
    "mistral": ("MistralConfig", _COMMON),
    "gpt2": ("GPT2Config", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gemma2-softcap": ("Gemma2Config", {**_EIGHT, "final_logit_softcapping": 2.0}),
    "gemma3-softcap": ("Gemma3TextConfig", {**_EIGHT, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", _EIGHT),
    "cohere-scale": ("CohereConfig", {**_COMMON, "logit_scale": 0.25}),
    "granite-scaling": ("GraniteConfig", {**_COMMON, "logits_scaling": 4.0}),
    "phi-bias": ("PhiConfig", {**_COMMON, "num_key_value_heads": 4}),
}


def build_model(architecture="llama", dtype=torch.float32, seed=0):
    """A small random model with logits of order one, so that soft-caps bend and scales show."""
    name, settings = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.normal_(std=0.5)
        if head.bias is not None:
            head.bias.normal_(std=0.5)
    return model.to(dtype).eval()


def build_rows(n, seed=0, vocab=VOCAB, longest=14):
    """Rows of random tokens, the prompt masked; lengths differ."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size=()):
        return torch.randint(low, high, size, generator=generator)

    rows = []
    for _ in range(n):
        length = int(draw(3, longest + 1))
        prompt = int(draw(1, length - 1))
        ids = draw(3, vocab, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


@pytest.fixture
def model():
    return build_model()
