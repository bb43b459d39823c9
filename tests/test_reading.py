"""The rows scored are the rows trained on: data sets are read as trainers read them, and nothing else notices."""

import random
import sqlite3

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig

from forvalue_callbacks import Drop, ForValueCallback, ForValueConfig, ForValueScorer
from forvalue_callbacks.data.corruption import corrupted
from forvalue_callbacks.data.reader import row_of
from forvalue_callbacks.data.reading import OwnRandomness, copied, examples_of, kept
from forvalue_callbacks.data.sft import RowConfig
from forvalue_callbacks.trainer.callback import settings_of
from helpers.models import build_model, build_rows
from helpers.oracles import relative
from helpers.tokenizers import build_tokenizer

ROWS = build_rows(6, seed=3)
VALIDATION = build_rows(4, seed=4)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def scores_of(dataset, **options):
    return ForValueScorer(build_model(), VALIDATION, progress=False, **options).score(dataset)


def scorer(model, validation, **options):
    return ForValueScorer(model, validation, progress=False, **options)


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
    assert scorer.pairwise(VALIDATION).shape == (4, 6)


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
    assert len(scorer.validation.samples()) == 4


@pytest.mark.parametrize(
    "dataset",
    [{"text": ["a", "b"]}, Dataset.from_list(ROWS).to_pandas(), "a.jsonl"],
    ids=["columns", "frame", "path"],
)
def test_what_is_no_data_set_of_rows_is_refused_by_name(dataset):
    with pytest.raises(ValueError, match=rf"a {type(dataset).__name__} is no data set of rows: give a list"):
        scorer(build_model(), VALIDATION).score(dataset)


def test_plain_lists_and_data_sets_are_read_as_they_are():
    dataset = Dataset.from_list(ROWS)
    assert list(examples_of(dataset)) == list(dataset)
    assert list(examples_of(ROWS)) == ROWS
    assert list(examples_of(dataset.with_transform(lambda batch: batch))) == list(dataset)


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
    pack = {**PACKED, **columns}
    with pytest.raises(ValueError, match="no row can be scored: packed rows"):
        scores_of([pack, pack], data_collator=collator)
    scores = scores_of([*ROWS, pack], data_collator=collator)
    assert np.isfinite(scores.values[:-1]).all()
    assert scores.reasons[-1].startswith("packed rows")


def test_one_row_that_needs_what_the_others_do_not_has_a_reason():
    bad = [{"text": "x"}, {"messages": [{"role": "user", "content": "x"}]}, {"image": "x", "text": "y"}, {"foo": 1}, 3]
    scores = scorer(build_model(), VALIDATION).score([*ROWS, *bad])
    assert [reason is None for reason in scores.reasons] == [True] * len(ROWS) + [False] * len(bad)
    assert "need a tokenizer" in scores.reasons[len(ROWS)]
    with pytest.raises(ValueError, match=r"no row can be scored: raw rows .* need a tokenizer"):
        scorer(build_model(), VALIDATION).score([bad[0]] * 3)


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
    sample = next(scorer(gpt2, typed(VALIDATION)).run.reader.samples(typed(ROWS)))
    rows = corrupted([row_of(sample.segments[0])] * 3, "truncated", np.random.default_rng(0))
    assert all(row is None or row.typed for row in rows)


def test_token_types_that_the_model_does_not_take_are_not_looked_at():
    want = scorer(build_model(), VALIDATION).score(ROWS)
    found = scorer(build_model(), VALIDATION).score(typed(ROWS, lambda place: place % 2))
    assert found.values.tolist() == want.values.tolist()
    assert found.metadata == want.metadata


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


# ---- copies ----


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
