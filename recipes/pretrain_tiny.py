"""Pretrain the package's own tiny model on generated text, from nothing, on a CPU.

    python recipes/pretrain_tiny.py --config recipes/pretrain_tiny.yaml

Trains a byte-level BPE tokenizer (any text can be encoded) and a small Llama in float32, prints the loss on text of
another seed and some greedy completions, and writes a folder for `from_pretrained`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import TrlParser

from forvalue_callbacks.tiny import instructions, pretraining_text

BOS, EOS, PAD, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
# What the assistant says, its end included, is marked as generated: `assistant_only_loss` needs to know.
CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}{{- '<|assistant|>' }}"
    "{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}"
    "{%- else %}{{- '<|' + message['role'] + '|>' + message['content'] }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


@dataclass
class PretrainConfig:
    """What `recipes/pretrain_tiny.yaml` holds."""

    output_dir: str = field(default="tiny_model", metadata={"help": "Folder for the model and its tokenizer."})
    vocab_size: int = field(default=2048, metadata={"help": "Tokens, special ones and 256 bytes included."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the hidden states."})
    intermediate_size: int = field(default=512, metadata={"help": "Width of the feed-forward part."})
    num_layers: int = field(default=4, metadata={"help": "Number of decoder layers."})
    num_heads: int = field(default=6, metadata={"help": "Attention heads; divides hidden_size."})
    context: int = field(default=512, metadata={"help": "Longest sequence the model is declared for, in tokens."})
    block: int = field(default=256, metadata={"help": "Tokens per packed training sequence."})
    batch_size: int = field(default=8, metadata={"help": "Packed sequences per step."})
    steps: int = field(default=3800, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak of the cosine schedule."})
    warmup_steps: int = field(default=200, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's weight decay, on matrices only."})
    tokenizer_documents: int = field(default=40_000, metadata={"help": "Documents the tokenizer is trained on."})
    eval_blocks: int = field(default=64, metadata={"help": "Packed sequences of test text for the final loss."})
    seed: int = field(default=0, metadata={"help": "Seeds the text and the weights; the test text takes seed + 1."})


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; encoding starts with BOS, decoding gives back any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, n_blocks: int, block: int) -> torch.Tensor:
    """The first `n_blocks` blocks of the texts' tokens, one text after the other, shape (n_blocks, block)."""
    ids: list[int] = []
    texts = iter(texts)
    while len(ids) < n_blocks * block:
        batch = list(itertools.islice(texts, 1_000))
        if not batch:
            raise ValueError(f"the texts hold {len(ids)} tokens, {n_blocks * block} are needed")
        for document in tokenizer(batch)["input_ids"]:
            ids += [*document, tokenizer.eos_token_id]
    return torch.tensor(ids[: n_blocks * block]).view(n_blocks, block)


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama with random weights in float32; its output head is not tied to the input embeddings."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.context,
            initializer_range=0.04,  # the usual 0.02 suits wider models
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: LlamaForCausalLM, blocks: torch.Tensor, config: PretrainConfig) -> list[float]:
    """One pass over `blocks` (steps * batch_size, block) in their order; returns the loss of each step in nats."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses: list[float] = []
    model.train()
    with tqdm(total=config.steps, desc="pretraining", mininterval=2) as progress:
        for batch in blocks.split(config.batch_size):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
            progress.update()
    return losses


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, blocks: torch.Tensor, batch_size: int = 16) -> float:
    """Mean loss per token, in nats, over blocks of shape (n, block)."""
    model.eval()
    losses = [model(input_ids=b, labels=b, use_cache=False).loss.item() * len(b) for b in blocks.split(batch_size)]
    return sum(losses) / len(blocks)


@torch.no_grad()
def complete(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int = 24) -> str:
    """The model's greedy continuation of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=n_tokens)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write weights in float16 (half the size) with a config that says float32, which is how they get loaded."""
    tokenizer.save_pretrained(folder)
    # transformers 5 saves names that 4 does not know; both read these.
    file = Path(folder) / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if extra := settings.pop("extra_special_tokens", None):
        settings["additional_special_tokens"] = extra
    file.write_text(json.dumps(settings, indent=2) + "\n")
    model.half().save_pretrained(folder)
    model.float()
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)


def main(config: PretrainConfig) -> float:
    """Tokenizer, training, check and saving; returns the test loss in nats per token."""
    texts = itertools.islice(pretraining_text(config.seed), config.tokenizer_documents)
    tokenizer = train_tokenizer(texts, config.vocab_size, config.context)
    blocks = pack(pretraining_text(config.seed), tokenizer, config.steps * config.batch_size, config.block)
    unseen = pack(pretraining_text(config.seed + 1), tokenizer, config.eval_blocks, config.block)

    model = build_model(config, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens, {blocks.numel():,} tokens of text")
    print(f"test loss before: {mean_loss(model, unseen):.3f} nats per token")
    train(model, blocks, config)
    save(model, tokenizer, config.output_dir)
    loss = mean_loss(model, unseen)
    print(f"test loss after: {loss:.3f} nats per token, written to {config.output_dir}")
    prompts = ["The nurse", "Q: What is the opposite of hot?\nA:", "<|user|>Tell me about music.<|assistant|>"]
    for prompt in [*prompts, *instructions(4, seed=config.seed)["prompt"]]:
        print(f"{prompt!r} -> {complete(model, tokenizer, prompt)!r}")
    return loss


if __name__ == "__main__":
    (parsed,) = TrlParser(PretrainConfig).parse_args_and_config()
    main(parsed)
