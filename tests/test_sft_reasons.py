"""Rows that cannot be scored and set-ups that cannot work say why."""

import re

import pytest
import torch

from helpers.tokenizers import build_tokenizer, chatml

try:
    from trl.chat_template_utils import qwen2_5_chat_template
except ImportError:
    qwen2_5_chat_template = None
from forvalue_callbacks.data.sft import Row, RowConfig, RowPreparer
from helpers.rows import FORMS, IDS, PAIRS, chats, from_value, turn

# The rules are those of the newest SFTTrainer.
pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(chatml())


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


PACKS = {
    "packed": ({"input_ids": IDS, "seq_lengths": [6, 6]}, "packed rows .*'seq_lengths'.*score before packing"),
    "cu_seq_lens": ({"input_ids": IDS, "cu_seq_lens_q": [0, 6]}, "packed rows .*'cu_seq_lens_q'"),
    "counted": (
        {"input_ids": IDS, "attention_mask": [1] * 6 + [2] * 6},
        "packed rows .*'attention_mask' counts",
    ),
    "restart": (
        {"input_ids": IDS, "position_ids": [*range(6)] * 2},
        "packed rows .*restart.*score before packing",
    ),
    "restart-images": ({"input_ids": IDS, "images": ["x"], "position_ids": [*range(6)] * 2}, "packed rows"),
    "single-tokens": ({"input_ids": [1, 2], "position_ids": [0, 0]}, "score before packing"),
}


@pytest.mark.parametrize(("example", "message"), PACKS.values(), ids=PACKS)
def test_a_pack_says_so(example, message, tokenizer):
    row = RowPreparer(tokenizer)(example)
    assert row.set_up
    assert re.search(message, row.reason)


def test_a_row_of_a_padding_free_batch_is_a_row(tokenizer):
    row = {"input_ids": IDS, "labels": [-100] * 4 + IDS[4:]}
    assert (
        RowPreparer(tokenizer)({**row, "seq_lengths": [len(IDS)]}).labels.tolist()
        == RowPreparer(tokenizer)(row).labels.tolist()
    )


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
