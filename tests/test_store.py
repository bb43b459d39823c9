"""What a scorer and a trainer keep on disk: killed, begun with something else, on a disk that is full."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from forvalue_callbacks import ForValueCallback, ForValueConfig, ForValueScorer, ForValueScores
from forvalue_callbacks.scores.pairs import PairsFile
from forvalue_callbacks.scores.writer import ScoreWriter
from helpers.models import build_model, build_rows
from helpers.trainers import Passes, make_trainer

WINDOW = 8
ROWS, VALIDATION = build_rows(5 * WINDOW + 3, seed=1), build_rows(6, seed=2)
FILE = "forvalue_scores.parquet"
NOBODYS = Path("/proc/self/task")  # a folder that nobody can write to, root neither
STARTS = list(range(0, len(ROWS), WINDOW))


@pytest.fixture
def written(monkeypatch):
    """First rows of the windows that are written, in windows that are small."""
    monkeypatch.setattr("forvalue_callbacks.data.reader.WINDOW", WINDOW)
    starts = []
    for kind in (ScoreWriter, PairsFile):

        def write_and_note(self, start, *what, write=kind.write):
            write(self, start, *what)
            starts.append(start)

        monkeypatch.setattr(kind, "write", write_and_note)
    return starts


def scorer(validation=VALIDATION, seed=0, **config):
    return ForValueScorer(build_model(seed=seed), validation, ForValueConfig(**config), progress=False)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """As sudden as can be had without a process of its own."""


def stop_before(monkeypatch, kind, name, n=0):
    """Ends the run at the call number n, once."""
    method, calls = getattr(kind, name), iter(range(n + 1))

    def stop(*args, **options):
        if next(calls, None) == n:
            raise Killed
        return method(*args, **options)

    monkeypatch.setattr(kind, name, stop)


def half_done(monkeypatch, score, kind=ScoreWriter, n=3):
    """Leaves what a run leaves that is killed before it writes the window number n."""
    with monkeypatch.context() as patch:
        stop_before(patch, kind, "write", n)
        with pytest.raises(Killed):
            score()


# ---- killed, and started again: more of it in attack/test_kills.py ----


def test_a_trainer_that_finds_its_scores_whole_removes_what_a_kill_has_left_beside_them(
    tmp_path, monkeypatch, written
):
    def train():
        make_trainer(tmp_path, [ForValueCallback(VALIDATION, verbose=False)], max_steps=1).train()

    with monkeypatch.context() as patch:
        stop_before(patch, ScoreWriter, "remove")
        with pytest.raises(Killed):
            train()
    assert names(tmp_path) == [FILE, f"{FILE}.parts"]
    n = len(written)
    with ScoreWriter(tmp_path / f"{FILE}.parts", {}, {}, anew=True):  # of another process: it is let be
        train()
        assert names(tmp_path / f"{FILE}.parts") == ["forvalue.lock", "manifest.json"]
    train()
    assert names(tmp_path) == [FILE]
    assert len(written) == n


# ---- begun with something else ----


def other_version(tmp_path, name):
    """What is there as an older version of the package would have left it."""
    file = tmp_path / name
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": "0.0.1"}))


OTHERS = {
    "weights": {"seed": 1},
    "validation rows": {"validation": VALIDATION[1:]},
    "settings": {"forward_dtype": "bfloat16"},
    r"version of the package (0.0.1)": {},
}


@pytest.mark.parametrize(("words", "options"), OTHERS.items())
def test_scores_that_were_begun_with_something_else_are_begun_anew(
    tmp_path, monkeypatch, caplog, written, words, options
):
    path = tmp_path / "a: b" / FILE
    half_done(monkeypatch, lambda: scorer().score(ROWS, path))
    if not options:
        other_version(tmp_path, f"a: b/{FILE}.parts/manifest.json")
    written.clear()
    found = scorer(**options).score(ROWS, path)
    assert [record.getMessage() for record in caplog.records] == [
        f"what is kept in {path}.parts was made with other {words}: everything is scored anew"
    ]
    assert written == STARTS
    np.testing.assert_array_equal(found.values, scorer(**options).score(ROWS).values)
    assert names(path.parent) == [FILE]


@pytest.mark.parametrize(
    ("words", "options"), [*OTHERS.items(), ("numbers of rows", {"validation": [*VALIDATION, VALIDATION[0]]})]
)
def test_pairs_that_were_begun_with_something_else_are_begun_anew(
    tmp_path, monkeypatch, caplog, written, words, options
):
    path = tmp_path / "pairs.npy"
    half_done(monkeypatch, lambda: scorer().pairwise(ROWS, path), PairsFile)
    if not options:
        other_version(tmp_path, "pairs.npy.partial.json")
    written.clear()
    found = scorer(**options).pairwise(ROWS, path)
    (record,) = caplog.records
    assert words in record.getMessage()
    assert written == STARTS
    np.testing.assert_array_equal(found, scorer(**options).pairwise(ROWS))
    assert names(tmp_path) == ["pairs.npy"]


@pytest.mark.parametrize("what", ["score", "pairwise"])
def test_rows_that_have_changed_are_made_again_and_those_before_and_after_are_not(
    tmp_path, monkeypatch, caplog, written, what
):
    kind = ScoreWriter if what == "score" else PairsFile
    half_done(monkeypatch, lambda: getattr(scorer(), what)(ROWS, tmp_path / "file"), kind, n=4)
    rows = list(ROWS)
    rows[WINDOW + 3] = build_rows(1, seed=9)[0]
    written.clear()
    found = getattr(scorer(), what)(rows, tmp_path / "file")
    assert written == [STARTS[1], *STARTS[4:]]
    want = getattr(scorer(), what)(rows)
    if what == "pairwise":
        np.testing.assert_array_equal(found, want)
    else:
        np.testing.assert_array_equal(found.values, want.values)
        assert found.row_digests == want.row_digests
        assert found.metadata == want.metadata
    assert caplog.records == []
    assert names(tmp_path) == ["file"]


def test_a_row_more_moves_the_windows_and_all_after_it_are_made_again(tmp_path, monkeypatch, written):
    half_done(monkeypatch, lambda: scorer().score(ROWS, tmp_path / FILE), n=4)
    rows = [*ROWS[:WINDOW], *build_rows(1, seed=9), *ROWS[WINDOW:]]
    written.clear()
    found = scorer().score(rows, tmp_path / FILE)
    assert written == STARTS[1:]
    np.testing.assert_array_equal(found.values, scorer().score(rows).values)


def test_tokens_that_are_seen_nowhere_are_those_of_all_rows_and_so_nothing_is_kept_of_other_rows(
    tmp_path, monkeypatch, caplog, written
):
    half_done(monkeypatch, lambda: scorer(vocab="seen").score(ROWS, tmp_path / FILE))
    rows = [*ROWS[:-1], {"input_ids": [5, *range(20, 60)], "labels": [-100, *range(20, 60)]}]
    written.clear()
    found = scorer(vocab="seen").score(rows, tmp_path / FILE)
    np.testing.assert_array_equal(found.values, scorer(vocab="seen").score(rows).values)
    assert "was made with other training rows: everything is scored anew" in caplog.text
    half_done(monkeypatch, lambda: scorer(vocab="seen").score(rows, tmp_path / FILE))
    written.clear()
    scorer(vocab="seen").score(rows, tmp_path / FILE)
    assert written == STARTS[3:]


# ---- refused, or an error, by name ----


def test_scores_that_are_not_finished_are_refused_by_load(tmp_path, monkeypatch, written):
    half_done(monkeypatch, lambda: scorer().score(ROWS, tmp_path / FILE))
    with pytest.raises(ValueError, match=rf"{FILE}\.parts are not finished: start the run that makes them again"):
        ForValueScores.load(tmp_path / f"{FILE}.parts")


HOLDS = {
    "score": "ScoreWriter(sys.argv[1] + '.parts', {}, {})",
    "pairwise": "PairsFile(sys.argv[1], 2, 2, {})",
}


@pytest.mark.parametrize("what", HOLDS)
def test_a_second_process_that_scores_to_the_same_path_is_refused_before_the_work(tmp_path, written, what):
    code = "import sys; from forvalue_callbacks.scores.writer import ScoreWriter\n"
    code += f"from forvalue_callbacks.scores.pairs import PairsFile\nwith {HOLDS[what]}:\n"
    code += "    print(flush=True); sys.stdin.readline()"
    arguments = [sys.executable, "-c", code, str(tmp_path / "file")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(arguments, **pipes) as other:
        assert other.stdout.readline() == "\n"
        second = scorer()
        second.validation.check()
        passes = Passes(second.backbone.model)
        with pytest.raises(
            ValueError, match=rf"another process is writing .*{tmp_path}/file.*wait until it has ended"
        ):
            getattr(second, what)(ROWS, tmp_path / "file")
        assert passes.n == 0
        other.communicate("\n")
    assert written == []


@pytest.mark.parametrize("what", HOLDS)
def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path, what):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    one = scorer()
    one.validation.check()
    passes = Passes(one.backbone.model)
    for path, match in (
        (tmp_path / "file" / "below", "nothing can be written to the folder .*file.* choose another"),
        (NOBODYS / "below", f"nothing can be written to the folder {NOBODYS}"),
        (tmp_path / "folder", "folder is a folder, and .* choose another"),
    ):
        with pytest.raises(ValueError, match=match):
            getattr(one, what)(ROWS, path)
    assert passes.n == 0
    assert names(tmp_path) == ["file", "folder"]
    getattr(one, what)(ROWS, tmp_path / "gone" / "below" / "file")
    assert names(tmp_path / "gone" / "below") == ["file"]


FULL_DISK = """
import resource, sys
from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.data import reader
from helpers.models import build_model, build_rows
reader.WINDOW = 8
what, path, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
one = ForValueScorer(build_model(), build_rows(6, seed=2), progress=False)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    getattr(one, what)(build_rows(43, seed=1), path)
except OSError as error:
    print(error)
"""


def on_full_disk(what, path, limit=0):
    """What is said where no file may be larger than the limit."""
    arguments = [sys.executable, "-c", FULL_DISK, what, str(path), str(limit)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout


def test_a_disk_that_is_full_is_an_error_that_names_the_file_and_what_is_there_stays(tmp_path, monkeypatch, written):
    path, parts = tmp_path / "file", tmp_path / "file.parts"
    assert f"File too large: '{parts}/manifest.json'" in on_full_disk("score", path, 100)
    assert f"rows 0 to 7 cannot be written to {parts} (File too large): what is there stays" in on_full_disk(
        "score", path, 1000
    )
    assert f"{tmp_path}/pairs.npy needs 2,192 bytes, which cannot be had: File too large" in on_full_disk(
        "pairwise", tmp_path / "pairs.npy", 1000
    )
    assert names(tmp_path) == ["file.parts"], "of pairs, nothing"
    with monkeypatch.context() as patch:
        stop_before(patch, ForValueScores, "save")
        with pytest.raises(Killed):
            scorer().score(ROWS, path)
    kept = names(parts)
    largest = max(file.stat().st_size for file in parts.iterdir())
    assert f"File too large: '{path}'" in on_full_disk("score", path, largest)
    assert names(parts) == kept
    assert names(tmp_path) == ["file.parts"]
    written.clear()
    scorer().score(ROWS, path)
    assert written == []
    assert names(tmp_path) == ["file"]


# ---- the folder of directions ----


def truncated(file):
    file.write_bytes(file.read_bytes()[:-50])


def of_another_shape(file):
    save_file({**load_file(file), "direction": np.zeros((67, 31), dtype=np.float32)}, file)


def without_its_metric(file):
    save_file({"direction": load_file(file)["direction"]}, file)


def with_nan(file):
    arrays = load_file(file)
    arrays["direction"][-1, -1] = np.nan
    save_file(arrays, file)


def empty(file):
    file.write_bytes(b"")


def a_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [truncated, of_another_shape, without_its_metric, with_nan, empty, a_folder])
def test_a_direction_that_cannot_be_used_costs_one_warning_and_is_computed_again(tmp_path, caplog, damage):
    options = {"method": "whitened", "direction_cache": str(tmp_path)}
    want = scorer(**options).score(ROWS).values
    (file,) = tmp_path.iterdir()
    damage(file)
    found = scorer(**options).score(ROWS).values
    np.testing.assert_array_equal(found, want)
    (record,) = caplog.records
    text = "cannot be written" if damage is a_folder else "cannot be used, what it kept is computed anew"
    assert record.getMessage().startswith(f"{file} {text}")
    caplog.clear()
    if damage is not a_folder:  # what has been computed is kept again
        found = scorer(**options).score(ROWS).values
        np.testing.assert_array_equal(found, want)
        assert caplog.records == []


def test_a_folder_for_directions_that_takes_no_more_costs_one_warning(tmp_path, monkeypatch, caplog):
    want = scorer().score(ROWS).values
    found = scorer(direction_cache=str(NOBODYS)).score(ROWS).values
    np.testing.assert_array_equal(found, want)
    assert [record.getMessage().split(":")[0].split(" ", 1)[1] for record in caplog.records] == [
        "cannot be written, what it would keep is computed again next time"
    ]
    caplog.clear()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    found = scorer(direction_cache=str(tmp_path)).score
    monkeypatch.setattr("forvalue_callbacks.scores.writer.whole_file", unsynced)
    monkeypatch.setattr("forvalue_callbacks.scores.parts.whole_file", unsynced)
    np.testing.assert_array_equal(found(ROWS).values, want)
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage()
    assert "No space left on device" in record.getMessage()
    assert names(tmp_path) == []


@contextmanager
def unsynced(path):
    yield Path(path)
