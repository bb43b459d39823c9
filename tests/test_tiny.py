"""The package's own model, its generated text, the demo's rows, and the recipe that made the model."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from forvalue_callbacks.tiny import (
    INTENTS,
    MOODS,
    TASKS,
    TINY_MODEL,
    TOPICS,
    instructions,
    past,
    plural,
    pretraining_text,
)

RECIPE = Path(__file__).parents[1] / "recipes" / "pretrain_tiny.py"
ANSWERS = {"topic": set(TOPICS), "mood": set(MOODS), "intent": set(INTENTS)}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("pretrain_tiny", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain_tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pretrain_tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL)


def take(seed: int, n: int) -> list[str]:
    return list(itertools.islice(pretraining_text(seed), n))


def test_folder_is_small_and_loads_in_float32(model, tokenizer):
    assert sum(file.stat().st_size for file in TINY_MODEL.iterdir()) < 6e6
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight.shape[0] == len(tokenizer)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "text",
    ["The quick brown fox, 1,234.50 dollars!", "  two  spaces\n\tand a tab ", "Größe 数据 🙂 «x»", " .,'s I 'm"],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id is None
    assert tokenizer.decode(ids[1:]) == text


def test_chat_template_marks_what_the_assistant_says(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Another one."},
        {"role": "assistant", "content": "Blue."},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [token for token, own in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if own]
    assert tokenizer.decode(said) == f"Red.{tokenizer.eos_token}Blue.{tokenizer.eos_token}"
    prompt = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert encoded["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]


def test_text_depends_on_the_seed_alone():
    assert take(0, 200) == take(0, 200)
    assert take(0, 200) != take(1, 200)
    assert len(set(take(0, 2_000))) > 1_900
    assert not any(
        mark in text for text in take(2, 2_000) for mark in ("\nTopic:", "\nKind:", "customer is", "{", "}")
    )


def digest(texts):
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def test_text_and_rows_are_the_ones_that_the_model_and_the_results_were_made_with():
    """Every word and every draw counts: the tables in `recipes/results` are of just these rows."""
    assert [digest(take(seed, 2_000)) for seed in (0, 1)] == ["cc0b9c579d1dbf41", "3de24936e17531f8"]
    assert digest(instructions(300, seed=0, noise=0.3).to_list()) == "aad1075269eb1db2"
    assert digest(instructions(300, seed=1, tasks=["intent"]).to_list()) == "fe62389817a4a510"


def test_words_are_inflected():
    verbs = ("stir", "try", "play", "bake", "catch", "hum")
    assert [past(verb) for verb in verbs] == ["stirred", "tried", "played", "baked", "caught", "hummed"]
    assert [plural(noun) for noun in ("knife", "bus", "fly", "key")] == ["knives", "buses", "flies", "keys"]


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_noise_share_is_exact_and_answers_are_valid(noise):
    rows = instructions(203, seed=3, noise=noise)
    counts = Counter(rows["task"])
    assert sum(counts.values()) == 203
    assert set(counts) == set(TASKS)
    noisy = Counter(row["task"] for row in rows if row["is_noisy"])
    assert all(noisy[task] == round(noise * n) for task, n in counts.items())
    for row in rows:
        assert row["is_noisy"] == (row["answer"] != row["true_answer"])
        assert row["completion"] == f" {row['answer']}"
        assert {row["answer"], row["true_answer"]} <= ANSWERS[row["task"]]


def test_rows_depend_on_the_seed_and_noise_changes_answers_only():
    clean, noisy, other = instructions(400, seed=0), instructions(400, seed=0, noise=0.5), instructions(400, seed=1)
    assert noisy.to_list() == instructions(400, seed=0, noise=0.5).to_list()
    for column in ("prompt", "true_answer", "task"):
        assert clean[column][:] == noisy[column][:]
    assert len(set(clean["prompt"]) & set(other["prompt"])) < 8
    with pytest.raises(ValueError, match="noise"):
        instructions(10, seed=0, noise=1.1)
    with pytest.raises(KeyError):
        instructions(10, seed=0, tasks=["poetry"])


def test_prompt_is_a_prefix_and_lengths_are_small(tokenizer):
    for row in instructions(200, seed=4):
        prompt = tokenizer(row["prompt"])["input_ids"]
        both = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert both[: len(prompt)] == prompt
        assert len(prompt) <= 80
        assert 1 <= len(both) - len(prompt) <= 4


def test_model_knows_its_world(recipe, model, tokenizer):
    blocks = recipe.pack(pretraining_text(12_345), tokenizer, n_blocks=8, block=256)
    torch.manual_seed(0)
    twin = AutoModelForCausalLM.from_config(model.config)
    loss, untrained = recipe.mean_loss(model, blocks), recipe.mean_loss(twin, blocks)
    assert untrained > 6
    assert loss < 0.4 * untrained
    shuffled = blocks.flatten()[torch.randperm(blocks.numel())].view_as(blocks)
    assert recipe.mean_loss(model, shuffled) > 2 * loss


def test_two_steps_of_the_recipe(recipe, tmp_path, capsys):
    config = recipe.PretrainConfig(
        output_dir=str(tmp_path / "model"),
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=2,
        block=64,
        batch_size=4,
        steps=2,
        warmup_steps=1,
        tokenizer_documents=200,
        eval_blocks=4,
    )
    loss = recipe.main(config)
    tokenizer = AutoTokenizer.from_pretrained(config.output_dir)
    model = AutoModelForCausalLM.from_pretrained(config.output_dir)
    unseen = recipe.pack(pretraining_text(config.seed + 1), tokenizer, config.eval_blocks, config.block)
    assert len(tokenizer) == config.vocab_size
    assert recipe.mean_loss(model, unseen) == pytest.approx(loss, abs=1e-3)
    before = float(capsys.readouterr().out.split("test loss before: ")[1].split()[0])
    assert loss < before - 0.01


def test_pack_says_when_text_runs_out(recipe, tokenizer):
    with pytest.raises(ValueError, match="tokens"):
        recipe.pack(["short"], tokenizer, n_blocks=1, block=64)
