"""Rows are read as a trainer reads them, and go through its collator once, as copies; nothing else notices."""

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.data.collated import NotTogetherError, together
from forvalue_callbacks.data.corruption import corrupted
from forvalue_callbacks.data.reading import OwnRandomness, examples_of
from helpers.models import build_model, build_rows, llava
from helpers.oracles import relative
from helpers.tokenizers import build_tokenizer

ROWS, VALIDATION = build_rows(6, seed=1), build_rows(5, seed=2)


def scorer(model, validation, **options):
    return ForValueScorer(model, validation, progress=False, **options)


# ---- token types ----


def typed(rows, of=lambda place: 0):
    return [{**row, "token_type_ids": [of(i) for i in range(len(row["input_ids"]))]} for row in rows]


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=67, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, tie_word_embeddings=False
    )
    return GPT2LMHeadModel(config).double().eval()


def autograd_scores(model, validation, rows):
    """Of the model's own loss on what a collator makes of each row."""
    weight = model.get_output_embeddings().weight

    def gradient(row):
        batch = {column: torch.tensor([values]) for column, values in row.items()}
        labels = batch.pop("labels")[0, 1:]
        log_p = model(**batch).logits[0, :-1].log_softmax(-1)[labels != -100]
        return torch.autograd.grad(log_p.gather(1, labels[labels != -100][:, None]).sum(), weight)[0]

    direction = torch.stack([gradient(row) for row in validation]).mean(0)
    return [float((direction * gradient(row)).sum()) for row in rows]


@pytest.mark.parametrize("of", [lambda place: 0, lambda place: place % 3], ids=["zeros", "others"])
def test_token_types_are_those_of_training(gpt2, of):
    """GPT-2 adds the embedding of token 0 where types are 0, and nothing where there are none."""
    rows, validation = typed(ROWS, of), typed(VALIDATION, of)
    collator = DataCollatorForSeq2Seq(build_tokenizer())
    scores = scorer(gpt2, validation, data_collator=collator).score(rows)
    assert relative(scores.values, autograd_scores(gpt2, validation, rows)) < 1e-10


def test_token_types_of_zero_count_without_a_collator_too(gpt2):
    plain, rows = scorer(gpt2, VALIDATION).score(ROWS), typed(ROWS)
    scores = scorer(gpt2, typed(VALIDATION)).score(rows)
    assert relative(scores.values, autograd_scores(gpt2, typed(VALIDATION), rows)) < 1e-10
    assert relative(plain.values, scores.values) > 0.01
    assert plain.metadata["provenance"]["data"] != scores.metadata["provenance"]["data"]


def test_token_types_go_with_a_copy_that_is_changed(gpt2):
    item, _ = next(scorer(gpt2, typed(VALIDATION)).batcher.items(typed(ROWS)))
    assert all(row is None or row.typed for row in corrupted([item.row] * 3, "truncated", np.random.default_rng(0)))


def test_token_types_that_the_model_does_not_take_are_not_looked_at():
    want = scorer(build_model(), VALIDATION).score(ROWS)
    found = scorer(build_model(), VALIDATION).score(typed(ROWS, lambda place: place % 2))
    assert found.values.tolist() == want.values.tolist()
    assert found.metadata == want.metadata


# ---- data sets ----


@pytest.mark.parametrize(
    "dataset",
    [{"text": ["a", "b"]}, Dataset.from_list(ROWS).to_pandas(), "a.jsonl"],
    ids=["columns", "frame", "path"],
)
def test_what_is_no_data_set_of_rows_is_refused_by_name(dataset):
    with pytest.raises(ValueError, match=rf"a {type(dataset).__name__} is no data set of rows: give a list"):
        scorer(build_model(), VALIDATION).score(dataset)


def test_one_row_that_needs_what_the_others_do_not_has_a_reason():
    bad = [{"text": "x"}, {"messages": [{"role": "user", "content": "x"}]}, {"image": "x", "text": "y"}, {"foo": 1}, 3]
    scores = scorer(build_model(), VALIDATION).score([*ROWS, *bad])
    assert [reason is None for reason in scores.reasons] == [True] * len(ROWS) + [False] * len(bad)
    assert "need a tokenizer" in scores.reasons[len(ROWS)]
    with pytest.raises(ValueError, match=r"no row can be scored: raw rows .* need a tokenizer"):
        scorer(build_model(), VALIDATION).score([bad[0]] * 3)


# ---- random numbers ----


def draws():
    return random.random(), np.random.random(), torch.rand(1).item()


def test_random_numbers_of_rows_are_not_those_of_the_run():
    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return len(ROWS)

        def __getitem__(self, index):
            drawn.append(draws())
            return ROWS[index]

    def collate(examples):
        drawn.append(draws())
        return DataCollatorForSeq2Seq(build_tokenizer())(examples)

    drawn = []
    torch.manual_seed(0)
    found = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    scorer(build_model(), VALIDATION, data_collator=collate).score(Augmented())
    torch.manual_seed(0)
    assert found == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    assert len(drawn) == 2 * len(ROWS) + len(VALIDATION)


def test_random_numbers_of_rows_go_on_from_row_to_row():
    own, drawn = OwnRandomness(), []
    want = torch.get_rng_state()
    for _ in range(3):
        with own:
            drawn.append(draws())
    assert len(set(drawn)) == 3
    assert torch.equal(torch.get_rng_state(), want)


# ---- rows that only a collator makes inputs of ----


def test_a_collator_is_called_once_a_row_with_a_copy():
    model, rows, collate = llava()
    seen, before = Counter(), copy.deepcopy(rows)

    def writes(examples):
        batch = collate(examples)
        for example in examples:
            seen[example["text"][0]] += 1
            example.pop("image")
            example["text"].clear()
        return batch

    made = scorer(model, rows[6:], data_collator=writes)
    assert (
        relative(made.score(rows[:6]).values, scorer(model, rows[6:], data_collator=collate).score(rows[:6]).values)
        < 1e-12
    )
    assert rows == before
    assert seen == Counter({row["text"][0]: 1 for row in rows})


def test_rows_beyond_the_memory_for_what_a_collator_made_are_made_again(monkeypatch):
    model, rows, collate = llava()
    want = scorer(model, rows[6:], data_collator=collate).score(rows[:6])
    monkeypatch.setattr("forvalue_callbacks.model.run.MADE_BYTES", 2000)  # a row of pixels in float64 takes 1,536
    calls = []
    few = scorer(model, rows[6:], data_collator=lambda examples: (calls.append(1), collate(examples))[1])
    assert relative(few.score(rows[:6]).values, want.values) < 1e-12
    assert len(calls) > len(rows)


def test_labels_through_a_collator_are_read_once_where_answers_repeat():
    model, rows, collate = llava()
    rows = [{**row, "text": [3 + i % 4, 3, 3, 9, 5 + i % 2]} for i, row in enumerate(rows * 8)]
    seen = []
    counting = scorer(
        model.float(),
        rows[:40],
        config=ForValueConfig("label_model"),
        data_collator=lambda examples: (
            seen.append(1),
            {key: value.float() if value.is_floating_point() else value for key, value in collate(examples).items()},
        )[1],
    )
    counting.score(rows[40:])
    assert len(seen) == len(rows)


def one(length, **others):
    ids = torch.arange(length)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, **others}


def test_rows_of_a_collator_are_put_together_padded_on_the_right():
    batch = together([one(2, pixels=torch.zeros(1, 3, 9)), one(4, pixels=torch.ones(2, 3, 9))])
    assert batch["input_ids"].tolist() == [[0, 1, 1, 1], [0, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[0, 1, -100, -100], [0, 1, 2, 3]]
    assert batch["pixels"][:, 0, 0].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "others",
    [
        [{"position_ids": torch.zeros(3, 1, 4)}] * 2,  # of M-RoPE: the first dimension is not that of the rows
        [{"attention_mask": torch.zeros(1, 1, 4, 4)}] * 2,
        [{"pixels": torch.zeros(1, 8, 8)}, {"pixels": torch.zeros(1, 8, 9)}],
        [{"pixels": torch.zeros(1, 8, 8)}, {}],
        [{"sizes": [(8, 8)]}] * 2,
    ],
    ids=["3d-positions", "4d-mask", "sizes-differ", "one-without", "list"],
)
def test_rows_of_a_collator_that_do_not_fit_together_are_run_alone(others):
    with pytest.raises(NotTogetherError):
        together([one(4, **other) for other in others])
    assert together([one(4, **others[0])]).keys() == one(4, **others[0]).keys()


def test_rows_that_do_not_fit_together_have_the_scores_of_each_alone():
    model, rows, collate = llava()

    def alone(examples):
        batch = collate(examples)
        if examples[0]["text"][0] % 2:
            del batch["attention_mask"]
        return batch

    want = scorer(model, rows[6:], data_collator=collate).score(rows[:6])
    assert relative(scorer(model, rows[6:], data_collator=alone).score(rows[:6]).values, want.values) < 1e-12


def test_plain_lists_and_data_sets_are_read_as_they_are():
    dataset = Dataset.from_list(ROWS)
    assert list(examples_of(dataset)) == list(dataset)
    assert list(examples_of(ROWS)) == ROWS
    assert list(examples_of(dataset.with_transform(lambda batch: batch))) == list(dataset)
