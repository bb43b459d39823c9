"""What a method knows of rows, kept on disk while it is made: parts, the manifest, and a run that goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from forvalue_callbacks.scores import ForValueScores
from forvalue_callbacks.scores.writer import ScoreWriter

PROVENANCE = {"weights": "w1", "validation": "v1", "config": "c1"}
SETTINGS = {"method": "gradient", "row_config": {"max_length": 512}}
WINDOW = 8

# The rows of a data set scored window by window, as a scorer does it; a process of its own, so that it can be killed.
SCORES = """
import sys, time, numpy as np
from forvalue_callbacks.scores import ForValueScores
from forvalue_callbacks.scores.writer import ScoreWriter

def columns_of(start, n):
    rng = np.random.default_rng(start)
    scored = np.arange(start, start + n) % 7 != 2
    columns = {"score": np.where(scored, rng.normal(size=n), np.nan), "log_likelihood": -rng.random(n)}
    columns |= {"n_labelled": rng.integers(1, 9, n), "features": rng.normal(size=(n, 3, 50)).astype(np.float32)}
    return [None if ok else "no labelled tokens" for ok in scored], columns

def score(folder, file, n_rows, window, provenance):
    with ScoreWriter(folder, provenance, {"method": "gradient"}) as writer:
        skipped = 0
        for start in range(0, n_rows, window):
            n = min(window, n_rows - start)
            digests = [f"{row:016x}" for row in range(start, start + n)]
            if writer.holds(start, digests):
                skipped += n
            else:
                writer.write(start, digests, *columns_of(start, n))
                time.sleep(0.01)  # whoever kills it must see what is written, on a busy machine too
        writer.finish(n_rows, {"provenance": provenance})
        ForValueScores.of_parts(writer.parts(), {"provenance": provenance}).save(file)
    return skipped

if __name__ == "__main__":
    print(score(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), {"weights": "w1"}))
"""


def start_scoring(folder, file, n_rows):
    arguments = [sys.executable, "-c", SCORES, str(folder), str(file), str(n_rows), "2"]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def digests_of(start, n=WINDOW):
    return [f"{row:016x}" for row in range(start, start + n)]


def make_columns(start, n=WINDOW):
    rng = np.random.default_rng(start)
    return {
        "score": rng.normal(size=n),
        "log_likelihood": -rng.random(n),
        "n_labelled": rng.integers(1, 9, n),
        "features": rng.normal(size=(n, 5)).astype(np.float32),
        "two": rng.normal(size=(n, 2, 3)),
        "is_short": rng.random(n) < 0.5,
    }


def open_writer(folder, anew=False, **provenance):
    return ScoreWriter(folder, {**PROVENANCE, **provenance}, SETTINGS, anew=anew)


def fill(writer, n_parts=3, first=0):
    for start in range(first * WINDOW, n_parts * WINDOW, WINDOW):
        writer.write(start, digests_of(start), [None] * WINDOW, make_columns(start))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def part_names(*starts):
    return [f"part-{start:012d}.parquet" for start in starts]


def test_what_is_written_comes_back_bit_for_bit(tmp_path):
    columns = make_columns(0)
    columns["score"][:4] = 0.0, -0.0, np.nan, np.inf
    columns["score"].view(np.int64)[4] = 0x7FF8_0000_0000_1234  # another NaN
    columns["features"] = np.asfortranarray(columns["features"])
    reasons = [None, "why not", *[None] * 6]
    with open_writer(tmp_path / "a" / "b") as writer:
        assert writer.n_rows == 0
        writer.write(0, digests_of(0), reasons, columns)
        writer.write(WINDOW, digests_of(WINDOW, 1), ["half \ud83d"], make_columns(8, 1))
        assert writer.n_rows == WINDOW + 1
    with open_writer(tmp_path / "a" / "b") as writer:
        first, second = writer.parts()
    assert (first.start, first.digests, first.reasons) == (0, digests_of(0), reasons)
    assert (second.start, second.digests, second.reasons) == (WINDOW, digests_of(WINDOW, 1), ["half ?"])
    assert list(first.columns) == list(columns)
    for name, column in columns.items():
        assert first.columns[name].dtype == column.dtype
        assert first.columns[name].shape == column.shape
        assert first.columns[name].tobytes() == column.tobytes()
    assert names(tmp_path / "a" / "b") == ["manifest.json", *part_names(0, WINDOW)]


def test_the_manifest_says_what_made_the_parts_and_numbers_can_be_read_by_anything(tmp_path):
    with open_writer(tmp_path) as writer:
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        fill(writer, 1)
    assert manifest.pop("version").count(".") == 2
    assert manifest == {"forvalue_scores": 1, "provenance": PROVENANCE, "settings": SETTINGS}
    table = pq.read_table(tmp_path / part_names(0)[0])
    assert table["score"].to_pylist() == make_columns(0)["score"].tolist()
    assert table["digest"].to_pylist() == digests_of(0)


def test_a_window_is_held_only_where_exactly_its_rows_are(tmp_path):
    with open_writer(tmp_path) as writer:
        fill(writer)
    with open_writer(tmp_path) as writer:
        assert writer.n_rows == 3 * WINDOW
        assert all(writer.holds(start, digests_of(start)) for start in (0, WINDOW, 2 * WINDOW))
        others = digests_of(WINDOW)
        assert not writer.holds(WINDOW, [*others[:-1], "f" * 16])
        assert not writer.holds(WINDOW, others[::-1])
        assert not writer.holds(WINDOW, others[:-1])
        assert not writer.holds(WINDOW, [*others, "f" * 16])
        assert not writer.holds(0, others)
        assert not writer.holds(4, digests_of(4))
        assert not writer.holds(3 * WINDOW, digests_of(3 * WINDOW))


def test_parts_that_share_rows_with_a_new_one_go_and_all_others_stay(tmp_path):
    with open_writer(tmp_path) as writer:
        fill(writer, 4)
        writer.write(4, digests_of(4, 10), [None] * 10, make_columns(4, 10))
        assert writer.n_rows == 0
        assert names(tmp_path)[2:] == part_names(4, 16, 24)
        assert writer.holds(16, digests_of(16))
        writer.write(0, digests_of(0, 4), [None] * 4, make_columns(0, 4))
        assert writer.n_rows == 14
        writer.write(14, digests_of(14, 2), [None] * 2, make_columns(14, 2))
        assert writer.n_rows == 4 * WINDOW
        assert [row for part in writer.parts() for row in part.digests] == digests_of(0, 4 * WINDOW)


def test_a_finished_folder_is_read_as_scores_and_one_that_is_not_is_refused(tmp_path):
    with open_writer(tmp_path) as writer:
        fill(writer)
    with pytest.raises(ValueError, match="are not finished: start the run that makes them again, it goes on"):
        ForValueScores.load(tmp_path)
    with open_writer(tmp_path) as writer:
        with pytest.raises(ValueError, match="holds 24 of 25 rows"):
            writer.finish(25, {})
        writer.finish(24, {"config": SETTINGS})
        made = ForValueScores.of_parts(writer.parts(), {"provenance": PROVENANCE, "config": SETTINGS})
    loaded = ForValueScores.load(tmp_path, expected=PROVENANCE)
    assert loaded.metadata == made.metadata
    np.testing.assert_array_equal(loaded.values, np.concatenate([make_columns(x)["score"] for x in (0, 8, 16)]))
    np.testing.assert_array_equal(loaded.values, made.values)
    np.testing.assert_array_equal(loaded.log_likelihood, made.log_likelihood)
    np.testing.assert_array_equal(loaded.n_labelled, made.n_labelled)
    loaded.check_rows(digests_of(0, 24))
    with pytest.raises(ValueError, match="were made with other weights: score again"):
        ForValueScores.load(tmp_path, expected={"weights": "w2"})
    with open_writer(tmp_path) as writer:  # begun again: no longer finished
        fill(writer, 1)
    with pytest.raises(ValueError, match="are not finished"):
        ForValueScores.load(tmp_path)


def test_a_finished_folder_that_has_lost_a_part_or_holds_a_damaged_one_is_refused(tmp_path):
    with open_writer(tmp_path) as writer:
        fill(writer)
        writer.finish(24, {})
    part = tmp_path / part_names(8)[0]
    whole = part.read_bytes()
    part.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{part.name} is damaged"):
        ForValueScores.load(tmp_path)
    part.unlink()
    with pytest.raises(ValueError, match="holds 8 of 24 rows: start the run that makes them again"):
        ForValueScores.load(tmp_path)


def test_a_data_set_that_has_become_shorter_leaves_no_rows_behind(tmp_path):
    with open_writer(tmp_path) as writer:
        fill(writer, 4)
    with open_writer(tmp_path) as writer:
        writer.finish(16, {})
        assert [part.start for part in writer.parts()] == [0, 8]
    assert names(tmp_path) == ["manifest.json", *part_names(0, 8)]
    assert len(ForValueScores.load(tmp_path)) == 16


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"weights": "w2"}, "other weights: give another folder, or anew=True"),
        ({"validation": "v2", "config": "c2"}, "other validation rows and other settings: "),
        ({"data": "d1"}, "other training rows: "),
    ],
)
def test_a_folder_of_another_provenance_is_refused_in_words_or_begun_anew(tmp_path, caplog, other, words):
    with open_writer(tmp_path) as writer:
        fill(writer)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "part-00000.parquet").write_text("mine")
    kept = names(tmp_path)
    with pytest.raises(ValueError, match=f"was made with {words}"):
        open_writer(tmp_path, **other)
    assert names(tmp_path) == kept
    with open_writer(tmp_path, anew=True, **other) as writer:
        assert writer.n_rows == 0
        assert not writer.holds(0, digests_of(0))
    assert names(tmp_path) == ["manifest.json", "notes.txt", "part-00000.parquet"]
    assert caplog.records == []
    with pytest.raises(ValueError, match="was made with other"):
        open_writer(tmp_path)


def test_a_part_of_provenance_the_other_way_round_is_seen_too(tmp_path):
    with open_writer(tmp_path, data="d1"):
        pass
    with pytest.raises(ValueError, match="was made with other training rows: "):
        open_writer(tmp_path)


@pytest.mark.parametrize("key", ["version", "forvalue_scores"])
def test_another_version_of_the_package_or_format_is_refused(tmp_path, key):
    with open_writer(tmp_path) as writer:
        fill(writer)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, key: "0.0.1"}))
    with pytest.raises(ValueError, match=r"made with other version of the package \("):
        open_writer(tmp_path)
    with open_writer(tmp_path, anew=True) as writer:
        assert writer.n_rows == 0


@pytest.mark.parametrize("text", ['{"name": "an app"}', "[]", '{"forvalue_scores": 1, "prov'])
def test_somebody_elses_manifest_is_refused_and_never_overwritten(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    for anew in (False, True):
        with pytest.raises(ValueError, match=r"manifest\.json .*manifest of scores: give another folder"):
            open_writer(tmp_path, anew=anew)
    assert (tmp_path / "manifest.json").read_text() == text
    assert names(tmp_path) == ["manifest.json"]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-50])


def empty(file):
    file.write_bytes(b"")


def edit(file):
    table = pq.read_table(file)
    score = np.array(table["score"].to_pylist())
    score[3] += 1e-9
    pq.write_table(table.set_column(table.column_names.index("score"), "score", [score]), file)


def shorten(file):
    pq.write_table(pq.read_table(file).slice(0, 5), file)


def replace_by_another(file):
    file.write_bytes((file.parent / part_names(0)[0]).read_bytes())


def of_another_folder(file):
    with open_writer(file.parent / "other", weights="w2") as writer:
        fill(writer)
    file.write_bytes((file.parent / "other" / file.name).read_bytes())


@pytest.mark.parametrize("damage", [truncate, empty, edit, shorten, replace_by_another, of_another_folder])
def test_a_part_that_is_not_as_it_was_written_counts_as_not_there(tmp_path, caplog, damage):
    with open_writer(tmp_path) as writer:
        fill(writer)
    damage(tmp_path / part_names(WINDOW)[0])
    with open_writer(tmp_path) as writer:
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "1 parts of the scores are made anew" in caplog.text
        assert writer.n_rows == WINDOW
        assert [part.start for part in writer.parts()] == [0]
        assert not writer.holds(WINDOW, digests_of(WINDOW))
        assert writer.holds(2 * WINDOW, digests_of(2 * WINDOW)), "what is whole is not made again"
        fill(writer, 2, first=1)
        assert writer.n_rows == 3 * WINDOW
    caplog.clear()
    with open_writer(tmp_path) as writer:
        assert writer.n_rows == 3 * WINDOW
    assert caplog.records == []


def test_of_parts_that_share_rows_one_is_used(tmp_path, caplog):
    with open_writer(tmp_path / "other") as writer:
        writer.write(4, digests_of(4), [None] * 8, make_columns(4))
    with open_writer(tmp_path) as writer:
        fill(writer, 2)
    (tmp_path / part_names(4)[0]).write_bytes((tmp_path / "other" / part_names(4)[0]).read_bytes())
    with open_writer(tmp_path) as writer:
        assert f"{part_names(4)[0]} is of rows that other parts hold" in caplog.text
        assert not writer.holds(4, digests_of(4))
        assert [part.start for part in writer.parts()] == [0, WINDOW]
        writer.finish(2 * WINDOW, {})
    assert names(tmp_path) == ["manifest.json", "other", *part_names(0, WINDOW)]


def test_a_part_that_is_damaged_while_the_writer_is_open_is_an_error_and_never_scores(tmp_path):
    with open_writer(tmp_path) as writer:
        fill(writer)
        edit(tmp_path / part_names(WINDOW)[0])
        with pytest.raises(ValueError, match=rf"{part_names(WINDOW)[0]} is damaged"):
            list(writer.parts())


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"score": np.zeros(7)}, r"a part of 8 rows, by their digests, has \{'reasons': 8, 'score': 7\}"),
        ({"score": np.zeros(8, dtype=np.float16)}, "column 'score' is float16"),
        ({"score": np.array(1.0)}, r"column 'score' is float64 \(\)"),
        ({"digest": np.zeros(8)}, "under other names than digest and reason"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, columns, words):
    with open_writer(tmp_path) as writer:
        with pytest.raises(ValueError, match=words):
            writer.write(0, digests_of(0), [None] * 8, columns)
        with pytest.raises(ValueError, match="a part of 0 rows"):
            writer.write(0, [], [], {})
        assert names(tmp_path) == ["forvalue.lock", "manifest.json"]


def test_parts_without_scores_make_none(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.write(0, digests_of(0), [None] * 8, {"features": np.zeros((8, 3))})
        with pytest.raises(ValueError, match="no scores are kept there: score and log_likelihood and n_labelled"):
            ForValueScores.of_parts(writer.parts(), {})


def test_one_process_writes_to_a_folder_and_a_second_is_refused(tmp_path):
    holds = "import sys; from forvalue_callbacks.scores.writer import ScoreWriter\n"
    holds += "with ScoreWriter(sys.argv[1], {}, {}):\n    print(flush=True); sys.stdin.readline()"
    arguments = [sys.executable, "-c", holds, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "\n"
        with pytest.raises(ValueError, match=f"another process is writing scores to {tmp_path}: wait until it has"):
            ScoreWriter(tmp_path, {}, {}, anew=True)
        process.communicate("\n")
    assert process.returncode == 0
    with ScoreWriter(tmp_path, {}, {}), pytest.raises(ValueError, match="another process"):
        ScoreWriter(tmp_path, {}, {})
    assert names(tmp_path) == ["manifest.json"]


def test_a_folder_is_removed_when_nothing_else_is_in_it(tmp_path):
    for name in ("alone", "shared"):
        with open_writer(tmp_path / name) as writer:
            fill(writer)
            if name == "shared":
                (tmp_path / name / "notes.txt").write_text("mine")
            writer.remove()
    assert names(tmp_path) == ["shared"]
    assert names(tmp_path / "shared") == ["notes.txt"]


def test_without_a_folder_what_is_kept_goes_with_the_writer(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with ScoreWriter(None, PROVENANCE, SETTINGS) as writer:
        fill(writer)
        assert len(list(writer.parts())) == 3
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == []


def test_temporary_folders_of_killed_runs_are_removed_by_the_next_and_those_in_use_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "forvalue-mine").mkdir()
    holds = "import sys; from forvalue_callbacks.scores.writer import ScoreWriter\n"
    holds += "with ScoreWriter(None, {}, {}) as writer:\n    print(writer.folder, flush=True); sys.stdin.readline()"
    how = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, "TMPDIR": str(tmp_path)},
    }
    with subprocess.Popen([sys.executable, "-c", holds], **how) as killed:
        left = killed.stdout.readline().strip()
        killed.kill()
    assert os.listdir(left) != []
    with subprocess.Popen([sys.executable, "-c", holds], **how) as running:
        used = running.stdout.readline().strip()
        with ScoreWriter(None, {}, {}) as writer:
            assert names(tmp_path) == sorted(os.path.basename(x) for x in ("forvalue-mine", used, writer.folder))
        running.communicate("\n")
    assert names(tmp_path) == ["forvalue-mine"]


def test_links_in_the_folder_are_replaced_and_what_they_lead_to_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run" / part_names(0)[0]).symlink_to(tmp_path / "elsewhere")
    with open_writer(tmp_path / "run") as writer:
        fill(writer, 1)
        assert writer.n_rows == WINDOW
        writer.remove()
    assert (tmp_path / "elsewhere").read_text() == "mine"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "forvalue.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"forvalue\.lock"):
        open_writer(tmp_path / "run")
    assert (tmp_path / "elsewhere").read_text() == "mine"


FULL_DISK = """
import resource, sys, numpy as np
from forvalue_callbacks.scores.writer import ScoreWriter
with ScoreWriter(sys.argv[1], {}, {}) as writer:
    writer.write(0, ["0" * 16], [None], {"x": np.zeros((1, 10))})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        writer.write(1, ["1" * 16], [None], {"x": np.random.default_rng(0).normal(size=(1, 10_000))})
    except OSError as error:
        print(error, "|", writer.n_rows)
"""


def test_a_full_disk_is_an_error_that_names_the_rows_and_keeps_what_is_there(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert f"rows 1 to 1 cannot be written to {tmp_path} (File too large): what is there stays" in done.stdout
    assert done.stdout.endswith("| 1\n")
    assert names(tmp_path) == ["manifest.json", *part_names(0)]


def test_a_run_that_is_killed_at_any_moment_goes_on_and_ends_the_same(tmp_path):
    """Each run writes some parts more and is killed while it writes the next one, somewhere."""
    n_kills, n_parts = 6, 72
    with start_scoring(tmp_path / "undisturbed", tmp_path / "expected.parquet", 2 * n_parts) as process:
        assert process.communicate() == ("0\n", "")
    draw, run, ends = random.Random(0), tmp_path / "run", []
    for _ in range(n_kills):
        wanted = len(list(run.glob("part-*"))) + draw.randint(0, 7)
        with start_scoring(run, tmp_path / "scores.parquet", 2 * n_parts) as process:
            while process.poll() is None and (not run.exists() or len(list(run.glob("part-*"))) < wanted):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.01))
            process.kill()
            ends.append(process.wait())
    assert ends.count(-signal.SIGKILL) > n_kills / 2  # a busy machine may have let some of them end
    kept = len(list(run.glob("part-*")))
    with start_scoring(run, tmp_path / "scores.parquet", 2 * n_parts) as process:
        skipped, errors = process.communicate()
    assert (int(skipped), errors) == (2 * kept, "")
    assert (tmp_path / "scores.parquet").read_bytes() == (tmp_path / "expected.parquet").read_bytes()
    assert names(run) == names(tmp_path / "undisturbed") == ["manifest.json", *part_names(*range(0, 2 * n_parts, 2))]
    assert names(tmp_path) == ["expected.parquet", "run", "scores.parquet", "undisturbed"]
