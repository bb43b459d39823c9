"""The report: what is on the page, what each cut drops, rows in any form, and how large it gets."""

import json
import re

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from forvalue_callbacks.data.shown import shown
from forvalue_callbacks.policies import Drop
from forvalue_callbacks.report.counts import BINS, by_group, cuts_of, lengths
from forvalue_callbacks.report.rows import LONGEST, visible
from forvalue_callbacks.report.words import NO_EVIDENCE, about_noise
from forvalue_callbacks.scores.scores import ForValueScores
from helpers.reports import HOSTILE, SOURCES, explanation, judged_scores, prompts

N = 90


def page_of(tmp_path, scores, *args, **beside):
    scores.report(tmp_path / "report.html", *args, **beside)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def plain(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page).replace("&#39;", "'").replace("&gt;", ">"))


# ---- what is on the page ----


def test_the_page_says_what_scored_what_and_in_the_words_of_the_log(tmp_path):
    scores = judged_scores(N)
    run = {"data": "train.jsonl", "model": "a-model", "command": "forvalue select train.jsonl", "seconds": 12.5}
    text = plain(page_of(tmp_path, scores, prompts(N), validation=prompts(40), run=run))
    for wanted in ("train.jsonl", "a-model", "12.5", "forvalue select train.jsonl", "auto", "0.2.0", "aa", "bb"):
        assert wanted in text
    for line in about_noise(scores.noise):
        assert " ".join(line[12:].split()) in text
    assert "flipped 0.93 0.90 to 0.96" in text
    assert "no labelled tokens" in text
    assert "question 3 → answer 3" in text, "a validation row that looks wrong"


def test_scores_without_a_noise_estimate_are_reported_too(tmp_path):
    scores = judged_scores(N)
    bare = ForValueScores(scores.values, scores.reasons, scores.log_likelihood, scores.n_labelled)
    page = page_of(tmp_path, bare)
    assert NO_EVIDENCE in plain(page)
    assert data_of(page)["start"] is None
    assert 'class="row"' in page


def test_rows_come_with_tokens_reason_suggestion_and_neighbours(tmp_path):
    scores = judged_scores(N)
    worst = scores.worst(1)[0]
    best = int(np.nanargmax(scores.values))
    page = page_of(tmp_path, scores, prompts(N), validation=prompts(40), explanations=[explanation(worst["row"])])
    row = page[page.index(f'id="row-{worst["row"]}"') :]
    row = row[: row.index("</article>")]
    assert 'class="m4" title="\u22123.00"' in row
    assert 'class="p4" title="+2.00"' in row
    assert "another answer is likelier" in row
    text = plain(row)
    assert f"answer {best} 0.90, as in row {best}" in text
    assert "for it 3 (+0.50) question 3 → answer 3" in text
    assert "against it 5 (\u22120.25) question 5 → answer 5" in text
    assert "whitened" in text


def test_findings_and_warnings_are_shown_as_given(tmp_path):
    findings = [("2 rows are there twice <b>", list(range(50)))]
    page = page_of(tmp_path, judged_scores(N), findings=findings, warnings=["forms differ <i>"])
    assert "2 rows are there twice &lt;b&gt;" in page
    assert "forms differ &lt;i&gt;" in page
    assert "(50 in all)" in page


def test_leakage_that_scoring_found_is_shown(tmp_path):
    scores = judged_scores(N)
    scores.metadata["leakage"] = {"n": 2, "rows": [7, 8]}
    assert "2 training rows are validation rows too" in plain(page_of(tmp_path, scores))


def test_the_length_of_rows_is_drawn(tmp_path):
    page = page_of(tmp_path, judged_scores(400))
    assert "<svg viewBox" in page
    assert "var(--kept)" in page[page.index("<svg viewBox") :]


def test_nothing_is_fetched_and_only_the_pages_own_script_may_run(tmp_path):
    page = page_of(tmp_path, judged_scores(400), prompts(400))
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert re.search(r"script-src 'sha256-[\w+/=]{44}'", page)


def test_wrong_lengths_and_columns_are_refused_with_the_way_out(tmp_path):
    scores = judged_scores(N)
    with pytest.raises(ValueError, match="scores are of 90 rows, and the data set has 89: give the rows"):
        scores.report(tmp_path / "r.html", prompts(N - 1))
    with pytest.raises(ValueError, match="3 weights for 90 rows: give"):
        scores.report(tmp_path / "r.html", weights=np.ones(3))
    with pytest.raises(ValueError, match="no column 'topic': choose of 'completion', 'prompt', 'source'"):
        scores.report(tmp_path / "r.html", prompts(N), columns=["topic"])
    nothing = ForValueScores([np.nan], ["empty"], [np.nan], [0])
    with pytest.raises(ValueError, match="no row has a score"):
        nothing.report(tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


# ---- what a row may hold ----


def test_what_rows_hold_is_text_on_the_page(tmp_path):
    scores = judged_scores(N, unscored=0)
    hostile = range(N)
    rows = prompts(N, hostile)
    page = page_of(tmp_path, scores, rows, validation=prompts(40, range(40)), explanations=[explanation(4)])
    assert "<img src=x" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search("[\x00-\x08\x0b-\x1f\u2028\u2029\u202e\ud800-\udfff]", page)
    assert "[U+202E]" in page
    assert "{{ 7 * 7 }}" in page


def test_what_cannot_be_seen_is_written_out():
    assert visible("a\x00b\u202ec\ud800") == "a[U+0000]b[U+202E]c[U+D800]"
    assert visible("two\r\nlines\tand") == "two\nlines\tand"
    assert visible("x" * (LONGEST + 1234)).endswith("x … (1,234 more characters)")


def test_an_image_is_on_the_page_and_a_broken_one_is_not(tmp_path):
    rows = [{**row, "image": Image.new("RGB", (2000, 1000), "red")} for row in prompts(N)]
    rows[5]["image"] = {"bytes": b"no image", "path": None}
    page = page_of(tmp_path, judged_scores(N), rows)
    assert page.count('src="data:image/jpeg;base64,') == N - 3, "two rows have no score"
    assert len(page) < 2_000_000


# ---- what a cut drops ----


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.75])
def test_the_first_cut_drops_what_the_policy_drops(fraction):
    values = judged_scores(3000, unscored=5).values
    weights = Drop(fraction)(values)
    cuts = cuts_of(values, weights, log_odds=False)
    assert cuts.exact
    counts = cuts.counted(values)
    assert sum(counts) == 2995
    assert sum(counts[: cuts.start + 1]) == round(fraction * 2995)


def test_scores_that_are_log_odds_are_cut_at_zero():
    values = judged_scores(3000, unscored=0).values
    cuts = cuts_of(values, None, log_odds=True)
    assert cuts.edges[cuts.start] == 0.0
    assert sum(cuts.counted(values)[: cuts.start + 1]) == (values < 0).sum()


def test_a_policy_that_is_no_single_cut_is_said_to_be_none(tmp_path):
    scores = judged_scores(N)
    weights = np.ones(N)
    weights[::2] = 0
    assert not cuts_of(scores.values, weights, log_odds=True).exact
    assert "not by one cut" in page_of(tmp_path, scores, weights=weights)


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [1e-300, 2e-300], [-1e12, 0.0, 1e12]])
def test_few_and_extreme_scores_are_counted(values):
    values = np.array(values)
    for log_odds in (False, True):
        cuts = cuts_of(values, None, log_odds)
        assert sum(cuts.counted(values)) == len(values)
        assert len(cuts.counted(values)) == BINS + 2
        assert (np.diff(cuts.edges) > 0).all()


def test_groups_add_up_and_the_smallest_of_many_are_one():
    values = np.arange(1000.0)
    cuts = cuts_of(values, None, log_odds=False)
    table = by_group("source", [f"s{min(i, 99)}" for i in range(1000)], values, cuts)
    assert sum(level["rows"] for level in table["levels"]) == 1000
    assert table["levels"][0]["name"] == "s99"
    assert table["levels"][-1]["name"] == "all others"
    assert np.sum([level["counts"] for level in table["levels"]], 0).tolist() == cuts.counted(values)


def test_lengths_are_spans_in_order():
    of, spans = lengths(np.arange(1, 13))
    assert spans == ["1", "2 to 3", "4 to 5", "6 to 7", "8 to 9", "10 to 12"]
    assert list(dict.fromkeys(of)) == spans
    assert lengths(np.full(5, 3)) is None


def test_rows_are_counted_by_source_kind_and_length(tmp_path):
    scores = judged_scores(N)
    data = data_of(page_of(tmp_path, scores, Dataset.from_list(prompts(N))))
    tables = {table["name"]: table["levels"] for table in data["tables"]}
    assert list(tables) == ["source", "kind of noise", "labelled tokens"]
    assert {level["name"] for level in tables["source"]} == set(SOURCES)
    noisy = next(level for level in tables["kind of noise"] if level["name"] == "wrong answer")
    assert noisy["rows"] == (scores.values < 0).sum() == sum(noisy["counts"][: data["start"] + 1])
    assert sum(data["counts"]) == N - 2


def test_rows_are_counted_by_answer_where_answers_repeat(tmp_path):
    scores = judged_scores(N)
    scores.metadata["noise"] |= {
        "n_answers": 3,
        "evidence": {"flipped": scores.metadata["noise"]["evidence"]["flipped"]},
    }
    rows = [{"prompt": f"q {row}", "completion": f" {SOURCES[row % 3]}"} for row in range(N)]
    table = data_of(page_of(tmp_path, scores, rows))["tables"][0]
    assert table["name"] == "answer"
    assert {level["name"] for level in table["levels"]} == set(SOURCES)


def test_a_hundred_thousand_rows_make_a_small_page(tmp_path):
    n = 100_000
    long = "word & <word> " * 2000
    rows = [{"prompt": long, "completion": f" {long} {row}", "source": SOURCES[row % 3]} for row in range(100)]
    scores = judged_scores(n)
    page = page_of(tmp_path, scores, [rows[row % 100] for row in range(n)], explanations=[explanation(50)])
    assert len(page.encode()) < 5_000_000
    assert 100 < page.count('class="row"') <= 301
    assert page.index('id="row-50"') < page.index(f'id="row-{scores.worst(1)[0]["row"]}"'), "explained rows are first"


def test_the_page_stays_small_however_many_rows_are_explained(tmp_path):
    n = 3000
    rows = [{"prompt": "<&" * 2000, "completion": f" answer {row}"} for row in range(n)]
    page = page_of(tmp_path, judged_scores(n), rows, explanations=[explanation(row) for row in range(2, n)])
    assert 100 < page.count('class="row"') < n
    assert len(page.encode()) < 5_000_000


def test_a_data_set_that_makes_its_rows_when_read_is_left_as_it_is(tmp_path):
    def made(batch):
        assert set(batch) == {"image", "prompt", "completion", "source"}
        return {name: batch[name] for name in ("prompt", "completion", "source")}

    rows = Dataset.from_list([{**row, "image": "a file"} for row in prompts(N)]).with_transform(made)
    page = page_of(tmp_path, judged_scores(N), rows)
    assert data_of(page)["tables"][0]["name"] == "source"


# ---- rows in any form ----

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
FORMS = {
    "prompt and completion": ({"prompt": "hi", "completion": " yes"}, ("hi", " yes")),
    "turns of both": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, ("user: hi", "assistant: yes")),
    "messages": ({"messages": TURNS, "source": "x"}, ("user: hi", "yes")),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "system": "be kind"},
        ("system: be kind\nuser: hi", "yes"),
    ),
    "no answer yet": ({"messages": TURNS[:1]}, ("user: hi", "")),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}, TURNS[1]]},
        ("user: [image]what", "yes"),
    ),
    "Alpaca": ({"instruction": "add", "input": "1 1", "output": "2"}, ("add\n1 1", "2")),
    "text": ({"text": "once upon"}, ("", "once upon")),
    "classes": ({"text": "good film", "label": 1}, ("good film", "1")),
    "own columns": ({"a": "x", "b": 2}, ("a: x\nb: 2", "")),
    "tokens": ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, ("5", "6 7")),
    "masks of another length": ({"input_ids": [5, 6, 7], "labels": [1]}, None),
    "no mapping": (17, ("17", "")),
    "nothing": ({}, ("", "")),
    "nulls": ({"prompt": None, "completion": None, "messages": None}, ("", "")),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_row_of_any_form_is_shown(name):
    row, sides = FORMS[name]
    found = shown(row)
    if sides is not None:
        assert (found.prompt, found.answer) == sides


def test_tokens_are_decoded_where_a_tokenizer_is_given():
    class Tokenizer:
        def decode(self, ids):
            return "".join(chr(96 + i) for i in ids)

    assert shown({"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, Tokenizer()) == shown(
        {"prompt": "ab", "completion": "c"}
    )


def test_images_of_rows_and_of_turns_are_found():
    image = Image.new("RGB", (2, 2))
    assert shown({"text": "x", "images": [image, None]}).images == (image,)
    turn = {"role": "user", "content": [{"type": "image", "image": image}]}
    assert shown({"messages": [turn]}).images == (image,)


# ---- in a notebook ----


def test_the_worst_rows_are_a_table_with_text():
    scores = judged_scores(N)
    table = scores.worst(5, prompts(N, hostile=range(N)))
    order = np.argsort(scores.values)[:5].tolist()
    assert [row["row"] for row in table] == order
    assert table[0]["kind"] == "wrong answer"
    assert table[0]["suggested_row"] == int(np.nanargmax(scores.values))
    assert len(repr(table).splitlines()) == 6
    html = table._repr_html_()
    assert html.count("<tr>") == 6
    assert "<img" not in html
    assert "&lt;img" in html
    assert table.to_pandas()["row"].tolist() == order


def test_the_worst_rows_of_scores_alone_are_a_table():
    scores = judged_scores(N)
    bare = ForValueScores(scores.values, scores.reasons, scores.log_likelihood, scores.n_labelled)
    assert list(bare.worst(2)[0]) == ["row", "score"]
    assert repr(ForValueScores([np.nan], ["empty"], [np.nan], [0]).worst()) == "no row has a score"


def test_a_data_set_and_a_frame_hold_what_the_file_holds(tmp_path):
    scores = judged_scores(N)
    scores.save(tmp_path / "s.parquet")
    frame = scores.to_pandas()
    assert {"row", "score", "reason", "n_labelled", "kind", "why", "suggested_row"} <= set(frame)
    assert frame.equals(Dataset.from_parquet(str(tmp_path / "s.parquet"), cache_dir=tmp_path).to_pandas())
    assert scores.to_dataset().to_pandas().equals(frame)
    assert np.array_equal(frame["score"].to_numpy(), scores.values, equal_nan=True)


def test_a_notebook_shows_scores_and_plots():
    scores = judged_scores(N)
    html = scores._repr_html_()
    assert "<svg" in html
    assert "<script" not in html
    assert "estimated share" in html
    assert ForValueScores([np.nan], [HOSTILE], [np.nan], [0])._repr_html_().count("<img") == 0
    assert scores.plot()._repr_png_().startswith(b"\x89PNG")
