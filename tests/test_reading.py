"""The rows scored are the rows trained on: data sets are read as trainers read them, and collators decide."""

import copy
import sqlite3

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_utils import RemoveColumnsCollator
from trl import SFTConfig

from forvalue_callbacks import Drop, ForValueCallback, ForValueConfig, ForValueScorer
from forvalue_callbacks.data.collated import Collated, Collating, only_pads
from forvalue_callbacks.data.reading import copied, kept
from forvalue_callbacks.data.sft import Row, RowConfig, RowPreparer
from forvalue_callbacks.trainer.callback import settings_of
from helpers.models import build_model, build_rows, llava
from helpers.tokenizers import EOS, build_tokenizer

ROWS = build_rows(6, seed=3)
VALIDATION = build_rows(4, seed=4)
IDS = torch.tensor([[5, 6, 7]])
PAIRS = [{"question": f"the sky {i}", "reply": f"is blue {i}"} for i in range(4)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def scores_of(dataset, **options):
    return ForValueScorer(build_model(), VALIDATION, progress=False, **options).score(dataset)


# ---- data sets ----


class Mapped(torch.utils.data.Dataset):
    """Map-style, and without the IndexError that ends an iteration over its places."""

    def __init__(self, rows):
        self.rows = dict(enumerate(rows))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Sized(torch.utils.data.IterableDataset):
    def __len__(self):
        return len(ROWS)

    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize(
    "kind",
    [
        Mapped,
        tuple,
        Dataset.from_list,
        lambda rows: torch.utils.data.Subset(Mapped(rows), range(6)),
        lambda _: Sized(),
    ],
    ids=["mapped", "tuple", "dataset", "subset", "iterable"],
)
def test_data_sets_of_every_kind_are_read_in_order(kind):
    expected = scores_of(ROWS).values
    assert scores_of(kind(ROWS)).values.tolist() == expected.tolist()
    scorer = ForValueScorer(build_model(), kind(ROWS), progress=False)
    assert scorer.score(VALIDATION).reasons == [None] * 4
    assert scorer._n_validation == 6


def test_a_mapping_of_data_sets_is_refused():
    with pytest.raises(ValueError, match="a dict of data sets is no data set: give one of 'train', 'test'"):
        scores_of({"train": ROWS, "test": ROWS})


@pytest.mark.parametrize("side", ["training", "validation"])
def test_rows_are_read_in_the_thread_that_owns_them(side):
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (place integer, ids text)")
    connection.executemany("insert into t values (?, ?)", [(i, f"{i + 3} 9 5") for i in range(6)])

    class Stored(Mapped):
        def __getitem__(self, index):
            (ids,) = connection.execute("select ids from t where place = ?", (index,)).fetchone()
            ids = list(map(int, ids.split()))
            return {"input_ids": ids, "labels": ids}

    if side == "training":
        assert scores_of(Stored(range(6))).reasons == [None] * 6
    else:
        assert ForValueScorer(build_model(), Stored(range(6)), progress=False).score(ROWS).reasons == [None] * 6


def test_a_generator_of_validation_rows_is_kept():
    rows = iter(ROWS)
    assert kept(rows) == ROWS
    assert kept(ROWS) is ROWS
    assert len(ForValueCallback(row for row in ROWS).validation_dataset) == 6
    scorer = ForValueScorer(build_model(), (row for row in VALIDATION), progress=False)
    assert scorer.score(ROWS).values.tolist() == scores_of(ROWS).values.tolist()
    assert len(scorer.validation_dataset) == 4


# ---- rows that do not fit ----


def test_one_row_that_does_not_fit_has_a_reason_and_ends_nothing():
    odd = [{"a": 1}, {"image": [[0.0]], "input_ids": [3, 4]}, None, {"input_ids": None}, *ROWS]
    scores = scores_of(odd)
    assert [reason is None for reason in scores.reasons] == [False] * 4 + [True] * 6
    assert "no known column" in scores.reasons[0]
    assert "pass a data_collator" in scores.reasons[1]


@pytest.mark.parametrize("n", [1, 5])
def test_a_data_set_without_a_known_column_is_an_error(n):
    with pytest.raises(ValueError, match=r"no row can be scored: no known column .*'a'"):
        scores_of([{"a": 1}] * n)
    with pytest.raises(ValueError, match=r"no validation row can be scored .*no known column .*'a'"):
        ForValueScorer(build_model(), [{"a": 1}] * n, progress=False).score(ROWS)


def test_a_later_part_of_a_data_set_may_have_none_that_fits():
    """As `map` shows parts to one scorer."""
    scorer = ForValueScorer(build_model(), VALIDATION, progress=False)
    scorer.score(ROWS)
    assert "no known column" in scorer.score([{"a": 1}]).reasons[0]


def tokens_only(rows):
    return default_data_collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])


PACKED = {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}


@pytest.mark.parametrize(
    "columns",
    [
        {"position_ids": [0, 1, 0, 1]},
        {"position_ids": [0, 1, 0, 1], "images": [], "videos": []},
        {"position_ids": [0, 1, 0, 1], "images": None, "attention_mask": [1, 1, 2, 2]},
        {"attention_mask": [1, 1, 2, 2], "image": None},
        {"seq_lengths": [2, 2]},
        {"cu_seq_lens_q": [0, 2, 4]},
    ],
)
@pytest.mark.parametrize("collator", [None, default_data_collator, tokens_only])
def test_packs_are_recognised_before_anything_else(columns, collator):
    with pytest.raises(ValueError, match="packed rows"):
        scores_of([*ROWS, {**PACKED, **columns}], data_collator=collator)


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
    with pytest.raises(ValueError, match="packed rows"):
        Collating(
            lambda rows: {"input_ids": IDS, "labels": IDS, "position_ids": torch.tensor([[0, 1, 0]])}, RowPreparer()
        ).read({"text": "x"})


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
    assert reason.startswith("the data_collator fails: ValueError in collate (test_reading.py, line ")
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


def test_copies_share_nothing_that_can_be_written_to():
    image = Image.new("RGB", (2, 2))
    value = {"a": [1, [2, {"b": image}]], "c": (np.zeros(1),), "d": torch.zeros(1), "file": open(__file__)}  # noqa: SIM115
    same = copied(value)
    same["a"][1][1]["b"].putpixel((0, 0), (9, 9, 9))
    same["a"][1].append(3)
    same["c"][0][:] = 1
    same["d"][:] = 1
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert len(value["a"][1]) == 2
    assert value["c"][0] == value["d"] == 0
    assert same["file"] is value["file"]  # cannot be copied
    value["file"].close()


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


# ---- trainers ----


def trained(tmp_path, train, validation, collator, config=None, **options):
    arguments = {"use_cpu": True, "report_to": [], "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(tmp_path), **arguments, **options)
    callback = ForValueCallback(validation, Drop(0.0), config)
    Trainer(build_model(), args, train_dataset=train, data_collator=collator, callbacks=[callback]).train()
    return callback.scores


@pytest.mark.parametrize("kind", [Mapped, Dataset.from_list])
def test_a_plain_trainer_does_not_truncate(kind, tmp_path, monkeypatch):
    long = [{"input_ids": [5] * 40 + row["input_ids"], "labels": [-100] * 40 + row["labels"]} for row in ROWS]
    monkeypatch.setattr(RowConfig.__dataclass_fields__["max_length"], "default", 30)
    scores = trained(tmp_path, kind(long), VALIDATION, DataCollatorForSeq2Seq(build_tokenizer()))
    assert scores.n_labelled.tolist() == scores_of(ROWS).n_labelled.tolist()


@pytest.mark.parametrize(
    ("options", "max_length"),
    [
        ({}, 1024),
        ({"max_length": 7}, 7),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, None),
        ({"max_length": 7, "dataset_kwargs": {"skip_prepare_dataset": True}}, None),
        ({"dataset_kwargs": {"skip_prepare_dataset": False}}, 1024),
    ],
)
def test_rows_are_truncated_where_sft_trainer_truncates(options, max_length, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], **options)
    assert settings_of(args, ForValueConfig(), None)["row_config"].max_length == max_length
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert settings_of(plain, ForValueConfig(), None)["row_config"].max_length is None
