"""Rows are those of a real `SFTTrainer`, row by row."""

import copy
import dataclasses
import inspect
import logging
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
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from trl import SFTConfig, SFTTrainer, TrlParser

from helpers.tokenizers import EOS, build_tokenizer, chatml

try:
    from trl.chat_template_utils import qwen2_5_chat_template
except ImportError:
    qwen2_5_chat_template = None
from forvalue_callbacks.data.conversations import refuse_unread
from forvalue_callbacks.data.reasons import UnscorableError
from forvalue_callbacks.data.sft import RowConfig, RowPreparer
from helpers.rows import FORMS, IDS, PAIRS, TEXTS, chats, from_value, turn

# The rules are those of the newest SFTTrainer.
pytestmark = pytest.mark.newest
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


def test_a_row_may_set_variables_of_the_template_and_nothing_else(tokenizer):
    """Rows come from anywhere, and a template is a program."""
    row, prepare = {"messages": chats()[0]}, RowPreparer(tokenizer)
    shouted = prepare({**row, "chat_template_kwargs": {"shout": True}})
    assert len(shouted.labels) > len(prepare(row).labels)
    arguments = {
        name
        for kind in (PreTrainedTokenizerBase, ProcessorMixin)
        for name in inspect.signature(kind.apply_chat_template).parameters
        if name not in ("self", "kwargs", "documents")  # what there is to read is the row's
    }
    assert len(arguments) > 10
    for name in arguments:
        refused = prepare({**row, "chat_template_kwargs": {name: "{% for x in range(10**9) %}{% endfor %}"}})
        assert f"'chat_template_kwargs' sets '{name}', which no row may" in refused.reason
    assert "cannot be tokenised" in prepare({**row, "chat_template_kwargs": {"text": 1, "messages": 2}}).reason
