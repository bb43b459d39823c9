"""Files of rows: told apart, read with their places, and written again as they came."""

import csv
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from forvalue_callbacks.data.answers import answer_of, with_answer_of
from forvalue_callbacks.data.files import DataError
from forvalue_callbacks.data.formats import CHATML, FormedRows, form_of, with_answers_marked
from forvalue_callbacks.data.sample import Sample
from forvalue_callbacks.data.sft import RowPreparer
from forvalue_callbacks.data.sources import read
from helpers.tokenizers import build_tokenizer, chatml

ROWS = [
    {"prompt": "what is the sky", "completion": " blue", "n": 1.50},
    {"prompt": 'naïve \U0001f600\n, "quoted"', "completion": " pie", "n": 2},
    {"prompt": "it is", "completion": " today", "n": 3},
    {"prompt": "the sky", "completion": " blue", "n": 4},
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(source, rows, suffix, changed=None):
    path = Path(f"out{suffix}")
    source.write(path, rows, changed)
    return path.read_bytes()


def halves(source, suffix):
    return written(source, [0, 2], suffix), written(source, [1, 3], suffix)


# What a file may look like: escapes, odd spacing, empty lines, Windows line ends, a BOM, no line end at the end.
JSONL = [
    b'{"prompt": "a",   "completion":"\\u00e9"}\n{"prompt":"b","completion":1.50}\n\n  {"prompt":"c"}\n{"prompt":"d"}',
    b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n{"prompt": "c"}\r\n{"prompt": "d"}\r\n\n',
    '\n{"prompt": "\U0001f600\u2028"}\n{"prompt": "\\ud83d"}\n{"a": 1e400}\n{"a": 1, "a": 2}\n'.encode(),
]


@pytest.mark.parametrize("data", JSONL)
def test_lines_come_back_byte_for_byte(data):
    Path("rows.jsonl").write_bytes(data)
    source = read("rows.jsonl")
    kept, dropped = halves(source, ".jsonl")
    assert len(source) == 4
    assert Counter(kept.splitlines() + dropped.splitlines()) == Counter(data.splitlines())
    assert written(source, [0, 1, 2, 3], ".jsonl") == data
    assert [source.line(row) for row in range(4)] == [
        i + 1 for i, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n")) if line.strip()
    ]


CSV = [
    b'prompt,completion\r\n"a, ""b""",1.50\r\n"two\r\nlines",x\r\n\r\nc,\r\nd,"y"',
    "\ufeffprompt,completion\n\nä,1\nb,2\nc,3\nd,4\n".encode(),
]


@pytest.mark.parametrize("data", CSV)
def test_records_come_back_byte_for_byte(data):
    Path("rows.csv").write_bytes(data)
    source = read("rows.csv")
    kept, dropped = halves(source, ".csv")
    header = data[: data.index(b"completion") + len(b"completion")]
    assert kept.startswith(header)
    assert dropped.startswith(header)
    assert Counter(kept.splitlines() + dropped.splitlines()) - Counter([header]) == Counter(data.splitlines())
    assert written(source, [0, 1, 2, 3], ".csv") == data
    expected = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    assert [{k: v or "" for k, v in row.items()} for row in source] == expected


def test_elements_of_a_list_keep_their_letters():
    text = '[ {"prompt": "\\u00e9",\n  "n": 1.50},{"n":[1, {"a": "]"}]} ,\n\n{"n": 1E2}, {"n": 4}\n]\n'
    Path("rows.json").write_text(text)
    source = read("rows.json")
    kept, dropped = halves(source, ".json")
    assert kept == b'[\n{"prompt": "\\u00e9",\n  "n": 1.50},\n{"n": 1E2}\n]\n'
    assert json.loads(kept) + json.loads(dropped) == [json.loads(text)[i] for i in (0, 2, 1, 3)]
    assert [source.line(row) for row in range(4)] == [1, 2, 4, 4]
    assert json.loads(written(source, [], ".json")) == []


def test_parquet_keeps_values_and_schema():
    schema = pa.schema(
        [
            pa.field("prompt", pa.large_string(), nullable=False),
            ("completion", pa.dictionary(pa.int32(), pa.string())),
            ("when", pa.timestamp("us", "UTC")),
            ("turns", pa.list_(pa.struct([("role", pa.string()), ("x", pa.float32())]))),
        ],
        metadata={b"mine": b"kept"},
    )
    rows = [
        {"prompt": f"p{i}", "completion": "ab"[i % 2], "when": i * 10**15, "turns": [{"role": "user", "x": i / 3}]}
        for i in range(10)
    ]
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, "rows.parquet", row_group_size=3, compression="zstd")
    source = read("rows.parquet")
    places = [0, 1, 5, 9]
    source.write(Path("out.parquet"), places)
    found = pq.read_table("out.parquet")
    assert found.equals(table.take(places))
    assert found.schema.equals(schema, check_metadata=False)
    assert found.schema.metadata[b"mine"] == b"kept"
    assert pq.ParquetFile("out.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    assert list(source) == table.to_pylist()
    changed = {**table.to_pylist()[5], "completion": "new"}
    source.write(Path("out.parquet"), places, {5: changed})
    assert pq.read_table("out.parquet").to_pylist() == [
        table.to_pylist()[0],
        table.to_pylist()[1],
        changed,
        table.to_pylist()[9],
    ]


def test_saved_data_sets_and_hub_ids(monkeypatch):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk("saved")
    DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk("splits")
    for source, n in ((read("saved"), 4), (read("splits"), 4), (read("splits", "test"), 1)):
        assert len(source) == n
        source.write(Path(f"out{n}"), [n - 1])
        again = Dataset.load_from_disk(f"out{n}")
        assert again.to_list() == [ROWS[3]]
        assert again.features == rows.features
    with pytest.raises(DataError, match=r"no split 'dev': choose one of train, test"):
        read("splits", "dev")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "no/such":
            raise ConnectionError("no network\nand more")
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = read("owner/name:main", "dev")
    assert (asked, len(source)) == ([("owner/name", "main", "dev")], 4)
    source.suffix = ".parquet"
    source.write(Path("out.parquet"), [1], {1: {**ROWS[1], "completion": " blue"}})
    assert Dataset.from_parquet("out.parquet").to_list() == [{**ROWS[1], "completion": " blue"}]
    with pytest.raises(DataError, match=r"no/such is no file .*no network\).*check the name"):
        read("no/such")


def test_a_folder_of_files_is_one_file():
    Path("f").mkdir()
    Path("f/2.jsonl").write_bytes(b'{"n": 3}\n{"n": 4}\n')
    Path("f/1.jsonl").write_bytes(b'{"n": 1}\n{"n": 2}')  # no line end
    Path("f/README.md").write_text("not rows")
    source = read("f")
    assert written(source, [0, 1, 2, 3], ".jsonl") == b'{"n": 1}\n{"n": 2}\n{"n": 3}\n{"n": 4}\n'
    assert source.place(2) == "f/2.jsonl, line 1"
    assert source.pick([3, 1]) == {3: {"n": 4}, 1: {"n": 2}}
    Path("f/3.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match=r"f holds files of several kinds \(.csv, .jsonl\)"):
        read("f")


BROKEN = {
    "broken line": ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"a\.jsonl, line 3: broken JSON .*mend or delete the line"),
    "a list on a line": ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl, line 2: a list, not an object"),
    "other encoding": ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
    "broken list": ("a.json", b'[{"a": 1},\n{"a": 2}\n{"a": 3}]', r"a\.json, line 3: broken JSON"),
    "unfinished list": ("a.json", b'[{"a": 1},\n', r"a\.json, line 2: broken JSON"),
    "a comma too many": ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv, line 3: 3 cells, but the header names 2"),
    "open quote": ("a.csv", b'a,b\n1,"2\n', r"a\.csv, line 2: broken CSV"),
    "two columns alike": ("a.csv", b"a,a\n1,2\n", r"a\.csv, line 1: two columns have one name"),
    "no Parquet": ("a.parquet", b"nothing", r"a\.parquet cannot be read as Parquet"),
    "empty": ("a.jsonl", b"", r"a\.jsonl is empty"),
    "no rows": ("a.csv", b"a,b\n", r"a\.csv has no rows"),
    "other kind": ("a.txt", b"x", r"a\.txt: rows are read from .jsonl, .json, .csv, .parquet, not from .txt"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named_with_its_place(case):
    name, data, match = BROKEN[case]
    Path(name).write_bytes(data)
    with pytest.raises(DataError, match=match):
        list(read(name))


def test_what_is_not_there():
    for name in ("no.jsonl", "a/b/c", "no.parquet"):
        with pytest.raises(DataError, match=f"no file or folder {name}"):
            read(name)


# ---- forms ----


def source_of(*rows, name="rows.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(name)


def chat(*turns, role="role", content="content"):
    return [{role: who, content: text} for who, text in turns]


ASKED, SAID = ("user", "what is the sky"), ("assistant", "blue")
MESSAGES = chat(("system", "x"), ASKED, SAID, ("user", "it"), ("assistant", "is"))
SHAREGPT = chat(
    ("human", "what is the sky"), ("gpt", "blue"), ("human", "it"), ("gpt", "is"), role="from", content="value"
)
FORMS = {
    "prompt/completion": ({"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": " b"}, " b"),
    "messages ('messages')": ({"messages": MESSAGES}, {"messages": MESSAGES}, "is"),
    "messages ('conversations')": ({"conversations": MESSAGES}, {"conversations": MESSAGES}, "is"),
    "ShareGPT ('conversations')": (
        {"conversations": SHAREGPT, "system": "x", "tools": "[]"},
        {"conversations": MESSAGES, "tools": "[]"},
        "is",
    ),
    "Alpaca": (
        {"instruction": "do", "input": "it", "output": "done", "id": 3},
        {"prompt": chat(("user", "do\nit")), "completion": chat(("assistant", "done"))},
        "done",
    ),
    "text ('text')": ({"text": "abc"}, {"text": "abc"}, None),
    "tokenised": ({"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}, None),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_told_by_their_columns(name):
    row, expected, answer = FORMS[name]
    source = source_of(row)
    form = form_of(source)
    assert form.name == name
    assert list(FormedRows(source, form)) == [expected]
    assert answer_of(row, form.answer) == answer
    assert form.chats == any(isinstance(value, list) and name != "tokenised" for value in expected.values())


def test_what_comes_before_an_instruction_is_in_the_prompt():
    row = {"instruction": "do", "output": "done", "system": "x", "history": [["what is the sky", "blue"]]}
    source = source_of(row)
    (found,) = FormedRows(source, form_of(source))
    assert found["prompt"] == chat(("system", "x"), ASKED, SAID, ("user", "do"))
    assert found["completion"] == chat(("assistant", "done"))


def test_own_templates():
    source = source_of({"q": "a", "hint": None, "a": 7}, {"q": "b", "hint": "h", "a": None})
    form = form_of(source, ("{q}\\n{hint}:", " {a}"))
    first, second = FormedRows(source, form)
    assert first == {"prompt": "a\n:", "completion": " 7"}
    assert isinstance(second, Sample)
    assert second.reason == "'a' is None: fill it or drop the row"
    assert answer_of({"a": 7}, form.answer) == "7"
    for templates, match in (
        (("{q}", None), "one template of two is missing"),
        (("{question}", "{a}"), r"names the column 'question', and the rows have 'q', 'hint', 'a'"),
        (("{q}", "yes"), "the completion template names no column"),
        (("{q", "{a}"), "no format string"),
    ):
        with pytest.raises(DataError, match=match):
            form_of(source, templates)
    with pytest.raises(
        DataError, match=r"rows\.jsonl: no known form of rows \(columns found: 'q', 'hint', 'a'\).*templ"
    ):
        form_of(source)
    assert form_of(source, text_column="q").name == "text ('q')"


def test_rows_that_cannot_be_read_have_reasons_that_name_their_column():
    rows = [
        {"instruction": "do", "output": "done"},
        {"instruction": "do", "output": None},
        {"instruction": 3, "output": "x"},
    ]
    source = source_of(*rows)
    reasons = [getattr(row, "reason", None) for row in FormedRows(source, form_of(source))]
    assert reasons[0] is None
    assert "'output' is None" in reasons[1]
    assert "'instruction' is a int, not text" in reasons[2]
    source = source_of(
        {"conversations": SHAREGPT},
        {"conversations": None},
        {"conversations": chat(("robot", "secret"), role="from", content="value")},
    )
    reasons = [getattr(row, "reason", None) for row in FormedRows(source, form_of(source))]
    assert "'conversations' is None" in reasons[1]
    assert "message 0 of 'conversations' is from none of human" in reasons[2]
    assert "secret" not in "".join(map(str, reasons))


def labelled(row, tokenizer):
    prepared = RowPreparer(tokenizer)(row)
    assert prepared.reason is None, prepared.reason
    return tokenizer.decode(prepared.labels[prepared.labels != -100])


def test_what_the_assistant_says_is_labelled_whoever_marks_it():
    """A template with markers, the same without, and one that thinks before it answers."""
    source = source_of({"messages": MESSAGES})
    form = form_of(source)
    found = {}
    for name, template in (
        ("markers", chatml(markers=True)),
        ("none", chatml()),
        ("thought", chatml(thought="hm")),
        ("default", CHATML),
    ):
        tokenizer = build_tokenizer(template)
        (row,) = FormedRows(source, with_answers_marked(form, tokenizer))
        found[name] = labelled(row, tokenizer)
    assert found["markers"] == "blue<|im_end|>is<|im_end|>" == found["default"]
    assert found["none"] == "blue<|im_end|>\nis<|im_end|>\n"
    assert found["thought"] == found["none"]
    (row,) = FormedRows(source, form)
    assert "what is the sky" in labelled(row, build_tokenizer(chatml())), "unless told otherwise"


def test_a_conversation_without_an_answer_has_a_reason():
    source = source_of({"messages": MESSAGES}, {"messages": chat(ASKED)}, {"messages": chat(("alien", "x"), SAID)})
    for template in (chatml(), chatml(markers=True)):
        form = with_answers_marked(form_of(source), build_tokenizer(template))
        rows = list(FormedRows(source, form))
        assert "no labelled tokens in 'messages'" in rows[1].reason
        assert "'messages' cannot be tokenised" in rows[2].reason


def test_prompts_and_completions_that_are_messages_need_no_marks():
    source = source_of({"instruction": "what is", "input": "the sky", "output": "blue"})
    tokenizer = build_tokenizer(chatml())
    (row,) = FormedRows(source, with_answers_marked(form_of(source), tokenizer))
    assert labelled(row, tokenizer) == "blue<|im_end|>\n"


def test_tools_reach_the_default_template():
    tokenizer = build_tokenizer(CHATML)
    tools = [{"type": "function", "function": {"name": "sky"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "sky", "arguments": {}}}]}
    source = source_of({"messages": [*chat(ASKED), call], "tools": tools})
    (row,) = FormedRows(source, with_answers_marked(form_of(source), tokenizer))
    text = tokenizer.decode(row["input_ids"])
    assert text.index('"name": "sky"') < text.index("what is the sky")
    assert '"arguments"' in labelled(row, tokenizer)


# ---- other answers ----


def test_the_answer_of_another_row_takes_the_place_of_its_own():
    for row, other, expected in (
        ({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}, {"prompt": "a", "completion": "d"}),
        (
            {"instruction": "a", "output": "b"},
            {"instruction": "c", "output": "d"},
            {"instruction": "a", "output": "d"},
        ),
        (
            {"messages": MESSAGES},
            {"messages": chat(ASKED, SAID, ASKED)},
            {"messages": [*MESSAGES[:-1], {"role": "assistant", "content": "blue"}]},
        ),
        (
            {"conversations": SHAREGPT},
            {"conversations": SHAREGPT[:2]},
            {"conversations": [*SHAREGPT[:-1], {"from": "gpt", "value": "blue"}]},
        ),
        (
            {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]},
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
            {"input_ids": [1, 2, 3, 6, 7], "labels": [-100, 2, -100, 6, 7]},
        ),
        (
            {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 0], "attention_mask": [1, 1, 1]},
            {"input_ids": [7, 8, 9], "completion_mask": [0, 1, 1], "attention_mask": [1, 1, 1]},
            {"input_ids": [1, 8, 9, 3], "completion_mask": [0, 1, 1, 0], "attention_mask": [1, 1, 1, 1]},
        ),
    ):
        before = json.dumps([row, other])
        assert with_answer_of(row, other) == expected
        assert json.dumps([row, other]) == before
    assert with_answer_of({"q": 1, "a": 2, "b": 3}, {"q": 4, "a": 5, "b": 6}, ("a",)) == {"q": 1, "a": 5, "b": 3}
    for row in ({"text": "a"}, {"input_ids": [1, 2]}, {"messages": chat(ASKED)}):
        with pytest.raises(ValueError, match="no answer that could be replaced"):
            with_answer_of(row, row)


def test_a_changed_row_is_written_in_the_form_of_the_others():
    source = source_of(*ROWS)
    new = {**ROWS[1], "completion": " \u00e9"}
    assert [json.loads(line) for line in written(source, [0, 1], ".jsonl", {1: new}).splitlines()] == [ROWS[0], new]
    Path("rows.csv").write_bytes(b'prompt,completion\r\n"a, b",1\r\nc,2')
    source = read("rows.csv")
    changed = {1: {"prompt": 'x, "y"', "completion": None}}
    assert written(source, [0, 1], ".csv", changed) == b'prompt,completion\r\n"a, b",1\r\n"x, ""y""",\r\n'
    Path("rows.json").write_text('[{"a":1.50}, {"a":2}]')
    assert written(read("rows.json"), [0, 1], ".json", {1: {"a": 3}}) == b'[\n{"a":1.50},\n{"a": 3}\n]\n'


def test_rows_are_read_again_and_by_their_places():
    source = source_of(*ROWS)
    rows = FormedRows(source, form_of(source), {2: "not this one"}, places=[3, 2])
    assert len(rows) == 2
    first, second = rows
    assert first.reason == "not this one"
    assert second["prompt"] == "the sky"
    assert rows.place(1) == "rows.jsonl, line 4"
    assert len(list(rows)) == len(list(rows)) == 2
    assert np.array_equal([len(list(source)) for _ in range(2)], [4, 4])
