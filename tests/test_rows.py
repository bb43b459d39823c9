"""Rows are those of a real `SFTTrainer`, row by row; what cannot be scored says why."""

import copy
import dataclasses
import logging
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import get_type_hints

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import CLIPImageProcessor, LlamaConfig, LlamaForCausalLM, LlavaProcessor
from trl import SFTConfig, SFTTrainer, TrlParser

from helpers.tokenizers import EOS, build_tokenizer, chatml

try:
    from trl.chat_template_utils import qwen2_5_chat_template
except ImportError:
    qwen2_5_chat_template = None

from forvalue_callbacks.data.conversations import refuse_unread
from forvalue_callbacks.data.reasons import UnscorableError
from forvalue_callbacks.data.sft import Row, RowConfig, RowPreparer

# The rules are those of the newest SFTTrainer.
pytestmark = pytest.mark.newest
IDS = list(range(10, 22))


def turn(role, content):
    return {"role": role, "content": content}


def from_value(role, content):
    return {"from": role, "value": content}


def chats(turn=turn):
    return [
        [turn("user", "what is the sky"), turn("assistant", "the sky is blue")],
        [turn("system", "user assistant"), turn("user", "it"), turn("assistant", "is"), turn("user", "blueberry pie")],
        [turn("user", "the sky " * 10), turn("assistant", "pie"), turn("user", "pie"), turn("assistant", "today")],
    ]


TEXTS = ["the sky is blue", "it is blue today" + EOS, "blueberry pie " * 10, "x", f"pie{EOS}{EOS}"]
PAIRS = [
    {"prompt": "what is the sky", "completion": " blue"},
    {"prompt": "the sky is bl", "completion": "ueberry"},  # tokens merge across the boundary
    {"prompt": "it is blue", "completion": " today" + EOS},
    {"prompt": "the sky is blue " * 10, "completion": "pie"},
    {"prompt": "it", "completion": ""},
    {"prompt": "", "completion": "blueberry pie"},
]
MASKED = [
    {"input_ids": IDS, "completion_mask": [0] * 5 + [1] * 7, "assistant_masks": [0, 1] * 6},
    {"input_ids": IDS[:4], "completion_mask": [0, 0, 1, 1], "assistant_masks": [1, 1, 1, 0]},
    {"input_ids": IDS[:4], "completion_mask": [0, 0, 0, 1], "assistant_masks": [1, 1, 1, 0]},
]
TOOLS = '[{"type": "function", "function": {"name": "sky"}}]'


def only(rows, *columns):
    return [{column: row[column] for column in columns} for row in rows]


FORMS = {
    "text": [{"text": text} for text in TEXTS],
    "prompt-completion": PAIRS,
    "prompt-completion-text": [
        {**pair, "text": text} for pair, text in zip(PAIRS, ["a", EOS, "b", EOS, "c", EOS], strict=True)
    ],
    "messages": [{"messages": chat} for chat in chats()],
    "messages-text": [{"messages": chat, "text": "not this"} for chat in chats()],
    "conversations": [{"conversations": chat} for chat in chats(from_value)],
    "conversations-text": [{"conversations": chat, "text": "this"} for chat in chats()],
    "prompt-completion-messages": [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in chats()],
    "tools-json": [{"messages": chat, "tools": TOOLS} for chat in chats()],
    "tools": [{"messages": chat, "tools": [{"name": "sky"}]} for chat in chats()],
    "chat-template-kwargs": [
        {"prompt": chat[:1], "completion": chat[1:], "chat_template_kwargs": {"shout": i == 1}}
        for i, chat in enumerate(chats())
    ],
    "input_ids": [{"input_ids": IDS}, {"input_ids": IDS[:3]}, {"input_ids": IDS[:1]}],
    "labels": [
        {"input_ids": IDS, "labels": [-100] * 9 + IDS[9:]},
        {"input_ids": IDS, "labels": IDS[:3] + [-100] * 9},
        {"input_ids": IDS, "labels": [-100] * 12},
        {"input_ids": IDS[:4], "labels": [-100, 30, 31, 32]},  # other tokens than the input's
        {"input_ids": IDS[:4], "labels": [10, -100, -100, -100]},
    ],
    "labels-and-masks": [{**row, "labels": row["input_ids"]} for row in MASKED],
    "completion_mask": only(MASKED, "input_ids", "completion_mask"),
    "assistant_masks": only(MASKED, "input_ids", "assistant_masks"),
    "both-masks": MASKED,
    "masks-and-text": [{**row, **pair} for row, pair in zip(MASKED, PAIRS, strict=False)],
    "attention_mask": [
        {"input_ids": IDS[:n], "attention_mask": [1] * n, "position_ids": list(range(n))} for n in (3, 9)
    ],
}
OPTIONS = {
    "defaults": {},
    "completion": {"completion_only_loss": True},
    "everything": {"completion_only_loss": False},
    "middle": {"max_length": 25},
    "short": {"max_length": 8},
    "short-end": {"max_length": 8, "truncation_mode": "keep_end"},
    "unlimited": {"max_length": None},
}


def processor():
    template = chatml().replace("message.content", "message.content[0].text")
    return LlavaProcessor(
        CLIPImageProcessor(), build_tokenizer(), patch_size=14, image_token="<pad>", chat_template=template
    )


@pytest.fixture(scope="module")
def llama():
    datasets.disable_progress_bars()
    yield LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
        )
    )
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(chatml())


@pytest.fixture
def compare(llama, tmp_path):
    """Prepares rows with a real `SFTTrainer` and with ours, and compares them row by row.

    Returns our rows, and the indices of those that `SFTTrainer` dropped.
    """

    def compare(rows, processing_class, options):
        dataset = Dataset.from_list([{**row, "row": i} for i, row in enumerate(rows)])
        args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False, **options)
        trainer = SFTTrainer(llama, args, train_dataset=dataset, processing_class=processing_class)
        theirs = {row["row"]: (row["input_ids"], row["labels"]) for row in trainer.train_dataset}
        preparer = RowPreparer(processing_class, RowConfig(**options))
        ours = [preparer(row) for row in dataset]
        for i, row in enumerate(ours):
            if row.reason is None:
                assert (row.input_ids.tolist(), row.labels.tolist()) == theirs[i], i
                assert row.n_labelled > 0
            else:  # dropped, or nothing to learn from
                assert all(label == -100 for label in theirs.get(i, ([], []))[1][1:]), (i, row.reason)
        assert any(row.reason is None for row in ours) or options.get("max_length") == 8
        return ours, sorted(set(range(len(rows))) - set(theirs))

    return compare


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_rows_are_those_of_sft_trainer(rows, options, tokenizer, compare):
    compare(rows, tokenizer, options)


@pytest.mark.parametrize("options", [{}, {"max_length": 8}], ids=["defaults", "short"])
@pytest.mark.parametrize("form", ["text", "prompt-completion"])
def test_rows_with_bos_are_those_of_sft_trainer(form, options, compare):
    rows, _ = compare(FORMS[form], build_tokenizer(bos=True), options)
    assert all(row.input_ids[0] == 1 for row in rows if row.reason is None)


def test_another_text_field_is_read(tokenizer, compare):
    rows = [{"body": text, "text": "not this"} for text in TEXTS]
    compare(rows, tokenizer, {"dataset_text_field": "body"})


def test_eos_is_added_once_and_is_labelled(tokenizer):
    prepare = RowPreparer(tokenizer)
    for example in (*FORMS["text"][:2], *FORMS["prompt-completion"]):
        row = prepare(example)
        assert row.input_ids.tolist().count(2) == 1
        assert row.labels[-1] == row.input_ids[-1] == 2


def test_the_completion_starts_where_tokens_diverge(compare):
    """Not always after the prompt: a thought that the conversation leaves out, a token across the boundary."""

    def labelled(row):
        return tokenizer.decode(row.labels[row.labels != -100])

    for thought, completion in (("<think>", "the sky is blue"), ("the sky", " is blue")):
        tokenizer = build_tokenizer(chatml(thought=thought))
        rows, _ = compare(FORMS["prompt-completion-messages"], tokenizer, {})
        assert labelled(rows[0]) == completion + "<|im_end|>\n"
    rows, _ = compare(PAIRS, tokenizer, {})
    assert labelled(rows[1]) == "blueberry" + EOS


@pytest.mark.parametrize("form", ["messages", "prompt-completion-messages", "chat-template-kwargs"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode")
def test_assistant_only_rows_are_those_of_sft_trainer(form, options, compare):
    rows = [row for i, row in enumerate(FORMS[form]) if i != 1]
    compare(rows, build_tokenizer(chatml(markers=True)), {**options, "assistant_only_loss": True})


def test_a_template_without_markers_is_swapped_like_sft_trainer_does(compare):
    tokenizer = build_tokenizer(qwen2_5_chat_template)
    rows, _ = compare([{"messages": chats()[0]}], tokenizer, {"assistant_only_loss": True})
    assert tokenizer.decode(rows[0].labels[rows[0].labels != -100]) == "\nthe sky is blue<|im_end|>\n"
    assert tokenizer.chat_template == qwen2_5_chat_template


@pytest.mark.parametrize("form", ["text", "prompt-completion", "messages", "prompt-completion-messages"])
def test_text_rows_through_a_processor_are_those_of_sft_trainer(form, compare):
    compare(FORMS[form], processor(), {})


def test_dropped_rows_are_those_without_labels_after_truncation(tokenizer, compare):
    rows, dropped = compare(PAIRS, tokenizer, {"max_length": 8})
    assert dropped == [3]
    assert rows[3].reason.startswith("no labelled tokens left in 'prompt' and 'completion' after truncation of ")
    assert "max_length=8" in rows[3].reason
    assert len(rows[3].input_ids) == len(rows[3].labels) == rows[3].n_labelled == 0


def test_names_and_defaults_are_those_of_sft_config():
    theirs = {field.name: field for field in dataclasses.fields(SFTConfig)}
    types, their_types = get_type_hints(RowConfig), get_type_hints(SFTConfig)
    for field in dataclasses.fields(RowConfig):
        assert (field.default, types[field.name]) == (theirs[field.name].default, their_types[field.name])
        assert field.metadata["help"]
        assert field.metadata.get("choices") == theirs[field.name].metadata.get("choices")


def test_config_is_parsed_from_the_command_line():
    arguments = ["--max_length", "7", "--completion_only_loss", "false", "--assistant_only_loss", "true"]
    (config,) = TrlParser(RowConfig).parse_args_and_config(arguments)
    assert config == RowConfig(max_length=7, completion_only_loss=False, assistant_only_loss=True)
    with pytest.raises(SystemExit), redirect_stdout(StringIO()):
        TrlParser(RowConfig).parse_args_and_config(["--truncation_mode", "middle"])


def test_a_config_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="'keep_start' or 'keep_end'"):
        RowConfig(truncation_mode="middle")
    with pytest.raises(ValueError, match="max_length=1"):
        RowConfig(max_length=1)


# ---- tokenised rows ----


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: np.array(x, dtype=np.int32)])
@pytest.mark.parametrize("padding", [([], [0, 0]), ([0, 0, 0], []), ([0], [0])], ids=["right", "left", "both"])
def test_padding_is_removed_on_either_side(kind, padding):
    left, right = padding
    example = {
        "input_ids": kind([*left, *IDS, *right]),
        "labels": kind([5] * len(left) + [-100, *IDS[1:]] + [5] * len(right)),
        "attention_mask": kind([*left, *[1] * 12, *right]),
        "position_ids": kind([1] * len(left) + list(range(12)) + [1] * len(right)),
    }
    row = RowPreparer(config=RowConfig(max_length=11))(example)  # truncation counts tokens, not padding
    assert row.reason is None
    assert row.input_ids.dtype == row.labels.dtype == np.int64
    assert row.input_ids.tolist() == IDS[:11]
    assert row.labels.tolist() == [-100, *IDS[1:11]]
    assert row.n_labelled == 10


def test_arrays_are_not_the_callers():
    ids = np.array(IDS)
    row = RowPreparer()({"input_ids": ids, "labels": ids})
    ids[:] = 0
    assert row.input_ids.tolist() == row.labels.tolist() == IDS


def test_masks_of_a_row_with_labels_are_not_looked_at():
    row = RowPreparer()({"input_ids": IDS, "labels": IDS, "completion_mask": [0], "assistant_masks": None})
    assert row.reason is None
    assert row.labels.tolist() == IDS


def test_tokens_are_taken_as_they_are_beside_text():
    row = RowPreparer(config=RowConfig(assistant_only_loss=True))(
        {"messages": chats()[0], "input_ids": IDS, "labels": IDS}
    )
    assert row.input_ids.tolist() == IDS


def test_a_completion_mask_that_does_not_count_is_said_once(caplog):
    prepare = RowPreparer()
    with caplog.at_level(logging.WARNING):
        rows = [prepare(row) for row in FORMS["completion_mask"]]
    assert all(row.n_labelled == len(row.input_ids) - 1 for row in rows)
    assert [record.message.split(":")[-1] for record in caplog.records] == [" set completion_only_loss=True."]


# ---- raw rows beyond what SFTTrainer takes ----


@pytest.mark.parametrize("example", [{"conversations": chats()[0]}, {"messages": chats(from_value)[0]}])
def test_conversations_with_roles_and_messages_with_from_are_taken(example, tokenizer):
    assert (
        RowPreparer(tokenizer)(example).labels.tolist() == RowPreparer(tokenizer)(FORMS["messages"][0]).labels.tolist()
    )


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_the_example_is_left_as_it_is(rows, tokenizer):
    before = copy.deepcopy(rows)
    prepare = RowPreparer(tokenizer)
    for row in rows:
        prepare(row)
        prepare(row)
    assert rows == before


# ---- rows that cannot be scored ----

BAD_ROWS = {
    "list": (["input_ids"], "the row is a list: make it a mapping"),
    "none": (None, "the row is a NoneType"),
    "ids-none": ({"input_ids": None}, "'input_ids' is None: fill it or drop the row"),
    "ids-empty": ({"input_ids": []}, "no tokens in 'input_ids'"),
    "ids-all-padding": ({"input_ids": [0, 0], "attention_mask": [0, 0]}, "no tokens in 'input_ids'"),
    "ids-text": ({"input_ids": "the sky"}, "'input_ids' must be one flat list of integers, not this str"),
    "ids-number": ({"input_ids": 3}, "'input_ids' must be one flat list of integers, not this int"),
    "ids-floats": ({"input_ids": [1.5, 2.0]}, "'input_ids' must be one flat list of integers, not this list"),
    "ids-holes": ({"input_ids": [1, None]}, "'input_ids' must be one flat list of integers"),
    "ids-nested": ({"input_ids": [IDS]}, "'input_ids' must be one flat list of integers"),
    "ids-ragged": ({"input_ids": [[1], [1, 2]]}, "'input_ids' must be one flat list of integers"),
    "ids-bfloat16": ({"input_ids": torch.ones(3, dtype=torch.bfloat16)}, "flat list of integers, not this Tensor"),
    "ids-dict": ({"input_ids": {"a": 1}}, "'input_ids' must be one flat list of integers, not this dict"),
    "labels-none": ({"input_ids": IDS, "labels": None}, "'labels' is None"),
    "labels-class": ({"input_ids": IDS, "labels": 1}, "'labels' must be one flat list of integers, not this int"),
    "labels-empty": (
        {"input_ids": IDS, "labels": []},
        "0 values in 'labels', but 12 in 'input_ids': make them equally",
    ),
    "labels-short": ({"input_ids": IDS, "labels": IDS[1:]}, "11 values in 'labels', but 12 in 'input_ids'"),
    "mask-short": ({"input_ids": IDS, "assistant_masks": [1]}, "1 values in 'assistant_masks', but 12 in 'input_ids'"),
    "mask-long": ({"input_ids": IDS, "attention_mask": [1] * 13}, "13 values in 'attention_mask', but 12"),
    "masked": ({"input_ids": IDS, "labels": [-100] * 12}, "no labelled tokens in 'labels': label what"),
    "mask-zero": ({"input_ids": IDS, "assistant_masks": [0] * 12}, "no labelled tokens in 'assistant_masks'"),
    "first-only": (
        {"input_ids": IDS, "labels": [10] + [-100] * 11},
        "no labelled tokens in 'labels' but the first, which nothing predicts: put a prompt or BOS before it",
    ),
    "one-token": ({"input_ids": [10]}, "no labelled tokens in 'input_ids' but the first"),
    "cut-off": (
        {"input_ids": [7] * 2000, "labels": [-100] * 1999 + [7]},
        "no labelled tokens left in 'labels' after truncation of 2,000 tokens to max_length=1024: raise max_length",
    ),
    "cut-off-but-first": (
        {"input_ids": [7] * 2000, "labels": [7] + [-100] * 1998 + [7]},
        "no labelled tokens left in 'labels' after truncation",
    ),
    "ids-beyond": ({"input_ids": [1, 300, 2]}, "token id 300 in 'input_ids' is outside the model's vocabulary of 300"),
    "ids-negative": ({"input_ids": [1, -1, 2], "labels": [1, 1, 2]}, "token id -1 in 'input_ids' is outside"),
    "labels-beyond": ({"input_ids": [1, 2], "labels": [-100, 999]}, "token id 999 in 'labels' is outside"),
    "labels-negative": ({"input_ids": [1, 2], "labels": [-1, 2]}, "token id -1 in 'labels' is outside"),
    "text-none": ({"text": None}, "'text' is None, not text or a list of messages: fill it or drop the row"),
    "text-number": ({"text": 3}, "'text' is a int, not text"),
    "text-empty": ({"text": ""}, "'text' is empty"),
    "prompt-none": ({"prompt": None, "completion": "a"}, "'prompt' is None"),
    "completion-none": ({"prompt": "a", "completion": None}, "'completion' is None"),
    "completion-other": ({"prompt": "a", "completion": chats()[0]}, "'prompt' must be a list of messages with 'role'"),
    "messages-none": ({"messages": None}, "'messages' is None, not a list of messages"),
    "messages-text": ({"messages": "hello"}, "'messages' is a str, not a list of messages"),
    "messages-empty": ({"messages": []}, "'messages' is empty"),
    "conversations-empty": ({"conversations": []}, "'conversations' is empty"),
    "messages-texts": ({"messages": ["hello"]}, "'messages' must be a list of messages with 'role' and 'content'"),
    "messages-refused": (
        {"messages": [turn("alien", "x")]},
        "'messages' cannot be tokenised: TemplateError in line 5 of the chat template",
    ),
    "messages-later-text": ({"messages": [turn("user", "x"), "y"]}, "message 1 of 'messages' has no role"),
    "messages-no-role": ({"messages": [{"content": "x"}]}, "message 0 of 'messages' has no role"),
    "messages-role-none": ({"messages": [turn(None, "x")]}, "message 0 of 'messages' has no role"),
    "messages-no-content": ({"messages": [{"role": "user"}]}, "content of message 0 of 'messages' is None, not text"),
    "messages-content-none": (
        {"messages": [turn("user", "x"), turn("assistant", None)]},
        "the content of message 1 of 'messages' is None, not text: fill it or drop the row",
    ),
    "messages-content-number": ({"messages": [turn("user", 7)]}, "content of message 0 of 'messages' is a int"),
    "messages-content-texts": ({"messages": [turn("user", ["x"])]}, "content of message 0 of 'messages' is a list"),
    "value-none": (
        {"conversations": chats(from_value)[0] + [from_value("user", None)]},
        "message 2 of 'conversations'",
    ),
    "prompt-content-none": (
        {"prompt": [turn("user", None)], "completion": [turn("assistant", "x")]},
        "content of message 0 of 'prompt' is None",
    ),
    "image-part": (
        {"messages": [turn("user", [{"type": "image"}])]},
        "parts that are no text, and a tokenizer takes text: pass a processor",
    ),
    "tools": ({"messages": chats()[0], "tools": "{no"}, "'tools' must be JSON"),
    "kwargs": ({"messages": chats()[0], "chat_template_kwargs": "x"}, "'chat_template_kwargs' a mapping"),
    "halves": ({"text": "half of an emoji \ud83d"}, "'text' cannot be tokenised: "),
    "labels-of-text": ({"text": "the sky", "labels": 1}, "'labels' must be one flat list of integers, not this int"),
}


@pytest.mark.parametrize(("example", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_cannot_be_scored_says_why(example, reason, tokenizer):
    row = RowPreparer(tokenizer, max_positions=1024, vocab_size=300)(example)
    assert isinstance(row, Row)
    assert reason in row.reason
    assert len(row.input_ids) == len(row.labels) == row.n_labelled == 0


def test_a_row_longer_than_the_model_says_so():
    prepare = RowPreparer(config=RowConfig(max_length=None), max_positions=1024)
    row = prepare({"input_ids": [7] * 2000})
    assert row.reason == "2,000 tokens in 'input_ids', but the model takes 1,024: set max_length=1024"
    assert prepare({"input_ids": [7] * 1024}).reason is None


def test_a_conversation_without_assistant_says_so():
    prepare = RowPreparer(build_tokenizer(chatml(markers=True)), RowConfig(assistant_only_loss=True))
    row = prepare({"messages": [turn("user", "x")]})
    assert row.reason == "no labelled tokens in 'messages': add an assistant's turn, or drop the row"


def test_nothing_of_a_row_is_in_its_reason():
    tokenizer = build_tokenizer("{{ raise_exception('no: ' + messages[0]['content']) }}")
    for reason in (
        RowPreparer(tokenizer)({"messages": [turn("user", "secret \x1b[31m\ud83d")]}).reason,
        Row.unscorable("a\nb\x1b[31m\u202e\ud83d" + "x" * 999).reason,
    ):
        assert reason.isprintable()
        assert "secret" not in reason
        assert len(reason) <= 400


@pytest.mark.parametrize(
    "images", [{"images": []}, {"image": None}, {"images": ""}, {"images": None, "pixel_values": None}]
)
def test_an_empty_column_is_no_image(images, tokenizer):
    for example in (PAIRS[0], {"input_ids": IDS, "labels": IDS}):
        plain = RowPreparer(tokenizer)(example)
        assert RowPreparer(tokenizer)({**example, **images}).labels.tolist() == plain.labels.tolist()


PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}{% endfor %}"
)


def test_parts_are_text_where_the_template_reads_them():
    """A template that reads no parts writes the list out, as Python does."""
    parts = [turn("user", [{"type": "text", "text": "the sky"}, {"type": "text", "text": " is"}]), turn("x", "blue")]
    row = RowPreparer(build_tokenizer(PARTS))({"messages": parts})
    joined = [turn("user", "the sky is"), turn("x", "blue")]
    assert row.input_ids.tolist() == RowPreparer(build_tokenizer(PARTS))({"messages": joined}).input_ids.tolist()
    for template in ("{{ messages[0].content }}{{ messages[1].content }}", PARTS.replace("c.text", "c | tojson")):
        reason = RowPreparer(build_tokenizer(template))({"messages": parts}).reason
        assert "is a list, which the chat template does not read as text: join its parts" in reason


def test_a_turn_that_calls_tools_needs_no_content():
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "sky"}}]}
    template = (
        "{% for m in messages %}{% if m.content %}{{ m.content }}{% else %}call {{ m.tool_calls[0].function.name }}"
        "{% endif %}{% endfor %}"
    )
    for call in (calls, {**calls, "content": None}, {**calls, "content": ""}):
        prepare = RowPreparer(tokenizer := build_tokenizer(template))
        assert tokenizer.decode(prepare({"messages": [turn("user", "None "), call]}).input_ids) == "None call sky"
    with pytest.raises(UnscorableError, match="is None, which the chat template writes out"):  # newer ones never do
        refuse_unread(
            [turn("user", "None"), calls], "'messages'", lambda turns: str([m.get("content") for m in turns])
        )


NO_TRL = """
import sys
sys.modules["trl"] = None
sys.path.insert(0, sys.argv[1])
from forvalue_callbacks.data.sft import RowConfig, RowPreparer
from helpers.tokenizers import build_tokenizer, chatml

chat = [{"role": "user", "content": "what is the sky"}, {"role": "assistant", "content": "blue"}]
shared = [{"from": turn["role"], "value": turn["content"]} for turn in chat]
marked = RowPreparer(build_tokenizer(chatml(markers=True)), RowConfig(assistant_only_loss=True))
plain = RowPreparer(build_tokenizer(chatml()))
rows = [{"messages": chat}, {"prompt": chat[:1], "completion": chat[1:]}, {"conversations": shared}]
for row in rows:
    assert plain(row).reason is marked(row).reason is None, row
for row in [{"text": "blue"}, {"prompt": "a", "completion": "b"}, {"input_ids": [1, 2], "labels": [1, 2]}]:
    assert plain(row).reason is None, row
print(RowPreparer(plain.processing_class, marked.config)(rows[0]).reason)
"""


def test_rows_need_trl_only_where_a_template_is_swapped():
    """A fresh process, in which trl cannot be imported."""
    command = [sys.executable, "-c", NO_TRL, str(Path(__file__).parent)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "trl, which knows templates with them, is not here or too old" in out.stdout


# ---- set-ups that cannot work ----

ASSISTANT = RowConfig(assistant_only_loss=True)
BAD_SET_UPS = {
    "unknown": ({"a": 1, "b": 2}, None, r"no known column \(columns found: 'a', 'b'\): give 'input_ids'.*now 'text'"),
    "empty": ({}, None, "no known column"),
    "prompt-alone": (
        {"prompt": "a", "text": "b"},
        None,
        "no known column .*'prompt', 'text'.*'prompt' with 'completion'",
    ),
    "completion-alone": ({"completion": "a"}, None, "no known column"),
    "other-text": ({"text": "a"}, RowConfig(dataset_text_field="body"), "columns found: 'text'.*now 'body'"),
    "assistant-text": ({"text": "a"}, ASSISTANT, "assistant_only_loss=True needs conversations, but 'text' is text"),
    "assistant-pair": (PAIRS[0], ASSISTANT, "needs conversations, but 'prompt' and 'completion' is text"),
    "assistant-ids": ({"input_ids": IDS}, ASSISTANT, "'labels' or 'assistant_masks' with 'input_ids'"),
    "assistant-template": ({"messages": chats()[0]}, ASSISTANT, r"needs {% generation %} markers.*trl has no version"),
    "image": (
        {"image": [[0.0]], "messages": []},
        None,
        "rows with images .*'image', 'messages'.*pass a data_collator",
    ),
    "images": ({"input_ids": IDS, "labels": IDS, "images": ["x"]}, None, "pass a data_collator"),
    "many": (dict.fromkeys(map(str, range(99))), None, r"columns found: .* '11', \.\.\.\)"),
}


@pytest.mark.parametrize(("example", "config", "message"), BAD_SET_UPS.values(), ids=BAD_SET_UPS)
def test_what_no_row_may_have_is_a_reason_of_one_row(example, config, message, tokenizer):
    row = RowPreparer(tokenizer, config)(example)
    assert row.set_up
    assert re.search(message, row.reason)


REFUSED = {
    "packed": ({"input_ids": IDS, "seq_lengths": [6, 6]}, None, "packed rows .*'seq_lengths'.*score before packing"),
    "cu_seq_lens": ({"input_ids": IDS, "cu_seq_lens_q": [0, 6]}, None, "packed rows .*'cu_seq_lens_q'"),
    "counted": (
        {"input_ids": IDS, "attention_mask": [1] * 6 + [2] * 6},
        None,
        "packed rows .*'attention_mask' counts",
    ),
    "restart": (
        {"input_ids": IDS, "position_ids": [*range(6)] * 2},
        None,
        "packed rows .*restart.*score before packing",
    ),
    "restart-images": ({"input_ids": IDS, "images": ["x"], "position_ids": [*range(6)] * 2}, None, "packed rows"),
    "single-tokens": ({"input_ids": [1, 2], "position_ids": [0, 0]}, None, "score before packing"),
}


@pytest.mark.parametrize(("example", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_a_set_up_that_cannot_work_raises(example, config, message, tokenizer):
    for _ in range(2):
        prepare = RowPreparer(tokenizer, config)
        with pytest.raises(ValueError, match=message):
            prepare(example)


@pytest.mark.parametrize("form", ["text", "prompt-completion", "messages", "conversations"])
def test_raw_rows_need_a_tokenizer(form):
    row = RowPreparer()(FORMS[form][0])
    assert row.set_up
    assert re.search(r"raw rows \(columns found: .*\) need a tokenizer: pass processing_class", row.reason)


def test_text_needs_an_eos_token():
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    row = RowPreparer(tokenizer)({"text": "a"})
    assert row.set_up
    assert "set tokenizer.eos_token" in row.reason


@pytest.mark.parametrize("config", [None, ASSISTANT])
def test_conversations_need_a_chat_template(config):
    prepare = RowPreparer(build_tokenizer(), config)
    row = prepare({"messages": chats()[0]})
    assert row.set_up
    assert "no chat template" in row.reason


def test_a_chat_template_may_come_with_the_row(tokenizer):
    example = {"messages": chats()[0], "chat_template_kwargs": {"chat_template": chatml()}}
    assert RowPreparer(build_tokenizer())(example).labels.tolist() == RowPreparer(tokenizer)(example).labels.tolist()
