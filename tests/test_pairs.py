"""Numbers of pairs in a file: space before the work, windows that stay when a run is killed."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from forvalue_callbacks.scores.pairs import PairsFile

N, M, WINDOW = 50, 7, 8
PROVENANCE = {"weights": "w1", "data": ["d1", "d2"]}

RUNS = """
import sys, numpy as np
from forvalue_callbacks.scores.pairs import PairsFile
n, m, window, stop = 50, 7, 8, int(sys.argv[2])
with PairsFile(sys.argv[1], n, m, {"weights": "w1", "data": ("d1", "d2")}) as pairs:
    for start in range(0, n, window):
        digests = [f"{row:016x}" for row in range(start, min(start + window, n))]
        if pairs.holds(start, digests):
            print("held", start, flush=True)
            continue
        if start // window == stop:
            print("stopped", flush=True)
            sys.stdin.readline()
        pairs.write(start, digests, np.random.default_rng(start).normal(size=(len(digests), m)))
    pairs.finish()
"""


def start_run(file, stop):
    """Another process that stops before a window, until it is told to go on."""
    arguments = [sys.executable, "-c", RUNS, str(file), str(stop)]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def kill_in_window(file, stop):
    with start_run(file, stop) as process:
        while (line := process.stdout.readline()) != "stopped\n":
            assert line
        process.kill()
        assert process.wait() == -signal.SIGKILL


def digests_of(start):
    return [f"{row:016x}" for row in range(start, min(start + WINDOW, N))]


def make_values(start):
    return np.random.default_rng(start).normal(size=(len(digests_of(start)), M))


def expected():
    return np.concatenate([make_values(start) for start in range(0, N, WINDOW)])


def write_all(pairs):
    for start in range(0, N, WINDOW):
        pairs.write(start, digests_of(start), make_values(start))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_an_npy_file_when_it_is_finished_and_not_before(tmp_path):
    with PairsFile(tmp_path / "new" / "pairs.npy", N, M, PROVENANCE) as pairs:
        write_all(pairs)
        assert names(tmp_path / "new") == ["pairs.npy.partial", "pairs.npy.partial.json"]
        pairs.finish()
    assert names(tmp_path / "new") == ["pairs.npy"]
    assert (tmp_path / "new" / "pairs.npy").stat().st_size == pairs.nbytes
    for mode in (None, "r"):
        found = np.load(tmp_path / "new" / "pairs.npy", mmap_mode=mode)
        np.testing.assert_array_equal(found, expected(), strict=True)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1)])
def test_files_of_few_rows_or_none(tmp_path, shape):
    with PairsFile(tmp_path / "pairs.npy", *shape, PROVENANCE) as pairs:
        if shape[0]:
            pairs.write(0, ["a"] * shape[0], np.ones(shape))
        pairs.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "pairs.npy"), np.ones(shape), strict=True)


def test_what_is_not_written_yet_is_nan_and_takes_its_space(tmp_path):
    with PairsFile(tmp_path / "pairs.npy", N, M, PROVENANCE) as pairs:
        pairs.write(WINDOW, digests_of(WINDOW), make_values(WINDOW))
        with pytest.raises(ValueError, match=r"pairs\.npy\.partial holds 0 of 50 rows"):
            pairs.finish()
    found = np.load(tmp_path / "pairs.npy.partial", allow_pickle=False)
    assert np.isnan(found).all(axis=1).tolist() == [not WINDOW <= row < 2 * WINDOW for row in range(N)]
    assert not (tmp_path / "pairs.npy").exists()


def test_a_run_that_is_killed_between_windows_goes_on_and_ends_the_same(tmp_path):
    file = tmp_path / "pairs.npy"
    for stop in (0, 2, 5):
        kill_in_window(file, stop)
    with start_run(file, 99) as process:
        assert process.communicate()[0].split("\n") == [f"held {start}" for start in range(0, 40, WINDOW)] + [""]
    assert process.returncode == 0
    assert names(tmp_path) == ["pairs.npy"]
    np.testing.assert_array_equal(np.load(file), expected(), strict=True)


@pytest.mark.parametrize(
    ("n", "provenance", "words"),
    [(N, {**PROVENANCE, "weights": "w2"}, "weights"), (N - 1, PROVENANCE, "numbers of rows")],
)
def test_windows_of_another_provenance_or_shape_are_not_used(tmp_path, caplog, n, provenance, words):
    kill_in_window(tmp_path / "pairs.npy", 2)
    with PairsFile(tmp_path / "pairs.npy", N, M, PROVENANCE) as pairs:
        assert pairs.holds(0, digests_of(0))
    assert caplog.records == []
    with PairsFile(tmp_path / "pairs.npy", n, M, provenance) as pairs:
        assert f"was begun with other {words}: it is begun anew" in caplog.text
        assert not pairs.holds(0, digests_of(0))
    assert np.isnan(np.load(tmp_path / "pairs.npy.partial")).all()


def test_windows_are_held_only_where_exactly_their_rows_and_numbers_are(tmp_path):
    with PairsFile(tmp_path / "pairs.npy", N, M, PROVENANCE) as pairs:
        write_all(pairs)
        assert pairs.holds(0, digests_of(0))
        assert not pairs.holds(0, digests_of(WINDOW))
        assert not pairs.holds(0, digests_of(0)[::-1])
        assert not pairs.holds(0, digests_of(0)[:-1])
        assert not pairs.holds(1, digests_of(0))
        with open(tmp_path / "pairs.npy.partial", "r+b") as file:
            file.seek(200)
            file.write(b"x")
        assert not pairs.holds(0, digests_of(0))
        assert pairs.holds(WINDOW, digests_of(WINDOW))
        pairs.write(4, digests_of(4), make_values(4))  # shares rows with the window at 8
        assert not pairs.holds(WINDOW, digests_of(WINDOW))
        with pytest.raises(ValueError, match="holds 0 of 50 rows"):
            pairs.finish()


def test_a_list_or_a_file_that_is_damaged_begins_anew(tmp_path):
    for name, text in (("pairs.npy.partial.json", "{"), ("pairs.npy.partial.json", "[]"), ("pairs.npy.partial", "x")):
        with PairsFile(tmp_path / "pairs.npy", N, M, PROVENANCE) as pairs:
            write_all(pairs)
        (tmp_path / name).write_text(text)
        with PairsFile(tmp_path / "pairs.npy", N, M, PROVENANCE) as pairs:
            assert not pairs.holds(0, digests_of(0))
            write_all(pairs)
            pairs.finish()
        np.testing.assert_array_equal(np.load(tmp_path / "pairs.npy"), expected(), strict=True)


def test_rows_of_another_shape_are_refused(tmp_path):
    with PairsFile(tmp_path / "pairs.npy", N, M, PROVENANCE) as pairs:
        with pytest.raises(ValueError, match=r"8 rows from 0 on, of shape \(8, 6\), are not rows of .*\(50, 7\)"):
            pairs.write(0, digests_of(0), np.zeros((8, 6)))
        with pytest.raises(ValueError, match=r"8 rows from 45 on"):
            pairs.write(45, digests_of(0), np.zeros((8, 7)))


def test_a_second_process_is_refused(tmp_path):
    with start_run(tmp_path / "pairs.npy", 1) as process:
        assert process.stdout.readline() == "stopped\n"
        with pytest.raises(ValueError, match=r"another process is writing .*pairs\.npy: wait until it has ended"):
            PairsFile(tmp_path / "pairs.npy", N, M, PROVENANCE)
        process.communicate("\n")
    assert process.returncode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "pairs.npy"), expected(), strict=True)


def test_links_are_replaced_and_what_they_lead_to_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    for name in ("pairs.npy", "pairs.npy.partial", "pairs.npy.partial.json"):
        (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with PairsFile(tmp_path / "run" / "pairs.npy", N, M, PROVENANCE) as pairs:
        write_all(pairs)
        pairs.finish()
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert names(tmp_path / "run") == ["pairs.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "pairs.npy"), expected(), strict=True)


FULL_DISK = """
import os, resource, sys
from forvalue_callbacks.scores.pairs import PairsFile
if sys.argv[2] == "no fallocate":
    del os.posix_fallocate
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    PairsFile(sys.argv[1], 1000, 100, {})
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("how", ["fallocate", "no fallocate"])
def test_a_full_disk_is_an_error_before_the_work_that_names_the_file_and_the_size(tmp_path, how):
    arguments = [sys.executable, "-c", FULL_DISK, str(tmp_path / "pairs.npy"), how]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert f"{tmp_path / 'pairs.npy'} needs 800,128 bytes, which cannot be had: File too large" in done.stdout
    assert names(tmp_path) == []


def test_where_the_file_system_reserves_nothing_the_space_is_taken_by_writing(tmp_path, monkeypatch):
    asked = []

    def refuse(file, first, n_bytes):
        asked.append(n_bytes)
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with PairsFile(tmp_path / "pairs.npy", N, M, PROVENANCE) as pairs:
        assert (tmp_path / "pairs.npy.partial").stat().st_size == pairs.nbytes
        assert asked == [pairs.nbytes]
        assert json.loads((tmp_path / "pairs.npy.partial.json").read_text())["shape"] == [N, M]
        write_all(pairs)
        pairs.finish()
    np.testing.assert_array_equal(np.load(tmp_path / "pairs.npy"), expected(), strict=True)
