"""Encoder-decoders and classifiers built in code, their heads, and rows for them."""

import torch
import transformers

from helpers.models import VOCAB

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
