"""Preference rows are tokenised and truncated as `DPOTrainer` and `KTOTrainer` have them, row by row."""

import datasets
import numpy as np
import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from forvalue_callbacks.data.preference import is_preference, made_for_preferences, swapped
from forvalue_callbacks.data.reader import Reader
from forvalue_callbacks.data.sft import RowConfig, RowPreparer
from helpers.tokenizers import build_tokenizer, chatml

trl = pytest.importorskip("trl")


def turn(role, content):
    return {"role": role, "content": content}


ASKED = ["what is the sky", "what is blueberry pie ", "the sky is blue today, what is it"]
GOOD, BAD = [" blue", "it is blue</s>", " pie, today and today"], [" pie", "the sky is pie", " pi"]
TEXT = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(ASKED, GOOD, BAD, strict=True)]
CHAT = [
    {
        "prompt": [turn("system", "today"), turn("user", row["prompt"])],
        "chosen": [turn("assistant", row["chosen"])],
        "rejected": [turn("assistant", row["rejected"])],
    }
    for row in TEXT
]
FORMS = {
    "text": TEXT,
    "chat": CHAT,
    "text without a prompt": [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in TEXT
    ],
    "chat without a prompt": [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHAT
    ],
    "chat with tools": [
        {**row, "tools": '[{"name": "sky"}]', "chat_template_kwargs": {"shout": True}} for row in CHAT
    ],
}
MARKED = {
    name: [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in FORMS[name]
        for side in ("chosen", "rejected")
    ]
    for name in ("text", "chat")
}
LENGTHS = {"defaults": {}, "unlimited": {"max_length": None}}
CUT = {
    "text": (7, 12),
    "chat": (27, 31),
    "text without a prompt": (7, 12),
    "chat without a prompt": (31,),
    "chat with tools": (60,),
}
ALL = [(form, options) for form in FORMS for options in (*LENGTHS.values(), *({"max_length": n} for n in CUT[form]))]
PLAIN = {"use_cpu": True, "report_to": [], "bf16": False, "gradient_checkpointing": False}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """In a folder: the trainers load a reference model from there."""
    datasets.disable_progress_bars()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=400, **sizes)).save_pretrained(folder := tmp_path_factory.mktemp("llama"))
    yield LlamaForCausalLM.from_pretrained(folder)
    datasets.enable_progress_bars()


def reader(tokenizer, **options):
    return Reader(RowPreparer(tokenizer, RowConfig(**options), vocab_size=400))


def trainer_of(kind, llama, rows, tokenizer, path, **options):
    args = getattr(trl, f"{kind}Config")(output_dir=str(path), **PLAIN, **options)
    dataset = Dataset.from_list([{**row, "row": i} for i, row in enumerate(rows)])
    return getattr(trl, f"{kind}Trainer")(llama, args=args, train_dataset=dataset, processing_class=tokenizer)


def learnt(sample):
    """Tokens of each side, with what is predicted where, and its weight."""
    return [
        (s.tokens.tolist(), dict(zip((s.at + 1).tolist(), s.target.tolist(), strict=True)), s.weight)
        for s in sample.segments
    ]


def as_trained(trainer, row, weights):
    """What the trainer's own collator makes of a row: token ids and where they count."""
    batch = trainer.data_collator([row])
    sides = []
    for ids, mask, attended, weight in zip(
        batch["input_ids"], batch["completion_mask"], batch["attention_mask"], weights, strict=True
    ):
        ids = ids[attended.bool()].tolist()
        counted = {t: ids[t] for t in range(1, len(ids)) if mask[t]}
        sides.append((ids, counted, weight))
    return sides


def compare(trainer, rows, ours, weights_of):
    theirs = {row["row"]: row for row in trainer.train_dataset}
    for i, (row, sample) in enumerate(zip(rows, ours, strict=True)):
        if sample.reason is None:
            assert learnt(sample) == as_trained(trainer, theirs[i], weights_of(row)), i
        elif i in theirs:  # nothing to learn from
            sides = as_trained(trainer, theirs[i], weights_of(row))
            assert sides[0][0] == sides[-1][0] or not all(counted for _, counted, _ in sides), sample.reason


@pytest.mark.newest
@pytest.mark.parametrize(("form", "options", "bos"), [*((*one, False) for one in ALL), ("text", {}, True)])
def test_pairs_are_those_of_dpo_trainer(form, options, bos, llama, tmp_path):
    rows, tokenizer = FORMS[form], build_tokenizer(chatml(), bos=bos)
    trainer = trainer_of("DPO", llama, rows, tokenizer, tmp_path, **options)
    ours = list(reader(tokenizer, **options).samples(rows))
    compare(trainer, rows, ours, lambda row: (1, -1))
    assert any(sample.reason is None for sample in ours)
    tokenised = list(reader(None, **options).samples(trainer.train_dataset))  # rows of the trainer are the same
    known = {sample.digest for sample in ours if sample.reason is None}
    assert {sample.digest for sample in tokenised if sample.reason is None} == known
    assert made_for_preferences(trainer.data_collator)


@pytest.mark.newest
def test_a_prompt_whose_tokens_merge_with_an_answer_ends_before_them(llama, tmp_path):
    tokenizer = build_tokenizer()
    rows = [
        {"prompt": "blue", "chosen": "berry pie", "rejected": " sky"},
        {"prompt": "the s", "chosen": "ky", "rejected": "o"},
    ]
    trainer = trainer_of("DPO", llama, rows, tokenizer, tmp_path)
    ours = list(reader(tokenizer).samples(rows))
    compare(trainer, rows, ours, lambda row: (1, -1))
    assert any(len(row["prompt_ids"]) < len(tokenizer(row["prompt"])["input_ids"]) for row in trainer.train_dataset)


@pytest.mark.newest
@pytest.mark.parametrize(("form", "options"), [one for one in ALL if one[0] in MARKED])
def test_marked_answers_are_those_of_kto_trainer(form, options, llama, tmp_path):
    rows, tokenizer = MARKED[form], build_tokenizer(chatml())
    more = {"per_device_train_batch_size": 2}
    trainer = trainer_of("KTO", llama, rows, tokenizer, tmp_path, **more, **options)
    ours = list(reader(tokenizer, **options).samples(rows))
    compare(trainer, rows, ours, lambda row: (1 if row["label"] else -1,))
    tokenised = list(reader(None, **options).samples(trainer.train_dataset))
    known = {sample.digest for sample in ours if sample.reason is None}
    assert {sample.digest for sample in tokenised if sample.reason is None} == known


def test_rows_tokenised_by_older_trainers_are_read():
    want = [([5, 6, 7, 8], {2: 7, 3: 8}, 1), ([5, 6, 9], {2: 9}, -1)]
    rows = {
        "trl 1": {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]},
        "trl 0.24": {"prompt_input_ids": [5, 6], "chosen_input_ids": [7, 8], "rejected_input_ids": [9]},
        "ORPO": {
            "prompt_input_ids": [5, 6],
            "chosen_input_ids": [5, 6, 7, 8],
            "chosen_labels": [-100, -100, 7, 8],
            "rejected_input_ids": [5, 6, 9],
            "rejected_labels": [-100, -100, 9],
        },
        "reward": {"chosen_ids": [5, 6, 7, 8], "rejected_ids": [5, 6, 9]},
    }
    for name, row in rows.items():
        assert learnt(reader(None).sample(0, row)) == want, name
    marked = {"prompt_input_ids": [5, 6], "completion_input_ids": [5, 6, 9], "completion_labels": [-100, -100, 9]}
    assert learnt(reader(None).sample(0, {**marked, "label": False})) == want[1:]
    assert learnt(reader(None).sample(0, {"prompt_ids": [5, 6], "completion_ids": [7, 8], "label": True})) == want[:1]


def test_the_end_of_a_long_row_is_kept_where_that_is_asked_for():
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    sample = reader(None, max_length=3, truncation_mode="keep_end").sample(0, row)
    assert learnt(sample) == [([6, 7, 8], {1: 7, 2: 8}, 1), ([5, 6, 9], {2: 9}, -1)]


def reason(row, tokenizer=None, **options):
    return reader(tokenizer, **options).sample(0, row).reason


def test_reasons_name_what_is_wrong_and_the_way_out():
    ids = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7, 8, 3]}
    assert reason(ids) is None
    assert reason(ids, max_length=4) == (
        "'chosen' and 'rejected' are the same after truncation to max_length=4: raise max_length, or drop the row"
    )
    assert reason({**ids, "rejected_ids": [7, 8, 9]}) == "'chosen' and 'rejected' are the same: drop the row"
    assert "no labelled tokens left in 'prompt_ids' and 'chosen_ids' after truncation" in reason(ids, max_length=2)
    assert "token id 500" in reason({**ids, "chosen_ids": [500]})
    assert "'rejected_ids' is None" in reason({**ids, "rejected_ids": None})
    labelled = {"chosen_input_ids": [1, 2], "rejected_input_ids": [1, 3], "chosen_labels": [1], "rejected_labels": [1]}
    assert "1 labels for 2 tokens in 'chosen_input_ids'" in reason(labelled)
    tokenizer = build_tokenizer(chatml())
    assert "pass processing_class" in reason(TEXT[0])
    assert "'rejected' is None" in reason({**TEXT[0], "rejected": None}, tokenizer)
    assert "are text and messages" in reason({**CHAT[0], "prompt": "what"}, tokenizer)
    assert "'chosen' has no message" in reason({**CHAT[0], "chosen": []}, tokenizer)
    assert "images" in reason({**TEXT[0], "image": object()}, tokenizer)
    assert "has no chat template" in reason(CHAT[0], build_tokenizer())


@pytest.mark.parametrize(
    ("row", "yes"),
    [
        (TEXT[0], True),
        (MARKED["text"][1], True),
        ({**TEXT[0], "messages": []}, True),
        ({**TEXT[0], "input_ids": [1, 2]}, False),
        ({**TEXT[0], "completion": "x"}, False),
        ({"prompt": "x", "completion": "y", "label": 1}, False),
        ({"prompt": "x", "completion": "y"}, False),
        ({"text": "x", "label": True}, False),
        ("chosen rejected", False),
    ],
)
def test_which_rows_are_preferences(row, yes):
    assert is_preference(row) is yes


def test_a_swapped_pair_is_the_other_way_round_in_all_columns_that_come_in_two():
    row = {**TEXT[0], "score_chosen": 0.9, "score_rejected": 0.1, "chosen_by": "me", "id": 5}
    other = swapped(row)
    assert list(other) == list(row)
    assert (other["chosen"], other["rejected"], other["score_chosen"], other["score_rejected"]) == (
        row["rejected"], row["chosen"], 0.1, 0.9,
    )  # fmt: skip
    assert (other["chosen_by"], other["id"], swapped(other)) == ("me", 5, row)
    assert swapped(MARKED["text"][0]) == {**MARKED["text"][0], "label": False}
    with pytest.raises(ValueError, match="cannot be swapped"):
        swapped({"prompt": "x", "completion": "y"})


def test_digests_tell_both_directions_apart():
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    there, back, good, bad = (
        reader(None).sample(0, one).digest
        for one in (
            row,
            {**row, "chosen_ids": [9], "rejected_ids": [7, 8]},
            {"prompt_ids": [5, 6], "completion_ids": [9], "label": True},
            {"prompt_ids": [5, 6], "completion_ids": [9], "label": False},
        )
    )
    assert len({there, back, good, bad}) == 4
    assert np.all([len(digest) == 16 for digest in (there, back, good, bad)])
