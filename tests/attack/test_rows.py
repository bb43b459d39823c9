"""Rows of every form, with anything in any place: as many rows out as in, each with a score or a reason."""

import copy
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.data.formats import FormedRows, form_of, with_answers_marked
from forvalue_callbacks.data.sources import read
from helpers.rows import FORMS, IDS
from helpers.tokenizers import build_tokenizer, chatml

# ATTACK=20 runs twenty times as many, and others each time.
ATTACK = int(os.environ.get("ATTACK", "1"))
GOOD = [{"input_ids": IDS, "labels": [-100] * n + IDS[n:]} for n in (3, 6, 9)]
VALIDATION = [{"input_ids": IDS[::-1], "labels": [-100] * n + IDS[:-n][::-1]} for n in (4, 5)]
SECRET = "Zx9Qv7"

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["", " ", "\x00", "\ud800", "{% for x in y %}", "\u202e\x1b[31m", SECRET, SECRET * 300]),
    st.sampled_from(
        [b"\xff", torch.ones(2), torch.ones(2, 2), np.array(["a", 1], dtype=object), np.arange(3), object]
    ),
)
ODD = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text", "image", "a"]), inner),
        st.tuples(inner),
    ),
    max_leaves=5,
)
EXTRA = [
    "input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "position_ids", "seq_lengths",
    "token_type_ids", "images", "image", "pixel_values", "messages", "prompt", "completion", "text", "tools",
    "chat_template", "chat_template_kwargs", "label", "chosen", "rejected", "conversations", "max_length",
]  # fmt: skip


def places(value, path=()):
    """Every place in a row."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for k, inner in enumerate(value[:8]):
            yield from places(inner, (*path, k))


def put(row, path, value):
    if not path:
        return value
    row = copy.deepcopy(row)
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return row


@st.composite
def broken(draw):
    row = draw(st.sampled_from([row for rows in FORMS.values() for row in rows]))
    for _ in range(draw(st.integers(1, 2))):
        if not isinstance(row, dict):
            break
        if draw(st.booleans()):
            row = {**row, draw(st.sampled_from(EXTRA)): draw(ODD)}
        else:
            row = put(row, draw(st.sampled_from(list(places(row)))), draw(ODD))
    return row


@pytest.fixture(scope="module")
def scorer():
    tokenizer = build_tokenizer(chatml())
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **settings)).eval()
    return ForValueScorer(model, VALIDATION, ForValueConfig(), processing_class=tokenizer, progress=False)


@pytest.fixture(scope="module")
def alone(scorer):
    return scorer.score(GOOD).values


@settings(max_examples=25 * ATTACK, derandomize=ATTACK == 1, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(broken(), min_size=1, max_size=6))
def test_no_row_ends_the_run_or_moves_the_score_of_another(rows, scorer, alone):
    scores = scorer.score([GOOD[0], *rows, *GOOD[1:]])
    assert len(scores) == len(rows) + 3
    np.testing.assert_allclose(scores.values[[0, -2, -1]], alone, rtol=1e-4, atol=1e-6)
    for value, reason in zip(scores.values, scores.reasons, strict=True):
        assert math.isnan(value) == (reason is not None)
        if reason is not None:
            assert 0 < len(reason) < 400
            assert SECRET not in reason
            assert not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202e]", reason)


# ---- files ----

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.sampled_from(["", "\ud800", "{x}", SECRET])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text", "a"]), inner),
    ),
    max_leaves=4,
)
FILES = {
    "Alpaca": {"instruction": "what is", "input": "the sky", "output": "blue"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "what is the sky"}, {"from": "gpt", "value": "blue"}],
        "system": "be kind",
        "tools": "[]",
    },
    "messages": {"messages": [{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "blue"}]},
    "prompt/completion": {"prompt": "the sky", "completion": " is blue"},
    "text": {"text": "the sky is blue"},
    "tokens": {"input_ids": IDS, "labels": [-100] * 4 + IDS[4:]},
}


@pytest.mark.parametrize("form", FILES)
@settings(max_examples=4 * ATTACK, derandomize=ATTACK == 1, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_line_of_a_file_ends_the_run(form, data, scorer, tmp_path):
    good, odd = FILES[form], []
    for _ in range(5):
        if data.draw(st.booleans()):
            odd.append({**good, data.draw(st.sampled_from(EXTRA)): data.draw(JSON)})
        else:
            odd.append(put(good, data.draw(st.sampled_from(list(places(good))[1:])), data.draw(JSON)))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*[good] * 5, *odd, good]))
    source = read(str(file))
    formed = form_of(source, (None, None), "text")
    if form != "tokens":
        formed = with_answers_marked(formed, scorer.run.reader.prepare.processing_class)
    scores = scorer.score(FormedRows(source, formed))
    assert len(scores) == 11
    assert np.isfinite(scores.values[[0, 1, 10]]).all()
    assert len(set(scores.values[[0, 1, 10]].round(4))) == 1
    assert not any(SECRET in reason for reason in scores.reasons if reason)
