"""Tiny models built in code, one per way in which an architecture turns hidden states into logits, and their rows."""

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


def llava():
    """A VLM of a few thousand parameters, rows with an image each, and the collator that makes its inputs."""
    torch.manual_seed(0)
    text = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text, "num_attention_heads": 4},
        vision_config={"model_type": "clip_vision_model", **vision, "num_attention_heads": 2},
        image_token_index=66,
        image_seq_length=4,
    )
    model = transformers.LlavaForConditionalGeneration(config).double().eval()
    rows = [{"image": torch.randn(3, 8, 8).tolist(), "text": list(range(3 + i, 9 + i))} for i in range(10)]

    def collate(examples):
        ids = torch.tensor([[66] * 4 + example["text"] for example in examples])
        labels = torch.where(torch.arange(ids.shape[1]) < 7, -100, ids)
        pixels = torch.tensor([example["image"] for example in examples], dtype=torch.float64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}

    return model, rows, collate


def batch(padding="right"):
    """Two rows of random tokens, 9 and 6, padded on either side."""
    torch.manual_seed(1)
    ids, mask = torch.randint(3, VOCAB, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, slice(0, 3) if padding == "left" else slice(6, 9)] = 0
    return {"input_ids": ids, "attention_mask": mask}
