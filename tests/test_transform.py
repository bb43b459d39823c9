"""`map` in every way in which it hands over rows and runs: scored, or a message that says how."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM

from forvalue_callbacks import TINY_MODEL, ForValueConfig, ForValueScorer, ForValueTransform
from helpers.models import build_model, build_rows
from helpers.oracles import relative
from helpers.tokenizers import build_tokenizer, chatml

TRAIN, VALIDATION = build_rows(12, seed=1), build_rows(5, seed=2)


def test_map_adds_the_scores_of_the_scorer_whatever_the_batch_size():
    model = build_model()
    want = ForValueScorer(model, VALIDATION, progress=False).score(TRAIN).values
    for size in (5, 1000):
        mapped = Dataset.from_list(TRAIN).map(ForValueTransform(model, VALIDATION), batched=True, batch_size=size)
        assert relative(mapped["forvalue_score"], want) < 1e-5
        assert mapped["input_ids"] == [row["input_ids"] for row in TRAIN]


def test_rows_without_a_score_keep_their_place_and_their_reason():
    rows = [TRAIN[0], {"input_ids": [5], "labels": [5]}, TRAIN[1]]
    mapped = Dataset.from_list(rows).map(ForValueTransform(build_model(), VALIDATION), batched=True)
    assert np.isnan(mapped["forvalue_score"]).tolist() == [False, True, False]
    assert "no labelled tokens" in mapped["forvalue_reason"][1]


def test_streams_are_scored_as_they_come():
    stream = IterableDataset.from_generator(lambda: iter(TRAIN)).map(
        ForValueTransform(build_model(), VALIDATION), batched=True, batch_size=4
    )
    want = ForValueScorer(build_model(), VALIDATION, progress=False).score(TRAIN).values
    assert relative([row["forvalue_score"] for row in stream], want) < 1e-5


WORKERS = """
import sys, torch
sys.path.insert(0, {tests!r})
from helpers.models import build_model, build_rows
from datasets import Dataset
from forvalue_callbacks import ForValueTransform

torch.set_num_threads(2)
torch.randn(500, 500) @ torch.randn(500, 500)  # the parent's thread pool is up before the fork
rows = [row for row in build_rows(12, seed=1) for _ in range(20)]
transform = ForValueTransform(build_model(), build_rows(5, seed=2))
transform.scorer().direction()
mapped = Dataset.from_list(rows).map(transform, batched=True, num_proc=2, with_rank=True)
print(mapped["forvalue_score"][::20])
"""


def test_worker_processes_give_the_same_column_and_do_not_wait_for_the_parents_threads():
    code = WORKERS.format(tests=str(Path(__file__).parent))
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120).stdout
    want = ForValueScorer(build_model(), VALIDATION, progress=False).score(TRAIN).values
    assert relative(json.loads(out), want) < 1e-5


def test_a_process_that_never_made_the_transform_says_what_to_do(monkeypatch):
    data = pickle.dumps(ForValueTransform(build_model(), VALIDATION))
    monkeypatch.setattr("forvalue_callbacks.transform._LIVE", {})
    with pytest.raises(RuntimeError, match=r"not forked .*map_batches\(ForValueTransform, fn_constructor_args="):
        pickle.loads(data)


def test_a_model_is_loaded_by_its_path_where_it_is_needed(monkeypatch):
    loaded = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float64)
    want = ForValueScorer(loaded, VALIDATION, progress=False).score(TRAIN)
    calls, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: (calls.append(args), load(*args, **kwargs))[1]
    )
    transform = ForValueTransform(TINY_MODEL, VALIDATION, model_kwargs={"dtype": torch.float64})
    assert calls == []
    mapped = Dataset.from_list(TRAIN).map(transform, batched=True, batch_size=5)
    assert relative(mapped["forvalue_score"], want.values) < 1e-9
    assert calls == [(TINY_MODEL,)], "once"
    assert transform.fingerprint == ForValueTransform(loaded, VALIDATION).fingerprint


def test_the_seen_vocabulary_needs_more_than_a_batch():
    with pytest.raises(ValueError, match=r"ForValueScorer\.score"):
        ForValueTransform(build_model(), VALIDATION, ForValueConfig(vocab="seen"))


# A fresh process that maps a data set from disk, once for each of its settings, and says whether it computed anything.
MAP = """
import json, sys, peft
sys.path.insert(0, {tests!r})
from helpers.models import build_model, build_rows
from datasets import load_from_disk
from forvalue_callbacks import ForValueConfig, ForValueTransform

call, calls = ForValueTransform.__call__, []
ForValueTransform.__call__ = lambda self, *args: (calls.append(1), call(self, *args))[1]
found = []
for settings in {settings!r}:
    model = build_model(seed=settings["seed"])
    if settings["adapter"]:
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, lora)
    if settings["adapter"] == "off":
        model.base_model.disable_adapter_layers()
    config = ForValueConfig(normalize=settings["normalize"])
    transform = ForValueTransform(model, build_rows(5, seed=settings["validation"]), config)
    calls.clear()
    load_from_disk({data!r}).map(transform, batched=True)
    found.append(("computed" if calls else "cached", transform.fingerprint))
print(json.dumps(found))
"""


def test_the_cache_serves_a_second_process_until_something_changes(tmp_path):
    Dataset.from_list(TRAIN).save_to_disk(str(tmp_path / "data"))

    def run(*changes):
        plain = {"seed": 0, "adapter": "", "validation": 2, "normalize": "none"}
        settings = [{**plain, **change} for change in changes]
        code = MAP.format(tests=str(Path(__file__).parent), data=str(tmp_path / "data"), settings=settings)
        env = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env).stdout
        return json.loads(out.splitlines()[-1])

    ((word, first),) = run({})
    assert word == "computed"
    others = [{"seed": 1}, {"adapter": "on"}, {"adapter": "off"}, {"validation": 3}, {"normalize": "length"}]
    again, *changed = run({}, *others)
    assert again == ["cached", first]
    assert [word for word, _ in changed] == ["computed"] * len(others)
    assert len({first, *(fingerprint for _, fingerprint in changed)}) == 1 + len(others)


FEW = TRAIN[:6]
BAD = {"input_ids": [5, 6], "labels": [-100, -100]}


@pytest.fixture
def transform():
    return ForValueTransform(build_model(), iter(VALIDATION))


@pytest.fixture(scope="module")
def want():
    return ForValueScorer(build_model(), VALIDATION, progress=False).score(FEW).values


@pytest.mark.parametrize("form", [None, "numpy", "torch", "pandas", "arrow"])
def test_every_format_gives_the_scores_and_keeps_the_columns(form, transform, want):
    data = Dataset.from_list([{**row, "text": "x"} for row in [*FEW, BAD]]).with_format(form)
    mapped = data.map(transform, batched=True, batch_size=4).with_format(None)
    assert np.allclose(mapped["forvalue_score"][:-1], want, rtol=1e-5, atol=1e-6)
    assert mapped["forvalue_reason"][:-1] == [None] * len(FEW)
    assert "no labelled tokens" in mapped["forvalue_reason"][-1]
    assert mapped["input_ids"] == [row["input_ids"] for row in [*FEW, BAD]]
    assert mapped["text"] == ["x"] * 7
    again = mapped.with_format(form).map(transform, batched=True).with_format(None)
    assert again.column_names == mapped.column_names


@pytest.mark.parametrize("form", ["pandas", "numpy"])
def test_conversations_come_through_other_formats(form):
    turns = [[{"role": "user", "content": f"the sky {i}"}, {"role": "assistant", "content": "blue"}] for i in range(3)]
    rows, tokenizer = [{"messages": turn} for turn in turns], build_tokenizer(chatml())
    model = build_model()
    model.resize_token_embeddings(400)
    transform = ForValueTransform(model, rows, processing_class=tokenizer)
    mapped = Dataset.from_list(rows).with_format(form).map(transform, batched=True).with_format(None)
    assert mapped["forvalue_reason"] == [None] * 3


@pytest.mark.parametrize(
    "options", [{"with_indices": True}, {"with_rank": True}, {"with_indices": True, "with_rank": True}], ids=str
)
def test_indices_and_ranks_are_no_columns(options, transform, want):
    mapped = Dataset.from_list(FEW).map(transform, batched=True, **options)
    assert np.allclose(mapped["forvalue_score"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", ["input_ids", ["input_ids", "labels"]])
def test_columns_without_names_are_refused(names, transform):
    with pytest.raises(ValueError, match=r"ForValueTransform needs the names of the columns.*select_columns"):
        Dataset.from_list(FEW).map(transform, batched=True, input_columns=names)


ONE = {
    "text": {"text": "hello there"},
    "pairs": {"prompt": "what ", "completion": "a cat"},
    "messages": {"messages": [{"role": "user", "content": "hi"}]},
    "message pairs": {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "user", "content": "x"}]},
    "tokens": {"input_ids": [3, 4, 5], "labels": [3, 4, 5]},
    "other columns": {"question": "what", "n": 3},
}


@pytest.mark.parametrize("stream", [False, True], ids=["data set", "stream"])
@pytest.mark.parametrize("form", [None, "torch"])
@pytest.mark.parametrize("row", ONE.values(), ids=ONE)
def test_a_row_in_place_of_a_batch_is_refused(row, form, stream, transform):
    data = Dataset.from_list([row] * 3)
    data = data.to_iterable_dataset() if stream else data
    with pytest.raises(ValueError, match=r"ForValueTransform scores batches of rows.*batched=True"):
        next(iter(data.with_format(form).map(transform)))


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"batch_size": 2, "writer_batch_size": 2}], ids=str)
@pytest.mark.parametrize("form", [None, "pandas", "arrow"])
def test_a_first_reason_may_come_late(options, form, transform):
    mapped = Dataset.from_list([*FEW, BAD]).with_format(form).map(transform, batched=True, **options)
    assert mapped.features.arrow_schema.field("forvalue_reason").type == pa.string()
    assert mapped.features.arrow_schema.field("forvalue_score").type == pa.float64()
    assert mapped.with_format(None)["forvalue_reason"][-1]


def test_a_first_score_may_come_late(transform):
    mapped = Dataset.from_list([BAD, BAD, *FEW]).map(transform, batched=True, batch_size=2)
    assert np.isnan(mapped["forvalue_score"]).tolist() == [True, True] + [False] * 6
