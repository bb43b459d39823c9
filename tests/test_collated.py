"""Rows go through a collator once, as copies, and what it makes of them is what is scored."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)
from transformers.trainer_utils import RemoveColumnsCollator

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.data.collated import Collated, Collating, NotTogetherError, only_pads, together
from forvalue_callbacks.data.sft import Row, RowConfig, RowPreparer
from helpers.models import build_model, build_rows, llava
from helpers.oracles import relative
from helpers.tokenizers import EOS, build_tokenizer

ROWS = build_rows(6, seed=3)
VALIDATION = build_rows(4, seed=4)
IDS = torch.tensor([[5, 6, 7]])
PAIRS = [{"question": f"the sky {i}", "reply": f"is blue {i}"} for i in range(4)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def scorer(model, validation, **options):
    return ForValueScorer(model, validation, progress=False, **options)


# ---- collators ----


def answering(tokenizer, first="question", second="reply"):
    """Makes inputs of raw rows with a template of its own; the reply is labelled."""

    def collate(examples):
        texts = [("Q: " + row[first] + " A:", " " + row[second]) for row in examples]
        ids = [[tokenizer(text)["input_ids"] for text in pair] for pair in texts]
        longest = max(len(a) + len(b) for a, b in ids)
        rows = [(a + b, [-100] * len(a) + b, longest - len(a) - len(b)) for a, b in ids]
        return {
            "input_ids": torch.tensor([tokens + [0] * n for tokens, _, n in rows]),
            "labels": torch.tensor([labels + [-100] * n for _, labels, n in rows]),
            "attention_mask": torch.tensor([[1] * len(tokens) + [0] * n for tokens, _, n in rows]),
        }

    return collate


@pytest.mark.parametrize("names", [("question", "reply"), ("prompt", "completion"), ("messages", "text")])
def test_rows_are_what_the_collator_makes_of_them(names, tokenizer):
    """Whatever the columns: a RowPreparer would prepare two of the three in its own way, cut off after 8 tokens."""
    collate = answering(tokenizer, *names)
    rows = [dict(zip(names, row.values(), strict=True)) for row in PAIRS]
    tokens = [{name: values[0].tolist() for name, values in collate([row]).items()} for row in rows]
    model = build_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    options = {"progress": False, "processing_class": tokenizer}
    by_tokens = ForValueScorer(model, tokens[2:], **options).score(tokens)
    cut = RowConfig(max_length=8)
    by_collator = ForValueScorer(model, rows[2:], row_config=cut, data_collator=collate, **options).score(rows)
    assert by_collator.n_labelled.tolist() == by_tokens.n_labelled.tolist()
    np.testing.assert_array_equal(by_collator.values, by_tokens.values)


def test_examples_that_are_no_mappings_are_the_collators(tokenizer):
    read = Collating(
        lambda rows: answering(tokenizer)([dict(zip(("question", "reply"), rows[0], strict=True))]), RowPreparer()
    )
    assert read.read(("the sky", "is blue")).n_labelled > 0


@pytest.mark.parametrize("wrapped", [False, True])
def test_raw_validation_rows_are_prepared_where_the_collator_takes_tokens(wrapped, tokenizer):
    given = []

    def collate(examples):
        ids = torch.tensor([row["input_ids"] for row in examples])
        given.append(examples)
        return {"input_ids": ids, "labels": torch.where(ids == ids[0, -1], ids, -100)}

    collator = RemoveColumnsCollator(collate, ["input_ids", "labels"]) if wrapped else collate
    collating = Collating(collator, RowPreparer(tokenizer))
    for text in ("the sky", "is blue"):
        row = collating.read({"text": text})
        assert tokenizer.decode(row.input_ids) == text + EOS
        assert row.n_labelled == 1
    assert len(given) == 2


def test_language_modelling_labels_all_but_padding_and_needs_no_prompt_mask(tokenizer):
    collating = Collating(DataCollatorForLanguageModeling(tokenizer, mlm=False), RowPreparer(tokenizer))
    row = collating.read({"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "name": "dropped by the trainer"})
    assert row.labels.tolist() == [5, 6, 7]  # as it is trained on
    row = collating.read({"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 0]})
    assert isinstance(row, Row)
    assert row.labels.tolist() == [5, 6, 7]
    found = collating.read({"input_ids": [5, 6, 7], "token_type_ids": [0, 1, 1]})
    assert isinstance(found, Collated)
    assert found.labels.tolist() == [5, 6, 7]


def test_tokens_masked_at_random_are_refused(tokenizer):
    tokenizer.add_special_tokens({"mask_token": "<pad>"})
    for collator in (lambda c: c, lambda c: RemoveColumnsCollator(c, ["input_ids"])):
        with pytest.raises(ValueError, match="mlm=True masks tokens at random"):
            Collating(collator(DataCollatorForLanguageModeling(tokenizer)), RowPreparer())


def test_collators_that_only_pad_are_passed_by(tokenizer, monkeypatch):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as OfTrl

    class Own(DataCollatorForSeq2Seq):
        """May label what it likes."""

    padding = [default_data_collator, DataCollatorForSeq2Seq(tokenizer), DataCollatorWithPadding(tokenizer), OfTrl(0)]
    for collator in (*padding, RemoveColumnsCollator(default_data_collator, [])):
        assert only_pads(collator)
        collating = Collating(collator, RowPreparer(tokenizer))
        monkeypatch.setattr(collating, "collator", None)
        assert collating.read(ROWS[0]).labels.tolist() == ROWS[0]["labels"]
        assert collating.read({"text": "the sky"}).n_labelled > 0
    for collator in (
        Own(tokenizer),
        DataCollatorWithFlattening(),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ):
        assert not only_pads(collator)


def test_one_row_of_a_flattening_collator_is_a_row():
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    row = Collating(collator, RowPreparer()).read({"input_ids": [5, 6, 7], "labels": [5, -100, 7]})
    assert row.input_ids.tolist() == [5, 6, 7]
    assert row.labels.tolist() == [-100, -100, 7]


@pytest.mark.parametrize(
    ("extra", "plain"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2]]), "token_type_ids": None, "attention_mask": IDS * 0 + 1}, True),
        ({"position_ids": torch.tensor([[2, 3, 4]])}, False),
        ({"position_ids": torch.tensor([[0, 5, 6]])}, False),
        ({"position_ids": torch.zeros(3, 1, 3)}, False),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, False),
        ({"mm_token_type_ids": IDS * 0}, True),
        ({"pixel_values": IDS}, False),
    ],
)
def test_what_is_more_than_a_row_of_tokens_is_left_to_the_collator(extra, plain):
    found = Collating(lambda rows: {"input_ids": IDS, "labels": IDS, **extra}, RowPreparer()).read({"text": "x"})
    assert isinstance(found, Row if plain else Collated)


def test_packs_that_a_collator_makes_are_refused():
    collating = Collating(
        lambda rows: {"input_ids": IDS, "labels": IDS, "position_ids": torch.tensor([[0, 1, 0]])}, RowPreparer()
    )
    assert collating.read({"text": "x"}).reason.startswith("packed rows")


def test_tokens_are_truncated_before_a_collator_sees_to_them(tokenizer):
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    collating = Collating(collator, RowPreparer(tokenizer, RowConfig(max_length=3)))
    assert len(collating.read({"input_ids": [5, 6, 7, 8, 9]}).input_ids) == 3


WRONG = {
    "raises": (lambda rows: rows[0]["secret"], "data_collator fails: KeyError in <lambda> "),
    "none": (lambda rows: None, "gives a NoneType, not a mapping"),
    "no labels": (lambda rows: {"input_ids": IDS}, "gives no 'labels'"),
    "no ids": (lambda rows: {"labels": IDS}, "gives no 'input_ids'"),
    "labels of classes": (lambda rows: {"input_ids": IDS, "labels": torch.tensor([1])}, "both must be (1, tokens)"),
    "flat": (lambda rows: {"input_ids": IDS[0], "labels": IDS[0]}, "both must be (1, tokens)"),
    "two": (lambda rows: {"input_ids": IDS.expand(2, 3), "labels": IDS.expand(2, 3)}, "both must be (1, tokens)"),
    "texts": (lambda rows: {"input_ids": IDS, "labels": "abc"}, "no tensors"),
    "unlabelled": (
        lambda rows: {"input_ids": IDS, "labels": IDS * 0 - 100},
        "no labelled tokens in 'labels' of the data_",
    ),
    "unlabelled image": (
        lambda rows: {"input_ids": IDS, "labels": IDS * 0 - 100, "pixel_values": IDS},
        "no labelled tokens after the data_collator",
    ),
}


@pytest.mark.parametrize(("collator", "reason"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_collators_row_is_its_reason(collator, reason):
    row = Collating(collator, RowPreparer()).read({"image": "x"})
    assert reason in row.reason


def test_no_text_of_a_row_is_in_a_collators_reason():
    def collate(rows):
        raise ValueError(f"cannot read {rows}")

    reason = Collating(collate, RowPreparer()).read({"text": "secret \ud83d\x1b[31m"}).reason
    assert reason.startswith("the data_collator fails: ValueError in collate (test_collated.py, line ")
    assert "secret" not in reason
    assert reason.isprintable()


# ---- copies ----


def test_collators_are_given_copies_once_a_row():
    """One that takes the image out of its row, writes into lists, arrays and tensors, and counts."""
    model, rows, collate = llava()
    rows = [{**row, "array": np.zeros(2), "tensor": torch.zeros(2), "deep": [{"x": [1]}]} for row in rows]
    before, calls = copy.deepcopy(rows), []

    def writing(examples):
        for row in examples:
            row["array"][:] = 7
            row["tensor"][:] = 7
            row["deep"][0]["x"].append(row["deep"].append(3))
        calls.append(len(examples))
        return collate([{"image": row.pop("image"), "text": row.pop("text")} for row in examples])

    scores = ForValueScorer(model, rows[6:], data_collator=writing, progress=False).score(rows[:6])
    expected = ForValueScorer(model, rows[6:], data_collator=collate, progress=False).score(rows[:6])
    np.testing.assert_array_equal(scores.values, expected.values)
    assert calls == [1] * len(rows)  # what it made is kept until it is run
    for row, old in zip(rows, before, strict=True):
        assert str(row) == str(old)


def test_rows_that_a_collator_cannot_put_together_go_one_by_one():
    model, rows, collate = llava()
    for i, row in enumerate(rows):
        row["text"] = row["text"] + [9] * i  # it stacks, and does not pad
    scores = ForValueScorer(model, rows[6:], data_collator=collate, progress=False).score(rows[:6])
    assert scores.reasons == [None] * 6
    alone = [
        ForValueScorer(model, rows[6:], data_collator=collate, progress=False).score([row]).values[0]
        for row in rows[:6]
    ]
    np.testing.assert_allclose(scores.values, alone, rtol=1e-12)


def test_a_collator_that_flattens_rows_with_images_is_given_one_at_a_time():
    model, rows, collate = llava()

    def flatten(examples):
        batch = collate(examples)
        return {**batch, "input_ids": batch["input_ids"].view(1, -1), "labels": batch["labels"].view(1, -1)}

    flat, plain = (
        ForValueScorer(model, rows[6:], data_collator=collator, progress=False).score(rows[:6]).values
        for collator in (flatten, collate)
    )
    np.testing.assert_array_equal(flat, plain)


def test_the_hash_of_a_collated_row_is_of_its_labels_too():
    model, rows, collate = llava()

    def other(examples):
        batch = collate(examples)
        batch["labels"][:, :8] = -100
        return batch

    def hash_of(rows, collator):
        return ForValueScorer(model, rows[6:], data_collator=collator, progress=False).hash_rows(rows[:6])

    assert hash_of(rows, collate) == hash_of(rows, collate) != hash_of(rows, other)
    assert hash_of(rows, collate) != hash_of(rows[1:] + rows[:1], collate)


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
    monkeypatch.setattr("forvalue_callbacks.data.reader.MADE_BYTES", 2000)  # a row of pixels in float64 takes 1,536
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
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **others}


def test_rows_of_a_collator_are_put_together_padded_on_the_right():
    batch = together([one(2, pixels=torch.zeros(1, 3, 9)), one(4, pixels=torch.ones(2, 3, 9))])
    assert batch["input_ids"].tolist() == [[0, 1, 1, 1], [0, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
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
