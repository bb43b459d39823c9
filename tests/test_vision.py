"""Rows with images through TRL's own collator: every family of models, bad rows, trainers, `auto`."""

import copy
import io
import json

import datasets
import numpy as np
import pytest
import torch
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from forvalue_callbacks import Drop, ForValueCallback, ForValueConfig, ForValueScorer
from forvalue_callbacks.data.sft import RowConfig
from forvalue_callbacks.model.backbone import Backbone
from helpers.models import build_model
from helpers.oracles import relative, row_gradient
from helpers.tokenizers import build_tokenizer
from helpers.trainers import FromHereOn
from helpers.vision import ANSWERS, PLACES, build_listener, build_vlm, image_rows, turn, with_template

NEW = pytest.mark.newest
LABELLED = {  # what TRL's collator is told, by what is labelled
    "all": ("messages", {}),
    "assistant": ("messages", {"assistant_only_loss": True}),
    "completion": ("pairs", {"completion_only_loss": True}),
    "completion of messages": ("pairs of messages", {"completion_only_loss": True}),
}
# Of each family the whole of messages, and one of the ways to label answers alone.
CASES = [
    *[(family, "all") for family in PLACES if family != "mllama"],
    *[(family, "completion") for family in ("llava", "qwen3_vl", "gemma3")],
    *[(family, "completion of messages") for family in ("llava", "qwen2_5_vl", "idefics3", "smolvlm")],
    *[(family, "assistant") for family in ("qwen2_5_vl", "gemma3", "mllama")],
]


# With older versions Qwen's processors want a tokenizer of Qwen's, and Mllama another name of its positions.
RENAMED = ["qwen2_5_vl", "qwen3_vl", "mllama"]


def case(family, kind):
    """With older versions there are no Qwen3-VL and no marks of the assistant's tokens, and Qwen's processors want a
    tokenizer of Qwen's."""
    return pytest.param(family, kind, marks=NEW if "qwen" in family or kind == "assistant" else ())


def scored(model, validation, rows, collator):
    return ForValueScorer(model, validation, data_collator=collator, progress=False).score(rows)


def by_autograd(model, collator, rows, validation):
    """Inner products of each row's gradient in the head's weight with the mean of those of the validation rows."""

    def gradient(row):
        batch = dict(collator([dict(row)]))
        ids, labels = batch.pop("input_ids")[0], batch.pop("labels")[0]
        return row_gradient(model, {"input_ids": ids, "labels": labels}, **batch)

    direction = torch.stack([gradient(row) for row in validation]).mean(0)
    return [float((direction * gradient(row)).sum()) for row in rows]


def padded_left(collator):
    """Pads what a collator makes on the left, to a multiple of 8."""

    def collate(examples):
        batch = dict(collator(examples))
        length = batch["input_ids"].shape[1]
        for name, value in batch.items():
            if value.ndim > 1 and value.shape[1] == length and "pixel" not in name and "image" not in name:
                filler = value.new_full((1, 8 - length % 8, *value.shape[2:]), -100 if name == "labels" else 0)
                batch[name] = torch.cat([filler, value], 1)
        return batch

    return collate


@pytest.mark.parametrize(("family", "kind"), [case(*names) for names in CASES])
def test_rows_of_mixed_lengths_have_the_scores_of_each_alone_however_padded(family, kind):
    form, options = LABELLED[kind]
    model, processor = build_vlm(family)
    collator = DataCollatorForVisionLanguageModeling(processor, **options)
    rows, validation = image_rows(family, form, [1, 3, 0, 2]), image_rows(family, form, [1, 0], seed=1)
    scorer = ForValueScorer(model, validation, data_collator=collator, progress=False)
    together = scorer.score(rows)
    assert together.reasons == [None] * len(rows)
    assert relative(together.values, [scorer.score([row]).values[0] for row in rows]) < 1e-5
    processor.tokenizer.padding_side = "left"
    left = scored(model, validation, rows, padded_left(collator))
    assert left.n_labelled.tolist() == together.n_labelled.tolist()
    assert relative(left.values, together.values) < 1e-5


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=NEW)])
def test_scores_are_gradients_of_the_head_by_autograd(family):
    model, processor = build_vlm(family, torch.float64)
    trl = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)

    def collator(examples):
        batch = trl(examples)
        return {**batch, "pixel_values": batch["pixel_values"].double()} if "pixel_values" in batch else batch

    rows, validation = (image_rows(family, "pairs", [2, 1, 0, 3], seed) for seed in (0, 1))
    want = by_autograd(model, collator, rows, validation)
    assert relative(scored(model, validation, rows, collator).values, want) < 1e-10


@NEW  # with older versions its config wants another name of its positions
def test_what_mllama_cannot_be_trained_on_is_named():
    """TRL labels the places of images, which its head does not know; and makes its mask of the prompt alone."""
    model, processor = build_vlm("mllama")
    rows = image_rows("mllama", "messages", [1, 0, 0])
    scores = scored(model, rows[2:], rows[:2], DataCollatorForVisionLanguageModeling(processor))
    assert scores.reasons[1] is None
    assert "is outside the model's vocabulary of 301: label the answer alone" in scores.reasons[0]
    rows = image_rows("mllama", "pairs", [1, 0, 0])
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    scores = scored(model, rows[2:], rows[:2], collator)
    assert scores.reasons[1] is None
    assert scores.reasons[0].startswith("the model fails on what the data_collator makes of this row: RuntimeError")
    with pytest.raises(ValueError, match="validation row 0: the model fails on what the data_collator makes"):
        scored(model, rows[:1], rows, collator)


@pytest.mark.parametrize("family", ["llava", "gemma3", *[pytest.param(name, marks=NEW) for name in RENAMED]])
def test_the_places_of_images_are_known_by_the_models_config(family):
    model, processor = build_vlm(family)
    batch = DataCollatorForVisionLanguageModeling(processor)(image_rows(family, "messages", [2]))
    plain = DataCollatorForVisionLanguageModeling(processor)(image_rows(family, "messages", [0]))
    new = set(batch["input_ids"][0].tolist()) - set(plain["input_ids"][0].tolist())
    assert new & Backbone(model).places


# ---- bad rows ----


def broken(image):
    """The bytes of an image without their end."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue()[:60], "path": None}


def test_bad_images_are_reasons_of_their_rows_and_no_end_of_the_run():
    model, processor = build_vlm("llava")
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    rows, validation = (image_rows("llava", "pairs", [1, 1, 2, 1, 1, 1], seed) for seed in (0, 1))
    want = scored(model, validation[:2], rows, collator)
    rows[1]["images"] = [None]
    rows[2]["images"] = rows[2]["images"][:1]  # and two places
    rows[3]["images"] = None
    rows[5]["images"] = [[1, 2]]
    validation[0]["images"] = [None]
    with pytest.raises(ValueError, match=r"no validation row can be scored .*1 rows; row 0: the data_collator fails"):
        scored(model, validation[:1], rows, collator)
    scores = scored(model, validation[:2], rows, collator)
    assert [i for i, reason in enumerate(scores.reasons) if reason is None] == [0, 4]
    alone = scored(model, validation[1:2], [rows[0], rows[4]], collator)
    assert relative(scores.values[[0, 4]], alone.values) < 1e-6
    assert want.reasons == [None] * 6
    assert all("fails" in reason for reason in (scores.reasons[i] for i in (1, 2, 3, 5)))


def test_images_that_a_data_set_cannot_open_are_reasons_of_their_rows():
    model, processor = build_vlm("llava")
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    rows = image_rows("llava", "pairs", [1] * 5)
    want = scored(model, rows[:2], rows, collator)
    stored = [
        {**row, "images": [broken(i) if k in (1, 4) else i for i in row["images"]]} for k, row in enumerate(rows)
    ]
    text = datasets.Value("string")
    features = {"images": datasets.Sequence(datasets.Image()), "prompt": text, "completion": text}
    data = datasets.Dataset.from_list(stored, features=datasets.Features(features))
    for dataset in (data, torch.utils.data.Subset(data, range(5)), data.with_transform(lambda batch: batch)):
        scores = scored(model, rows[:2], dataset, collator)
        assert [reason is None for reason in scores.reasons] == [True, False, True, True, False]
        assert scores.reasons[1].startswith("the data set fails on this row: ")
        assert relative(scores.values[[0, 2, 3]], want.values[[0, 2, 3]]) < 1e-6


def test_a_row_cut_off_within_its_image_is_left_out_and_those_beside_it_are_not():
    model, processor = build_vlm("llava")
    cut = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=False, max_length=20)
    rows = image_rows("llava", "pairs", [1, 1, 1])
    rows[1]["prompt"] = "the sky is blue " * 9 + rows[1]["prompt"]
    scores = scored(model, rows[:1], rows, cut)
    assert [reason is None for reason in scores.reasons] == [True, False, True]
    assert "the model fails on what the data_collator makes of this row" in scores.reasons[1]
    assert relative(scores.values[[0, 2]], scored(model, rows[:1], rows[::2], cut).values) < 1e-6


# ---- trainers ----


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llava", "pairs"),
        pytest.param("qwen2_5_vl", "messages", marks=NEW),
        pytest.param("smolvlm", "pairs of messages", marks=NEW),  # older versions do not train it in bf16
    ],
)
def test_sft_with_its_defaults_draws_no_row_that_is_dropped_or_broken(family, form, tmp_path):
    model, processor = build_vlm(family)
    before = copy.deepcopy(model)
    rows, validation = image_rows(family, form, [1, 2, 1, 1, 2, 1, 1, 1]), image_rows(family, form, [1, 2, 1], 1)
    number = {row["images"][0].tobytes(): i for i, row in enumerate(rows)}
    stored = [dict(row) for row in rows]
    stored[3]["images"] = [broken(image) for image in rows[3]["images"]]
    train = datasets.Dataset.from_list(stored).cast_column("images", datasets.Sequence(datasets.Image()))
    callback, drawn = ForValueCallback(validation, Drop(0.25), verbose=False), []
    settings = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_steps": 6}
    args = SFTConfig(str(tmp_path), per_device_train_batch_size=2, **settings)
    trainer = SFTTrainer(model, args=args, train_dataset=train, processing_class=processor)
    trainer.add_callback(callback)
    trainer.add_callback(FromHereOn(drawn))
    assert args.bf16
    collator = trainer.data_collator

    def noting(examples):
        drawn.extend(number.get(example["images"][0].tobytes()) for example in examples)
        return collator(examples)

    trainer.data_collator = noting
    trainer.train()
    assert [reason is None for reason in callback.scores.reasons] == [i != 3 for i in range(8)]
    config = ForValueConfig(forward_dtype="bfloat16")
    scorer = ForValueScorer(before, validation, config, data_collator=collator, progress=False)
    np.testing.assert_array_equal(callback.scores.values, scorer.score(train).values)
    assert set(drawn) == set(np.flatnonzero(callback.weights).tolist())
    assert len(set(drawn)) == 5


# ---- sound ----


def test_rows_with_sounds_go_whole_to_a_model_that_hears():
    model, processor = build_listener(torch.float64)

    def collate(examples):
        (row,) = examples
        batch = processor(text=[row["text"]], audio=row["audio"], sampling_rate=16_000, return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[:, : -row["n"]] = -100
        batch.pop("token_type_ids", None)  # older versions make some, and the model takes none
        if row["audio"] is not None:
            batch["input_features"] = batch["input_features"].double()
        return {**batch, "labels": labels}

    def rows(n, seed):
        rng = np.random.default_rng(seed)
        place, made = "<|audio_bos|><|AUDIO|><|audio_eos|>", []
        for i in range(n):
            sounds = [rng.normal(size=int(rng.integers(3_000, 16_000))) for _ in range(i % 3)] or None
            made.append({"audio": sounds, "text": place * (i % 3) + "what is it" + ANSWERS[i % 5], "n": 2})
        return made

    train, validation = rows(6, 0), rows(3, 1)
    scores = scored(model, validation, train, collate)
    assert relative(scores.values, by_autograd(model, collate, train, validation)) < 1e-10


# ---- tools, several turns ----


def chats():
    """Conversations in which tools are called."""
    call = {"type": "function", "function": {"name": "sky", "arguments": {"day": "today"}}}
    asks = {"role": "assistant", "content": None, "tool_calls": [call]}
    answers = {"role": "tool", "name": "sky", "content": "blue"}
    question, last = turn("user", "what is the sky"), turn("assistant", "the sky is blue")
    return [
        [question, asks, answers, last],
        [turn("system", "user assistant"), question, last, turn("user", "and today"), asks, answers, last],
        [question, last],
    ]


@NEW  # an assistant's tokens are marked by rules of newer versions
@pytest.mark.parametrize("assistant", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_turns_and_calls_of_tools_are_labelled_as_trl_does(assistant, listed, tmp_path):
    tool = {"type": "function", "function": {"name": "sky", "description": "it is", "parameters": {"type": "object"}}}
    tools = [tool] if listed else json.dumps([tool])
    rows = datasets.Dataset.from_list([{"messages": chat, "tools": tools} for chat in chats()])
    tokenizer, model = with_template(build_tokenizer()), build_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    args = SFTConfig(str(tmp_path), use_cpu=True, report_to=[], assistant_only_loss=assistant, bf16=False)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    config = RowConfig(assistant_only_loss=assistant)
    scorer = ForValueScorer(model, rows, processing_class=tokenizer, row_config=config, progress=False)
    scores, prepared = scorer.score(rows), scorer.score(trainer.train_dataset)
    assert scores.reasons == [None] * 3
    assert scores.row_digests == prepared.row_digests
    np.testing.assert_array_equal(scores.values, prepared.values)
    texts = [tokenizer.decode([t for t in row["labels"] if t >= 0]) for row in trainer.train_dataset]
    assert ["blue<|im_end|>\n" in text for text in texts] == [not assistant, not assistant, not assistant]
    assert ["arguments" in text for text in texts] == [True, True, False]


# ---- auto ----


def described(n, seed, wrong=()):
    """Rows with an image and an answer of their own; some are said three times over."""
    rng = np.random.default_rng(seed)
    words = ["the", "sky", "is", "blue", "it", "today", "blueberry", "pie", "what", "user", "system", "assistant"]
    rows = image_rows("llava", "pairs", [1] * n, seed)
    for i, row in enumerate(rows):
        answer = " " + " ".join(rng.permutation(words)[: int(rng.integers(4, 7))])
        row |= {"prompt": PLACES["llava"] + "what is it", "completion": answer * (3 if i in wrong else 1)}
    return rows


def test_auto_finds_wrong_answers_of_rows_with_images():
    model, processor = build_vlm("llava")
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    options = {"config": ForValueConfig("auto"), "data_collator": collator, "processing_class": processor}
    rows = described(20, 1, wrong=range(6))
    rows[9]["images"] = [None]
    scores = ForValueScorer(model, described(40, 0), progress=False, **options).score(rows)
    assert [i for i, reason in enumerate(scores.reasons) if reason is not None] == [9]
    values = np.delete(scores.values, 9)
    assert values[:6].max() < values[6:].min()
    assert scores.noise.evidence["repeated text"].auc > 0.9
    assert "prompt truncated" not in scores.noise.evidence


def test_auto_refuses_by_name_where_places_of_images_are_learnt():
    model, processor = build_vlm("llava")
    collator = DataCollatorForVisionLanguageModeling(processor)
    options = {"config": ForValueConfig("auto"), "data_collator": collator, "progress": False}
    rows = [{"images": row["images"], "text": row["prompt"] + row["completion"]} for row in described(44, 0)]
    with pytest.raises(
        ValueError, match=r"in 44 of 44 what is learnt holds places of images: label the answers alone"
    ):
        ForValueScorer(model, rows, processing_class=processor, **options).score(rows[:2])
