"""Scores: what is saved comes back, and scores made of something else are refused."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from forvalue_callbacks.scores.judgements import Judgements
from forvalue_callbacks.scores.noise import Evidence, NoiseEstimate
from forvalue_callbacks.scores.provenance import PARTS
from forvalue_callbacks.scores.scores import ForValueScores, grouped_reasons

MADE_OF = {"weights": "w1", "validation": "v1", "data": "d1", "config": "c1"}


def make_scores(n=20, provenance=MADE_OF, digests=True):
    rng = np.random.default_rng(n)
    values, reasons = rng.normal(size=n), [None] * n
    for row in range(2, n, 7):
        values[row], reasons[row] = np.nan, "no labelled tokens"
    log_likelihood = np.where(np.isnan(values), np.nan, -rng.random(n))
    metadata = {"provenance": dict(provenance), "config": {"direction": "gradient"}, "torch": "2"}
    n_labelled = rng.integers(1, 30, n)
    return ForValueScores(values, reasons, log_likelihood, n_labelled, metadata, make_digests(n) if digests else None)


def make_digests(n):
    return [f"{row:016x}" for row in range(n)]


def assert_same(a, b):
    np.testing.assert_array_equal(a.values, b.values)
    np.testing.assert_array_equal(a.log_likelihood, b.log_likelihood)
    np.testing.assert_array_equal(a.n_labelled, b.n_labelled)
    assert a.reasons == b.reasons
    assert a.metadata == b.metadata
    assert a.row_digests == b.row_digests


@pytest.mark.parametrize("digests", [True, False])
def test_saved_scores_come_back_bit_for_bit(tmp_path, digests):
    scores = make_scores(digests=digests)
    scores.values[:2] = 0.0, -0.0
    scores.save(tmp_path / "scores.parquet")
    loaded = ForValueScores.load(tmp_path / "scores.parquet", expected=MADE_OF)
    assert_same(loaded, scores)
    assert np.signbit(loaded.values[:2]).tolist() == [False, True]
    assert loaded.values.dtype == loaded.log_likelihood.dtype == np.float64
    assert loaded.n_labelled.dtype == np.int64


def test_the_file_is_one_row_per_sample_with_null_for_no_score(tmp_path):
    scores = make_scores()
    scores.save(tmp_path / "scores.parquet")
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.column_names == ["row", "score", "reason", "log_likelihood", "n_labelled", "digest"]
    assert table["row"].to_pylist() == list(range(20))
    assert table["score"].null_count == np.isnan(scores.values).sum() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_a_save_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    make_scores().save(tmp_path / "scores.parquet")

    def break_off(table, path):
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", break_off)
    with pytest.raises(OSError, match="disk full"):
        make_scores(30).save(tmp_path / "scores.parquet")
    monkeypatch.undo()
    assert len(ForValueScores.load(tmp_path / "scores.parquet")) == 20
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("part", MADE_OF)
def test_scores_made_of_another_part_are_refused_by_its_name(tmp_path, part):
    make_scores().save(tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match=f"made with other {PARTS[part]}: score again") as error:
        ForValueScores.load(tmp_path / "scores.parquet", expected=MADE_OF | {part: "other"})
    assert MADE_OF[part] not in str(error.value).replace(str(tmp_path), ""), "no hash in what people read"
    others = {key: value for key, value in MADE_OF.items() if key != part}
    ForValueScores.load(tmp_path / "scores.parquet", expected=others)


def test_scores_that_do_not_say_what_made_them_match_no_expectation(tmp_path):
    make_scores(provenance={}).save(tmp_path / "scores.parquet")
    with pytest.raises(
        ValueError, match="other weights and other validation rows and other training rows and other settings"
    ):
        ForValueScores.load(tmp_path / "scores.parquet", expected=MADE_OF)


def change(file, changed):
    """Writes what `changed` makes of the table, as somebody does who keeps the metadata."""
    table = changed(pq.read_table(file))
    pq.write_table(table, file)
    return table


def set_column(name, values):
    return lambda table: table.set_column(table.column_names.index(name), name, [values])


def drop_file_metadata(table):
    return table.replace_schema_metadata({b"forvalue_scores": table.schema.metadata[b"forvalue_scores"]})


def set_format(table):
    old, new = b'"format": 1', b'"format": 7'
    return table.replace_schema_metadata({key: x.replace(old, new) for key, x in table.schema.metadata.items()})


def set_provenance(table):
    return table.replace_schema_metadata({k: x.replace(b'"w1"', b'"w2"') for k, x in table.schema.metadata.items()})


CHANGES = {
    "sorted": (lambda table: table.sort_by("score"), "rows of .* are not in their order: its column 'row' has"),
    "cut short": (lambda table: table.slice(0, 15), "holds 15 of 20 rows"),
    "drawn": (lambda table: table.take([0, 1, 5]), "holds 3 of 20 rows"),
    "a score": (set_column("score", [9.0] * 20), "was changed after it was written .its checksum"),
    "a reason": (set_column("reason", ["why"] * 20), "was changed after it was written .its checksum"),
    "a likelihood": (set_column("log_likelihood", [9.0] * 20), "was changed after it was written .its checksum"),
    "a length": (set_column("n_labelled", [9] * 20), "was changed after it was written .its checksum"),
    "a digest": (set_column("digest", ["9" * 16] * 20), "was changed after it was written .its checksum"),
    "numbered anew": (
        lambda table: set_column("row", list(range(20)))(table.sort_by("score")),
        "was changed after it was written .its checksum",
    ),
    "no digests": (lambda table: table.drop_columns(["digest"]), "was changed after it was written .its checksum"),
    "no scores": (lambda table: table.drop_columns(["score"]), "it has no double column 'score'"),
    "texts": (set_column("score", ["1"] * 20), "it has no double column 'score'"),
    "provenance": (set_provenance, "was changed after it was written .its checksum"),
    "version 0.1": (drop_file_metadata, r"was written by version 0\.1.*score again"),
    "format": (set_format, "is of format 7, this version reads format 1: score again"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_that_was_changed_is_refused_by_what_was_changed(tmp_path, what):
    changed, text = CHANGES[what]
    make_scores().save(tmp_path / "scores.parquet")
    change(tmp_path / "scores.parquet", changed)
    with pytest.raises(ValueError, match=text):
        ForValueScores.load(tmp_path / "scores.parquet")


def test_a_file_that_was_sorted_and_sorted_back_or_has_a_column_more_is_read(tmp_path):
    scores = make_scores()
    scores.save(tmp_path / "scores.parquet")
    change(tmp_path / "scores.parquet", lambda table: table.sort_by("score"))
    change(tmp_path / "scores.parquet", lambda table: table.sort_by("row").append_column("mine", [list("ab" * 10)]))
    assert_same(ForValueScores.load(tmp_path / "scores.parquet"), scores)


def test_a_file_with_any_byte_wrong_is_refused_or_the_same(tmp_path):
    scores, file = make_scores(), tmp_path / "scores.parquet"
    scores.save(file)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = []
    for place in rng.choice(len(whole), 200, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        try:
            assert_same(ForValueScores.load(file), scores)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert all(str(file) in text for text in refused)


def test_a_link_that_leads_elsewhere_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scores.parquet").symlink_to(tmp_path / "elsewhere")
    make_scores().save(tmp_path / "run" / "scores.parquet")
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert len(ForValueScores.load(tmp_path / "run" / "scores.parquet")) == 20


def test_rows_are_compared_and_what_differs_is_named():
    digests = make_digests(20)
    scores = make_scores()
    scores.check_rows(digests)
    scores.check_rows(tuple(digests))
    swapped = [*digests[:3], digests[4], digests[3], *digests[5:]]
    with pytest.raises(ValueError, match="same rows in another order, from row 3 on: sort them as they were"):
        scores.check_rows(swapped)
    other = digests[:7] + ["f" * 16] * 2 + digests[9:]
    with pytest.raises(ValueError, match="2 of 20 rows are others than those that have scores, the first is row 7: "):
        scores.check_rows(other)
    with pytest.raises(ValueError, match="20 rows have scores, but there are 15 rows, 5 fewer; the first 15 are the"):
        scores.check_rows(digests[:15])
    with pytest.raises(ValueError, match="there are 21 rows, 1 more, which differ from row 2 on: give the rows"):
        scores.check_rows([*digests[:2], "f" * 16, *digests[2:]])


def test_scores_that_do_not_say_which_rows_they_are_of_are_compared_by_their_number():
    scores = make_scores(digests=False)
    scores.check_rows(["f" * 16] * 20)
    with pytest.raises(ValueError, match="20 rows have scores, but there are 19 rows, 1 fewer: give the rows"):
        scores.check_rows(["f" * 16] * 19)
    with pytest.raises(ValueError, match="3 digests of 20 rows"):
        ForValueScores(np.zeros(20), [None] * 20, np.zeros(20), np.ones(20), {}, make_digests(3))


def test_a_parquet_file_from_elsewhere_is_refused(tmp_path):
    table = pq.read_table  # keep the reader; write a table without the metadata
    make_scores().save(tmp_path / "scores.parquet")
    pq.write_table(table(tmp_path / "scores.parquet").replace_schema_metadata(None), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"was not written by ForValueScores\.save"):
        ForValueScores.load(tmp_path / "other.parquet")


def test_the_fingerprint_depends_on_what_made_the_scores_and_on_nothing_else():
    reordered = dict(reversed(MADE_OF.items()))
    assert make_scores(20).fingerprint == make_scores(30, reordered).fingerprint
    assert make_scores(20).fingerprint != make_scores(20, MADE_OF | {"data": "d2"}).fingerprint
    assert len(make_scores().fingerprint) == 32


def test_a_row_has_either_a_score_or_a_reason():
    with pytest.raises(ValueError, match="row 1 has the score nan and the reason None"):
        ForValueScores(np.array([1.0, np.nan]), [None, None], np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match=r"row 0 has the score 1\.0 and the reason 'too long'"):
        ForValueScores(np.array([1.0]), ["too long"], np.zeros(1), np.ones(1))
    with pytest.raises(ValueError, match=r"differ in length: \[2, 2, 2, 3\]"):
        ForValueScores(np.zeros(2), [None, None], np.zeros(2), np.ones(3))


def test_the_summary_counts_missing_rows_by_reason_and_shows_the_bias_towards_long_rows():
    n_labelled = np.arange(1, 11)
    values = n_labelled * 2.0
    reasons = [None] * 10
    for row, reason in ((0, "too long"), (4, "no labelled tokens"), (5, "too long")):
        values[row], reasons[row] = np.nan, reason
    text = ForValueScores(values, reasons, np.zeros(10), n_labelled).summary()
    assert text.startswith("rows        10\nscored      7\nscore ")
    assert text.endswith("\nnot scored  2: too long\nnot scored  1: no labelled tokens")
    assert "min 4 " in text
    assert "median 14 " in text
    assert "max 20" in text
    assert "Spearman correlation of score and labelled tokens +1.00: long rows decide" in text


def test_a_summary_without_any_score_still_tells_the_reasons():
    scores = ForValueScores(np.full(2, np.nan), ["a", "b"], np.zeros(2), np.zeros(2))
    assert scores.summary().splitlines()[1:] == ["scored      0", "not scored  1: a", "not scored  1: b"]


def test_the_summary_shows_the_evidence_before_anything_that_many_rows_could_fill():
    reasons = [None, *(f"{n} tokens, but the model takes 512" for n in range(600, 640))]
    values = np.array([1.0, *[np.nan] * 40])
    noise = NoiseEstimate(0.3, {"flipped": Evidence(0.9)}, 9, n_answers=3)
    scores = ForValueScores(values, reasons, np.zeros(41), np.ones(41), {"noise": noise.to_dict()})
    lines = scores.summary().splitlines()
    assert lines[2].startswith("evidence    on your 9 validation rows a wrong answer put in on purpose is told")
    assert lines[3] == "noise       estimated share of wrong answers 0.30"
    assert lines[-1] == "not scored  40: 600 to 639 tokens, but the model takes 512"
    assert len(lines) == 7


def test_scores_are_shown_in_three_lines_whatever_is_in_them():
    scores = make_scores(5000)
    assert repr(scores).splitlines() == [
        f"ForValueScores of 5,000 rows, 4,286 with a score from {np.nanmin(scores.values):.4g} to "
        f"{np.nanmax(scores.values):.4g} (median {np.nanmedian(scores.values):.4g})",
        "without: 714 x no labelled tokens",
    ]
    scores.reasons[2], scores.metadata["noise"] = "too long", NoiseEstimate(0.3, {}, 9).to_dict()
    assert repr(scores).splitlines()[1:] == [
        "without: 713 x no labelled tokens and 1 other reasons",
        "log odds that a row is clean",
    ]
    assert repr(ForValueScores([], [], [], [])) == "ForValueScores of 0 rows, 0 with a score"


def test_reasons_bring_nothing_into_logs_and_files_that_these_do_not_bear(tmp_path):
    reasons = ["half \ud83d of an emoji", "\x1b[31mred\x00\n", "caf\u00e9 \u4f60\u597d"]
    scores = ForValueScores(np.full(3, np.nan), reasons, np.zeros(3), np.zeros(3))
    scores.save(tmp_path / "scores.parquet")
    loaded = ForValueScores.load(tmp_path / "scores.parquet")
    assert loaded.reasons == ["half ? of an emoji", "?[31mred??", "caf\u00e9 \u4f60\u597d"]
    assert loaded.summary().isascii() is False
    assert "\x1b" not in loaded.summary()


def test_a_file_that_is_no_table_is_refused_and_one_that_is_not_there_is_missing(tmp_path):
    (tmp_path / "scores.parquet").write_text("row,score\n0,1\n")
    (tmp_path / "empty.parquet").touch()
    for name in ("scores", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.parquet cannot be read as a Parquet file.*output_dir"):
            ForValueScores.load(tmp_path / f"{name}.parquet")
    with pytest.raises(FileNotFoundError):
        ForValueScores.load(tmp_path / "missing.parquet")
    with pytest.raises(ValueError, match=r"is a folder without manifest\.json"):
        ForValueScores.load(tmp_path)


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("with_noise", [False, True])
def test_the_plot_is_a_png_and_leaves_no_global_state(tmp_path, with_weights, with_noise):
    scores = make_scores(200)
    weights = (scores.values > 0).astype(float) if with_weights else None
    scores.plot(tmp_path / "scores.png", weights=weights, noisy=scores.n_labelled > 20 if with_noise else None)
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.png"]


def test_one_outlier_does_not_flatten_the_plot(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self.axes[0]))
    scores = make_scores(1000)
    scores.values[0] = 1e9
    scores.plot(tmp_path / "scores.png", weights=np.where(scores.values > 0, 1.0, 0.0))
    assert drawn[0].get_xlim()[1] < 5
    assert "lie outside" in drawn[0].get_xlabel()
    labels = [text.get_text() for text in drawn[0].get_legend().get_texts()]
    assert f"{(scores.values <= 0).sum()} dropped" in labels


def test_without_matplotlib_the_plot_names_the_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"forvalue-callbacks\[plot\]"):
        make_scores().plot(tmp_path / "scores.png")


def test_policies_and_scores_import_neither_torch_nor_matplotlib():
    code = (
        "import json, sys, forvalue_callbacks.policies, forvalue_callbacks.scores; "
        "print(json.dumps([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_reasons_that_differ_in_a_number_only_are_one():
    long = "{:,} tokens in 'input_ids', but the model takes 512: set max_length=512"
    reasons = [None, long.format(2048), "no labelled tokens", long.format(600), None, long.format(10000)]
    reasons += ["'col1' is None", "no labelled tokens", "'col2' is None"]
    assert grouped_reasons(reasons) == [
        (3, "600 to 10,000 tokens in 'input_ids', but the model takes 512: set max_length=512"),
        (2, "no labelled tokens"),
        (1, "'col1' is None"),
        (1, "'col2' is None"),
    ]
    assert grouped_reasons([None]) == []


def test_judgements_are_written_and_read_with_the_scores(tmp_path):
    reasons = [None, "too long", None, None]
    probability, suggested = [0.9, np.nan, 0.2], [0.8, np.nan, 0.5]
    found = Judgements(probability, ["garbage", None, None], ["a\x00b", "no like", None], [2, -1, 0], suggested)
    index, numbers = np.array([0, 2, 3]), np.ones(3)
    scores = ForValueScores.of_scored(reasons, index, [-2.0, 0.0, 1.0], numbers, numbers, {}, None, found)
    scores.save(tmp_path / "scores.parquet")
    read = ForValueScores.load(tmp_path / "scores.parquet").judgements
    assert read.kind == ["garbage", None, None, None]
    assert read.why == ["a?b", None, "no like", None]
    np.testing.assert_array_equal(read.probability, [0.9, np.nan, np.nan, 0.2])
    np.testing.assert_array_equal(read.suggested_row, [3, -1, -1, 0])
    np.testing.assert_array_equal(read.judged, [True, False, False, True])
    with pytest.raises(ValueError, match="1 judgements of 4 rows"):
        ForValueScores(scores.values, reasons, scores.log_likelihood, scores.n_labelled, judgements=read.take([0]))
