import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from forvalue_callbacks.rows import RowConfig, RowPreparer, needs_collator

MARKED = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\n' }}{%- if m['role'] == 'assistant' %}"
    "{%- generation %}{{- m['content'] + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}{{- m['content'] + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
UNMARKED = MARKED.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
TEXT = ["The cat sat on the mat.", "A dog ran to the park and back again.", "Hi.", "The cat sat<|eos|>"]


@pytest.fixture(scope="module")
def tokenizer():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|eos|>", pad_token="<|pad|>")
    fast.chat_template = MARKED
    return fast


@pytest.fixture(scope="module")
def tiny(tokenizer):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))


def chat(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


TURNS = [("Hi.", "The cat."), ("A dog?", "ran", "Where?", "to the park."), ("On the mat?", "Hi.")]
FORMS = {
    "text": [{"text": t} for t in TEXT],
    "named text": [{"story": t} for t in TEXT],
    "prompt": [{"prompt": t[:6], "completion": t[6:]} for t in TEXT if len(t) > 8],
    "prompt that merges": [{"prompt": "The ca", "completion": "t sat"}, {"prompt": "A", "completion": " dog<|eos|>"}],
    "messages": [{"messages": chat(*turns)} for turns in TURNS],
    "message lists": [{"prompt": chat(*turns)[:-1], "completion": chat(*turns)[-1:]} for turns in TURNS],
    "from/value": [
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in chat(*turns)]} for turns in TURNS
    ],
    "tokens": [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}],
    "tokens and labels": [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}],
    "tokens and assistant masks": [{"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]}],
}
OPTIONS = [
    {},
    {"max_length": 7},
    {"max_length": 7, "truncation_mode": "keep_end"},
    {"max_length": None},
    {"completion_only_loss": False},
    {"completion_only_loss": True},
    {"assistant_only_loss": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_sft_trainer(form, options, tokenizer, tiny, tmp_path):
    """Row by row; the rows that SFTTrainer drops in silence are those that get a reason."""
    if options.get("assistant_only_loss") and form not in ("messages", "message lists"):
        pytest.skip("SFTTrainer refuses assistant_only_loss for rows that are not conversational")
    options = {**options, "dataset_text_field": "story" if form == "named text" else "text"}
    rows = FORMS[form]
    trainer = SFTTrainer(
        tiny,
        args=SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **options),
        train_dataset=Dataset.from_list([{**row, "row": i} for i, row in enumerate(rows)]),
        processing_class=copy.deepcopy(tokenizer),
    )
    prepare = RowPreparer(tokenizer, RowConfig(**options), vocab_size=len(tokenizer))
    before = copy.deepcopy(rows)
    ours = [prepare(row) for row in rows]
    assert rows == before, "the caller's rows are left alone"
    theirs = {row["row"]: row for row in trainer.train_dataset}
    for i, row in enumerate(ours):
        if i in theirs and any(label != -100 for label in theirs[i]["labels"][1:]):
            assert row.reason is None
            assert row.input_ids.tolist() == theirs[i]["input_ids"]
            assert row.labels.tolist() == theirs[i]["labels"]
        else:
            assert "no labelled tokens" in row.reason


def test_a_template_without_generation_markers_is_swapped_or_refused(tokenizer):
    unmarked = copy.deepcopy(tokenizer)
    unmarked.chat_template = UNMARKED
    with pytest.raises(ValueError, match="chat template"):
        RowPreparer(unmarked, RowConfig(assistant_only_loss=True))(FORMS["messages"][0])


def test_a_completion_mask_counts_unless_told_otherwise():
    """SFTTrainer would ignore it without completion_only_loss=True; a scorer by itself takes it at its word."""
    row = {"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}
    assert RowPreparer()(row).labels.tolist() == [-100, -100, 7]
    assert RowPreparer(config=RowConfig(completion_only_loss=False))(row).labels.tolist() == [5, 6, 7]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_padding_is_taken_off_with_its_labels(side, kind):
    ids, mask, labels = [5, 6, 7], [1, 1, 1], [-100, 6, 7]
    padded = {
        name: kind([filler] * 2 + values if side == "left" else values + [filler] * 2)
        for name, values, filler in (("input_ids", ids, 0), ("attention_mask", mask, 0), ("labels", labels, -100))
    }
    row = RowPreparer()(padded)
    assert (row.input_ids.tolist(), row.labels.tolist()) == (ids, labels)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "no labelled tokens"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "only one is on the first token"),
        ({"input_ids": [5] * 40, "labels": [-100] * 30 + [5] * 10}, "within max_length=20: raise it"),
        ({"input_ids": [5] * 20}, "20 tokens, but the model takes 19: set max_length"),
        ({"input_ids": [5, 99]}, "input_ids holds 99, outside the model's vocabulary of 50"),
        ({"input_ids": [5, 6], "labels": [5, -1]}, "labels holds -1"),
        ({"input_ids": [5, 6], "labels": [5]}, "'labels' has 1 entries, input_ids 2"),
        ({"input_ids": None}, "'input_ids' is empty"),
        ({"input_ids": []}, "'input_ids' is empty"),
        ({"input_ids": [[5], [6]]}, "not a flat list of integers"),
        ({"input_ids": [[5], [6, 7]]}, "not a flat list of integers"),
        ({"input_ids": [0.5, 0.25]}, "not a flat list of integers"),
        ({"text": None}, "'text' holds NoneType, not text"),
        ({"prompt": "Hi.", "completion": None}, "'completion' holds NoneType"),
        ({"messages": None}, "['messages'] are empty"),
        ({"messages": []}, "['messages'] are empty"),
        ([5, 6], "the row is a list"),
    ],
)
def test_a_bad_row_gets_a_reason_and_never_raises(row, reason, tokenizer):
    config = RowConfig(max_length=20)
    assert reason in RowPreparer(tokenizer, config, max_positions=19, vocab_size=50)(row).reason


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "Hi."}, {}, r"no column to score in \['question'\].*'prompt' and 'completion'"),
        ({"prompt": "Hi."}, {}, "no 'completion'"),
        ({"text": "Hi.", "image": 1}, {}, "data_collator"),
        ({"input_ids": [5, 6], "seq_lengths": [1, 1]}, {}, "score before packing"),
        ({"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, {}, "score before packing"),
        ({"text": "Hi."}, {"assistant_only_loss": True}, "conversational"),
    ],
)
def test_a_set_up_that_fits_no_row_raises_with_the_way_out(row, options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        RowPreparer(tokenizer, RowConfig(**options))(row)


def test_raw_rows_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"\['text'\] are not tokenised: pass processing_class"):
        RowPreparer()({"text": "Hi."})
    with pytest.raises(ValueError, match="truncation_mode"):
        RowConfig(truncation_mode="keep_middle")


def test_only_rows_without_labels_or_with_images_need_a_collator():
    assert needs_collator({"input_ids": [1]})
    assert needs_collator({"images": [], "messages": []})
    assert not needs_collator({"input_ids": [1], "completion_mask": [1]})
    assert not needs_collator({"text": "Hi."})
