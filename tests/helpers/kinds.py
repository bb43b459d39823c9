"""Encoder-decoders and classifiers built in code, their heads, and rows for them."""

import torch
import transformers
from transformers import DataCollatorForSeq2Seq, DataCollatorForTokenClassification, DataCollatorWithPadding

from helpers.models import VOCAB
from helpers.tokenizers import build_tokenizer

CLASSES = 5
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIDES = {
    **_TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
}
_T5 = {**_TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
SEQ2SEQ = {  # name of the model, settings of its config, name of its head
    "t5": ("T5ForConditionalGeneration", {**_T5, "tie_word_embeddings": True}, "lm_head"),
    "t5 untied": ("T5ForConditionalGeneration", {**_T5, "tie_word_embeddings": False}, "lm_head"),
    "bart": ("BartForConditionalGeneration", {**SIDES, "max_position_embeddings": 64}, "lm_head"),
    "mbart": ("MBartForConditionalGeneration", {**SIDES, "max_position_embeddings": 64}, "lm_head"),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**SIDES, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 24},
        "proj_out",
    ),
}
TEXT = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "eos_token_id": 2}
_DISTIL = {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4}
SEQUENCE = {  # name of the model -> settings of its config, name of the last linear map
    "BertForSequenceClassification": (TEXT, "classifier"),
    "DistilBertForSequenceClassification": ({**_DISTIL, "max_position_embeddings": 64}, "classifier"),
    "RobertaForSequenceClassification": (TEXT, "classifier.out_proj"),
    "LlamaForSequenceClassification": (TEXT, "score"),
    "Qwen2ForSequenceClassification": ({**TEXT, "num_key_value_heads": 2}, "score"),
    "GPT2ForSequenceClassification": ({**GPT2, "pad_token_id": 0}, "score"),
    "Gemma2ForSequenceClassification": ({**TEXT, "head_dim": 8, "num_key_value_heads": 2}, "score"),
}
TOKEN = {
    "BertForTokenClassification": (TEXT, "classifier"),
    "LlamaForTokenClassification": (TEXT, "score"),
}
CLASSIFIERS = {**SEQUENCE, **TOKEN}


def seq2seq(family, dtype=torch.float64):
    """An encoder-decoder with logits of order one, and a bias behind its head where it has such."""
    name, settings, _ = SEQ2SEQ[family]
    model = getattr(transformers, name)
    torch.manual_seed(0)
    model = model(model.config_class(**settings)).to(dtype).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_(std=0.5)
    return model


def classifier(name, dtype=torch.float64, settings=None, **changes):
    """A classifier of sequences or of tokens."""
    model = getattr(transformers, name)
    torch.manual_seed(0)
    config = model.config_class(**{**(settings or CLASSIFIERS[name][0]), "num_labels": CLASSES, **changes})
    model = model(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


# ---- all of them alike ----

KINDS = {**SEQ2SEQ, **CLASSIFIERS}
for other in ("t5 untied", "Qwen2ForSequenceClassification", "Gemma2ForSequenceClassification"):
    del KINDS[other]  # their heads are tested by themselves
TOKENIZER = build_tokenizer()  # for padding


def build(kind, **options):
    return seq2seq(kind, **options) if kind in SEQ2SEQ else classifier(kind, **options)


def head_of(kind):
    return f"{KINDS[kind][-1]}.weight"


def build_rows(kind, n, seed):
    """Rows as a data set has them: lengths of both sides differ, some labels are masked."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    rows = []
    for _ in range(n):
        ids = draw(3, VOCAB, int(draw(3, 12)))
        row = {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)}
        if kind == "whisper":
            row = {"input_features": torch.randn(8, 20, generator=generator, dtype=torch.float64).tolist()}
        if kind in SEQUENCE:
            row["label"] = int(draw(0, CLASSES))
        else:
            labels = draw(0, CLASSES, len(ids)) if kind in TOKEN else draw(3, VOCAB, int(draw(2, 9)))
            labels[1] = -100
            row["labels"] = labels.tolist()
        rows.append(row)
    return rows


def sounds(rows):
    """What is written for Whisper: features of one length, labels padded."""
    longest = max(len(row["labels"]) for row in rows)
    labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]
    features = torch.tensor([row["input_features"] for row in rows], dtype=torch.float64)
    return {"input_features": features, "labels": torch.tensor(labels)}


def collator(kind):
    if kind == "whisper":
        return sounds
    if kind in TOKEN:
        return DataCollatorForTokenClassification(TOKENIZER)
    return DataCollatorWithPadding(TOKENIZER) if kind in SEQUENCE else DataCollatorForSeq2Seq(TOKENIZER)
